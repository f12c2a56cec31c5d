"""Least recently used first, whoever it belongs to."""

from __future__ import annotations

from heapq import heapify, heappop, heappush
from itertools import count
from typing import Generic, TypeVar

T = TypeVar("T")


class LRU(Generic[T]):
    """A heap by last use with lazy deletion: an entry whose tick is no longer the item's own is skipped.

    Not a linked list, since an item may become evictable long after its last use (when its child is evicted) and must
    then take its old place.
    """

    def __init__(self) -> None:
        self._ticks: dict[T, int] = {}
        self._heap: list[tuple[int, int, T]] = []
        self._order = count()  # breaks ties, so that items are never compared

    def insert(self, item: T, tick: int) -> None:
        self._ticks[item] = tick
        heappush(self._heap, (tick, next(self._order), item))
        if len(self._heap) > 2 * len(self._ticks) + 64:
            self._heap = [entry for entry in self._heap if self._ticks.get(entry[2]) == entry[0]]
            heapify(self._heap)

    def discard(self, item: T) -> None:
        self._ticks.pop(item, None)

    def charge(self, tenant: str, nbytes: int) -> None:
        """All tenants are one."""

    def full(self, tenant: str, nbytes: int) -> bool:
        return False

    def victim(self, tenant: str = "", nbytes: int = 0) -> T | None:
        while self._heap:
            tick, _, item = heappop(self._heap)
            if self._ticks.get(item) == tick:
                del self._ticks[item]
                return item
        return None

    def __contains__(self, item: T) -> bool:
        return item in self._ticks

    def __len__(self) -> int:
        return len(self._ticks)
