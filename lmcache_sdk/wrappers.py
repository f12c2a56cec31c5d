"""Backends around a backend, for users: a prefix in front of every key, and encryption. ``docs/wrappers.md``.

A wrapper can do what only some backends can (``Scan``, ``Usage``, ``Touch``) where the one in it can.
"""

from __future__ import annotations

import base64
import binascii
import os
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import ClassVar, Self

import numpy as np

from lmcache_sdk.backend import (
    Backend,
    Buffer,
    Item,
    Miss,
    RangeGet,
    RegisterMemory,
    Scan,
    Stat,
    Touch,
    Url,
    Usage,
    UsageReport,
)
from lmcache_sdk.errors import ConfigError
from lmcache_sdk.observe.logs import logger

_log = logger("wrappers")

_PREFIX = re.compile(r"[A-Za-z0-9._/-]{1,64}")
_KEY_BYTES = 32
_VERSION = b"\x01"
_NONCE_BYTES = 12
_TAG_BYTES = 16
_FRONT_BYTES = len(_VERSION) + _NONCE_BYTES
OVERHEAD_BYTES = _FRONT_BYTES + _TAG_BYTES
_REMEMBERED = 1 << 14


def wrapping(
    *, prefix: str | None = None, encrypt_key_file: str | None = None, encrypt_key_env: str | None = None
) -> Callable[[Backend], Backend]:
    """What wraps a backend as a user asked for it; everything is checked before a backend is opened.

    Args:
        prefix: see :class:`Namespaced`.
        encrypt_key_file, encrypt_key_env: where the key of :class:`Encrypted` is; at most one of them.

    Raises:
        ConfigError: a prefix that is none, a key that is none or cannot be read, or cryptography is not installed.
    """
    if encrypt_key_file is not None and encrypt_key_env is not None:
        raise ConfigError("a tier has one key: give encrypt_key_file or encrypt_key_env, not both")
    if prefix is not None:
        _check_prefix(prefix)
    key: bytes | None = None
    if encrypt_key_file is not None:
        key = key_from_file(Path(encrypt_key_file))
    elif encrypt_key_env is not None:
        key = key_from_env(encrypt_key_env)
    if key is not None:
        _check_key(key)

    def wrap(backend: Backend) -> Backend:
        if key is not None:  # inside, so that what is authenticated is the whole key, with its prefix
            backend = Encrypted(backend, key)
        return Namespaced(backend, prefix) if prefix is not None else backend

    return wrap


class Wrapper:
    """Passes everything on; a subclass changes what it is for. ``scan``, ``usage`` and ``touch`` are there only where
    the inner backend has them.
    """

    instant: ClassVar[bool] = False

    def __init__(self, inner: Backend) -> None:
        self.inner = inner
        self.instant = inner.instant  # type: ignore[misc]  # it is the inner backend's
        # Not methods of the class: they would be there for every inner backend.
        if isinstance(inner, Usage) and not isinstance(self, Usage):
            self.usage = lambda: self._usage(inner)
        if isinstance(inner, Touch) and not isinstance(self, Touch):
            self.touch = lambda keys: self._touch(inner, keys)
        if isinstance(inner, Scan) and not isinstance(self, Scan):
            self.scan = lambda prefix="": self._scan(inner, prefix)
            self.dated = getattr(inner, "dated", False)

    @classmethod
    def from_url(cls, url: Url) -> Self:
        """Not addressable: it is made around a backend."""
        raise ConfigError(f"a wrapper has no URL, got {url.shown!r}")

    def _inner_key(self, key: str) -> str:
        return key

    def _usage(self, inner: Usage) -> UsageReport:
        return inner.usage()

    def _touch(self, inner: Touch, keys: Sequence[str]) -> None:
        inner.touch([self._inner_key(key) for key in keys])

    def _scan(self, inner: Scan, prefix: str) -> Iterator[Stat]:
        return inner.scan(prefix)

    def get(self, keys: Sequence[str], buffers: Sequence[Buffer]) -> list[int | Miss]:
        return self.inner.get([self._inner_key(key) for key in keys], buffers)

    def put(self, items: Sequence[Item], *, if_absent: bool = True) -> list[bool]:
        return self.inner.put([Item(self._inner_key(key), data) for key, data in items], if_absent=if_absent)

    def contains(self, keys: Sequence[str]) -> list[bool]:
        return self.inner.contains([self._inner_key(key) for key in keys])

    def prefix_len(self, keys: Sequence[str]) -> int:
        return self.inner.prefix_len([self._inner_key(key) for key in keys])

    def delete(self, keys: Sequence[str]) -> int:
        return self.inner.delete([self._inner_key(key) for key in keys])

    def close(self, timeout_s: float) -> None:
        """Close the inner backend."""
        self.inner.close(timeout_s)


class Namespaced(Wrapper):
    """Puts a prefix and ``/`` in front of every key, so that two deployments share a store and see nothing of each
    other. ``usage`` is the whole store's.

    Args:
        prefix: 1 to 64 of the characters of keys. Keys have their limit less these and the ``/``.

    Raises:
        ConfigError: it is not such a prefix.
    """

    def __init__(self, inner: Backend, prefix: str) -> None:
        _check_prefix(prefix)
        self._prefix = f"{prefix}/"
        super().__init__(inner)
        if isinstance(inner, RangeGet):
            self.get_ranges = lambda ranges: inner.get_ranges(
                [part._replace(key=self._prefix + part.key) for part in ranges]
            )
            self.pack_bytes = getattr(inner, "pack_bytes", 0)
        if isinstance(inner, RegisterMemory):
            self.register_memory, self.unregister_memory = inner.register_memory, inner.unregister_memory

    def _inner_key(self, key: str) -> str:
        return self._prefix + key

    def _scan(self, inner: Scan, prefix: str) -> Iterator[Stat]:
        for stat in inner.scan(self._prefix + prefix):
            yield stat._replace(key=stat.key.removeprefix(self._prefix))


class Encrypted(Wrapper):
    """Encrypts records with AES-256-GCM; a record is bound to its key, so that it is of no use under another.

    A record that does not decrypt (changed, moved, encrypted with another key, or never encrypted) is absent: for
    ``get`` at once, and for all calls of this object after that, until it is put anew. Keys and lengths are not hidden.

    Args:
        key: 32 secret bytes.

    Raises:
        ConfigError: the key is not 32 bytes long, or cryptography is not installed.
    """

    def __init__(self, inner: Backend, key: bytes) -> None:
        _check_key(key)
        from cryptography.hazmat.primitives.ciphers.aead import AESGCM

        self._cipher = AESGCM(key)
        self._rejected: dict[str, None] = {}  # the oldest first; bounded
        self._lock = threading.Lock()
        self._told = False
        super().__init__(inner)

    def _scan(self, inner: Scan, prefix: str) -> Iterator[Stat]:
        for stat in inner.scan(prefix):
            yield stat._replace(nbytes=max(0, stat.nbytes - OVERHEAD_BYTES))

    def get(self, keys: Sequence[str], buffers: Sequence[Buffer]) -> list[int | Miss]:
        whole = np.empty(sum(map(len, buffers)) + OVERHEAD_BYTES * len(buffers), np.uint8).data
        encrypted, start = [], 0
        for buffer in buffers:
            end = start + len(buffer) + OVERHEAD_BYTES
            encrypted.append(whole[start:end])
            start = end
        answers = self.inner.get(keys, encrypted)
        return [
            answer if isinstance(answer, Miss) else self._decrypt(key, record[:answer], buffer)
            for key, record, buffer, answer in zip(keys, encrypted, buffers, answers, strict=True)
        ]

    def put(self, items: Sequence[Item], *, if_absent: bool = True) -> list[bool]:
        encrypted = [Item(key, self._encrypt(key, data)) for key, data in items]
        if not self._rejected:
            return self.inner.put(encrypted, if_absent=if_absent)
        answers = []
        for item in encrypted:
            rejected = self._forget_rejected(item.key)
            answers += self.inner.put([item], if_absent=if_absent and not rejected)
        return answers

    def contains(self, keys: Sequence[str]) -> list[bool]:
        present = self.inner.contains(keys)
        if not self._rejected:
            return present
        return [here and key not in self._rejected for key, here in zip(keys, present, strict=True)]

    def prefix_len(self, keys: Sequence[str]) -> int:
        present = self.inner.prefix_len(keys)
        if not self._rejected:
            return present
        return next((at for at in range(present) if keys[at] in self._rejected), present)

    def delete(self, keys: Sequence[str]) -> int:
        for key in keys:
            self._forget_rejected(key)
        return self.inner.delete(keys)

    def _encrypt(self, key: str, data: memoryview) -> memoryview:
        record = np.empty(len(data) + OVERHEAD_BYTES, np.uint8).data
        nonce = os.urandom(_NONCE_BYTES)
        record[:_FRONT_BYTES] = _VERSION + nonce
        self._cipher.encrypt_into(nonce, data, key.encode(), record[_FRONT_BYTES:])
        return record

    def _decrypt(self, key: str, record: memoryview, buffer: Buffer) -> int | Miss:
        from cryptography.exceptions import InvalidTag

        nbytes = len(record) - OVERHEAD_BYTES
        if nbytes < 0 or record[: len(_VERSION)] != _VERSION:
            return self._reject(key)
        nonce = record[len(_VERSION) : _FRONT_BYTES]
        try:
            self._cipher.decrypt_into(nonce, record[_FRONT_BYTES:], key.encode(), buffer[:nbytes])
        except InvalidTag:
            return self._reject(key)
        return nbytes

    def _forget_rejected(self, key: str) -> bool:
        with self._lock:
            rejected = key in self._rejected
            self._rejected.pop(key, None)
        return rejected

    def _reject(self, key: str) -> Miss:
        with self._lock:
            told, self._told = self._told, True
            self._rejected[key] = None
            while len(self._rejected) > _REMEMBERED:
                del self._rejected[next(iter(self._rejected))]
        if not told:
            _log.warning(
                "the record %s does not decrypt: it was changed, or written with another encryption key or none; "
                "it and others like it are misses and will be replaced", key,
            )  # fmt: skip
        return Miss.UNREADABLE


def key_from_file(path: Path) -> bytes:
    """32 secret bytes from a file, as they are or in base64. Raises ConfigError."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"cannot read the encryption key {path}: {error.strerror}; {_make_one(path)}") from None
    if len(data) == _KEY_BYTES:
        return data
    return _from_base64(data, f"the file {path}", _make_one(path))


def key_from_env(name: str) -> bytes:
    """32 secret bytes from an environment variable, in base64. Raises ConfigError."""
    text = os.environ.get(name)
    fix = f'make one: export {name}="$(head -c 32 /dev/urandom | base64)"'
    if not text:
        raise ConfigError(f"the environment variable {name}, which should hold an encryption key, is not set; {fix}")
    return _from_base64(text.encode(), f"the environment variable {name}", fix)


def _make_one(path: Path) -> str:
    return f"make one: (umask 077; head -c 32 /dev/urandom > {path})"


def _from_base64(text: bytes, place: str, fix: str) -> bytes:
    try:
        key = base64.b64decode(b"".join(text.split()), validate=True)
    except binascii.Error:
        key = b""
    if len(key) != _KEY_BYTES:
        raise ConfigError(f"{place} holds no key of {_KEY_BYTES} bytes (raw or in base64); {fix}")
    return key


def _check_key(key: bytes) -> None:
    if len(key) != _KEY_BYTES:
        raise ConfigError(f"a key for encryption has {_KEY_BYTES} bytes, this one {len(key)}")
    try:
        import cryptography.hazmat.primitives.ciphers.aead  # noqa: F401 - only whether it loads
    except ImportError as error:
        raise ConfigError(
            "encryption needs the package 'cryptography': pip install 'lmcache-sdk[encryption]'"
        ) from error


def _check_prefix(prefix: str) -> None:
    if not _PREFIX.fullmatch(prefix) or prefix.endswith("/"):
        raise ConfigError(f"{prefix!r} is no prefix: 1 to 64 of A-Z a-z 0-9 . _ / -, and no / at the end")


__all__ = ["OVERHEAD_BYTES", "Encrypted", "Namespaced", "Wrapper", "key_from_env", "key_from_file", "wrapping"]
