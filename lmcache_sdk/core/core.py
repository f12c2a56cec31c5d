"""The decisions: index, leases, loads from tiers, write-back, eviction. No I/O, no clock, no thread.

Every method is one event. It changes the state, answers, and appends to ``actions`` what the shell (``store.py``) must
do or tell; the shell carries them out and reports back by further events. Time comes in as an argument. The same core
runs under the seeded simulator of the tests.

A chunk in the pool is an *entry*: RESERVED (being written by an engine) or LOADING (being read from a tier), then
PUBLISHED (readable), later also *sealed* (its records' headers carry checksums; only then may it go to a tier). Entries
know their parent. A parent is never evicted before its children, so holding the last entry of a prefix keeps all of it
from eviction; only a lease, which must outlast a deletion too, holds each entry. What is about entries alone, eviction
included, is in ``index.py``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import groupby, islice
from operator import attrgetter

from lmcache_sdk.core.actions import Action, DeleteRecords, Job, JobKind, Probe, Resolved, StartJob, Stored
from lmcache_sdk.core.earlier import EarlierLife
from lmcache_sdk.core.entries import (
    Derived,
    Entry,
    EntryState,
    Lease,
    Mark,
    Request,
    RequestState,
    Reserved,
    Source,
    Space,
)
from lmcache_sdk.core.extents import Extents, Note
from lmcache_sdk.core.index import Index
from lmcache_sdk.core.integrity import check_integrity
from lmcache_sdk.core.rules import TierRules
from lmcache_sdk.core.tiers import Limits, TierState
from lmcache_sdk.core.writing import Writing
from lmcache_sdk.eviction import Fair, Policy
from lmcache_sdk.keys import Chain, Origin
from lmcache_sdk.packs import batches
from lmcache_sdk.patience import ReadingSpeed

_VERIFY = -1  # in place of a tier's number: the pool itself has the chunk, unchecked
_MOST_PROBES = 64  # for one lookup, whose chunks may lie scattered over spaces and tiers


class Core:
    """See the module's docstring.

    Args:
        extents: the pool's bookkeeping.
        tiers: (name, instant), fastest first; the order of reading. See :attr:`Backend.instant`.
        rules: of each tier.
        seal: take checksums of what is published, and so let it go to the tiers.

    Attributes:
        actions: what the shell has yet to carry out; it takes them out of this very list.
        earlier: what an earlier life of the pool left.
        probes: asked for and not yet answered.
        writing: what goes to which tier when.
        usage: tenant -> bytes.
    """

    def __init__(
        self,
        extents: Extents,
        tiers: Sequence[tuple[str, bool]] = (),
        *,
        rules: Sequence[TierRules] = (),
        limits: Limits | None = None,
        policy: Policy[Entry] | None = None,
        seal: bool = True,
    ) -> None:
        self.extents = extents
        rules = rules or [TierRules()] * len(tiers)
        self.tiers = [TierState(name, instant, rule) for (name, instant), rule in zip(tiers, rules, strict=True)]
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
        self.probes: dict[Probe, None] = {}  # an ordered set
        self.pins: list[tuple[float, Entry]] = []
        self.counters: Counter[str] = Counter()
        self.index = Index(extents, self.policy, self.limits.eviction_factor, self.actions, self.counters)
        self.usage = self.index.usage
        self.earlier = EarlierLife(self.index)
        self.writing = Writing(self.tiers, self.index, self.limits, self.counters, self._start)
        self.index.leave = self.writing.leave
        self._seal = seal
        self._next_id = 1

    # Events from adapters

    def open_space(self, origin: Origin, cell_bytes: Sequence[int], chunk_tokens: int = 1) -> Space:
        """The space of an origin. ``cell_bytes`` includes the header's room."""
        if origin not in self.spaces:
            self.spaces[origin] = Space(origin, cell_bytes, chunk_tokens)
        space = self.spaces[origin]
        assert space.cell_bytes == tuple(cell_bytes), "one origin has one geometry"
        return space

    def close_spaces(self, spaces: Iterable[Space]) -> list[Space]:
        """Forget those of them of which nothing is known and that nothing uses."""
        requests = {*self.requests.values(), *(probe.request for probe in self.probes)}
        used = {request.space for request in requests} | {source.space for r in requests for source in r.others}
        used |= {entry.space for job in self.jobs.values() for entry in job.entries}
        closed = []
        for space in spaces:
            if space not in used and not (space.entries or space.deleting or space.clearing):
                del self.spaces[space.origin]
                closed.append(space)
        return closed

    def lookup(
        self,
        space: Space,
        rid: str,
        chain: Chain,
        now: float,
        *,
        prefetch: bool = True,
        total: int = 0,
        others: Sequence[Source] = (),
        leave_out: int = 0,
    ) -> Request:
        """Find the longest prefix; the same request id and chain get the same answer until it is forgotten.

        Args:
            total: chunks of the whole prompt, if ``chain`` is only its first part; the rest follows if that is found.
            others: where chunks that the space lacks may come from, in this order.
            leave_out: of the digests at which others would be asked first, one in so many has them left out; always the
                same ones.
        """
        request = self.requests.get(rid)
        if request is not None:
            # After a claim a preempted request asks anew, and what was deleted must not be found.
            answered = request.state is not RequestState.CLAIMED and self._is_there(request)
            if answered and request.space is space and self._same(request, chain):
                return request
            self._drop_request(request)
        elif len(self.requests) >= self.limits.requests:
            self._give_up(next(iter(self.requests.values())), "too many lookups")
        request = Request(space, rid, chain, prefetch, now, now + self.limits.hold_s, total, others, leave_out)
        self.requests[rid] = request
        self._walk(request, now)
        return request

    def probe_started(self, probe: Probe, now: float) -> bool:
        """A thread has taken it up; False if nobody waits for it any more, and no answer is due."""
        request = probe.request
        if self.requests.get(request.rid) is request and request.state is RequestState.WALKING and probe in self.probes:
            probe.started, probe.deadline = True, now + self.tiers[probe.tier].rules.probe_s
            return True
        self.probes.pop(probe, None)
        return False

    def probed(self, probe: Probe, count: int, now: float, *, failed: bool = False) -> None:
        """The tier has ``count`` chunks from the asked position on."""
        if probe not in self.probes:
            return
        del self.probes[probe]
        request, state = probe.request, self.tiers[probe.tier]
        if probe.abandoned:
            state.hung_probes -= 1
            return
        if failed:
            state.breaker.record(False, now)
        elif not count and not state.instant and state.breaker.state == "open":
            state.breaker.record(True, now)  # it answers again; where it has chunks, their load will tell
        if self.requests.get(request.rid) is not request or request.state is not RequestState.WALKING:
            return
        if failed:
            request.why = f"{state.name} failed"
        start = len(request.entries)
        end = min(start + count, request.at_hand().reach)
        if not failed:
            state.lacked(request, start + count, now)
        if end > start:
            request.found([None] * (end - start))
            request.fetch |= dict.fromkeys(range(start, end), probe.tier)
            self._found_some(request, probe.tier)
        else:
            request.tier = probe.tier + 1
        self._walk(request, now, in_pool=end > start)

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

    def claim(self, rid: str, boundary: int, first: int, parts: int, now: float) -> tuple[int, list[Entry]] | None:
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
            self.index.hold(entry)
            self.index.note(entry, Note.LEASED)
        lease = self._id()
        self.leases[lease] = Lease(entries, set(range(parts)))
        self.counters["leased_bytes"] += len(entries) * request.space.chunk_bytes
        self.counters["foreign_chunks"] += sum(map(len, request.foreign(first, boundary)))
        request.state, request.lease = RequestState.CLAIMED, lease
        for last in request.last_of_runs(boundary):
            self.writing.used(last, now)
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
                self.index.note(entry, Note.RELEASED)
                self.index.drop(entry)

    def forget(self, rid: str) -> None:
        request = self.requests.get(rid)
        if request is not None:
            self._drop_request(request)

    def withdraw(self, spaces: Iterable[Space]) -> None:
        """Chunks of others must not be given any more to those who ask in these spaces."""
        for request in list(self.requests.values()):
            if request.space in spaces and request.others and request.state is not RequestState.CLAIMED:
                self._give_up(request, "withdrawn")

    def reserve(
        self,
        space: Space,
        digests: Sequence[bytes],
        first: int,
        cells: Sequence[int],
        now: float,
        *,
        parent: bytes | None = None,
        tenant: str = "",
        chunk_tokens: int = 0,
        derived: Derived | None = None,
    ) -> tuple[int, Reserved] | None:
        """Room for the given cells of those chunks that are not there yet; None if there is nothing to write.

        Args:
            digests: of the chunks ``first …``; ``parent`` is that of the chunk before.
            chunk_tokens: to tell a chunk's position in its request; 0 where that is unknown.
        """
        reserved = Reserved({}, {})
        if derived is not None and derived.first <= first:
            space = derived.space
        previous = space.entries.find(parent) if parent is not None else None
        for number, digest in enumerate(digests, start=first):
            if derived is not None and number >= derived.first:
                if space is not derived.space:
                    space, previous = derived.space, None
                if any(_is_readable(other.entries.find(digest)) for other in derived.others):
                    previous = None
                    continue
            entry = space.entries.find(digest)
            if entry is None:
                position = number * chunk_tokens if chunk_tokens else -1
                entry = self.index.add(space, digest, tenant, position, EntryState.RESERVED)
            self.index.link(entry, previous)
            previous = entry
            if entry.state is not EntryState.RESERVED:
                continue
            wanted = tuple(cell for cell in cells if entry.extents[cell] is None)
            if not wanted:
                continue
            self.index.hold(entry)
            lack = self.index.allocate(entry, wanted, now)
            if lack:
                self.counters[f"store_dropped_chunks.{lack}"] += first + len(digests) - number
                if entry.written or any(address is not None for address in entry.extents):
                    self.index.drop(entry)
                else:
                    self.index.remove(entry, "aborted")
                    self.index.drop(entry)
                break
            reserved.entries[number] = entry
            reserved.cells[number] = wanted
        self.writing.make_way(tenant, space.chunk_bytes, now)
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
                self.index.unwrite(entry, cells)
                continue
            for cell in cells:
                entry.written |= 1 << cell
            if entry.written == entry.space.all_cells:
                entry.state = EntryState.PUBLISHED
                self.index.touch(entry)
                published.append(entry)
                self.counters["stored_chunks"] += 1
                self.counters["stored_bytes"] += entry.space.chunk_bytes
            else:
                self.index.drop(entry)
        published.reverse()
        for entry in published:
            self._tell_stored(entry, now)
        if published:
            if self._seal:
                for _, entries in groupby(published, attrgetter("space")):
                    self._start(JobKind.SEAL, -1, list(entries), now)
            for entry in published:
                self.index.drop(entry)

    def abort(self, reservation: int) -> None:
        reserved = self.reservations.pop(reservation, None)
        if reserved is None:
            return
        for number in sorted(reserved.entries, reverse=True):
            self.index.unwrite(reserved.entries[number], reserved.cells[number])

    def pin(self, space: Space, digests: Sequence[bytes], until: float) -> int:
        """Hold the prefix of these chunks that is in the pool; the answer is its length."""
        last, count = None, 0
        for digest in digests:
            entry = space.entries.find(digest)
            if entry is None or entry.state is not EntryState.PUBLISHED:
                break
            self.index.link(entry, last)
            last, count = entry, count + 1
        if last is not None:
            self.index.hold(last)
            self.pins.append((until, last))
        return count

    def count_to_root(self, space: Space, digests: Sequence[bytes]) -> int:
        """How many entries :meth:`pin` would keep from eviction: what is there of these, and all before it."""
        found: dict[Entry, Entry | None] = {}  # each with the one before
        last: Entry | None = None
        for digest in digests:
            entry = space.entries.find(digest)
            if entry is None or entry.state is not EntryState.PUBLISHED:
                break
            found[entry] = last
            last = entry
        count = 0
        while last is not None and count < len(space.entries):
            parent = last.parent
            last = parent if parent is not None and parent.state is not EntryState.DEAD else found.get(last)
            count += 1
        return count

    def delete(self, space: Space, digests: Sequence[bytes]) -> int:
        """Remove these chunks, from the tiers too. What is held stays readable to its holders only; what is being
        written or loaded is removed as well, and comes to nothing.
        """
        found = [entry for entry in map(space.entries.find, reversed(digests)) if entry is not None]
        removed = self._delete(space, found, "deleted")
        if self.tiers and digests:
            space.deleting.update(digests)
            self.actions.append(DeleteRecords(space.origin, tuple(digests), len(self.tiers)))
        return removed

    def clear(self, space: Space, most: int | None = None) -> int:
        """The same for all chunks of the space, or so many; from the tiers when that was the last. To be repeated until
        the answer is below ``most``.
        """
        removed = self._delete(space, list(islice(space.entries.values(), most)), "cleared")
        if self.tiers and (most is None or removed < most):
            space.clearing += 1
            self.actions.append(DeleteRecords(space.origin, None, len(self.tiers)))
        return removed

    def _delete(self, space: Space, entries: list[Entry], reason: str) -> int:
        removed = 0
        for entry in entries:
            if entry.state is not EntryState.DEAD:  # named twice
                self._fail(entry, reason)
                removed += 1
        space.deletions += removed
        return removed

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
        if job.tier >= 0 and not job.abandoned:
            self.tiers[job.tier].breaker.record(not failed, now)
        if job.kind in (JobKind.FETCH, JobKind.VERIFY):
            if job.kind is JobKind.FETCH and job.abandoned:
                self.tiers[job.tier].hung_reads -= 1
            self._end_reading(job, results, now)
            return
        del self.jobs[job.id]
        if job.kind is JobKind.SEAL:
            sealed = [entry for entry, ok in zip(job.entries, results, strict=True) if ok]
            for entry in sealed:
                self.index.set_sealed(entry)
            self.writing.sealed([entry for entry in sealed if entry.state is EntryState.PUBLISHED], now)
        else:
            self.writing.done(job, results)
        for entry in reversed(job.entries):
            self.index.drop(entry)
        self.writing.gone(job)

    def records_deleted(self, action: DeleteRecords) -> None:
        """One more tier has deleted them, or failed to."""
        action.left -= 1
        if action.left:
            return
        space = self.spaces[action.origin]
        if action.digests is None:
            space.clearing -= 1
        else:
            space.deleting.subtract(action.digests)
            for digest in action.digests:
                if not space.deleting[digest]:
                    del space.deleting[digest]

    @property
    def waits(self) -> bool:
        """Whether anything can expire, so that :meth:`tick` must come."""
        return bool(self.requests or self.jobs or self.probes or self.pins or self.writing.waiting)

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
            state = self.tiers[job.tier]
            if job.started:
                state.breaker.record(False, now)
            self.counters[f"abandoned_jobs.{self.tier_names[job.tier]}"] += 1
            if job.kind is JobKind.FETCH:
                # The call may still write into these extents: they are quarantined until it returns.
                for entry in reversed(job.entries):
                    self._fail(entry, "abandoned")
                if job.started:
                    state.hung_reads += 1
                else:  # there is no call, and while those before it hang there may never be one
                    self._end_reading(job, (), now)
        self._abandon_probes(now)
        self.writing.tick(now)
        for request in list(self.requests.values()):
            if request.deadline <= now and request.lease not in self.leases:
                self._give_up(request, "timed out")
        if self.pins:
            for until, entry in self.pins:
                if until <= now:
                    self.index.drop(entry)
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

    def _end_reading(self, job: Job, results: Sequence[bool], now: float) -> None:
        del self.jobs[job.id]
        size = job.entries[0].space.chunk_bytes
        self.reading[job.tier].end(size * len(job.entries), size * sum(results), now)
        if results:
            self._fetched(job, results, now)
        for entry in reversed(job.entries):
            self.index.drop(entry)

    def _abandon_probes(self, now: float) -> None:
        """A tier that does not say what it has is taken to have nothing."""
        for probe in [probe for probe in self.probes if probe.deadline <= now and not probe.abandoned]:
            state, request = self.tiers[probe.tier], probe.request
            self.counters[f"abandoned_probes.{state.name}"] += 1
            if probe.started:
                probe.abandoned = True
                state.hung_probes += 1
                state.breaker.record(False, now)
            else:
                del self.probes[probe]
            if self.requests.get(request.rid) is request and request.state is RequestState.WALKING:
                request.why, request.tier = f"{state.name} does not answer", probe.tier + 1
                self._walk(request, now)

    # Looking up

    def _same(self, request: Request, chain: Chain) -> bool:
        if request.chain is chain:
            return len(chain) == request.length
        # While a tier is asked, chunks that were not looked at yet are still to come.
        walking = request.state is RequestState.WALKING
        walked = request.length if walking else min(len(request.entries) + 1, request.length)
        return len(chain) == request.length and chain.digests(walked) == request.chain.digests(walked)

    def _walk(self, request: Request, now: float, *, in_pool: bool = True) -> None:
        """Extend the prefix through the pool; where it ends there, ask the tiers; then the next space in the same way.
        If nobody is left to ask, start the loads.

        Args:
            in_pool: False: the pool has been looked into already, for the chunk and the space at hand.
        """
        chain = request.chain
        if not request.entries and 0 < request.length == chain.hashed:
            digests = chain.digests()
            readable = _readable_up_from(request.space.entries.find(digests[-1]), digests)
            if readable is not None:
                request.source = 0
                request.found(readable)
                self._load(request, now, linked=request.length)
                return
        while len(request.entries) < request.length:
            if in_pool and self._extend(request):
                self._found_some(request)
                continue
            in_pool = True
            if self._ask(request, now):
                return
            if request.source == len(request.others) or self._leaves_out(request):
                break
            request.source, request.tier, request.lacking = request.source + 1, 0, -1
        self._load(request, now)

    def _extend(self, request: Request) -> bool:
        """Through the pool, by chunks of the space at hand; whether there were any."""
        chain, before, step = request.chain, len(request.entries), 1
        space, reach = request.at_hand()
        reserved = EntryState.RESERVED
        while (start := len(request.entries)) < reach:
            found = space.entries.get_all(chain.digests(min(start + step, reach))[start:])
            usable = [entry is not None and entry.state is not reserved for entry in found]
            if False in usable:
                request.found(found[: usable.index(False)])
                break
            request.found(found)
            step *= 4
        return len(request.entries) > before

    @staticmethod
    def _leaves_out(request: Request) -> bool:
        """Whether others are left out, so that the engine computes, and stores, what can be compared with theirs."""
        if not request.leave_out or request.source or request.foreign():
            return False
        digest = request.chain.digests(len(request.entries) + 1)[-1]
        return int.from_bytes(digest[-8:]) % request.leave_out == 0

    @staticmethod
    def _found_some(request: Request, lacking: int = -1) -> None:
        """Behind what was found, all are asked anew; its own space first, as what it has is of more worth."""
        if request.source:
            lacking = -1
        request.source, request.tier, request.lacking = 0, 0, lacking

    def _ask(self, request: Request, now: float) -> bool:
        """Ask the next tier what it has of the space at hand from here on; False if none is left."""
        source = request.at_hand()
        if len(request.entries) >= source.reach or request.probes >= _MOST_PROBES or not request.prefetch:
            return False
        for tier in range(request.tier, len(self.tiers)):
            state = self.tiers[tier]
            if tier == request.lacking:
                continue
            if state.lacks(request, len(request.entries), now):
                self.counters[f"negative_hits.{state.name}"] += 1
                continue
            if state.answers(self.limits.readers, now):
                request.tier = tier
                request.probes += 1
                probe = Probe(request, source, tier, len(request.entries), now + state.rules.probe_s)
                self.probes[probe] = None
                self.actions.append(probe)
                return True
            request.why = f"{state.name} paused after failures"
        return False

    def _load(self, request: Request, now: float, *, linked: int = 0) -> None:
        """The prefix is known: link it, start loading what is not in the pool, and answer if nothing is.

        Args:
            linked: how many entries from the front are readable and linked already.
        """
        # Nothing was held while tiers were asked: what was evicted meanwhile ends the prefix here.
        start: dict[tuple[int, Space], list[Entry]] = {}
        chain = request.chain
        request.deletions = request.count_deletions()
        digests = chain.digests(len(request.entries))
        published = EntryState.PUBLISHED
        previous = request.entries[linked - 1] if linked else None
        for position, entry in enumerate(islice(request.entries, linked, None), linked):
            if entry is not None and entry.state is published and entry.parent is previous is not None:
                previous = entry  # the usual case, of thousands
                continue
            space = request.space_of(position)
            if previous is not None and previous.space is not space:
                self.index.hold(previous)  # or room for this run might be made of the one before
                request.holds.append(previous)
                previous = space.entries.find(digests[position - 1])
            if entry is None or entry.state is EntryState.DEAD:
                entry = space.entries.find(digests[position])
            if entry is not None and entry.state is EntryState.RESERVED:
                del request.entries[position:]
                break
            if entry is None:
                tier = request.fetch.get(position)
                if tier is None or space.clearing or digests[position] in space.deleting:
                    del request.entries[position:]
                    break
                first = position * chain.chunk_tokens if chain.positions_known else -1
                entry = self.index.add(space, digests[position], chain.tenant, first, EntryState.LOADING)
                self.index.link(entry, previous)
                self.index.hold(entry)
                lack = self.index.allocate(entry, range(len(space.cell_bytes)), now)
                if lack:
                    self.index.remove(entry, "aborted")
                    self.index.drop(entry)
                    request.why = lack.replace("_", " ")
                    del request.entries[position:]
                    break
                if not self.tiers[tier].rules.promote:
                    entry.marks |= Mark.PASSING
                start.setdefault((tier, space), []).append(entry)
            else:
                self.index.link(entry, previous)
                request.fetch.pop(position, None)
                if entry.state is EntryState.ADOPTED:
                    entry.state = EntryState.LOADING
                    self.index.hold(entry)
                    self.index.give(entry, chain.tenant)
                    start.setdefault((_VERIFY, space), []).append(entry)
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
        self._hold(request)
        request.state = RequestState.PENDING
        for (tier, _), loading in start.items():
            self._start(JobKind.VERIFY if tier == _VERIFY else JobKind.FETCH, tier, loading, now)
            request.goals[tier] = self.reading[tier].asked
            for entry in reversed(loading):
                self.index.drop(entry)  # the job holds it now
        if start:
            self.writing.make_way(chain.tenant, request.space.chunk_bytes, now)
        self._settle(request)

    def _settle(self, request: Request) -> None:
        """Answer a PENDING request if nothing within its limit is still being loaded."""
        if request.state is not RequestState.PENDING or request.pending:
            return
        if not self._is_there(request):
            request.limit = next(i for i, e in enumerate(request.entries) if e is None or e.state is EntryState.DEAD)
            request.why = "deleted"
        self._hold(request)
        for last in reversed(request.holds):
            self.index.touch(last)
            if not last.marks & Mark.PASSING:
                last.uses += 1
        request.state = RequestState.READY if request.limit else RequestState.MISS
        self.actions.append(Resolved(request))

    def _fetched(self, job: Job, results: Sequence[bool], now: float) -> None:
        loaded = []
        for entry, ok in zip(job.entries, results, strict=True):
            if entry.state is EntryState.DEAD:
                continue
            if not ok:
                self._fail(entry, "failed")
                continue
            entry.state = EntryState.PUBLISHED
            entry.written = entry.space.all_cells
            self.index.set_sealed(entry)
            self._tell_stored(entry, now)
            if job.tier >= 0:
                entry.tiers |= 1 << job.tier
            self.index.touch(entry)
            loaded.append(entry)
            waiters, entry.waiters = entry.waiters, []
            for request, position in waiters:
                if position < request.limit:
                    request.pending -= 1
                    self._settle(request)
        if job.tier > 0 and self.tiers[job.tier].rules.promote:
            self.writing.offer(loaded, now, range(job.tier))

    def _fail(self, entry: Entry, reason: str) -> None:
        """A chunk could not be loaded: those who wait for it get the shorter prefix."""
        if entry.state is EntryState.DEAD:
            return
        waiters, entry.waiters = entry.waiters, []
        self.index.remove(entry, reason)
        for request, position in waiters:
            if request.state is RequestState.PENDING and position < request.limit:
                request.limit = position
                request.why = f"load {reason}"
                found = request.entries[:position]
                request.pending = sum(e is not None and e.state is EntryState.LOADING for e in found)
                self._settle(request)

    @staticmethod
    def _is_there(request: Request) -> bool:
        """Whether nothing of what was found has been deleted since."""
        deletions = request.count_deletions()
        if request.deletions != deletions:
            if any(entry is not None and entry.state is EntryState.DEAD for entry in request.entries[: request.limit]):
                return False
            request.deletions = deletions
        return True

    def _give_up(self, request: Request, why: str) -> None:
        """Forget a request that may still be waited for."""
        if request.state in (RequestState.PENDING, RequestState.WALKING):
            request.limit, request.why = 0, why
            request.state = RequestState.MISS
            self.actions.append(Resolved(request))
        self._drop_request(request)

    def _drop_request(self, request: Request) -> None:
        if self.requests.get(request.rid) is request:
            del self.requests[request.rid]
        if request.state is not RequestState.CLAIMED:
            request.state = RequestState.MISS
        self._release_hold(request)

    def _hold(self, request: Request) -> None:
        """Keep what was found, up to the limit, and no longer what is behind it."""
        if not request.runs:
            return
        held, request.holds = request.holds, request.last_of_runs(request.limit)
        for entry in request.holds:
            self.index.hold(entry)
        for entry in held:
            self.index.drop(entry)

    def _release_hold(self, request: Request) -> None:
        held, request.holds = request.holds, []
        for entry in held:
            self.index.drop(entry)

    # Jobs

    def _start(self, kind: JobKind, tier: int, entries: list[Entry], now: float) -> list[Job]:
        """Start jobs over entries of one space, cut into batches."""
        jobs = []
        reading = self.reading[tier] if kind in (JobKind.FETCH, JobKind.VERIFY) else None
        nbytes, space = self.limits.batch_bytes, entries[0].space
        chunk_bytes = space.chunk_bytes
        size = max(1, (reading.step_bytes(nbytes) if reading is not None else nbytes) // chunk_bytes)
        block = space.block_chunks if reading is None else 1
        positions = [entry.first_position // space.chunk_tokens if block > 1 else -1 for entry in entries]
        for part in batches(positions, size, block):
            batch = entries[part]
            for entry in batch:
                self.index.hold(entry)
            job = Job(self._id(), kind, tier, batch, now + self._seconds(kind))
            if reading is not None:
                reading.start(len(batch) * chunk_bytes, now)
                job.ahead = reading.asked - reading.ended
            self.jobs[job.id] = job
            self.actions.append(StartJob(job))
            jobs.append(job)
        return jobs

    def _seconds(self, kind: JobKind) -> float:
        return self.limits.fetch_s if kind is JobKind.FETCH else self.limits.put_s

    def _tell_stored(self, entry: Entry, now: float) -> None:
        entry.readable_since = now
        parent = entry.parent.digest if entry.parent is not None else None
        self.actions.append(Stored(entry.space.origin, entry.digest, parent))

    def _id(self) -> int:
        self._next_id += 1
        return self._next_id

    def check_integrity(self) -> None:
        """Raise AssertionError if anything does not add up. For tests: it looks at everything."""
        check_integrity(self)


def _is_readable(entry: Entry | None) -> bool:
    return entry is not None and entry.state in (EntryState.PUBLISHED, EntryState.ADOPTED)


def _readable_up_from(last: Entry | None, digests: Sequence[bytes]) -> list[Entry | None] | None:
    """The entries of a whole chain, by their parents; None if one of them is not there, not readable or not linked.

    The usual case, of thousands: this is quicker than to look each of them up, the more so the larger the index is.
    """
    published, entry = EntryState.PUBLISHED, last
    entries: list[Entry | None] = []
    for digest in reversed(digests):
        if entry is None or entry.state is not published or entry.digest != digest:
            return None
        entries.append(entry)
        entry = entry.parent
    entries.reverse()
    return entries
