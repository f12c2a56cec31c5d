"""Records in LMDB: a write transaction for each, an index in memory, eviction of the least recently used."""

from __future__ import annotations

import errno
import shutil
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from hashlib import blake2b
from logging import getLogger
from pathlib import Path
from typing import Any, ClassVar, Self, TypeVar

import lmdb
import numpy as np

from lmcache_backends.lmdb.environment import DAMAGE, open_records
from lmcache_backends.lmdb.home import Home, last_size
from lmcache_sdk.backend import Buffer, Item, Miss, Stat, Url, UsageReport
from lmcache_sdk.calls import Calls
from lmcache_sdk.config import format_size, parse_size
from lmcache_sdk.errors import BackendError, BackendFull, BackendUnavailable, ConfigError

log = getLogger(__name__)
T = TypeVar("T")

DEFAULT_SIZE = "10GiB"
MINIMUM_SIZE = 1 << 20
MAXIMUM_SIZE = 1 << 46  # the address space has 47 bits
_UNNAMED = "the size it had"

_PAGE = 4096
_PAGE_HEADER = 16
_INLINE_LIMIT = 2036  # a node (8 bytes, key, value) beyond it keeps its value in overflow pages
_NODE = 10  # a node's header and its slot in the page
_RECENCY_NODE = _NODE + 16
_RESERVE = 0.1  # of the size: B-tree slack, free list, pages freed too recently to be reused, fragmentation
_LEAST_RESERVE = 96 * _PAGE
_BATCH_LIMIT = 64 << 20
_RECENCY_BATCH = 256
_TRIES = 8
_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def cost(key: str, nbytes: int) -> int:
    """Bytes of LMDB pages that a record takes: its own in whole pages, the B-trees' two thirds full."""
    node = _NODE + len(key)
    pages = 0
    if node + nbytes > _INLINE_LIMIT:
        pages = -(-(nbytes + _PAGE_HEADER) // _PAGE) * _PAGE
        nbytes = 8
    return pages + (node + nbytes + _RECENCY_NODE) * 3 // 2


class LMDBBackend:
    """A bounded store in a directory of a local disk, for one process at a time.

    When ``put`` returns, the record is visible, and safe from the end of this process. A power cut may cost
    the whole store (LMDB runs without fsync, what it left is verified before use), never correctness. A
    record takes at most half of the store.

    Args:
        path: the directory; its parent exists.
        size: bound on the data file, in bytes. A smaller one than before evicts and compacts at once.

    Raises:
        ConfigError: the size holds nothing, the parent is missing.
        BackendLocked, BackendFormatError, BackendUnavailable: see :meth:`Home.claim`.
        BackendFull: the disk has no room for the compacted copy.
    """

    instant: ClassVar[bool] = True

    def __init__(self, path: Path, size: int) -> None:
        if not MINIMUM_SIZE <= size <= MAXIMUM_SIZE:
            raise ConfigError(
                f"size={size} for the store {path}: it must be from {format_size(MINIMUM_SIZE)} "
                f"to {format_size(MAXIMUM_SIZE)}"
            )
        self.path = path
        self._size = size
        self._full_budget = size - max(int(size * _RESERVE), _LEAST_RESERVE)
        self._budget = self._full_budget  # what records may take; less while the disk is full
        self._evictions = 0
        # Guards the index and what follows from it, for microseconds. Never take `_writing` inside it.
        self._lock = threading.Lock()
        self._writing = threading.Lock()
        self._calls = Calls(f"the store {path}", self._release)
        with ExitStack() as undo:
            self._home = Home.claim(path)
            undo.callback(self._home.release)
            self._environment, lengths, recency = open_records(self._home, size)
            undo.callback(self._close_environment)
            self._index: OrderedDict[str, int] = OrderedDict()  # key -> length, least recently used first
            self._touched: dict[str, int] = {}  # key -> sequence number of its last use, not yet saved
            self._restore(lengths, recency)
            if self._environment.extent > size:
                self._shrink()
            undo.pop_all()
        self._warn_of_a_small_disk()

    @classmethod
    def from_url(cls, url: Url) -> Self:
        """``lmdb:///absolute/path[?size=50GiB]``; by default the size it had, 10 GiB if it is new. Raises as the class
        does.
        """
        size = url.take("size", _UNNAMED)
        url.finish()
        if url.host or len(url.path) < 2:
            raise ConfigError(f"{url.shown!r} has no absolute path; write lmdb:///var/lib/kv with three slashes")
        path = Path(url.path)
        if size != _UNNAMED:
            return cls(path, parse_size(size))
        known = last_size(path)
        return cls(path, max(known, MINIMUM_SIZE) if known else parse_size(DEFAULT_SIZE))

    # Reading

    def get(self, keys: Sequence[str], buffers: Sequence[Buffer]) -> list[int | Miss]:
        with self._calls:
            found = [self._read(key, buffer) for key, buffer in zip(keys, buffers, strict=True)]
            with self._lock:
                for key, answer in zip(reversed(keys), reversed(found), strict=True):
                    if not isinstance(answer, Miss):
                        self._touch(key)  # the first of a prefix last: it is of use without the others
        return found

    def touch(self, keys: Sequence[str]) -> None:
        with self._calls, self._lock:
            for key in keys:
                self._touch(key)

    def _read(self, key: str, buffer: Buffer) -> int | Miss:
        # The index answers for what is not there; the length that counts is that in the transaction.
        # A transaction a record: an open one keeps every page that is freed meanwhile from being reused.
        if key not in self._index:
            return Miss.ABSENT
        try:
            with self._environment.env.begin(self._environment.records, buffers=True) as txn:
                value = txn.get(key.encode())
                if value is None:
                    return Miss.ABSENT
                nbytes = len(value)
                if nbytes > len(buffer):
                    return Miss.TOO_LARGE
                if nbytes:  # numpy copies without the GIL
                    np.copyto(np.frombuffer(buffer, np.uint8, nbytes), np.frombuffer(value, np.uint8))
                return nbytes
        except lmdb.Error as error:
            raise self._failure(error) from error

    def contains(self, keys: Sequence[str]) -> list[bool]:
        self._calls.check()
        index = self._index
        return [key in index for key in keys]

    def prefix_len(self, keys: Sequence[str]) -> int:
        self._calls.check()
        index = self._index
        for count, key in enumerate(keys):
            if key not in index:
                return count
        return len(keys)

    def scan(self, prefix: str = "") -> Iterator[Stat]:
        self._calls.check()
        with self._lock:
            records = list(self._index.items())
        return (Stat(key, nbytes) for key, nbytes in records if key.startswith(prefix))

    def usage(self) -> UsageReport:
        """``used_bytes`` counts whole LMDB pages; about a tenth of the capacity is LMDB's own."""
        self._calls.check()
        with self._lock:
            return UsageReport(len(self._index), self._used, self._size, self._evictions)

    # Writing

    def put(self, items: Sequence[Item], *, if_absent: bool = True) -> list[bool]:
        with self._calls, self._writing:
            return [self._write(key, data, if_absent) for key, data in items]

    def _write(self, key: str, data: memoryview, if_absent: bool) -> bool:
        if if_absent and key in self._index:
            with self._lock:
                self._touch(key)
            return False
        need = cost(key, data.nbytes)
        if need > self._full_budget // 2:
            raise BackendFull(
                f"a record of {format_size(data.nbytes)} is over half of what the store {self.path} holds "
                f"(size={format_size(self._size)}); raise its size"
            )
        encoded, records = key.encode(), self._environment.records
        self._make_room(need)
        self._commit(lambda txn: txn.put(encoded, data, db=records), need)
        with self._lock:
            if key in self._index:
                self._used -= cost(key, self._index[key])
            self._index[key] = data.nbytes
            self._used += need
            self._touch(key)
        if len(self._touched) >= _RECENCY_BATCH:
            self._save_recency()
        return True

    def delete(self, keys: Sequence[str]) -> int:
        with self._calls, self._writing:
            return self._remove([key for key in dict.fromkeys(keys) if key in self._index])

    def _remove(self, keys: Sequence[str]) -> int:
        if keys:
            self._commit(lambda txn: self._remove_in(txn, keys))
            self._forget(keys)
        return len(keys)

    def _remove_in(self, txn: lmdb.Transaction[Any], keys: Sequence[str]) -> None:
        for key in keys:
            encoded = key.encode()
            txn.delete(encoded, db=self._environment.records)
            txn.delete(_digest(encoded), db=self._environment.recency)

    def _forget(self, keys: Sequence[str]) -> None:
        with self._lock:
            for key in keys:
                self._used -= cost(key, self._index.pop(key))
                self._touched.pop(key, None)

    def _commit(self, work: Callable[[lmdb.Transaction[Any]], T], need: int = 0) -> T:
        """Run ``work`` in a write transaction; where there is no room, evict more each time and try again.

        The map may be full though the budget is not: free pages are scattered, a reader keeps them, or they
        were freed by the last transaction. Or the disk is full.
        """
        last: lmdb.Error | None = None
        for attempt in range(_TRIES):
            if last:
                if not isinstance(last, lmdb.MapFullError):
                    self._budget = min(self._budget, int(self._environment.extent * (1 - _RESERVE)))
                self._evict(need << (attempt - 1))
                self._tick()
                time.sleep(0.001 * attempt)  # for readers to end
            try:
                with self._environment.env.begin(write=True) as txn:
                    return work(txn)
            except lmdb.Error as error:
                if not self._no_room(error, need):
                    raise self._failure(error) from error
                last = error
        raise BackendFull(f"no room in the store {self.path} ({last}); free disk space, or raise its size") from last

    def _make_room(self, need: int) -> None:
        """Evict ahead of a record; in batches, since freed pages are reusable only a commit later."""
        if self._budget < self._full_budget and self._disk_free() > 2 * need + _BATCH_LIMIT:
            self._budget = self._full_budget  # the disk was full, and no longer is
        excess = self._used + need - self._budget
        if excess > 0:
            self._evict(excess + min(self._size // 64, _BATCH_LIMIT))

    def _evict(self, nbytes: int) -> None:
        """Delete least recently used records that take ``nbytes`` together; none where there is no room."""
        victims: list[str] = []
        with self._lock:
            for key, length in self._index.items():
                if nbytes <= 0:
                    break
                victims.append(key)
                nbytes -= cost(key, length)
        if not victims:
            return
        try:
            with self._environment.env.begin(write=True) as txn:
                self._remove_in(txn, victims)
        except lmdb.Error as error:
            if not self._no_room(error):
                raise self._failure(error) from error
            log.debug("could not evict from %s: %s", self.path, error)
            return
        self._forget(victims)
        self._evictions += len(victims)

    def _tick(self) -> None:
        """An empty commit: what the last transaction freed becomes reusable by the next."""
        try:
            with self._environment.env.begin(write=True) as txn:
                txn.put(b"tick", b"", db=self._environment.recency)
                txn.delete(b"tick", db=self._environment.recency)
        except lmdb.Error as error:
            log.debug("tick failed in %s: %s", self.path, error)

    # Recency, saved in batches: a crash loses the order of the last uses, nothing else

    def _restore(self, lengths: dict[str, int], recency: dict[bytes, bytes]) -> None:
        """Fill the index. A record whose use was not saved before a crash was among the last used."""
        order = [(recency.get(_digest(key.encode()), b"\xff" * 8), key) for key in lengths]
        for _, key in sorted(order):
            self._index[key] = lengths[key]
        self._used = sum(cost(key, nbytes) for key, nbytes in self._index.items())
        self._sequence = int.from_bytes(max(recency.values(), default=b""), "big")

    def _touch(self, key: str) -> None:
        """Note a use. The caller holds ``_lock``."""
        if key in self._index:
            self._index.move_to_end(key)
            self._sequence += 1
            self._touched[key] = self._sequence

    def _save_recency(self) -> None:
        """Write the uses since the last time. The caller holds ``_writing``. Failing costs their order."""
        with self._lock:
            touched, self._touched = self._touched, {}
        try:
            with self._environment.env.begin(self._environment.recency, write=True) as txn:
                for key, sequence in touched.items():
                    txn.put(_digest(key.encode()), sequence.to_bytes(8, "big"))
        except lmdb.Error as error:
            log.debug("could not save the recency of %s: %s", self.path, error)

    # Opening, closing, trouble

    def _shrink(self) -> None:
        """The file is larger than the size asked for: evict what is over it, and copy the rest together."""
        before = self._environment.extent
        self._environment.env.set_mapsize(before + _BATCH_LIMIT)  # deleting takes new pages, before it frees any
        if self._used > self._budget:
            self._evict(self._used - self._budget)
        try:
            self._environment = self._environment.compacted(self._size)
            if self._environment.extent > self._size:
                raise OSError(errno.ENOSPC, "what is kept is still too large")
        except (OSError, lmdb.Error) as error:
            raise BackendFull(
                f"cannot shrink {self.path} from {format_size(before)} to {format_size(self._size)}, "
                f"copying what stays failed ({error}); free disk space, or keep the size"
            ) from error
        log.info("shrunk the store %s from %s to %s", self.path, format_size(before), format_size(self._size))

    def _warn_of_a_small_disk(self) -> None:
        room = self._disk_free() + self._environment.extent
        if room < self._size:
            log.warning(
                "the disk of %s has room for %s, less than size=%s; records are evicted when it is full",
                self.path, format_size(room), format_size(self._size),
            )  # fmt: skip

    def _disk_free(self) -> int:
        return shutil.disk_usage(self.path).free

    def _no_room(self, error: lmdb.Error, need: int = 0) -> bool:
        if error.code == errno.EIO:  # a broken disk, or LMDB's word for a write that a full one cut short
            return self._disk_free() < need + _BATCH_LIMIT
        return isinstance(error, lmdb.MapFullError) or error.code in _NO_ROOM

    def _failure(self, error: lmdb.Error) -> BackendError:
        """What LMDB's error is to a caller. After damage, whoever opens the store next verifies it first."""
        if isinstance(error, DAMAGE):
            with suppress(OSError):
                self._home.mark_suspect()
        return BackendUnavailable(f"the store {self.path} failed: {error}")

    def close(self, timeout_s: float) -> None:
        """Wait for the calls inside, write everything to the disk, unlock.

        Calls that are still inside after ``timeout_s`` are left to end: the last of them closes the store.
        """
        if not self._calls.close(timeout_s):
            log.warning("the store %s is in use still, it closes when its last call returns", self.path)

    def _close_environment(self) -> None:
        self._environment.env.close()  # another one after compaction

    def _release(self) -> None:
        try:
            self._save_recency()
            self._environment.env.sync(True)
            self._environment.env.close()
            self._home.mark_clean()
        except (OSError, lmdb.Error) as error:
            # The marker of a use stays, so the next one to open it knows.
            log.exception("the store %s could not be closed cleanly", self.path, exc_info=error)
        finally:
            self._environment.env.close()
            self._home.release()


def _digest(key: bytes) -> bytes:
    """Where a key's recency is kept. Two keys that met there would share it, no more."""
    return blake2b(key, digest_size=8).digest()
