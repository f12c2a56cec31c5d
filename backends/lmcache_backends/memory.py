"""``memory://``: records in a dict. The reference for other backends, and a tier for tests."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import ClassVar, Self

from lmcache_sdk.backend import Buffer, Item, Miss, Stat, Url, UsageReport, leading
from lmcache_sdk.calls import Calls
from lmcache_sdk.config import parse_size
from lmcache_sdk.errors import BackendFull, ConfigError


class MemoryBackend:
    """A dict in this process, gone when it is closed; least recently used records are evicted.

    Args:
        size: bound on the sum of the records' lengths, in bytes; 0 = none.
    """

    instant: ClassVar[bool] = True

    def __init__(self, size: int = 0) -> None:
        self._size = size
        self._used = 0
        self._evictions = 0
        self._records: OrderedDict[str, bytes] = OrderedDict()  # least recently used first
        self._lock = threading.Lock()
        self._calls = Calls("memory://", self._records.clear)

    @classmethod
    def from_url(cls, url: Url) -> Self:
        """``memory://[?size=1GiB]``. Raises ConfigError."""
        if url.host or url.path not in ("", "/"):
            raise ConfigError(f"memory:// takes no host or path, got {url.shown!r}")
        text = url.take("size")
        url.finish()
        return cls(parse_size(text) if text else 0)

    def get(self, keys: Sequence[str], buffers: Sequence[Buffer]) -> list[int | Miss]:
        with self._calls:
            return [self._read(key, buffer) for key, buffer in zip(keys, buffers, strict=True)]

    def _read(self, key: str, buffer: Buffer) -> int | Miss:
        with self._lock:
            data = self._records.get(key)
            if data is None:
                return Miss.ABSENT
            self._records.move_to_end(key)
        if len(data) > len(buffer):
            return Miss.TOO_LARGE
        buffer[: len(data)] = data
        return len(data)

    def put(self, items: Sequence[Item], *, if_absent: bool = True) -> list[bool]:
        with self._calls:
            return [self._write(key, data, if_absent) for key, data in items]

    def _write(self, key: str, data: memoryview, if_absent: bool) -> bool:
        if self._size and data.nbytes > self._size:
            raise BackendFull(f"a record of {data.nbytes} bytes does not fit memory://?size={self._size}")
        record = data.tobytes()
        with self._lock:
            if key in self._records:
                if if_absent:
                    self._records.move_to_end(key)
                    return False
                self._used -= len(self._records.pop(key))
            while self._size and self._used + len(record) > self._size:
                self._used -= len(self._records.popitem(last=False)[1])
                self._evictions += 1
            self._records[key] = record
            self._used += len(record)
        return True

    def touch(self, keys: Sequence[str]) -> None:
        with self._calls, self._lock:
            for key in keys:
                if key in self._records:
                    self._records.move_to_end(key)

    def contains(self, keys: Sequence[str]) -> list[bool]:
        self._calls.check()
        return [key in self._records for key in keys]

    def prefix_len(self, keys: Sequence[str]) -> int:
        self._calls.check()
        return leading(key in self._records for key in keys)

    def delete(self, keys: Sequence[str]) -> int:
        with self._calls, self._lock:
            found = [record for key in keys if (record := self._records.pop(key, None)) is not None]
            self._used -= sum(map(len, found))
            return len(found)

    def scan(self, prefix: str = "") -> Iterator[Stat]:
        with self._calls, self._lock:
            return iter([Stat(key, len(data)) for key, data in self._records.items() if key.startswith(prefix)])

    def usage(self) -> UsageReport:
        with self._calls, self._lock:
            return UsageReport(len(self._records), self._used, self._size, self._evictions)

    def close(self, timeout_s: float) -> None:
        self._calls.close(timeout_s)
