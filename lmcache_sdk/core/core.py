"""The decisions: index, leases, loads from tiers, write-back, eviction. No I/O, no clock, no thread.

Every method is one event. It changes the state, answers, and appends to ``actions`` what the shell (``store.py``) must
do or tell; the shell carries them out and reports back by further events. Time comes in as an argument. The same core
runs under the seeded simulator of the tests.

A chunk in the pool is an *entry*: RESERVED (being written by an engine) or LOADING (being read from a tier), then
PUBLISHED (readable), later also *sealed* (its records' headers carry checksums; only then may it go to a tier). Entries
know their parent. A parent is never evicted before its children, so holding the last entry of a prefix keeps all of it
from eviction; only a lease, which must outlast a deletion too, holds each entry.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import islice

from lmcache_sdk.core.actions import Action, DeleteRecords, Job, JobKind, Probe, Removed, Resolved, StartJob, Stored
from lmcache_sdk.core.breaker import Breaker
from lmcache_sdk.core.entries import Entry, EntryState, Lease, Request, RequestState, Reserved, Space
from lmcache_sdk.core.extents import Extents, Note, round_up
from lmcache_sdk.eviction import Fair, Policy
from lmcache_sdk.keys import Chain, Origin
from lmcache_sdk.patience import ReadingSpeed

_VERIFY = -1  # in place of a tier's number: the pool itself has the chunk, unchecked


@dataclass(slots=True)
class TierState:
    """``queued_bytes`` are written or wait to be."""

    name: str
    instant: bool
    breaker: Breaker = field(default_factory=Breaker)
    queued_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Limits:
    """Times in seconds.

    Attributes:
        hold_s: how long a READY lookup is held for its claim.
        fetch_s, put_s: deadline of one job on a tier; of a read, beyond what it and those before it should take.
        batch_bytes: the most for one job; several jobs run side by side.
        queue_bytes: writes waiting for one tier; beyond it they are dropped (0 = as much as the pool).
        eviction_factor: how many times the wanted bytes may be evicted for one extent, before giving up on a
            fragmented pool.
    """

    hold_s: float = 60.0
    fetch_s: float = 5.0
    put_s: float = 30.0
    batch_bytes: int = 8 << 20
    queue_bytes: int = 0
    eviction_factor: int = 16


class Core:
    """See the module's docstring.

    Args:
        extents: the pool's bookkeeping.
        tiers: (name, instant), fastest first; the order of reading. See :attr:`Backend.instant`.
        seal: take checksums of what is published, and so let it go to the tiers.
    """

    def __init__(
        self,
        extents: Extents,
        tiers: Sequence[tuple[str, bool]] = (),
        *,
        limits: Limits | None = None,
        policy: Policy[Entry] | None = None,
        seal: bool = True,
    ) -> None:
        self.extents = extents
        self.tiers = [TierState(name, instant) for name, instant in tiers]
        self.tier_names = [name for name, _ in tiers]
        self.reading = [ReadingSpeed() for _ in (*self.tiers, _VERIFY)]  # so that [_VERIFY] is the pool's own
        self.limits = limits or Limits()
        self.policy: Policy[Entry] = policy if policy is not None else Fair(extents.total_bytes)
        self.actions: list[Action] = []
        self.spaces: dict[Origin, Space] = {}
        self.requests: dict[str, Request] = {}
        self.leases: dict[int, Lease] = {}
        self.reservations: dict[int, Reserved] = {}
        self.jobs: dict[int, Job] = {}
        self.pins: list[tuple[float, Entry]] = []
        self.counters: Counter[str] = Counter()
        self.usage: Counter[str] = Counter()  # tenant -> bytes
        self._earlier_entries: list[Entry] = []  # an earlier life's clients may still read or write these
        self._earlier_extents: list[int] = []
        self._seal = seal
        self._tick = 0
        self._next_id = 1
        self._queue_bytes = self.limits.queue_bytes or extents.total_bytes

    # Events from adapters

    def open_space(self, origin: Origin, cell_bytes: Sequence[int]) -> Space:
        """The space of an origin. ``cell_bytes`` includes the header's room."""
        if origin not in self.spaces:
            self.spaces[origin] = Space(origin, cell_bytes)
        space = self.spaces[origin]
        assert space.cell_bytes == tuple(cell_bytes), "one origin has one geometry"
        return space

    def lookup(
        self, space: Space, rid: str, chain: Chain, now: float, *, prefetch: bool = True, total: int = 0
    ) -> Request:
        """Find the longest prefix; the same request id and chain get the same answer until it is forgotten.

        Args:
            total: chunks of the whole prompt, if ``chain`` is only its first part; the rest follows if that is found.
        """
        request = self.requests.get(rid)
        if request is not None:
            answered = request.state is not RequestState.CLAIMED  # after a claim, a preempted request asks anew
            if answered and request.space is space and self._same(request, chain):
                return request
            self._drop_request(request)
        request = Request(space, rid, chain, prefetch, now, now + self.limits.hold_s, total)
        self.requests[rid] = request
        self._walk(request, now)
        return request

    def probed(self, request: Request, tier: int, count: int, now: float, *, failed: bool = False) -> None:
        """Answer to :class:`Probe`: the tier has ``count`` chunks from the asked position on."""
        state = self.tiers[tier]
        if failed:
            state.breaker.record(False, now)
        elif not count and not state.instant and state.breaker.state == "open":
            state.breaker.record(True, now)  # it answers again; where it has chunks, their load will tell
        if self.requests.get(request.rid) is not request or request.state is not RequestState.WALKING:
            return
        if failed:
            request.why = f"{state.name} failed"
        start = len(request.entries)
        for position in range(start, min(start + count, request.length)):
            request.fetch[position] = tier
            request.entries.append(None)
        if count:
            request.tier, request.lacking = 0, tier
            self._walk(request, now)
        else:
            request.tier = tier + 1
            self._ask(request, now)

    def hurry(self, rid: str, now: float) -> None:
        """The asker waits no longer: answer with the part of the prefix that is in the pool already."""
        request = self.requests.get(rid)
        if request is None or request.state not in (RequestState.WALKING, RequestState.PENDING):
            return
        request.why = "timed out"
        if request.state is RequestState.WALKING:
            request.fetch.clear()
            self._load(request, now)
        found = request.entries[: request.limit]
        published = [entry is not None and entry.state is EntryState.PUBLISHED for entry in found]
        request.limit = published.index(False) if False in published else len(published)
        request.pending = 0
        self._settle(request)

    def claim(self, rid: str, boundary: int, first: int, parts: int) -> tuple[int, list[Entry]] | None:
        """Lease entries ``first .. boundary - 1`` of a READY request; None if it is not READY or is shorter."""
        request = self.requests.get(rid)
        if request is None or request.state is not RequestState.READY:
            return None
        if not 0 <= first < boundary <= request.limit or parts < 1:
            return None
        entries = []
        for entry in request.entries[first:boundary]:
            if entry is None or entry.state is not EntryState.PUBLISHED:  # deleted meanwhile
                return None
            entries.append(entry)
        for entry in entries:
            self._hold(entry)
            self._note(entry, Note.LEASED)
        lease = self._id()
        self.leases[lease] = Lease(entries, set(range(parts)))
        self.counters["leased_bytes"] += len(entries) * request.space.chunk_bytes
        request.state = RequestState.CLAIMED
        self._release_hold(request)
        return lease, entries

    def release(self, lease: int, part: int) -> None:
        held = self.leases.get(lease)
        if held is None:
            return
        held.parts.discard(part)
        if not held.parts:
            del self.leases[lease]
            for entry in reversed(held.entries):
                self._note(entry, Note.RELEASED)
                self._drop(entry)

    def release_all(self, lease: int) -> None:
        """Whoever held this lease is gone, all parts of it."""
        held = self.leases.get(lease)
        for part in list(held.parts) if held is not None else ():
            self.release(lease, part)

    def forget(self, rid: str) -> None:
        request = self.requests.get(rid)
        if request is not None:
            self._drop_request(request)

    def reserve(
        self,
        space: Space,
        digests: Sequence[bytes],
        first: int,
        cells: Sequence[int],
        *,
        parent: bytes | None = None,
        tenant: str = "",
        chunk_tokens: int = 0,
    ) -> tuple[int, Reserved] | None:
        """Room for the given cells of those chunks that are not there yet; None if there is nothing to write.

        Args:
            digests: of the chunks ``first …``; ``parent`` is that of the chunk before.
            chunk_tokens: to tell a chunk's position in its request; 0 where that is unknown.
        """
        reserved = Reserved({}, {})
        previous = space.entries.get(parent) if parent is not None else None
        for number, digest in enumerate(digests, start=first):
            entry = space.entries.get(digest)
            if entry is None:
                position = number * chunk_tokens if chunk_tokens else -1
                entry = self._add(space, digest, tenant, position, EntryState.RESERVED)
            self._link(entry, previous)
            previous = entry
            if entry.state is not EntryState.RESERVED:
                continue
            wanted = tuple(cell for cell in cells if entry.extents[cell] is None)
            if not wanted:
                continue
            self._hold(entry)
            lack = self._allocate(entry, wanted)
            if lack:
                self.counters[f"store_dropped_chunks.{lack}"] += first + len(digests) - number
                if entry.written or any(address is not None for address in entry.extents):
                    self._drop(entry)
                else:
                    self._remove(entry, "aborted")
                    self._drop(entry)
                break
            reserved.entries[number] = entry
            reserved.cells[number] = wanted
        if not reserved.entries:
            return None
        reservation = self._id()
        self.reservations[reservation] = reserved
        return reservation, reserved

    def publish(self, reservation: int, chunks: Iterable[int] | None, now: float) -> None:
        """The cells of these chunks (None = all) have been written; the others of the reservation were not."""
        reserved = self.reservations.pop(reservation, None)
        if reserved is None:
            return
        written = set(reserved.entries) if chunks is None else set(chunks)
        published = []
        # Back to front: an entry that is dropped must not free its parent for eviction before it has been seen.
        for number in sorted(reserved.entries, reverse=True):
            entry, cells = reserved.entries[number], reserved.cells[number]
            if number not in written or entry.state is EntryState.DEAD:
                self._unwrite(entry, cells)
                continue
            for cell in cells:
                entry.written |= 1 << cell
            if entry.written == entry.space.all_cells:
                entry.state = EntryState.PUBLISHED
                self._touch(entry)
                published.append(entry)
                self.counters["stored_chunks"] += 1
                self.counters["stored_bytes"] += entry.space.chunk_bytes
            else:
                self._drop(entry)
        published.reverse()
        for entry in published:
            self._tell_stored(entry, now)
        if published:
            if self._seal:
                self._start(JobKind.SEAL, -1, published, now)
            for entry in published:
                self._drop(entry)

    def abort(self, reservation: int) -> None:
        reserved = self.reservations.pop(reservation, None)
        if reserved is None:
            return
        for number in sorted(reserved.entries, reverse=True):
            self._unwrite(reserved.entries[number], reserved.cells[number])

    def pin(self, space: Space, digests: Sequence[bytes], until: float) -> int:
        """Hold the prefix of these chunks that is in the pool; the answer is its length."""
        last, count = None, 0
        for digest in digests:
            entry = space.entries.get(digest)
            if entry is None or entry.state is not EntryState.PUBLISHED:
                break
            self._link(entry, last)
            last, count = entry, count + 1
        if last is not None:
            self._hold(last)
            self.pins.append((until, last))
        return count

    def delete(self, space: Space, digests: Sequence[bytes]) -> int:
        """Remove these chunks, from the tiers too. What is held stays readable to its holders only."""
        removed = 0
        for digest in reversed(digests):
            entry = space.entries.get(digest)
            if entry is not None and entry.state in (EntryState.PUBLISHED, EntryState.ADOPTED):
                self._remove(entry, "deleted")
                removed += 1
        if self.tiers and digests:
            self.actions.append(DeleteRecords(space.origin, tuple(digests)))
        return removed

    def clear(self, space: Space, most: int | None = None) -> int:
        """Remove all published chunks of the space from the pool, or so many. Tiers are the shell's to clear."""
        kept = (EntryState.PUBLISHED, EntryState.ADOPTED)
        published = list(islice((entry for entry in space.entries.values() if entry.state in kept), most))
        for entry in published:
            self._remove(entry, "cleared")
        return len(published)

    # What an earlier life of the pool left

    def adopt(self, space: Space, digest: bytes, extents: Sequence[int], first_position: int, *, leased: bool) -> None:
        """Take over a sealed chunk that is not in the space yet. Call with the deepest chunks first.

        Args:
            extents: the address of each cell; already taken, see :meth:`Extents.take`.
            leased: a client of the earlier life may still read it.
        """
        entry = self._add(space, digest, "", first_position, EntryState.ADOPTED)
        entry.extents = list(extents)
        self._charge("", self._bytes_of(entry))
        entry.written = space.all_cells
        entry.sealed = True
        if leased:
            entry.holds += 1
            self._earlier_entries.append(entry)
        else:
            self.policy.insert(entry, entry.tick)

    def quarantine(self, address: int) -> None:
        """Keep memory out of use (already taken) that a client of the earlier life may still write to."""
        self.extents.quarantine(address)
        self._earlier_extents.append(address)

    def earlier_clients_gone(self) -> None:
        """No client of the earlier life reads or writes the pool any more."""
        entries, self._earlier_entries = self._earlier_entries, []
        addresses, self._earlier_extents = self._earlier_extents, []
        for address in addresses:
            self.extents.free(address)
        for entry in entries:
            self._drop(entry)

    # Events from the shell

    def job_started(self, job: Job, now: float) -> None:
        """A thread has taken it up: what it waited in line is not the tier's fault."""
        job.started = True
        if not job.abandoned:
            job.deadline = now + self._seconds(job.kind)

    def job_done(self, job: Job, results: Sequence[bool], now: float, *, failed: bool = False) -> None:
        """A job has ended; ``results[i]`` says whether ``job.entries[i]`` came through.

        ``failed`` = the tier was in trouble (for its breaker); a plain miss or a broken record is not.
        """
        del self.jobs[job.id]
        if job.tier >= 0 and not job.abandoned:
            self.tiers[job.tier].breaker.record(not failed, now)
        if job.kind in (JobKind.FETCH, JobKind.VERIFY):
            size = job.entries[0].space.chunk_bytes
            self.reading[job.tier].end(size * len(job.entries), size * sum(results), now)
            self._fetched(job, results, now)
        elif job.kind is JobKind.SEAL:
            sealed = [entry for entry, ok in zip(job.entries, results, strict=True) if ok]
            for entry in sealed:
                self._set_sealed(entry)
            self._write_back([entry for entry in sealed if entry.state is EntryState.PUBLISHED], now)
        else:
            state = self.tiers[job.tier]
            state.queued_bytes -= sum(entry.space.chunk_bytes for entry in job.entries)
            for entry, ok in zip(job.entries, results, strict=True):
                if ok:
                    entry.tiers |= 1 << job.tier
                    self.counters[f"written_chunks.{state.name}"] += 1
                else:
                    self.counters[f"store_dropped_chunks.{state.name}"] += 1
        for entry in reversed(job.entries):
            self._drop(entry)

    def tick(self, now: float) -> None:
        """Abandon what is past its deadline, let holds and pins expire."""
        for job in list(self.jobs.values()):
            if job.tier < 0 or job.deadline > now or job.abandoned:
                continue  # work on the pool's own memory always ends
            if job.kind is JobKind.PUT and not job.started:
                continue  # it waits in line, and nobody waits for it
            if not job.started and job.deadline + (self.reading[job.tier].seconds(job.ahead) or 0.0) > now:
                continue
            job.abandoned = True
            if job.started:
                self.tiers[job.tier].breaker.record(False, now)
            self.counters[f"abandoned_jobs.{self.tier_names[job.tier]}"] += 1
            if job.kind is JobKind.FETCH:
                # The call may still write into these extents: they are quarantined until it returns.
                for entry in reversed(job.entries):
                    self._fail(entry, "abandoned")
        for request in list(self.requests.values()):
            if request.deadline <= now and request.state is not RequestState.CLAIMED:
                if request.state in (RequestState.PENDING, RequestState.WALKING):
                    request.limit, request.why = 0, "timed out"
                    request.state = RequestState.MISS
                    self.actions.append(Resolved(request))
                self._drop_request(request)
        if self.pins:
            for until, entry in self.pins:
                if until <= now:
                    self._drop(entry)
            self.pins = [pin for pin in self.pins if pin[0] > now]

    def eta_s(self, request: Request, now: float) -> float | None:
        """Seconds until all that a PENDING request waits for is here, as its tiers have been so far; None = unknown."""
        slowest = 0.0
        for tier, goal in list(request.goals.items()):
            seconds = self.reading[tier].eta_s(goal, now)
            if seconds is None:
                return None
            slowest = max(slowest, seconds)
        return slowest

    # Looking up

    def _same(self, request: Request, chain: Chain) -> bool:
        if request.chain is chain:
            return len(chain) == request.length
        walked = min(len(request.entries) + 1, request.length)
        return len(chain) == request.length and chain.digests(walked) == request.chain.digests(walked)

    def _walk(self, request: Request, now: float) -> None:
        """Extend the prefix through the pool; where it ends there, ask the tiers."""
        entries, chain, index = request.entries, request.chain, request.space.entries
        before, step = len(entries), 2
        reserved = EntryState.RESERVED
        while (start := len(entries)) < request.length:
            found = list(map(index.get, chain.digests(start + step)[start:]))
            usable = [entry is not None and entry.state is not reserved for entry in found]
            if False in usable:
                entries += found[: usable.index(False)]
                break
            entries += found
            step *= 4
        if len(entries) > before:
            request.tier, request.lacking = 0, -1
        self._ask(request, now)

    def _ask(self, request: Request, now: float) -> None:
        """Ask the next tier what it has from here on; if none is left, start the loads."""
        if len(request.entries) < request.length and request.prefetch:
            for tier in range(request.tier, len(self.tiers)):
                if tier == request.lacking:
                    continue
                if self.tiers[tier].breaker.allows(now):
                    request.tier = tier
                    self.actions.append(Probe(request, tier, len(request.entries)))
                    return
                request.why = f"{self.tier_names[tier]} paused after failures"
        self._load(request, now)

    def _load(self, request: Request, now: float) -> None:
        """The prefix is known: link it, start loading what is not in the pool, and answer if nothing is."""
        # Nothing was held while tiers were asked: what was evicted meanwhile ends the prefix here.
        previous: Entry | None = None
        start: dict[int, list[Entry]] = {}
        chain, space = request.chain, request.space
        digests = chain.digests(len(request.entries))
        published = EntryState.PUBLISHED
        for position, entry in enumerate(request.entries):
            if entry is not None and entry.state is published and entry.parent is previous is not None:
                previous = entry  # the usual case, of thousands
                continue
            if entry is None or entry.state is EntryState.DEAD:
                entry = space.entries.get(digests[position])
            if entry is not None and entry.state is EntryState.RESERVED:
                del request.entries[position:]
                break
            if entry is None:
                tier = request.fetch.get(position)
                if tier is None:
                    del request.entries[position:]
                    break
                first = position * chain.chunk_tokens if chain.positions_known else -1
                entry = self._add(space, digests[position], chain.tenant, first, EntryState.LOADING)
                self._link(entry, previous)
                self._hold(entry)
                lack = self._allocate(entry, range(len(space.cell_bytes)))
                if lack:
                    self._remove(entry, "aborted")
                    self._drop(entry)
                    request.why = lack.replace("_", " ")
                    del request.entries[position:]
                    break
                start.setdefault(tier, []).append(entry)
            else:
                self._link(entry, previous)
                request.fetch.pop(position, None)
                if entry.state is EntryState.ADOPTED:
                    entry.state = EntryState.LOADING
                    self._hold(entry)
                    self._give(entry, chain.tenant)
                    start.setdefault(_VERIFY, []).append(entry)
            request.entries[position] = entry
            if entry.state is EntryState.LOADING:
                if entry.waiters:  # whose job it is, or who waits for it as well
                    request.goals |= entry.waiters[0][0].goals
                entry.waiters.append((request, position))
                request.pending += 1
            previous = entry
        request.limit = len(request.entries)
        if not request.length:
            request.why = "no full chunk"
        elif request.limit < request.length and not request.why:
            request.why = "not stored"
        if previous is not None:
            self._hold(previous)
            request.hold = previous
        request.state = RequestState.PENDING
        for tier, loading in start.items():
            self._start(JobKind.VERIFY if tier == _VERIFY else JobKind.FETCH, tier, loading, now)
            request.goals[tier] = self.reading[tier].asked
            for entry in reversed(loading):
                self._drop(entry)  # the job holds it now
        self._settle(request)

    def _settle(self, request: Request) -> None:
        """Answer a PENDING request if nothing within its limit is still being loaded."""
        if request.state is not RequestState.PENDING or request.pending:
            return
        last = request.entries[request.limit - 1] if request.limit else None
        if last is not None:
            self._hold(last)
            self._touch(last)
        self._release_hold(request)
        request.hold = last
        request.state = RequestState.READY if last is not None else RequestState.MISS
        self.actions.append(Resolved(request))

    def _fetched(self, job: Job, results: Sequence[bool], now: float) -> None:
        for entry, ok in zip(job.entries, results, strict=True):
            if entry.state is EntryState.DEAD:
                continue
            if not ok:
                self._fail(entry, "failed")
                continue
            entry.state = EntryState.PUBLISHED
            entry.written = entry.space.all_cells
            self._set_sealed(entry)
            self._tell_stored(entry, now)
            if job.tier >= 0:
                entry.tiers |= 1 << job.tier
            self._touch(entry)
            waiters, entry.waiters = entry.waiters, []
            for request, position in waiters:
                if position < request.limit:
                    request.pending -= 1
                    self._settle(request)

    def _fail(self, entry: Entry, reason: str) -> None:
        """A chunk could not be loaded: those who wait for it get the shorter prefix."""
        if entry.state is EntryState.DEAD:
            return
        waiters, entry.waiters = entry.waiters, []
        self._remove(entry, reason)
        for request, position in waiters:
            if request.state is RequestState.PENDING and position < request.limit:
                request.limit = position
                request.why = f"load {reason}"
                found = request.entries[:position]
                request.pending = sum(e is not None and e.state is EntryState.LOADING for e in found)
                self._settle(request)

    def _drop_request(self, request: Request) -> None:
        if self.requests.get(request.rid) is request:
            del self.requests[request.rid]
        if request.state is not RequestState.CLAIMED:
            request.state = RequestState.MISS
        self._release_hold(request)

    def _release_hold(self, request: Request) -> None:
        held, request.hold = request.hold, None
        if held is not None:
            self._drop(held)

    # Jobs

    def _start(self, kind: JobKind, tier: int, entries: list[Entry], now: float) -> None:
        """Start jobs over the entries, cut into batches."""
        reading = self.reading[tier] if kind in (JobKind.FETCH, JobKind.VERIFY) else None
        nbytes, chunk_bytes = self.limits.batch_bytes, entries[0].space.chunk_bytes
        size = max(1, (reading.step_bytes(nbytes) if reading is not None else nbytes) // chunk_bytes)
        for at in range(0, len(entries), size):
            batch = entries[at : at + size]
            for entry in batch:
                self._hold(entry)
            job = Job(self._id(), kind, tier, batch, now + self._seconds(kind))
            if reading is not None:
                reading.start(len(batch) * chunk_bytes, now)
                job.ahead = reading.asked - reading.ended
            self.jobs[job.id] = job
            self.actions.append(StartJob(job))

    def _seconds(self, kind: JobKind) -> float:
        return self.limits.fetch_s if kind is JobKind.FETCH else self.limits.put_s

    def _write_back(self, entries: list[Entry], now: float) -> None:
        for tier, state in enumerate(self.tiers):
            wanted = [entry for entry in entries if not entry.tiers >> tier & 1]
            if not wanted:
                continue
            nbytes = sum(entry.space.chunk_bytes for entry in wanted)
            if state.queued_bytes + nbytes > self._queue_bytes or not state.breaker.allows(now):
                self.counters[f"store_dropped_chunks.{state.name}"] += len(wanted)
            else:
                state.queued_bytes += nbytes
                self._start(JobKind.PUT, tier, wanted, now)

    # Entries

    def _id(self) -> int:
        self._next_id += 1
        return self._next_id

    def _add(self, space: Space, digest: bytes, tenant: str, first_position: int, state: EntryState) -> Entry:
        entry = Entry(space, digest, tenant, first_position, state)
        self._tick += 1
        entry.tick = self._tick
        space.entries[digest] = entry
        return entry

    def _link(self, entry: Entry, parent: Entry | None) -> None:
        """Tell an entry its parent, if it has none that lives."""
        if parent is None or entry.parent is parent:
            return
        if entry.parent is not None and entry.parent.state is not EntryState.DEAD:
            return
        entry.parent = parent
        parent.children += 1
        self.policy.discard(parent)

    def _hold(self, entry: Entry) -> None:
        entry.holds += 1
        if entry.holds == 1:
            self.policy.discard(entry)

    def _drop(self, entry: Entry) -> None:
        entry.holds -= 1
        if entry.holds == 0:
            if entry.state is EntryState.DEAD:
                self._free(entry)
            elif entry.children == 0:
                self.policy.insert(entry, entry.tick)

    def _set_sealed(self, entry: Entry) -> None:
        if not entry.sealed:
            entry.sealed = True
            if entry.state is not EntryState.DEAD:
                self._note(entry, Note.SEALED)

    def _note(self, entry: Entry, what: Note) -> None:
        if self.extents.log is not None:
            for address in entry.extents:
                if address is not None:
                    self.extents.note(address, what)

    def _tell_stored(self, entry: Entry, now: float) -> None:
        entry.readable_since = now
        parent = entry.parent.digest if entry.parent is not None else None
        self.actions.append(Stored(entry.space.origin, entry.digest, parent))

    def _touch(self, entry: Entry) -> None:
        """Mark as just used; the entry is held by the caller, so the policy does not have it."""
        self._tick += 1
        entry.tick = self._tick

    def _remove(self, entry: Entry, reason: str) -> None:
        """Take an entry out of the index; its memory is freed, or quarantined until the last hold is dropped."""
        del entry.space.entries[entry.digest]
        entry.state = EntryState.DEAD
        self.policy.discard(entry)
        self.counters[f"removed_chunks.{reason}"] += 1
        self.actions.append(Removed(entry.space.origin, entry.digest, reason, entry.readable_since))
        parent, entry.parent = entry.parent, None
        if parent is not None:
            parent.children -= 1
            parent.tick = max(parent.tick, entry.tick)
            if parent.children == 0 and parent.holds == 0 and parent.state is not EntryState.DEAD:
                self.policy.insert(parent, parent.tick)
        if entry.holds:
            for address in entry.extents:
                if address is not None:
                    self.extents.quarantine(address)
        else:
            self._free(entry)

    def _free(self, entry: Entry) -> None:
        for cell in range(len(entry.extents)):
            self._free_cell(entry, cell)

    def _free_cell(self, entry: Entry, cell: int) -> None:
        address, entry.extents[cell] = entry.extents[cell], None
        if address is not None:
            self._charge(entry.tenant, -self.extents.size_of(address))
            self.extents.free(address)

    def _unwrite(self, entry: Entry, cells: Sequence[int]) -> None:
        """Reserved cells were not written."""
        if entry.state is not EntryState.DEAD:
            for cell in cells:
                self._free_cell(entry, cell)
            if all(address is None for address in entry.extents):
                self._remove(entry, "aborted")
        self._drop(entry)

    def _bytes_of(self, entry: Entry) -> int:
        return sum(self.extents.size_of(address) for address in entry.extents if address is not None)

    def _charge(self, tenant: str, nbytes: int) -> None:
        self.usage[tenant] += nbytes
        if not self.usage[tenant]:
            del self.usage[tenant]  # tenants come from requests: nothing is kept of those that have nothing
        self.policy.charge(tenant, nbytes)

    def _give(self, entry: Entry, tenant: str) -> None:
        """What an earlier life left is nobody's; it becomes the first asker's, as far as that one's quota goes.

        The entry is held, so the policy does not have it.
        """
        nbytes = self._bytes_of(entry)
        if entry.tenant == "" != tenant and not self.policy.full(tenant, nbytes):
            self._charge("", -nbytes)
            entry.tenant = tenant
            self._charge(tenant, nbytes)

    def _allocate(self, entry: Entry, cells: Iterable[int]) -> str:
        """Extents for the cells, evicting as needed; all or nothing. The answer is what is lacking, if anything."""
        done: list[int] = []
        for cell in cells:
            nbytes = round_up(entry.space.cell_bytes[cell])
            address = self._room(entry.tenant, nbytes)
            if address is None:
                lack = "quota" if self.policy.full(entry.tenant, nbytes) else "pool_full"
                for earlier in done:
                    self._free_cell(entry, earlier)
                return lack
            entry.extents[cell] = address
            self._charge(entry.tenant, nbytes)
            done.append(cell)
        return ""

    def _room(self, tenant: str, nbytes: int) -> int | None:
        budget = self.limits.eviction_factor * nbytes
        while True:
            full = self.policy.full(tenant, nbytes)
            address = None if full else self.extents.allocate(nbytes)
            if address is not None:
                return address
            victim = self.policy.victim(tenant, nbytes) if budget > 0 else None
            if victim is None:
                return None
            budget -= victim.space.chunk_bytes
            self._remove(victim, "quota" if full else "evicted")

    def check_integrity(self) -> None:
        """Raise AssertionError if anything does not add up. For tests: it looks at everything."""
        self.extents.check_integrity()
        holds: Counter[Entry] = Counter()
        for request in self.requests.values():
            if request.hold is not None:
                holds[request.hold] += 1
            if request.state is RequestState.PENDING:
                found = request.entries[: request.limit]
                assert request.pending == sum(e is not None and e.state is EntryState.LOADING for e in found) > 0
            if request.state is RequestState.READY:
                assert request.hold is request.entries[request.limit - 1]
        for entries in (
            *(lease.entries for lease in self.leases.values()),
            *(reserved.entries.values() for reserved in self.reservations.values()),
            *(job.entries for job in self.jobs.values()),
            [entry for _, entry in self.pins],
            self._earlier_entries,
        ):
            holds.update(entries)
        children: Counter[Entry] = Counter()
        alive = {entry for space in self.spaces.values() for entry in space.entries.values()}
        for entry in alive:
            assert entry.space.entries[entry.digest] is entry and entry.state is not EntryState.DEAD
            if entry.parent is not None:
                children[entry.parent] += 1
            if entry.state in (EntryState.PUBLISHED, EntryState.ADOPTED):
                assert entry.written == entry.space.all_cells and None not in entry.extents
            if entry.state is EntryState.LOADING:
                assert holds[entry]
            evictable = not entry.holds and not entry.children
            assert (entry in self.policy) == evictable, f"{entry.state.name} holds {entry.holds}"
        assert len(self.policy) == sum(not e.holds and not e.children for e in alive)
        everything = alive | set(holds)
        addresses: list[int] = []
        quarantined = 0
        for entry in everything:
            assert entry.holds == holds[entry], f"{entry.holds} holds, {holds[entry]} known"
            if entry.state is not EntryState.DEAD:
                assert entry.children == children[entry]
            for address in entry.extents:
                if address is not None:
                    addresses.append(address)
                    quarantined += self.extents.size_of(address) * (entry.state is EntryState.DEAD)
        addresses += self._earlier_extents
        quarantined += sum(self.extents.size_of(address) for address in self._earlier_extents)
        assert len(addresses) == len(set(addresses)) == self.extents.allocated
        assert quarantined == self.extents.quarantined_bytes
        usage: Counter[str] = Counter()
        for entry in everything:
            usage[entry.tenant] += sum(self.extents.size_of(a) for a in entry.extents if a is not None)
        assert +usage == self.usage, "nor is anything kept of a tenant that has nothing"
        for tier, state in enumerate(self.tiers):
            queued = [job for job in self.jobs.values() if job.kind is JobKind.PUT and job.tier == tier]
            assert state.queued_bytes == sum(e.space.chunk_bytes for job in queued for e in job.entries)
        reads = [job for job in self.jobs.values() if job.kind in (JobKind.FETCH, JobKind.VERIFY)]
        for tier in (*range(len(self.tiers)), _VERIFY):
            asked = sum(entry.space.chunk_bytes for job in reads if job.tier == tier for entry in job.entries)
            assert self.reading[tier].asked - self.reading[tier].ended == asked
