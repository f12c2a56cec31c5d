"""What a LoRA adapter adds to the keys of its requests: a digest of its files, whatever it is called."""

from __future__ import annotations

import hashlib
from collections.abc import Hashable
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Any

from lmcache_sdk.errors import ConfigError
from lmcache_sdk.spec import canonical_json
from lmcache_sdk.workers import Worker

_MOST = 4096  # adapters, and versions of their files, that are remembered

# Of each file: path, inode, bytes, time of its last change.
Files = tuple[tuple[str, int, int, int], ...]

NO_ADAPTER: Future[str | None] = Future()
NO_ADAPTER.set_result(None)


class LoraKeys:
    """Of one engine's adapters. All of an adapter is read, once for each version of its files, which may be hundreds of
    megabytes that come from far away: on a thread, since who asks is vLLM's scheduler.
    """

    def __init__(self) -> None:
        self._keys: dict[Files, Future[str | None]] = {}
        self._given: dict[Hashable, Files] = {}  # by what vLLM's memory, and its prefix cache, know an adapter by
        self._reader: Worker | None = None

    def ask(self, lora: Any) -> Future[str | None]:
        """The key of a request's ``lora_request``, which is None where it has no adapter.

        The future fails with OSError or ConfigError: no directory, no adapter in it, or not the one that it was.
        """
        if lora is None:
            return NO_ADAPTER
        try:
            files = _files(lora.lora_path)
            self._refuse_changed(lora, files)
        except (OSError, ConfigError) as error:
            failed: Future[str | None] = Future()
            failed.set_exception(error)
            return failed
        key = self._keys.get(files)
        if key is None or (key.done() and key.exception() is not None):
            key = self._keys[files] = Future()
            _trim(self._keys)
            self._reader = self._reader or Worker("lora")
            self._reader.submit(partial(_read, lora.lora_path, files, key))
        return key

    def _refuse_changed(self, lora: Any, files: Files) -> None:
        """vLLM may have in its memory what they were before, or what they are now; it does not say. Nor does its prefix
        cache forget the KV of an adapter that was unloaded: it is that of the next one with this name and path.
        """
        known = [lora.lora_int_id, (lora.lora_name, lora.lora_path)]
        for name in known:
            self._given[name] = self._given.pop(name, files)  # the last that are forgotten
        _trim(self._given)
        if any(self._given[name] != files for name in known):
            raise ConfigError(
                f"the files of the LoRA adapter {lora.lora_path} are not those that vLLM's adapter {lora.lora_name} "
                f"({lora.lora_int_id}) had at first; load them under another name"
            )

    def close(self) -> None:
        """Nothing is waited for."""
        if self._reader is not None:
            self._reader.stop()


def _trim(known: dict[Any, Any]) -> None:
    while len(known) > _MOST:
        del known[next(iter(known))]


def _files(path: str) -> Files:
    found = sorted(Path(path).glob("adapter_*"))
    if not found:
        raise ConfigError(f"{path} is not a directory with a LoRA adapter")
    stats = [(str(file), file.stat()) for file in found]
    return tuple((name, s.st_ino, s.st_size, s.st_mtime_ns) for name, s in stats)


def _read(path: str, files: Files, key: Future[str | None]) -> None:
    try:
        key.set_result(_digest(path, files))
    except Exception as error:  # noqa: BLE001 - whatever it is, who asked must hear of it
        key.set_exception(error)


def _digest(path: str, files: Files) -> str:
    sha = hashlib.sha256()
    for name, _, size, _ in files:
        sha.update(canonical_json([Path(name).name, size]))
        with Path(name).open("rb") as file:
            while block := file.read(1 << 20):
                sha.update(block)
    if _files(path) != files:
        raise ConfigError(f"the LoRA adapter {path} was changed while it was read")
    return f"lora:{sha.hexdigest()[:32]}"
