"""Who has the most beyond its share gives first, so that one tenant's flood does not push another below its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from heapq import heapify, heappop, heappush
from typing import Generic, Protocol, TypeVar

from lmcache_sdk.eviction.lru import LRU

ANYBODY = "*"  # stands for every tenant that is not named


class Owned(Protocol):
    """An item that knows whose it is."""

    tenant: str


O_ = TypeVar("O_", bound=Owned)


class Queue(Protocol[O_]):
    """What orders the items of one tenant: the part of a :class:`~lmcache_sdk.eviction.Policy` that is needed here."""

    def insert(self, item: O_, tick: int) -> None: ...

    def discard(self, item: O_) -> None: ...

    def charge(self, tenant: str, nbytes: int) -> None: ...

    def victim(self, tenant: str, nbytes: int) -> O_ | None: ...

    def __contains__(self, item: O_) -> bool: ...

    def __len__(self) -> int: ...


class Fair(Generic[O_]):
    """A queue of its own for each tenant, and a rule for whose queue gives.

    A tenant's share is ``pool_bytes * weight / sum of the weights of all who have something in the pool``. Room comes
    from the tenant that has the most for its weight. Two things are never taken from another, only from one's own:

    * what would leave the taker with more for its weight than the other has, while the other is not above its share;
    * room for a tenant at its quota.

    So a tenant at or below its share loses nothing to one above, and nobody is kept out who is below: if all others
    were at or below their shares as well, the pool would not be full.

    Args:
        pool_bytes: what is shared.
        weights: whole numbers from 1; a tenant without one has that of ``*``, else 1.
        quotas: bytes that a tenant may have at most; without one that of ``*``, else no bound.
        queue: makes the queue of one tenant.
    """

    def __init__(
        self,
        pool_bytes: int,
        *,
        weights: Mapping[str, int] | None = None,
        quotas: Mapping[str, int] | None = None,
        queue: Callable[[], Queue[O_]] = LRU,
    ) -> None:
        self._pool_bytes = pool_bytes
        self._weights = dict(weights or {})
        self._quotas = dict(quotas or {})
        assert all(weight >= 1 for weight in self._weights.values())
        self._bytes: dict[str, int] = {}
        self._present = 0  # the sum of the weights of those in _bytes
        self._make = queue
        self._queues: dict[str, Queue[O_]] = {}
        # By bytes for weight, greatest first. Who is in _ranked has an entry that is not below its true place; one
        # above is put right when it comes to the top. All who have something in their queue are in _ranked.
        self._ranks: list[tuple[float, str]] = []
        self._ranked: set[str] = set()

    def insert(self, item: O_, tick: int) -> None:
        self._queue(item.tenant).insert(item, tick)
        if item.tenant not in self._ranked:
            self._ranked.add(item.tenant)
            self._rank(item.tenant)

    def discard(self, item: O_) -> None:
        queue = self._queues.get(item.tenant)
        if queue is not None:
            queue.discard(item)
            self._tidy(item.tenant)

    def charge(self, tenant: str, nbytes: int) -> None:
        self._queue(tenant).charge(tenant, nbytes)
        before = self._bytes.get(tenant, 0)
        after = self._bytes[tenant] = before + nbytes
        if not before and after:
            self._present += self._weight(tenant)
        elif before and not after:
            self._present -= self._weight(tenant)
        if not after:
            del self._bytes[tenant]
            self._tidy(tenant)
        elif nbytes > 0 and tenant in self._ranked:
            self._rank(tenant)

    def full(self, tenant: str, nbytes: int) -> bool:
        quota = self._quotas.get(tenant, self._quotas.get(ANYBODY))
        return quota is not None and self._bytes.get(tenant, 0) + nbytes > quota

    def victim(self, tenant: str, nbytes: int) -> O_ | None:
        giver = tenant if self.full(tenant, nbytes) else self._giver(tenant, nbytes)
        queue = self._queues.get(giver)
        item = queue.victim(giver, nbytes) if queue is not None else None
        self._tidy(giver)
        return item

    def share(self, tenant: str) -> float:
        """Bytes, as if the tenant had something in the pool."""
        weight = self._weight(tenant)
        return self._pool_bytes * weight / (self._present + (weight if tenant not in self._bytes else 0))

    def __contains__(self, item: O_) -> bool:
        queue = self._queues.get(item.tenant)
        return queue is not None and item in queue

    def __len__(self) -> int:
        return sum(len(queue) for queue in self._queues.values())

    def _queue(self, tenant: str) -> Queue[O_]:
        queue = self._queues.get(tenant)
        if queue is None:
            queue = self._queues[tenant] = self._make()
        return queue

    def _giver(self, taker: str, nbytes: int) -> str:
        """Whose queue gives; the taker's own, which may be empty, where it may not take from another."""
        richest = self._richest()
        if richest is None:
            return taker
        would_have = (self._bytes.get(taker, 0) + nbytes) / self._weight(taker)
        may_take = self._level(richest) >= would_have or self._level(richest) > self.share(taker) / self._weight(taker)
        return richest if may_take else taker

    def _richest(self) -> str | None:
        while self._ranks:
            negative, tenant = self._ranks[0]
            queue = self._queues.get(tenant)
            if queue is not None and len(queue) and -negative == self._level(tenant):
                return tenant
            heappop(self._ranks)
            if queue is not None and len(queue):
                self._rank(tenant)
            else:
                self._ranked.discard(tenant)
        return None

    def _rank(self, tenant: str) -> None:
        heappush(self._ranks, (-self._level(tenant), tenant))
        if len(self._ranks) > 2 * len(self._ranked) + 64:
            self._ranks = [(-self._level(ranked), ranked) for ranked in self._ranked]
            heapify(self._ranks)

    def _tidy(self, tenant: str) -> None:
        """Keep nothing for a tenant that has nothing. With bytes it keeps its queue, which soon fills again."""
        queue = self._queues.get(tenant)
        if queue is not None and not len(queue) and tenant not in self._bytes:
            del self._queues[tenant]
            self._ranked.discard(tenant)

    def _level(self, tenant: str) -> float:
        return self._bytes.get(tenant, 0) / self._weight(tenant)

    def _weight(self, tenant: str) -> int:
        return self._weights.get(tenant, self._weights.get(ANYBODY, 1))
