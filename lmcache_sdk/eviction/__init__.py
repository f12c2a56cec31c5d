"""Eviction policies: one file each, one small interface."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol, TypeVar

from lmcache_sdk.eviction.fair import ANYBODY, Fair, Queue
from lmcache_sdk.eviction.lru import LRU
from lmcache_sdk.eviction.s3fifo import S3FIFO

__all__ = ["ANYBODY", "LRU", "QUEUES", "S3FIFO", "Fair", "Policy"]

QUEUES: Mapping[str, Callable[[], Queue[Any]]] = {"lru": LRU, "s3fifo": S3FIFO}
"""What ``eviction`` may be set to."""


T = TypeVar("T")


class Policy(Protocol[T]):
    """Orders what may be evicted, and says who may have room. Pure: no clock, no I/O; ``tick`` is the core's counter.

    The caller guarantees that an item is inserted only while it is evictable (nobody holds it and it has no child),
    is discarded as soon as it is not, and that its tenant does not change in between.

    An implementation MUST return from ``victim`` only inserted items, each once. It MUST accept ``discard`` of an item
    that it does not have, and a tenant that it has never heard of. It MUST keep nothing for a tenant that has neither
    bytes nor items: tenants come from requests, and there may be any number of them. A call costs O(log n) or less,
    amortised; only ``len`` may cost more.
    """

    def insert(self, item: T, tick: int) -> None:
        """The item became evictable; it was last used at ``tick``."""
        ...

    def discard(self, item: T) -> None:
        """The item is in use again, or gone."""
        ...

    def charge(self, tenant: str, nbytes: int) -> None:
        """So many more bytes of the pool (fewer, where negative) belong to the tenant."""
        ...

    def full(self, tenant: str, nbytes: int) -> bool:
        """Whether the tenant may not have so many bytes more, however much room there is."""
        ...

    def victim(self, tenant: str, nbytes: int) -> T | None:
        """Remove and return what to evict next so that the tenant gets so many bytes more; None if there is nothing
        that it may take. For a tenant that is full, it MUST be the tenant's own.
        """
        ...

    def __contains__(self, item: T) -> bool: ...

    def __len__(self) -> int: ...
