"""What adapters see: the Cache protocol, and what travels through it.

Cache trouble never raises and never blocks: a lookup says MISS, a claim None, a load has failed chunks, a store is
skipped. Only ``wait``, ``drain`` and ``close`` block, to their deadline.

A request's way through it::

    lookup(rid, chain) -> PENDING -> lookup or wait(rid) -> READY   the chunks are in the pool and held
    claim(rid, boundary) -> Ticket                                a hard lease; GPUConnector.load copies under it
    release(ticket, part)                                        by the connector, when its copy has ended
    reserve(rid, chain, first, count) -> Reservation              room for what the cache lacks; then publish or abort
    forget(rid)                                                  the request has ended, was aborted or preempted
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Protocol

import msgspec
import numpy as np
import numpy.typing as npt

from lmcache_sdk.keys import Chain
from lmcache_sdk.spec import WHOLE, Namespace, Part, Producer

__all__ = [
    "WHOLE",
    "Cache",
    "Chain",
    "Lookup",
    "LookupState",
    "PairStats",
    "Part",
    "PoolStats",
    "Reservation",
    "Stats",
    "Ticket",
    "TierStats",
    "Transfer",
]

Bytes = npt.NDArray[np.uint8]


class LookupState(StrEnum):
    """What a lookup found. PENDING: some of it is still on its way."""

    MISS = "miss"
    PENDING = "pending"
    READY = "ready"


@dataclass(frozen=True, slots=True)
class Lookup:
    """The answer of a lookup.

    Attributes:
        state: READY: the chunks are in the pool, verified, and held for this request until claim, forget or a
            timeout; nothing remote can fail any more. PENDING: ask again, or wait.
        boundaries: every restorable length, in chunks, ascending; empty unless READY.
        why: for a MISS or a shorter hit than hoped for, the reason in a word or two.
        sources: chunks by the tier they came from (``pool``, ``lmdb`` …).
        found: while PENDING: chunks from the front that were found so far, here or on their way.
        missing: those of them that are on their way.
        eta_s: seconds until they will be here, as fast as their tiers have been so far; None = unknown.
    """

    state: LookupState
    boundaries: Sequence[int] = ()
    why: str = ""
    sources: Mapping[str, int] = field(default_factory=dict)
    found: int = 0
    missing: int = 0
    eta_s: float | None = None

    @property
    def chunks(self) -> int:
        """The longest restorable length, in chunks."""
        return self.boundaries[-1] if self.boundaries else 0


class _Extents(msgspec.Struct, frozen=True):
    """Shared by Ticket and Reservation: where payloads lie in the pool.

    Attributes:
        extents: int64 ``[chunk, cell, 2]`` as bytes: segment number, offset of the payload in it.
    """

    lease: int
    boot: str
    cells: tuple[int, ...]
    extents: bytes

    def places(self) -> npt.NDArray[np.int64]:
        """int64 ``[chunk, cell, 2]``: segment, payload offset. Cells in the order of ``cells``."""
        return np.frombuffer(self.extents, dtype="<i8").reshape(-1, len(self.cells), 2)


class Ticket(_Extents, frozen=True):
    """A hard lease on chunks ``first .. boundary - 1`` of a request. Picklable, and plain data on the wire.

    Made by the scheduler's process, used by ``parts`` workers; each releases its own part. The memory is not reused
    before the last part has been released, or its process is proven gone.

    Attributes:
        lease: number of the lease, unique within ``boot``.
        boot: id of the cache's life; a ticket of an earlier life is void.
        fidelity: the worst among the chunks: ``exact``, or ``foreign`` if some are another producer's.
        inexact: digest of the first chunk that is not exact, if there is one; what is computed behind it is not exact,
            either.
        cells: indices into ``KVSpec.cells``.
    """

    first: int
    boundary: int
    parts: int = 1
    fidelity: str = "exact"
    inexact: bytes = b""


class Reservation(_Extents, frozen=True):
    """Room to write chunks that the cache lacks.

    Attributes:
        chunks: absolute chunk numbers in the request, ascending; those that exist or find no room are left out.
    """

    chunks: tuple[int, ...]


class PoolStats(msgspec.Struct, frozen=True):
    """Bytes; ``free + used + quarantined == total``."""

    total_bytes: int
    free_bytes: int
    used_bytes: int
    quarantined_bytes: int
    largest_free_bytes: int


class TierStats(msgspec.Struct, frozen=True):
    """``breaker`` is ``open`` while a tier that failed is left alone; ``capacity_bytes`` 0 = unbounded or unknown;
    ``write`` says when it is written to, ``unwritten_bytes`` what is to be, now or later.
    """

    name: str
    records: int
    used_bytes: int
    capacity_bytes: int
    breaker: str
    write: str = "through"
    unwritten_bytes: int = 0


class PairStats(msgspec.Struct, frozen=True):
    """Two producers of a namespace whose chunks have been, or could be, compared.

    Attributes:
        state: ``checking``; ``open``: each is served the other's chunks; ``closed``: they disagreed, and are not.
        compared, failed: chunks.
        depth: up to which position of a request chunks are served, in tokens.
        worst: by role (``k``, ``v``, ``latent``), the largest relative error of a head so far.
        why: they cannot be compared.
    """

    namespace: str
    producers: tuple[str, str]
    state: str
    compared: int = 0
    failed: int = 0
    depth: int = 0
    worst: dict[str, float] = {}
    why: str = ""


class Stats(msgspec.Struct, frozen=True):
    """``counters`` are totals since start, named as the Prometheus metrics are."""

    pool: PoolStats
    chunks: int
    leases: int
    tiers: tuple[TierStats, ...]
    counters: dict[str, float]
    pairs: tuple[PairStats, ...] = ()


class Cache(Protocol):
    """Thread-safe. LocalCache (a private Store) or DaemonCache (a daemon's), and no adapter knows which."""

    @property
    def namespace(self) -> Namespace: ...

    @property
    def producer(self) -> Producer: ...

    def lookup(self, rid: str, chain: Chain, *, over: Part = WHOLE, prefetch: bool = True) -> Lookup:
        """The longest restorable prefix. Idempotent per request id, bounded time; starts fetching what only a tier has.

        Args:
            rid: names the request in all later calls.
            over: what the asker holds; a prefix counts only if all its cells are there.
            prefetch: False = count only what is in the pool already.
        """
        ...

    def wait(self, rid: str, timeout_s: float, *, settle: bool = True) -> Lookup:
        """Block until the request's lookup is no longer PENDING, or to the deadline.

        Args:
            settle: at the deadline take the part that is there; False = leave it PENDING.
        """
        ...

    def claim(self, rid: str, boundary: int, *, first: int = 0, parts: int = 1) -> Ticket | None:
        """Lease chunks ``first .. boundary - 1`` of a READY lookup; None if it is not, or no longer, READY."""
        ...

    def take(self, ticket: Ticket, part: int = 0) -> bool:
        """Before a process copies a part of a ticket that another process may have claimed; False: it must not.

        From here on the part is this process's to release.
        """
        ...

    def release(self, ticket: Ticket, part: int = 0) -> None:
        """Give one part of a ticket back. Idempotent."""
        ...

    def forget(self, rid: str) -> None:
        """The request has ended: drop its holds. Tickets stay valid until they are released."""
        ...

    # The lower half: for the connector and the tools.

    def reserve(self, rid: str, chain: Chain, first: int, count: int, part: Part = WHOLE) -> Reservation | None:
        """Room for those of chunks ``first .. first + count - 1`` that are not there yet; None if there are none."""
        ...

    def publish(self, reservation: Reservation, chunks: Sequence[int] | None = None) -> None:
        """Make written chunks readable (all of the reservation by default); the others of it are aborted."""
        ...

    def abort(self, reservation: Reservation) -> None:
        """Give reserved room back unwritten."""
        ...

    def segments(self, boot: str) -> Sequence[Bytes]:
        """The pool's memory, uint8 [nbytes] a segment, as it was for tickets of this ``boot``; () if that is gone."""
        ...

    def pin(self, chain: Chain, ttl_s: float) -> int:
        """Keep the chunks of the chain that are in the pool from eviction; the answer is how many."""
        ...

    def delete(self, chain: Chain) -> int:
        """Remove the chunks of the chain, from the tiers too; the answer is how many were removed from the pool."""
        ...

    def clear(self) -> int | None:
        """Remove all chunks of this namespace and producer; the answer is how many, or None: some may be left."""
        ...

    def stats(self) -> Stats: ...

    def drain(self, timeout_s: float) -> bool:
        """Block until what was published has reached the tiers; False if that did not happen in time."""
        ...

    def close(self, timeout_s: float = 10.0) -> None:
        """Drain, then release everything. Idempotent."""
        ...


class Transfer(Protocol):
    """A copy between the pool and engine memory, under way or ended."""

    def done(self) -> bool: ...

    def wait(self, timeout_s: float) -> bool:
        """Block until it has ended; False if it has not by then."""
        ...

    def failed_chunks(self) -> Sequence[int]:
        """Absolute numbers of the chunks that were not copied, ascending. Meaningful once done."""
        ...

    def ready_on(self, layer: int, stream: Any) -> None:
        """Make a device stream wait for one layer of a load. On CPU there are no streams: use ``wait_layer``."""
        ...

    def wait_layer(self, layer: int, timeout_s: float) -> bool:
        """Block until one layer of a load is in place; False = it failed or is late."""
        ...

    def cancel(self) -> None:
        """Start no further copies; what has not been copied counts as failed. Chunks under way are finished."""
        ...
