"""The one shell around the core: the pool's memory, the tiers, their threads and deadlines, checksums and codecs.

Calls of adapters run in their own threads and never wait for a tier; tiers are served by I/O threads of their own, so
that a slow one delays nobody else. One lock guards the core; no backend is called and no byte copied under it.
"""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Callable, Container, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, TypeVar

import msgspec
import numpy as np

from lmcache_sdk.adoption import Described, adopt, end_earlier_life, remembered, room_of, write_journal
from lmcache_sdk.api import Lookup, LookupState, PoolStats, Reservation, Stats, Ticket, TierStats
from lmcache_sdk.backend import Backend, RegisterMemory, Scan, Touch
from lmcache_sdk.config import Tenant
from lmcache_sdk.core import (
    Action,
    Core,
    DeleteRecords,
    Derived,
    Entry,
    Job,
    JobKind,
    Limits,
    Probe,
    Removed,
    Request,
    RequestState,
    Reserved,
    Resolved,
    Space,
    StartJob,
    Stored,
)
from lmcache_sdk.core.extents import SEGMENT_SHIFT, Extents
from lmcache_sdk.errors import BackendError, BackendFull, ConfigError, UnsupportedError
from lmcache_sdk.eviction import QUEUES, Fair, Policy
from lmcache_sdk.janitor import Janitor
from lmcache_sdk.jobs import Jobs, OpenSpace, Tier
from lmcache_sdk.keys import EXACT, FOREIGN, Chain, Origin
from lmcache_sdk.observe.events import EventLog
from lmcache_sdk.observe.logs import logger
from lmcache_sdk.observe.metrics import Metrics
from lmcache_sdk.pool import Pool, PrivatePool, extent_bytes, segment_sizes
from lmcache_sdk.producers import Producers, is_own
from lmcache_sdk.records import HEADER_BYTES
from lmcache_sdk.sharing import LEAVE_OUT, NAME, is_name
from lmcache_sdk.spec import Namespace, Producer, Share
from lmcache_sdk.workers import KnownUsage, Worker

if TYPE_CHECKING:
    from lmcache_sdk.pool.journal import Journal, Recovered

_log = logger("store")
_T = TypeVar("_T")

_TICK_S = 0.1
_CLEARED_AT_ONCE = 128
_TOUCHES = 64  # that wait for one tier; beyond it uses are not counted
_PROMPT_TOKENS = 4096  # a pool that does not hold one prompt of this length is told at start

_STATES = {
    RequestState.WALKING: LookupState.PENDING,
    RequestState.PENDING: LookupState.PENDING,
    RequestState.READY: LookupState.READY,
    RequestState.MISS: LookupState.MISS,
    RequestState.CLAIMED: LookupState.READY,
}


class Store:
    """A pool over tiers.

    Args:
        tiers: fastest first. They are closed with the store.
        pool: memory for chunks; it stays the caller's, who closes it after the store. What an earlier life left in it
            is adopted.
        pool_bytes: without a pool: the size of a private one.
        limits: deadlines and bounds.
        tenants: what each may have of the pool; by default all have the same share.
        eviction: what of a tenant's to evict first, one of :data:`~lmcache_sdk.eviction.QUEUES`.
        policy: instead of these two: what to evict first, and who may have room.
        keep_pool: a shared pool is there for the next life, so that what is only in it need not be written at the end.

    Attributes:
        boot: this life of the store.
        on_change: called, from any thread, whenever a lookup may have been answered or a write has ended.

    Raises:
        ConfigError: two tiers of one name, or a pool too small.
        UnsupportedError: a lossy codec.
        BackendError: a tier refuses to work with the pool's memory.
    """

    def __init__(
        self,
        tiers: Sequence[Tier] = (),
        *,
        pool: Pool | None = None,
        pool_bytes: int = 1 << 30,
        limits: Limits | None = None,
        tenants: Mapping[str, Tenant] | None = None,
        eviction: str = "lru",
        policy: Policy[Entry] | None = None,
        keep_pool: bool = True,
    ) -> None:
        if len({tier.name for tier in tiers}) != len(tiers):
            raise ConfigError(f"tiers need different names, got {', '.join(tier.name for tier in tiers)}")
        for tier in tiers:
            if not tier.codec.lossless:
                raise UnsupportedError(f"codec {tier.codec.name!r} is lossy, which is not served yet")
        self.pool: Pool = pool if pool is not None else PrivatePool(segment_sizes(pool_bytes))
        self.on_change: Callable[[], None] = lambda: None
        self.events = EventLog()
        self.metrics = Metrics(self._totals)
        self.boot = uuid.uuid4().hex
        self.tiers = list(tiers)
        self._tier_names = [tier.name for tier in tiers]
        self._lookups = {result: self.metrics.lookups.labels(result) for result in ("hit", "miss")}
        self._tokens = {s: self.metrics.lookup_tokens.labels(s) for s in ("pool", *self._tier_names, "none")}
        self._journal = self.pool.journal
        limits = limits or Limits()
        self._core = Core(
            Extents(self.pool.sizes),
            [(tier.name, tier.backend.instant) for tier in tiers],
            rules=[tier.rules for tier in tiers],
            limits=limits,
            policy=policy if policy is not None else _fair(sum(self.pool.sizes), tenants or {}, eviction),
            seal=bool(tiers) or self._journal is not None,
        )
        self._keeps_pool = keep_pool and self._journal is not None
        self._register_memory()
        self._spaces: dict[Space, OpenSpace] = {}
        self._jobs = Jobs(self.pool, self.tiers, self._spaces, self.metrics)
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._tasks = 0  # writes that are no jobs: manifests, deletions
        self._closed = False
        self._stop = threading.Event()
        self._busy = threading.Event()
        self._sealer = Worker("seal")
        self._producers = Producers(
            self._core,
            self._spaces,
            self.pool,
            self.metrics,
            event=self._event,
            open_space=self._open,
            wait=self.wait,
            write=self._write_to_all,
        )
        self._readers = [Worker(f"{tier.name}-read", limits.readers) for tier in tiers]
        self._writers = [Worker(f"{tier.name}-write") for tier in tiers]
        # Not the readers: whether a chunk is there is known long before the loads that wait in line.
        self._probers = {
            index: Worker(f"{tier.name}-probe", limits.readers)
            for index, tier in enumerate(tiers)
            if not tier.backend.instant
        }
        self._usage = [KnownUsage(tier.backend, writer) for tier, writer in zip(tiers, self._writers, strict=True)]
        for usage in self._usage:
            usage.refresh(time.monotonic())
        self._timer = threading.Thread(target=self._keep_time, name="lmcache-timer", daemon=True)
        self._timer.start()
        self._prefault = threading.Thread(
            target=self.pool.prefault, args=(self._stop,), name="lmcache-prefault", daemon=True
        )
        self._prefault.start()
        self._janitors = [
            Janitor(
                tier.name,
                tier.backend,
                size=tier.size,
                ttl_s=tier.ttl_s,
                keep=self._has,
                on_error=partial(self._tier_error, index),
            )
            for index, tier in enumerate(tiers)
            if tier.size or tier.ttl_s
        ]
        self._recovered: list[Recovered] = []
        if self._journal is not None:
            self._adopt(self._journal)

    # For adapters, through a Cache

    def open_space(self, namespace: Namespace, producer: Producer) -> OpenSpace:
        """Serve a namespace and producer; writes their descriptions to the tiers in the background.

        Raises:
            ConfigError: one chunk does not fit the pool, or a producer whose name is too long or cannot be printed.
        """
        if not is_name(producer):
            raise ConfigError(f"a producer is {NAME} printable characters at most, got {producer.name[:NAME]!r}")
        with self._lock:
            opened = self._open(namespace, producer)
        self._producers.meet_when_due(opened, time.monotonic())
        return opened

    def lookup(
        self,
        opened: OpenSpace,
        rid: str,
        chain: Chain,
        *,
        share: Share = Share.OWN,
        prefetch: bool = True,
        total: int = 0,
    ) -> Lookup:
        """See :meth:`Core.lookup` for ``total``."""
        if chain.chunk_tokens != opened.spec.chunk_tokens:
            return Lookup(
                LookupState.MISS, why=f"chunks of {chain.chunk_tokens} tokens, not {opened.spec.chunk_tokens}"
            )
        if self._closed:
            return Lookup(LookupState.MISS, why="closed")
        now = time.monotonic()
        if share is not Share.OWN:
            self._producers.meet_when_due(opened, now)

        def lookup() -> Request:
            return self._core.lookup(
                opened.space,
                rid,
                chain,
                now,
                prefetch=prefetch,
                total=total,
                others=self._producers.sources(opened, chain, share),
                leave_out=LEAVE_OUT if share is Share.VERIFIED else 0,
            )

        return self._answer(self._event(lookup))

    def wait(self, rid: str, timeout_s: float, *, settle: bool = True) -> Lookup:
        deadline = time.monotonic() + timeout_s
        with self._lock:
            request = self._core.requests.get(rid)
            if request is None:
                return Lookup(LookupState.MISS, why="no such request")
            while _STATES[request.state] is LookupState.PENDING:
                left = deadline - time.monotonic()
                if left <= 0 or not self._changed.wait(left):
                    break
        if settle and _STATES[request.state] is LookupState.PENDING:
            self._event(lambda: self._core.hurry(rid, time.monotonic()))
        return self._answer(request)

    def claim(self, rid: str, boundary: int, first: int, parts: int) -> Ticket | None:

        def claim() -> tuple[int, list[Entry], Request, list[tuple[OpenSpace, Entry]]] | None:
            claimed = self._core.claim(rid, boundary, first, parts, time.monotonic())
            if claimed is None:
                return None
            request = self._core.requests[rid]
            used = [(self._spaces[last.space], last) for last in request.last_of_runs(boundary)]
            return (*claimed, request, used)

        claimed = self._event(claim)
        if claimed is None:
            return None
        lease, entries, request, used = claimed
        self._touch_tiers(used)
        foreign = request.foreign(first, boundary)
        return Ticket(
            lease=lease,
            boot=self.boot,
            cells=tuple(range(len(entries[0].extents))),
            extents=_places([address for entry in entries for address in entry.extents]),
            first=first,
            boundary=boundary,
            parts=parts,
            fidelity=FOREIGN if foreign else EXACT,
            inexact=request.chain.digests(boundary)[foreign[0].start] if foreign else b"",
        )

    def release(self, ticket: Ticket, part: int) -> None:
        if ticket.boot == self.boot:
            self._event(lambda: self._core.release(ticket.lease, part))

    def forget(self, rid: str) -> None:
        self._event(lambda: self._core.forget(rid))
        self._tell_change()  # whoever waits for it

    def reserve(
        self,
        opened: OpenSpace,
        digests: Sequence[bytes],
        first: int,
        cells: tuple[int, ...],
        *,
        parent: bytes | None,
        tenant: str,
        positions_known: bool,
        inexact: int | None = None,
        share: Share = Share.OWN,
    ) -> Reservation | None:
        """See :class:`~lmcache_sdk.daemon.protocol.Reserve` for ``inexact``."""
        if self._closed:
            return None

        def reserve() -> tuple[int, Reserved] | None:
            derived, wanted = None, digests
            if inexact is not None:
                room = self._producers.derived(opened, share)
                if room is None:  # nobody would read it
                    wanted = digests[: max(0, inexact - first)]
                else:
                    others = (opened, *self._producers.sharing.others(opened))
                    derived = Derived(inexact, room.space, [other.space for other in others])
            return self._core.reserve(
                opened.space,
                wanted,
                first,
                cells,
                time.monotonic(),
                parent=parent,
                tenant=tenant,
                chunk_tokens=opened.spec.chunk_tokens if positions_known else 0,
                derived=derived,
            )

        answer = self._event(reserve)
        if answer is None:
            return None
        lease, reserved = answer
        addresses = []
        for number, entry in reserved.entries.items():
            mine = reserved.cells[number]
            # A cell that somebody else writes, or has written, has no place in this reservation.
            addresses += [entry.extents[cell] if cell in mine else None for cell in cells]
        return Reservation(
            lease=lease,
            boot=self.boot,
            cells=cells,
            extents=_places(addresses),
            chunks=tuple(reserved.entries),
        )

    def publish(self, reservation: Reservation, chunks: Sequence[int] | None) -> None:
        if reservation.boot == self.boot:
            self._event(lambda: self._core.publish(reservation.lease, chunks, time.monotonic()))

    def abort(self, reservation: Reservation) -> None:
        if reservation.boot == self.boot:
            self._event(lambda: self._core.abort(reservation.lease))

    def pin(self, opened: OpenSpace, digests: Sequence[bytes], ttl_s: float) -> int:
        return self._event(lambda: self._core.pin(opened.space, digests, time.monotonic() + ttl_s))

    def delete(self, opened: OpenSpace, digests: Sequence[bytes]) -> int:
        if self._closed:
            return 0
        return self._event(
            lambda: sum(self._core.delete(space, digests) for space in self._producers.spaces_of(opened))
        )

    def clear(self, opened: OpenSpace) -> int:
        """Remove the space's chunks from the pool at once and from the tiers that can list theirs in the background."""
        total, removed = 0, _CLEARED_AT_ONCE
        while removed == _CLEARED_AT_ONCE:
            removed = self.clear_some(opened)
            total += removed
        return total

    def clear_some(self, opened: OpenSpace) -> int:
        """As much of :meth:`clear` as delays nobody else; to be repeated until the answer is 0."""
        if self._closed:
            return 0

        def clear() -> int:
            removed = 0
            for space in self._producers.spaces_of(opened):
                if removed < _CLEARED_AT_ONCE:
                    removed += self._core.clear(space, _CLEARED_AT_ONCE - removed)
            return removed

        return self._event(clear)

    def stats(self) -> Stats:
        """Without waiting: what a tier says of itself is what it said last, after the last write if that was a second
        ago; one that has not said yet has zeros.
        """
        with self._lock:
            extents = self._core.extents
            pool = PoolStats(
                extents.total_bytes,
                extents.free_bytes,
                extents.used_bytes,
                extents.quarantined_bytes,
                extents.largest_free_bytes,
            )
            chunks = sum(len(space.entries) for space in self._core.spaces.values())
            leases = len(self._core.leases)
            states = [(state.breaker.state, state.queued_bytes + state.waiting_bytes) for state in self._core.tiers]
        metrics = self.metrics
        for state in ("free", "used", "quarantined"):
            metrics.pool_bytes.labels(state).set(getattr(pool, f"{state}_bytes"))
        metrics.pool_largest_free_bytes.set(pool.largest_free_bytes)
        metrics.pool_chunks.set(chunks)
        metrics.leases.set(leases)
        tiers = []
        for tier, known, (breaker, unwritten_bytes) in zip(self.tiers, self._usage, states, strict=True):
            known.changed()  # others may write to it as well
            usage = known.report
            numbers = (usage.records, usage.used_bytes, usage.capacity_bytes) if usage else (0, 0, 0)
            tiers.append(TierStats(tier.name, *numbers, breaker, tier.rules.write.value, unwritten_bytes))
            if usage:
                metrics.tier_records.labels(tier.name).set(usage.records)
                metrics.tier_used_bytes.labels(tier.name).set(usage.used_bytes)
                metrics.tier_capacity_bytes.labels(tier.name).set(usage.capacity_bytes)
            metrics.tier_breaker_open.labels(tier.name).set(breaker == "open")
            metrics.tier_unwritten_bytes.labels(tier.name).set(unwritten_bytes)
        self._busy.set()
        with self._lock:
            pairs = self._producers.sharing.stats()
        for state in ("checking", "open", "closed"):
            metrics.pairs.labels(state).set(sum(pair.state == state for pair in pairs))
        return Stats(pool, chunks, leases, tuple(tiers), metrics.values(), pairs)

    def drain(self, timeout_s: float) -> bool:
        deadline = time.monotonic() + timeout_s
        while not self.drained():
            with self._lock:
                left = deadline - time.monotonic()
                if left <= 0:
                    return False
                if not self._written():
                    self._changed.wait(min(left, _TICK_S))  # what is sealed meanwhile may have to be flushed as well
        return True

    def close(self, timeout_s: float = 10.0) -> bool:
        """Write what is not yet in the tiers, and end; idempotent.

        False if a call that reads a tier or writes to it has not returned by then. It may still use the pool's memory:
        leave the pool open then, so that nobody else gets that before this process ends. May be asked again.
        """
        if not self._closed:
            self._end(time.monotonic() + timeout_s)
        return not self._in_use()

    def _workers(self) -> list[Worker]:
        return [self._producers.overlap.worker, self._sealer, *self._readers, *self._writers, *self._probers.values()]

    def _in_use(self) -> bool:
        """Whether a call that has not returned may use the pool's memory; to ask a tier what it has takes none."""
        probers = self._probers.values()
        return any(worker.alive for worker in self._workers() if worker not in probers)

    def _give_up_requests(self) -> None:
        """Nobody waits any longer for a tier that hangs; nor does it get room when it answers after all."""

        def forget() -> None:
            for rid in list(self._core.requests):
                self._core.forget(rid)

        self._event(forget)
        self._tell_change()

    def _end(self, deadline: float) -> None:
        self._producers.end()
        if not self._keeps_pool:
            self._event(lambda: self._core.writing.leave_all(self._core.spaces.values()))
        if not self.drain(deadline - time.monotonic()):
            with self._lock:
                left = [f"{job.kind.value} {len(job.entries)} chunks" for job in self._core.jobs.values()]
            _log.warning("closed with unfinished writes: %d tasks, %s", self._tasks, left)
        self._closed = True
        self._give_up_requests()
        self._stop.set()
        self._busy.set()
        self._timer.join()
        self._prefault.join()
        for worker in self._workers():
            worker.stop()
        for janitor in self._janitors:
            janitor.stop(deadline)
        for worker in self._workers():
            worker.join(deadline)
        in_use = self._in_use()
        for tier in self.tiers:
            try:
                if isinstance(tier.backend, RegisterMemory) and not in_use:
                    for segment in self.pool.segments:
                        tier.backend.unregister_memory(segment.data)
                tier.backend.close(max(0.1, deadline - time.monotonic()))
            except BackendError as error:
                _log.warning("closing %s: %s", tier.name, error)

    # For a daemon

    def drained(self) -> bool:
        """Whether all that was published has reached the tiers; what waits for later starts on its way now."""
        if self._core.writing.waiting:
            self._event(lambda: self._core.writing.flush(time.monotonic()))
        with self._lock:
            return self._written()

    def _written(self) -> bool:
        reading = all(job.kind is JobKind.FETCH for job in self._core.jobs.values())
        return reading and not self._tasks and not self._core.writing.waiting

    def found(self, rid: str) -> tuple[Lookup, int]:
        """The state of a request's lookup, without waiting; and how many chunks from the front were found, loaded or
        not (all of them while a tier is still being asked).
        """
        with self._lock:
            request = self._core.requests.get(rid)
        if request is None:
            return Lookup(LookupState.MISS, why="no such request"), 0
        walked = request.length if request.state is RequestState.WALKING else len(request.entries)
        return self._answer(request), walked

    def hurry(self, rid: str) -> None:
        """Answer a pending lookup with what is in the pool already."""
        self._event(lambda: self._core.hurry(rid, time.monotonic()))

    def digests_of(self, rid: str) -> list[bytes]:
        """The digests that a request's lookup was given."""
        with self._lock:
            request = self._core.requests.get(rid)
        return request.chain.digests() if request is not None else []

    def release_part(self, lease: int, part: int) -> bool:
        """Give one part of a lease back; True if that was the last."""

        def release() -> bool:
            self._core.release(lease, part)
            return lease not in self._core.leases

        return self._event(release)

    def publish_lease(self, lease: int, chunks: Sequence[int] | None) -> None:
        """See ``publish``."""
        self._event(lambda: self._core.publish(lease, chunks, time.monotonic()))

    @property
    def space_count(self) -> int:
        """Namespaces, each with a producer, that are open."""
        return len(self._spaces)

    def close_spaces(self, but: Container[OpenSpace]) -> None:
        """Forget all that have no chunks in the pool but these, whose users are about."""
        with self._lock:
            self._close_spaces([space for space, opened in self._spaces.items() if opened not in but])

    def describe_spaces(self) -> list[dict[str, str | int]]:
        """What is open, for people."""
        with self._lock:
            return [
                {
                    "namespace": opened.namespace.id,
                    "model": opened.namespace.label,
                    "producer": opened.producer.name,
                    "fidelity": opened.space.origin.fidelity,
                    "chunks": len(opened.space.entries),
                    "chunk_bytes": opened.space.chunk_bytes,
                }
                for opened in self._spaces.values()
            ]

    def count_to_root(self, opened: OpenSpace, digests: Sequence[bytes]) -> int:
        """Chunks that a pin of these would keep from eviction: the prefix that is there, and all that it follows."""
        with self._lock:
            return self._core.count_to_root(opened.space, digests)

    def reopen(self, namespace: str, producers: tuple[str, str]) -> bool:
        """Compare two producers of a namespace anew, by their names, that disagreed; False if they are not closed."""
        return not self._closed and self._producers.reopen(namespace, producers)

    def tenant_bytes(self) -> dict[str, int]:
        """Bytes in the pool by tenant."""
        with self._lock:
            return dict(self._core.usage)

    def abort_lease(self, lease: int) -> None:
        """Give back a reservation: its holder is gone."""
        self._event(lambda: self._core.abort(lease))

    def end_earlier_life(self) -> None:
        """No client of an earlier life of the pool reads or writes it any more."""
        journal, recovered = self._journal, self._recovered
        if journal is not None and recovered:
            self._recovered = []
            self._event(lambda: end_earlier_life(self._core, journal, recovered))

    def _open(self, namespace: Namespace, producer: Producer, fidelity: str = EXACT) -> OpenSpace:
        """``open_space`` without a word to anybody. The lock is held."""
        origin, spec = Origin(namespace.id, producer.id, fidelity), namespace.spec
        known = self._core.spaces.get(origin)
        if known is not None and known in self._spaces:
            return self._spaces[known]
        spec.validate()
        sizes = [extent_bytes(cell.nbytes) for cell in spec.cells]
        if sum(sizes) > max(self.pool.sizes):
            raise ConfigError(
                f"one chunk has {sum(sizes)} bytes, the pool {sum(self.pool.sizes)}; "
                f"raise pool_bytes or lower chunk_tokens ({spec.chunk_tokens})"
            )
        space = self._core.open_space(origin, sizes, spec.chunk_tokens)
        opened = self._spaces[space] = OpenSpace(space, namespace, producer)
        space.block_chunks = max((opened.most_chunks(tier) for tier in self.tiers), default=1)
        if fidelity == EXACT:
            self._producers.sharing.join(opened)
        if self._journal is not None:
            self._journal.save_space(_described(opened))
        room = sum(self.pool.sizes) // sum(sizes) * spec.chunk_tokens
        if room < _PROMPT_TOKENS and fidelity == EXACT:
            _log.warning(
                "the pool holds %d tokens of %s, less than one prompt of %d: of little use; raise pool_bytes",
                room, namespace.label or namespace.id, _PROMPT_TOKENS,
            )  # fmt: skip
        return opened

    def _close_spaces(self, spaces: Sequence[Space]) -> None:
        """Those without chunks or users. The lock is held."""
        for space in self._core.close_spaces(spaces):
            self._producers.sharing.leave(self._spaces.pop(space))
        if self._journal is not None:
            self._journal.keep_spaces([*map(_described, self._spaces.values()), *self._producers.verdicts()])

    def _adopt(self, journal: Journal) -> None:
        """Take over what an earlier life left; nobody else uses the store yet."""
        rooms = {}
        self._producers.remember(journal.recovered_spaces)
        for space in remembered(journal.recovered_spaces, Described):
            namespace = space.namespace
            try:
                opened = self._open(namespace, space.producer, space.fidelity)
            except (ConfigError, UnsupportedError) as error:
                _log.warning("not adopted: chunks of %s: %s", namespace.label or namespace.id, error)
                continue
            rooms[opened.space.origin] = room_of(opened.space, namespace)
        self._recovered, journal.recovered = journal.recovered, []
        self._core.extents.most = journal.capacity
        count = adopt(self._core, self.pool, self._recovered, rooms)
        self._close_spaces(list(self._spaces))
        for opened in list(self._spaces.values()):
            self._producers.meet(opened)
        self._core.extents.log = []
        if self._recovered:
            _log.info("adopted %d chunks from an earlier life of the pool", count)

    def _register_memory(self) -> None:
        for tier in self.tiers:
            if isinstance(tier.backend, RegisterMemory):
                for segment in self.pool.segments:
                    tier.backend.register_memory(segment.data)

    def _has(self, key: str) -> bool:
        """Whether a record's chunk is in the pool."""
        namespace, producer, fidelity, digest, *_ = (*key.split("/"), "", "", "", "")
        space = self._core.spaces.get(Origin(namespace, producer, fidelity))
        try:
            return space is not None and bytes.fromhex(digest) in space.entries
        except ValueError:
            return False

    def check_integrity(self) -> None:
        with self._lock:
            self._core.check_integrity()

    # The core's actions

    def _event(self, call: Callable[[], _T]) -> _T:
        """Give the core an event and carry out what it answers."""
        with self._lock:
            answer = call()
            core = self._core
            if core.extents.log and self._journal is not None:
                write_journal(self._journal, core.extents.log)
            # A router must hear of a chunk in the order in which things happened to it: so that is under the lock.
            changed = bool(core.actions)
            actions = [action for action in core.actions if not self._tell(action)]
            core.actions.clear()
            if changed:
                self._changed.notify_all()
            if core.waits and not self._busy.is_set():
                self._busy.set()
        self._carry_out_all(actions)
        if changed:
            self.on_change()
        return answer

    def _carry_out_all(self, actions: list[Action]) -> None:
        """None may be lost, whatever comes in between (an interrupt, say): what is left is for the next event. But one
        that fails would fail in every later event, too.
        """
        done = 0
        try:
            for action in actions:
                try:
                    self._carry_out(action)
                except Exception:  # noqa: BLE001 - any call may run into it, and is not what failed
                    _log.exception("%s failed", type(action).__name__)
                done += 1
        finally:
            if done < len(actions):
                with self._lock:
                    self._core.actions[:0] = actions[done:]

    def _carry_out(self, action: Action) -> None:
        match action:
            case StartJob(job):
                if job.kind is JobKind.SEAL:
                    self._sealer.submit(lambda: self._run(job, self._jobs.seal))
                elif job.kind is JobKind.VERIFY:
                    self._sealer.submit(lambda: self._run(job, self._jobs.verify))
                elif job.kind is JobKind.FETCH:
                    self._readers[job.tier].submit(lambda: self._run(job, self._jobs.fetch))
                else:
                    self._writers[job.tier].submit(lambda: self._run(job, self._jobs.put))
            case Probe():
                if self.tiers[action.tier].backend.instant:
                    self._probe(action)
                else:
                    self._probers[action.tier].submit(lambda: self._probe_if_wanted(action))
            case Resolved(request):
                self._count(request)
                self._producers.found(request)
            case DeleteRecords():
                self._delete_records(action)

    def _tell(self, action: Action) -> bool:
        """Whether that was all there is to do about it."""
        match action:
            case Stored(origin, digest, parent):
                self.events.add(stored=True, namespace=origin.namespace, digest=digest, parent=parent or b"")
                return True
            case Removed(origin, digest, reason, since):
                if since:
                    self.metrics.residence_seconds.labels(reason).observe(time.monotonic() - since)
                self.events.add(stored=False, namespace=origin.namespace, digest=digest, reason=reason)
                return True
        return False

    def _run(self, job: Job, work: Callable[[Job], list[bool]]) -> None:
        """One job, in a worker's thread. Whatever happens, the core is told that it has ended."""
        results, failed = [False] * len(job.entries), False
        with self._lock:
            if job.started or job.id not in self._core.jobs:
                return  # an interrupt came between submitting it and noting that
            self._core.job_started(job, time.monotonic())
        try:
            if not job.abandoned:
                results = work(job)
        except BackendFull as error:
            self._tier_error(job.tier, error)
        except Exception as error:  # noqa: BLE001 - a backend is other people's code
            failed = True
            self._tier_error(job.tier, error)
        self._event(lambda: self._core.job_done(job, results, time.monotonic(), failed=failed))
        if job.kind is JobKind.SEAL:
            self._producers.stored(job.entries)
        if job.kind is JobKind.PUT:
            self._usage[job.tier].changed()
            self._busy.set()
        self._tell_change()

    def _tell_change(self) -> None:
        with self._lock:
            self._changed.notify_all()
        self.on_change()

    def _tier_error(self, tier: int, error: Exception) -> None:
        name = self.tiers[tier].name if tier >= 0 else "pool"
        self.metrics.tier_errors.labels(name, type(error).__name__).inc()
        _log.warning("%s: %s: %s", name, type(error).__name__, error, exc_info=not isinstance(error, BackendError))

    def _probe_if_wanted(self, probe: Probe) -> None:
        """In a thread of the tier's, which may have been long in coming."""
        with self._lock:
            wanted = self._core.probe_started(probe, time.monotonic())
        if wanted:
            self._probe(probe)

    def _probe(self, probe: Probe) -> None:
        request = probe.request
        count, step, failed = 0, 1, False
        try:
            opened = self._spaces[probe.source.space]
            while (at := probe.start + count) < probe.source.reach:
                present = self._jobs.present(probe.tier, opened, request.chain, at, step)
                count += present
                if present < step:
                    break
                step *= 4
        except Exception as error:  # noqa: BLE001 - as in _run
            failed = True
            self._tier_error(probe.tier, error)
        self._event(lambda: self._core.probed(probe, count, time.monotonic(), failed=failed))

    def _touch_tiers(self, used: Sequence[tuple[OpenSpace, Entry]]) -> None:
        """A hit in the pool is a use for the tiers as well; else they evict what is used most. ``used``: the last chunk
        of each run, deepest first.
        """

        def touch(backend: Backend) -> None:
            if isinstance(backend, Touch):
                backend.touch([key for opened, last in used for key in self._jobs.keys_to_root(opened, last)])

        for index, tier in enumerate(self.tiers):
            if isinstance(tier.backend, Touch) and self._writers[index].waiting < _TOUCHES:
                self._write_task(index, touch)

    def _delete_records(self, action: DeleteRecords) -> None:
        with self._lock:
            opened = self._spaces[self._core.spaces[action.origin]]

        def delete(tier: int, backend: Backend) -> None:
            if action.digests is not None:
                self._jobs.delete(tier, opened, action.digests)
            elif isinstance(backend, Scan):
                backend.delete([stat.key for stat in backend.scan(action.origin.prefix())])

        for index in range(len(self.tiers)):
            self._write_task(index, partial(delete, index), lambda: self._core.records_deleted(action))

    def _write_task(
        self, tier: int, task: Callable[[Backend], object], then: Callable[[], None] = lambda: None
    ) -> None:
        """Something else for a tier's writer, in order with its puts; the core is told when it has ended."""

        def ended() -> None:
            self._tasks -= 1
            then()

        def run() -> None:
            try:
                task(self.tiers[tier].backend)
            except Exception as error:  # noqa: BLE001 - as in _run
                self._tier_error(tier, error)
            finally:
                self._event(ended)
                self._usage[tier].changed()
                self._busy.set()
                self._tell_change()

        with self._lock:
            self._tasks += 1
        self._writers[tier].submit(run)

    def _write_to_all(self, task: Callable[[Backend], object]) -> None:
        for index in range(len(self.tiers)):
            self._write_task(index, task)

    def _keep_time(self) -> None:
        """Tick while there is anything that can expire, or a tier to be asked; sleep while there is not."""
        while not self._stop.wait(_TICK_S):
            self._busy.wait()
            with self._lock:
                self._busy.clear()
            now = time.monotonic()
            self._event(partial(self._core.tick, now))
            for usage in self._usage:
                usage.refresh(now)
                if usage.stale:
                    self._busy.set()

    def _answer(self, request: Request) -> Lookup:
        state = _STATES[request.state]
        if state is LookupState.PENDING:
            eta_s = self._core.eta_s(request, time.monotonic()) if request.pending else None
            found = request.limit if request.pending else 0
            return Lookup(state, why=request.why, found=found, missing=request.pending, eta_s=eta_s)
        if state is LookupState.MISS:
            return Lookup(state, why=request.why)
        sources = request.sources(self._tier_names)
        return Lookup(state, range(1, request.limit + 1), request.why, sources)

    def _count(self, request: Request) -> None:
        """Once for each lookup: its tokens by where they were found."""
        if request.limit == request.length < request.total or is_own(request):
            return  # the rest of the prompt follows; or it is nobody's
        chunk_tokens = request.chain.chunk_tokens
        self.metrics.lookup_seconds.observe(time.monotonic() - request.started)
        self._lookups["hit" if request.limit else "miss"].inc()
        if request.limit:
            for source, chunks in request.sources(self._tier_names).items():
                self._tokens[source].inc(chunks * chunk_tokens)
        self._tokens["none"].inc((request.total - request.limit) * chunk_tokens)

    def _totals(self) -> dict[str, int]:
        with self._lock:
            return dict(self._core.counters)


def _fair(pool_bytes: int, tenants: Mapping[str, Tenant], eviction: str) -> Fair[Entry]:
    return Fair(
        pool_bytes,
        weights={name: tenant.weight for name, tenant in tenants.items()},
        quotas={name: tenant.quota for name, tenant in tenants.items() if tenant.quota},
        queue=QUEUES[eviction],
    )


def _described(opened: OpenSpace) -> bytes:
    """For the journal."""
    return msgspec.json.encode(Described(opened.namespace, opened.producer, opened.space.origin.fidelity))


def _places(addresses: Sequence[int | None]) -> bytes:
    """Addresses of extents as int64 [n, 2]: segment, offset of the payload; segment -1 where there is none."""
    flat = np.array([-1 if address is None else address for address in addresses], dtype="<i8")
    places = np.empty((len(flat), 2), dtype="<i8")
    places[:, 0] = flat >> SEGMENT_SHIFT
    places[:, 1] = (flat & ((1 << SEGMENT_SHIFT) - 1)) + HEADER_BYTES
    return places.tobytes()


__all__ = ["Limits", "OpenSpace", "Store", "Tier"]
