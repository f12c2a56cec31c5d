"""What the core knows of a tier, and the bounds on what it asks of one."""

from __future__ import annotations

from collections import OrderedDict, deque
from dataclasses import dataclass

from lmcache_sdk.core.breaker import Breaker
from lmcache_sdk.core.entries import Entry, Request
from lmcache_sdk.core.rules import TierRules
from lmcache_sdk.keys import Origin

_MISSING = 1 << 16  # chunks of which it is remembered that a tier lacks them


@dataclass(frozen=True, slots=True)
class Limits:
    """Times in seconds.

    Attributes:
        hold_s: how long a READY lookup is held for its claim.
        fetch_s, put_s: deadline of one job on a tier; of a read, beyond what it and those before it should take.
        batch_bytes: the most for one job; several jobs run side by side.
        readers: how many reads, and beside them how many probes, one tier serves side by side.
        queue_bytes: writes waiting for one tier; beyond it they are dropped (0 = as much as the pool).
        requests: lookups that are remembered; beyond it the oldest is forgotten.
        eviction_factor: how many times the wanted bytes may be evicted for one extent, before giving up on a
            fragmented pool.
    """

    hold_s: float = 60.0
    fetch_s: float = 5.0
    put_s: float = 30.0
    batch_bytes: int = 8 << 20
    readers: int = 2
    queue_bytes: int = 0
    requests: int = 1 << 16
    eviction_factor: int = 16


class TierState:
    """One tier.

    Attributes:
        queued_bytes: are written, or wait for the tier's writer.
        waiting: what is to be written later: from when on, and the chunks; ``waiting_bytes`` in all.
        hung_reads, hung_probes: have not ended by their deadline.
    """

    def __init__(self, name: str, instant: bool, rules: TierRules) -> None:
        self.name = name
        self.instant = instant
        self.rules = rules
        self.breaker = Breaker(rules.failures, rules.retry_s)
        self.queued_bytes = 0
        self.waiting: deque[tuple[float, list[Entry]]] = deque()
        self.waiting_bytes = 0
        self.hung_reads = 0
        self.hung_probes = 0
        self._missing: OrderedDict[tuple[Origin, bytes], float] = OrderedDict()  # until when

    def answers(self, readers: int, now: float) -> bool:
        """Whether to ask it for chunks: not while each of its threads hangs in an earlier call."""
        return max(self.hung_reads, self.hung_probes) < readers and self.breaker.allows(now)

    def lacks(self, request: Request, position: int, now: float) -> bool:
        """Whether it has said lately that it lacks this chunk of the request's."""
        return bool(self._missing) and now < self._missing.get(_chunk(request, position), 0.0)

    def lacked(self, request: Request, position: int, now: float) -> None:
        """It says that it lacks this chunk of the space at hand."""
        if self.instant or not self.rules.missing_s or position >= request.at_hand().reach:
            return
        chunk = _chunk(request, position)
        self._missing[chunk] = now + self.rules.missing_s
        self._missing.move_to_end(chunk)
        if len(self._missing) > _MISSING:
            self._missing.popitem(last=False)

    def written(self, entry: Entry) -> None:
        """It has a chunk by now."""
        self._missing.pop((entry.space.origin, entry.digest), None)


def _chunk(request: Request, position: int) -> tuple[Origin, bytes]:
    return request.at_hand().space.origin, request.chain.digests(position + 1)[-1]
