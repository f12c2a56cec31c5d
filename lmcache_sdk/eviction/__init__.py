"""Eviction policies: one file each, one small interface."""

from __future__ import annotations

from typing import Protocol, TypeVar

from lmcache_sdk.eviction.lru import LRU

__all__ = ["LRU", "Policy"]


T = TypeVar("T")


class Policy(Protocol[T]):
    """Orders what may be evicted. Pure: no clock, no I/O; ``tick`` is the core's own counter.

    The caller guarantees that an item is inserted only while it is evictable (nobody holds it and it has no child)
    and discarded as soon as it is not. An implementation MUST return from ``victim`` only inserted items, each once,
    and MUST accept ``discard`` of an item that it does not have. Every method costs O(log n) or less, amortised.
    """

    def insert(self, item: T, tick: int) -> None:
        """The item became evictable; it was last used at ``tick``."""
        ...

    def discard(self, item: T) -> None:
        """The item is in use again, or gone."""
        ...

    def victim(self) -> T | None:
        """Remove and return what to evict next; None if there is nothing."""
        ...

    def __contains__(self, item: T) -> bool: ...

    def __len__(self) -> int: ...
