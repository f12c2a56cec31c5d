"""When a chunk goes to which tier: what users choose, see ``docs/tiers.md``."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Sequence
from itertools import groupby

from lmcache_sdk.core.actions import Job, JobKind
from lmcache_sdk.core.entries import Entry, EntryState, Mark, Space
from lmcache_sdk.core.index import Index
from lmcache_sdk.core.rules import Admit, Write
from lmcache_sdk.core.tiers import Limits, TierState

_STORED = 1 << 16  # chunks of which it is remembered that they were stored
_LEAVING_PART = 4  # at most one part in so many of the pool is held by writes of what is to go


class Writing:
    """Writes of chunks to tiers, and room by writing what goes out.

    Args:
        start: start jobs over entries of one space: kind, tier, entries, now.

    Attributes:
        leaving_bytes: of what is being written before it goes.
    """

    def __init__(
        self,
        tiers: Sequence[TierState],
        index: Index,
        limits: Limits,
        counters: Counter[str],
        start: Callable[[JobKind, int, list[Entry], float], list[Job]],
    ) -> None:
        self._tiers = tiers
        self._index = index
        self._limits = limits
        self._counters = counters
        self._start = start
        pool_bytes = index.extents.total_bytes
        self._queue_bytes = limits.queue_bytes or pool_bytes
        self._most_leaving = pool_bytes // _LEAVING_PART
        self._room_ahead = min(2 * limits.batch_bytes, self._most_leaving // 2)
        self._on_eviction = [tier for tier, state in enumerate(tiers) if state.rules.write is Write.EVICT]
        self._second = any(state.rules.admit is Admit.SECOND for state in tiers)
        self._stored: OrderedDict[bytes, None] = OrderedDict()
        self.leaving_bytes = 0

    @property
    def waiting(self) -> bool:
        """Whether anything is to be written later."""
        return any(state.waiting for state in self._tiers)

    def sealed(self, entries: Sequence[Entry], now: float) -> None:
        """These may be written from now on; parents come first."""
        if self._second:
            for entry in entries:
                if entry.digest in self._stored:
                    entry.marks |= Mark.AGAIN
                    self._stored.move_to_end(entry.digest)
                self._stored[entry.digest] = None
            while len(self._stored) > _STORED:
                self._stored.popitem(last=False)
        self.offer(entries, now, range(len(self._tiers)))

    def used(self, last: Entry, now: float) -> None:
        """A request uses this chunk and those before it."""
        if not self._second:
            return
        again: list[Entry] = []
        entry: Entry | None = last
        while entry is not None and not entry.marks & Mark.AGAIN:
            entry.marks |= Mark.AGAIN
            again.append(entry)
            entry = entry.parent
        second = [tier for tier, state in enumerate(self._tiers) if state.rules.admit is Admit.SECOND]
        self.offer(again[::-1], now, second)

    def offer(self, entries: Sequence[Entry], now: float, tiers: Iterable[int]) -> None:
        """Write them to these tiers now or later, as each wants."""
        for tier in tiers:
            state = self._tiers[tier]
            if state.rules.write is Write.EVICT:
                continue
            wanted = self._wanted(tier, entries)
            if not wanted:
                continue
            if state.rules.write is Write.BACK:
                self._wait(tier, wanted, now + state.rules.back_s)
            elif state.queued_bytes + _bytes(wanted) > self._queue_bytes or not state.breaker.allows(now):
                self._counters[f"store_dropped_chunks.{state.name}"] += len(wanted)
            else:
                self._write(tier, wanted, now)

    def tick(self, now: float) -> None:
        """Write what has waited long enough."""
        for tier, state in enumerate(self._tiers):
            if state.waiting and state.waiting[0][0] <= now and state.breaker.allows(now):
                self._write_waiting(tier, now, now)

    def flush(self, now: float) -> None:
        """Write what waits, as far as the queues have room; what waits for a tier in trouble is dropped."""
        for tier, state in enumerate(self._tiers):
            if not state.waiting:
                continue
            if state.breaker.allows(now):
                self._write_waiting(tier, float("inf"), now)
                continue
            dropped = []
            while state.waiting:
                dropped += self._next_waiting(tier)
            self._counters[f"store_dropped_chunks.{state.name}"] += len(dropped)

    def leave_all(self, spaces: Iterable[Space]) -> None:
        """The pool will go: what would be written when it is evicted is to be written by :meth:`flush`."""
        for space in spaces:
            # By whole prefixes, as far as they are wanted.
            for entry in sorted(space.entries.values(), key=lambda entry: entry.children > 0):
                for tier in self._on_eviction:
                    if run := self._wanted(tier, [entry], ancestors=True):
                        self._wait(tier, run, 0.0)

    def leave(self, victim: Entry, now: float) -> bool:
        """Write a chunk that is to be evicted; False if no tier wants it, or it cannot be written, and it may go.

        The write holds it, and the chunks before it that would be next; when it ends, what was not used meanwhile goes.
        """
        tiers = []
        for tier in self._on_eviction:
            state = self._tiers[tier]
            if not self._wants(tier, victim):
                continue
            size = victim.space.chunk_bytes
            if (
                (self.leaving_bytes and self.leaving_bytes + size > self._most_leaving)
                or state.queued_bytes + size > self._queue_bytes
                or not state.breaker.allows(now)
            ):
                self._counters[f"store_dropped_chunks.{state.name}"] += 1
            else:
                tiers.append(tier)
        if not tiers:
            return False
        most = min(self._limits.batch_bytes, self._most_leaving - self.leaving_bytes) // victim.space.chunk_bytes
        run = [victim]
        while len(run) < most:
            parent = run[-1].parent
            if parent is None or parent.children > 1 or parent.holds or not self._lacks(tiers[0], parent):
                break
            run.append(parent)
        if run[-1].parent is not None:
            run[-1].parent.marks |= Mark.DEEP
        run.reverse()
        for tier in tiers:
            for job in self._write(tier, [entry for entry in run if self._lacks(tier, entry)], now):
                job.leaving = self._index.tick
                self.leaving_bytes += _bytes(job.entries)
        return True

    def make_way(self, tenant: str, nbytes: int, now: float) -> None:
        """Have room ahead of who needs it next, so that nobody finds the pool full of what is being written."""
        if not self._on_eviction:
            return
        policy = self._index.policy
        while self._index.extents.free_bytes + self.leaving_bytes < self._room_ahead:
            victim = None if policy.full(tenant, nbytes) else policy.victim(tenant, nbytes)
            if victim is None:
                return
            if not self.leave(victim, now):
                self._index.remove(victim, "evicted")

    def done(self, job: Job, results: Sequence[bool]) -> None:
        """A write has ended; its entries are still held by it."""
        state, bit = self._tiers[job.tier], 1 << job.tier
        state.queued_bytes -= _bytes(job.entries)
        self._unqueue(job.tier, job.entries)
        for entry, ok in zip(job.entries, results, strict=True):
            if ok:
                entry.tiers |= bit
                state.written(entry)
                self._counters[f"written_chunks.{state.name}"] += 1
            else:
                self._counters[f"store_dropped_chunks.{state.name}"] += 1

    def gone(self, job: Job) -> None:
        """After a write that has ended holds its entries no more: those go that were to go and were not used since."""
        if job.leaving is None:
            return
        self.leaving_bytes -= _bytes(job.entries)
        for entry in reversed(job.entries):
            if entry in self._index.policy and entry.tick <= job.leaving:
                self._index.remove(entry, "evicted")

    def _wants(self, tier: int, entry: Entry) -> bool:
        least = self._tiers[tier].rules.min_tokens
        end = entry.first_position + entry.space.chunk_tokens
        deep = entry.first_position < 0 or end >= least or entry.marks & Mark.DEEP
        return bool(deep) and self._lacks(tier, entry)

    def _lacks(self, tier: int, entry: Entry) -> bool:
        """Whether the tier should have it, if the prefix is long enough."""
        return (
            entry.sealed
            and entry.state in (EntryState.PUBLISHED, EntryState.ADOPTED)
            and not (entry.tiers | entry.queued) >> tier & 1
            and not entry.marks & Mark.PASSING
            and (bool(entry.marks & Mark.AGAIN) or self._tiers[tier].rules.admit is Admit.ALWAYS)
        )

    def _wanted(self, tier: int, entries: Sequence[Entry], *, ancestors: bool = False) -> list[Entry]:
        """Those that the tier should get; where the first of a prefix may be missing, behind those before it."""
        if not ancestors and not self._tiers[tier].rules.min_tokens:
            return [entry for entry in entries if self._lacks(tier, entry)]
        wanted: dict[Entry, None] = {}
        for entry in entries:
            if entry in wanted or not self._wants(tier, entry):
                continue
            run: list[Entry] = []
            last: Entry | None = entry
            while last is not None and last not in wanted and self._lacks(tier, last):
                run.append(last)
                last = last.parent
            wanted.update(dict.fromkeys(reversed(run)))
        return list(wanted)

    def _wait(self, tier: int, entries: list[Entry], due: float) -> None:
        state = self._tiers[tier]
        self._put_off(tier, entries, due)
        if state.waiting_bytes > 2 * self._index.extents.total_bytes:  # most of it has gone
            for _ in range(len(state.waiting)):
                due = state.waiting[0][0]
                if alive := self._next_waiting(tier):
                    self._put_off(tier, alive, due)

    def _put_off(self, tier: int, entries: list[Entry], due: float) -> None:
        for entry in entries:
            entry.queued |= 1 << tier
        self._tiers[tier].waiting.append((due, entries))
        self._tiers[tier].waiting_bytes += _bytes(entries)

    def _next_waiting(self, tier: int) -> list[Entry]:
        """Take the next ones out; those that have not gone meanwhile."""
        state = self._tiers[tier]
        _, run = state.waiting.popleft()
        state.waiting_bytes -= _bytes(run)
        self._unqueue(tier, run)
        alive = [entry for entry in run if entry.state is not EntryState.DEAD]
        self._counters[f"short_lived_chunks.{state.name}"] += len(run) - len(alive)
        return alive

    def _write_waiting(self, tier: int, due: float, now: float) -> None:
        state = self._tiers[tier]
        ready: list[Entry] = []
        room = self._queue_bytes - state.queued_bytes
        while state.waiting and state.waiting[0][0] <= due:
            room -= _bytes([entry for entry in state.waiting[0][1] if entry.state is not EntryState.DEAD])
            if room < 0 and (ready or state.queued_bytes):
                break
            ready += self._next_waiting(tier)
        ready.sort(key=lambda entry: entry.space.origin.prefix())
        for _, entries in groupby(ready, key=lambda entry: entry.space):
            self._write(tier, list(entries), now)

    def _write(self, tier: int, entries: list[Entry], now: float) -> list[Job]:
        if not entries:
            return []
        for entry in entries:
            entry.queued |= 1 << tier
        self._tiers[tier].queued_bytes += _bytes(entries)
        return self._start(JobKind.PUT, tier, entries, now)

    def _unqueue(self, tier: int, entries: Iterable[Entry]) -> None:
        for entry in entries:
            entry.queued &= ~(1 << tier)


def _bytes(entries: Sequence[Entry]) -> int:
    return sum(entry.space.chunk_bytes for entry in entries)
