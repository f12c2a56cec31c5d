"""Least recently used first, whoever it belongs to."""

from __future__ import annotations

from heapq import heappop, heappush
from itertools import count
from typing import Generic, TypeVar

from lmcache_sdk.core.parted import ByHash

T = TypeVar("T")


_MOVED = 4  # entries at a time, when those that are skipped are left behind


class LRU(Generic[T]):
    """A heap by last use with lazy deletion: an entry whose tick is no longer the item's own is skipped.

    Not a linked list, since an item may become evictable long after its last use (when its child is evicted) and must
    then take its old place. When over half of the heap would be skipped, a new one takes over a few entries with each
    change: all at once, a million would stop everything for half a second.
    """

    def __init__(self) -> None:
        self._ticks: ByHash[T, int] = ByHash()
        self._heap: list[tuple[int, int, T]] = []
        self._old: list[tuple[int, int, T]] = []  # is taken over; a heap, too, also without its last
        self._order = count()  # breaks ties, so that items are never compared

    def insert(self, item: T, tick: int) -> None:
        self._ticks[item] = tick
        heappush(self._heap, (tick, next(self._order), item))
        self._move()

    def discard(self, item: T) -> None:
        if self._ticks.pop(item, None) is not None:
            self._move()

    def charge(self, tenant: str, nbytes: int) -> None:
        """All tenants are one."""

    def full(self, tenant: str, nbytes: int) -> bool:
        return False

    def victim(self, tenant: str = "", nbytes: int = 0) -> T | None:
        while self._ticks:
            from_old = self._old and (not self._heap or self._old[0] < self._heap[0])
            tick, _, item = heappop(self._old if from_old else self._heap)
            if self._ticks.find(item) == tick:
                del self._ticks[item]
                return item
        return None

    def __contains__(self, item: T) -> bool:
        return item in self._ticks

    def __len__(self) -> int:
        return len(self._ticks)

    def _move(self) -> None:
        if not self._old and len(self._heap) > 2 * len(self._ticks) + 64:
            self._old, self._heap = self._heap, []
        for entry in [self._old.pop() for _ in range(min(_MOVED, len(self._old)))]:
            if self._ticks.find(entry[2]) == entry[0]:
                heappush(self._heap, entry)
