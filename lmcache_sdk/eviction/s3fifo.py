"""What is used once does not push out what is used again: scans of prompts that never come back leave the rest alone.

After S3-FIFO: Yang, Zhang, Qiu, Yue, Rashmi, "FIFO queues are all you need for cache eviction", SOSP 2023.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Generic, Protocol, TypeVar

from lmcache_sdk.eviction.lru import LRU

SMALL_PART = 0.1  # of what may be evicted: where the newcomers wait for a second use
MOST_USES = 3  # that count


class Counted(Protocol):
    """An item that knows its name, which outlives it, and how often it was used since it came."""

    digest: bytes
    uses: int


C = TypeVar("C", bound=Counted)


class S3FIFO(Generic[C]):
    """A small queue for newcomers, a main one for what was used again, and the names of newcomers that were evicted.

    A newcomer gives room first, unless it was used meanwhile; one that comes back after its eviction belongs to the
    main queue at once. There each counted use is worth another round.

    Two things differ from the paper, since an item is taken out while it is in use: one that was used goes to the main
    queue at its use, rather than when it gets to the end of the small one; and a place in a queue is that of the last
    use. As many names are remembered as pieces of the size asked for would fill what is in the pool.
    """

    def __init__(self) -> None:
        self._small: LRU[C] = LRU()
        self._main: LRU[C] = LRU()
        self._evicted: OrderedDict[bytes, None] = OrderedDict()
        self._bytes = 0
        self._tick = 0

    def insert(self, item: C, tick: int) -> None:
        self._tick = max(self._tick, tick)
        item.uses = min(item.uses, MOST_USES)
        queue = self._main if item.uses or item.digest in self._evicted else self._small
        queue.insert(item, tick)

    def discard(self, item: C) -> None:
        self._small.discard(item)
        self._main.discard(item)

    def charge(self, tenant: str, nbytes: int) -> None:
        """All tenants are one."""
        self._bytes += nbytes
        if not self._bytes:
            self._evicted.clear()

    def full(self, tenant: str, nbytes: int) -> bool:
        return False

    def victim(self, tenant: str = "", nbytes: int = 0) -> C | None:
        if len(self._small) > SMALL_PART * len(self) or not len(self._main):
            item = self._small.victim()
            if item is not None:
                self._evicted[item.digest] = None
                while self._evicted and len(self._evicted) * max(nbytes, 1) > self._bytes:
                    self._evicted.popitem(last=False)
            return item
        while (item := self._main.victim()) is not None and item.uses:
            item.uses -= 1
            self._main.insert(item, self._tick)
        return item

    def __contains__(self, item: C) -> bool:
        return item in self._small or item in self._main

    def __len__(self) -> int:
        return len(self._small) + len(self._main)
