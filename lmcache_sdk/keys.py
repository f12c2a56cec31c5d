"""Token ids -> a chain of chunk digests; the text of a key. Specified in ``docs/key-format.md``.

digest_i = SHA-256(digest_{i-1} || tokens_i as uint32 little-endian); the predecessor of chunk 0 is the request's
seed, and nothing where the request has none. With ``chunk_tokens == page_size`` this is SGLang's own page digest.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterable, Sequence
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from lmcache_sdk.errors import ConfigError

DIGEST_BYTES = 32
EXACT, FOREIGN = "exact", "foreign"

Tokens = npt.NDArray[np.uint32]

_sha256 = hashlib.sha256
_EMPTY = hashlib.sha256()  # a copy of it is had in less time than a new one


def as_tokens(tokens: Sequence[int] | npt.NDArray[Any]) -> Tokens:
    """Token ids as one contiguous little-endian uint32 array (no copy if it already is one).

    Raises:
        ConfigError: not one flat sequence of integers within ``0 .. 2**32 - 1``.
    """
    try:
        given = np.asarray(tokens)
    except (OverflowError, ValueError) as error:
        raise ConfigError(f"token ids must be one flat sequence of integers: {error}") from error
    if given.ndim != 1:
        raise ConfigError(f"token ids must be one flat sequence, got shape {given.shape}")
    if given.dtype != np.uint32 and given.size:
        if given.dtype.kind not in "iu":  # a float would be cut off, a huge integer is an object
            raise ConfigError(f"token ids must be integers within 0 .. 2**32 - 1, got {given.dtype} values")
        if int(given.min()) < 0 or int(given.max()) > 0xFFFFFFFF:
            raise ConfigError(f"token ids must be within 0 .. 2**32 - 1, got {int(given.min())} .. {int(given.max())}")
    return np.ascontiguousarray(given, dtype="<u4")


def request_seed(*, extra_key: str | None = None, cache_salt: str | None = None) -> bytes:
    """The predecessor of a request's first chunk: empty, or 32 bytes.

    The framing is SGLang's (``docs/key-format.md``), so that salted requests meet in one store, too. A LoRA
    fingerprint is part of ``extra_key``.
    """
    if extra_key is None and cache_salt is None:
        return b""
    frame = [b"sglang-cache-namespace-v1"]
    for part in (extra_key, cache_salt):
        if part is None:
            frame.append(b"\x00")
        else:
            text = _utf8(part)
            frame.append(b"\x01" + len(text).to_bytes(8, "little") + text)
    return _sha256(b"".join(frame)).digest()


def _utf8(text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise ConfigError(f"{text!r} cannot be part of a key: {error.reason}") from error


class Overlay(msgspec.Struct, frozen=True, order=True):
    """Something other than tokens that fills the positions ``start .. end - 1`` (an image, audio).

    It enters only the digests of the chunks that it overlaps, so that a late image leaves an earlier shared prefix
    shared.
    """

    start: int
    end: int
    identifier: str


class Chain:
    """The digests of a request's full chunks, hashed lazily and front first, each once. Hashing is thread-safe.

    Args:
        tokens: the request's token ids, shape [n]. A uint32 array is not copied, and must not be changed.
        chunk_tokens: tokens in a chunk. Only full chunks have a digest: ``len(chain) == n // chunk_tokens``.
        cache_salt, extra_key: constant for the request; they enter the seed.
        tenant: whose quota the chunks count against. Not part of the key.
        overlays: what is not text among the tokens, in any order.

    Raises:
        ConfigError: token ids, a chunk size or an overlay that cannot be.
    """

    def __init__(
        self,
        tokens: Sequence[int] | npt.NDArray[Any],
        chunk_tokens: int,
        *,
        cache_salt: str | None = None,
        extra_key: str | None = None,
        tenant: str = "",
        overlays: Iterable[Overlay] = (),
    ) -> None:
        if chunk_tokens < 1:
            raise ConfigError(f"chunk_tokens must be at least 1, got {chunk_tokens}")
        self.chunk_tokens = chunk_tokens
        self.tenant = tenant
        self.salted = cache_salt is not None
        self._tokens = as_tokens(tokens)
        self._overlays = tuple(sorted(overlays))
        for overlay in self._overlays:
            if not 0 <= overlay.start < overlay.end:
                raise ConfigError(f"an overlay covers positions start .. end - 1, got {overlay}")
        self._last = request_seed(extra_key=extra_key, cache_salt=cache_salt)
        self._digests: list[bytes] = []
        self._length = self._tokens.size // chunk_tokens
        self._hashing = threading.Lock()  # a store's I/O thread may hash on while the engine asks again
        self._by_digests = False
        self.positions_known = True

    @classmethod
    def from_digests(
        cls, digests: Sequence[bytes], chunk_tokens: int, *, tenant: str = "", positions_known: bool = False
    ) -> Chain:
        """A chain whose digests an engine computed itself (SGLang's page keys). It may start inside a request."""
        lengths = set(map(len, digests)) - {DIGEST_BYTES}
        if lengths:
            raise ConfigError(f"a digest has {DIGEST_BYTES} bytes, got {lengths.pop()}")
        chain = cls((), chunk_tokens, tenant=tenant)
        chain._digests = list(digests)
        chain._length = len(chain._digests)
        chain._by_digests = True
        chain.positions_known = positions_known
        return chain

    def __len__(self) -> int:
        """The number of full chunks."""
        return self._length

    @property
    def hashed(self) -> int:
        """How many digests have been computed so far."""
        return len(self._digests)

    def digests(self, count: int | None = None) -> list[bytes]:
        """The first ``count`` digests; all by default, fewer if the chain is shorter."""
        count = self._length if count is None else min(count, self._length)
        if count > len(self._digests):
            with self._hashing:
                self._hash(count)
        return self._digests[:count]

    def extend(self, tokens: Sequence[int] | npt.NDArray[Any]) -> None:
        """Append token ids (generated ones). What was hashed stays hashed."""
        if self._by_digests:
            raise ConfigError("a chain that was made from digests cannot be extended by tokens")
        self._tokens = np.concatenate([self._tokens, as_tokens(tokens)])
        self._length = self._tokens.size // self.chunk_tokens

    def _hash(self, count: int) -> None:
        width = 4 * self.chunk_tokens
        done = len(self._digests)
        if done >= count:
            return
        data = self._tokens.data.cast("B")[done * width : count * width]
        chunks: list[bytes] = np.frombuffer(data, f"V{width}").tolist()
        append, empty, last = self._digests.append, _EMPTY.copy, self._last
        if self._overlays:
            chunks = [chunk + self._overlay_frame(index) for index, chunk in enumerate(chunks, done)]
        for chunk in chunks:
            state = empty()
            state.update(last + chunk)
            last = state.digest()
            append(last)
        self._last = last

    def _overlay_frame(self, index: int) -> bytes:
        first = index * self.chunk_tokens
        frame = []
        for overlay in self._overlays:
            if overlay.start < first + self.chunk_tokens and overlay.end > first:
                text = _utf8(overlay.identifier)
                frame.append((overlay.start - first).to_bytes(8, "little", signed=True))
                frame.append((overlay.end - first).to_bytes(8, "little", signed=True))
                frame.append(len(text).to_bytes(8, "little") + text)
        return b"lmcache-sdk-overlay-v1" + b"".join(frame) if frame else b""


class Origin(msgspec.Struct, frozen=True):
    """Everything of a key that a request does not change: whose KV it is, and how faithful.

    Attributes:
        namespace: 32 hex digits, the digest of a :class:`~lmcache_sdk.spec.Namespace`.
        producer: 16 hex digits, the digest of a :class:`~lmcache_sdk.spec.Producer`.
        fidelity: ``exact``; ``foreign`` (computed behind chunks of other producers; ``foreign.any``: of unverified
            ones), ``lossy.<codec>`` or ``blended``.
    """

    namespace: str
    producer: str
    fidelity: str = EXACT

    def prefix(self) -> str:
        return f"{self.namespace}/{self.producer}/{self.fidelity}/"


def key_text(origin: Origin, digest: bytes, group: str, cell: str) -> str:
    """``{namespace}/{producer}/{fidelity}/{digest}/{group}/{cell}``."""
    return f"{origin.namespace}/{origin.producer}/{origin.fidelity}/{digest.hex()}/{group}/{cell}"


def manifest_key(namespace: str) -> str:
    """Where a tier keeps the description of a namespace, for ``lmcache-sdk ls`` and ``gc``."""
    return f"{namespace}/manifest"
