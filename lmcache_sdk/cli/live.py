"""A scratch part of a store that may be in use: a random prefix, of which nothing is left in the end; and its speed."""

from __future__ import annotations

import os
import secrets
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple, Self

import numpy as np

from lmcache_sdk.backend import KEY_LIMIT, Backend, Item, RangeGet, Scan
from lmcache_sdk.cli.target import CLOSE_TIMEOUT_S, address, local_path
from lmcache_sdk.errors import BackendError
from lmcache_sdk.tiers import open_tier
from lmcache_sdk.wrappers import Namespaced, Wrapper

_DELETED_AT_ONCE = 500
_SIZES = (1 << 20, 4 << 20, 8 << 20)
_CALL_BYTES = 8 << 20  # of the store's jobs
_READERS = 2  # of the store, for each tier
_TOTAL_BYTES = 64 << 20
_LONGEST_S = 2.0
_REPEATED = 5
_EXISTENCE_KEYS = 500


class _Noting(Wrapper):
    """Notes every key that is put, before it is."""

    def __init__(self, inner: Backend, keys: set[str]) -> None:
        super().__init__(inner)
        self._keys = keys
        if isinstance(inner, RangeGet):
            self.get_ranges = inner.get_ranges

    def put(self, items: Sequence[Item], *, if_absent: bool = True) -> list[bool]:
        self._keys.update(item.key for item in items)
        return super().put(items, if_absent=if_absent)


class LiveStore:
    """A context manager. Leaving it removes all that was put.

    Args:
        url: a tier: ``URL[#options]``.

    Attributes:
        stores: it keeps what it is given.
        durable: a client that comes later finds it.
        alone: why a second client, open at the same time, is of no use; empty if it finds the records.
        longest_key: what the prefix leaves of a key.
        left: why something may be left of the scratch part; empty if nothing is.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self.prefix = f"check-{secrets.token_hex(6)}"
        self.longest_key = KEY_LIMIT - len(self.prefix) - 14
        self.stores = self.durable = False
        self.alone = ""
        self.left = ""
        self._keys: set[str] = set()

    def __enter__(self) -> Self:
        """Raises ConfigError, or a BackendError: it does not open, or no call works."""
        try:
            self._probe()
        except BaseException:
            self._clean()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._clean()

    def open(self, part: str) -> Backend:
        """A client of its own that sees a part of the scratch part only. ``part``: at most 12 characters of keys."""
        inner = open_tier(self.url).backend
        return Namespaced(_Noting(inner, self._keys), f"{self.prefix}/{part}")

    @contextmanager
    def opened(self, part: str) -> Iterator[Backend]:
        """The same, and closed."""
        backend = self.open(part)
        try:
            yield backend
        finally:
            backend.close(CLOSE_TIMEOUT_S)

    def _probe(self) -> None:
        with self.opened("probe") as first:
            first.put([Item("k", memoryview(b"probe"))])
            self.stores = first.contains(["k"]) == [True]
            try:
                with self.opened("probe") as other:
                    if other.contains(["k"]) != [True]:
                        self.alone = "a second client does not see the records"
            except BackendError as error:
                self.alone = f"a second client cannot be opened: {error}"
        with self.opened("probe") as later:
            self.durable = later.contains(["k"]) == [True]

    def _clean(self) -> None:
        keys = sorted(self._keys)
        if not keys:
            return
        try:
            backend = open_tier(self.url).backend
            try:
                for at in range(0, len(keys), _DELETED_AT_ONCE):
                    backend.delete(keys[at : at + _DELETED_AT_ONCE])
                if isinstance(backend, Scan):
                    count = sum(1 for _ in backend.scan(self.prefix))
                else:
                    count = sum(backend.contains(keys))
            finally:
                backend.close(CLOSE_TIMEOUT_S)
            self.left = f"{count} records that were deleted are still there" if count else ""
        except Exception as error:  # noqa: BLE001 - a backend is other people's code; what it leaves is told
            self.left = f"{type(error).__name__}: {error}"


class Throughput(NamedTuple):
    """Bytes a second, for records of one size, beside the plain way of moving the same bytes."""

    nbytes: int
    put: float
    plain_put: float
    get: float
    plain_get: float


def throughput(store: LiveStore) -> Iterator[Throughput]:
    """As the cache does it: calls of up to 8 MiB, one that writes and two that read. See :func:`plain_way`.

    Raises:
        BackendError: a call failed, or gave other bytes.
    """
    beside = _beside(store.url)
    source = np.random.default_rng(0).integers(0, 256, _SIZES[-1] + (1 << 16), np.uint8)
    for nbytes in _SIZES:
        per_call = max(1, _CALL_BYTES // nbytes)
        records = [source[at : at + nbytes].data for at in range(_TOTAL_BYTES // nbytes)]
        with store.opened(f"speed-{nbytes >> 20}") as backend:
            put, keys = _puts(backend, "k", records, per_call)
            get = _gets(backend, keys, records, per_call, _READERS)
            if beside:
                plain_put, plain_get = _file(beside, records[: len(keys)])
            else:
                plain_put, keys = _puts(backend, "plain", records, 1)
                plain_get = _gets(backend, keys, records, 1, 1)
        yield Throughput(nbytes, put, plain_put, get, plain_get)


def plain_way(url: str) -> str:
    """What the throughput is compared with."""
    if _beside(url):
        return "the same bytes written to and read from a file beside the store"
    scheme = address(url).scheme
    return f"one record a call, one call at a time (no other ceiling can be told for {scheme}://)"


def existence(store: LiveStore) -> tuple[float, float]:
    """Seconds of one ``contains`` and one ``prefix_len`` of 500 keys that are there."""
    keys = [f"k{number}" for number in range(_EXISTENCE_KEYS)]
    with store.opened("exist") as backend:
        backend.put([Item(key, memoryview(b"x")) for key in keys])
        contains = statistics.median(_seconds(lambda: backend.contains(keys)) for _ in range(_REPEATED))
        prefix_len = statistics.median(_seconds(lambda: backend.prefix_len(keys)) for _ in range(_REPEATED))
    return contains, prefix_len


def _puts(backend: Backend, name: str, records: Sequence[memoryview], per_call: int) -> tuple[float, list[str]]:
    """Bytes a second, and the keys that were put until the time was over."""
    keys: list[str] = []
    start = time.perf_counter()
    for at in range(0, len(records), per_call):
        items = [Item(f"{name}{number}", records[number]) for number in range(at, min(at + per_call, len(records)))]
        backend.put(items)
        keys += [item.key for item in items]
        if time.perf_counter() - start > _LONGEST_S:
            break
    return len(keys) * len(records[0]) / (time.perf_counter() - start), keys


def _gets(backend: Backend, keys: Sequence[str], records: Sequence[memoryview], per_call: int, threads: int) -> float:
    """Bytes a second: the median of some rounds through all keys."""
    calls = [range(at, min(at + per_call, len(keys))) for at in range(0, len(keys), per_call)]
    targets = [np.zeros(len(record), np.uint8).data for record in records[: len(keys)]]

    def read(numbers: range) -> None:
        answers = backend.get([keys[n] for n in numbers], [targets[n] for n in numbers])
        if answers != [len(records[n]) for n in numbers]:
            raise BackendError(f"records that were just put are gone (the store is too small for this): {answers}")

    rates: list[float] = []
    start = time.perf_counter()
    with ThreadPoolExecutor(threads) as pool:
        while len(rates) < _REPEATED and time.perf_counter() - start < _LONGEST_S:
            seconds = _seconds(lambda: list(pool.map(read, calls)))
            rates.append(len(keys) * len(records[0]) / seconds)
    if any(target != record for target, record in zip(targets, records, strict=False)):
        raise BackendError("get gave other bytes than were put")
    return statistics.median(rates)


def _file(beside: Path, records: Sequence[memoryview]) -> tuple[float, float]:
    """Bytes a second of writing a file, and of reading it."""
    nbytes = len(records[0])
    targets = [np.zeros(nbytes, np.uint8).data for _ in records]
    with tempfile.TemporaryFile(dir=beside, buffering=0) as file:

        def write() -> None:
            for number, record in enumerate(records):
                os.pwrite(file.fileno(), record, number * nbytes)

        def read() -> None:
            for number, target in enumerate(targets):
                os.preadv(file.fileno(), [target], number * nbytes)

        wrote = _seconds(write)
        return len(records) * nbytes / wrote, len(records) * nbytes / statistics.median(
            _seconds(read) for _ in range(_REPEATED)
        )


def _beside(url: str) -> Path | None:
    """A writable directory on the file system of a local store; None for another store."""
    place = local_path(address(url))
    if place is None:
        return None
    beside = place if place.is_mount() else place.parent
    return beside if beside.is_dir() and os.access(beside, os.W_OK | os.X_OK) else None


def _seconds(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start
