"""Everything in the core adds up. For tests: it looks at everything."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from lmcache_sdk.core.actions import JobKind
from lmcache_sdk.core.entries import Entry, EntryState, RequestState

if TYPE_CHECKING:
    from lmcache_sdk.core.core import Core


def check_integrity(core: Core) -> None:
    """Raise AssertionError if anything does not add up."""
    core.extents.check_integrity()
    holds = _holds(core)
    alive = {entry for space in core.spaces.values() for entry in space.entries.values()}
    everything = alive | set(holds)
    _check_requests(core)
    _check_entries(core, alive, holds)
    _check_memory(core, everything, holds)
    _check_tiers(core)


def _holds(core: Core) -> Counter[Entry]:
    holds: Counter[Entry] = Counter()
    for request in core.requests.values():
        holds.update(request.holds)
    for entries in (
        *(lease.entries for lease in core.leases.values()),
        *(reserved.entries.values() for reserved in core.reservations.values()),
        *(job.entries for job in core.jobs.values()),
        [entry for _, entry in core.pins],
        core.earlier.entries,
    ):
        holds.update(entries)
    return holds


def _check_requests(core: Core) -> None:
    assert len(core.requests) <= core.limits.requests
    for request in core.requests.values():
        if request.state is RequestState.PENDING:
            found = request.entries[: request.limit]
            assert request.pending == sum(e is not None and e.state is EntryState.LOADING for e in found) > 0
        if request.state is RequestState.READY:
            alive = [entry for entry in request.entries[: request.limit] if entry is not None]
            followers = [entry.space for entry in alive[1:]]
            last = [entry for entry, space in zip(alive, [*followers, None], strict=True) if entry.space is not space]
            assert request.holds == last[::-1], "the last of each run"
            for position, entry in enumerate(request.entries[: request.limit]):
                assert entry is not None and entry.space is request.space_of(position), "not from where it may come"
                if request.deletions == request.count_deletions():
                    assert entry.state is EntryState.PUBLISHED, "not held from the first moment on"
        if request.state is RequestState.WALKING:
            assert any(probe.request is request for probe in core.probes), "nobody asks a tier for it"


def _check_entries(core: Core, alive: set[Entry], holds: Counter[Entry]) -> None:
    children: Counter[Entry] = Counter()
    rooted: set[Entry] = set()
    for entry in alive:
        assert entry.space.entries[entry.digest] is entry and entry.state is not EntryState.DEAD
        if entry.parent is not None:
            children[entry.parent] += 1
        if entry.state in (EntryState.PUBLISHED, EntryState.ADOPTED):
            assert entry.written == entry.space.all_cells and None not in entry.extents
        if entry.state is EntryState.LOADING:
            assert holds[entry]
        evictable = not entry.holds and not entry.children
        assert (entry in core.policy) == evictable, f"{entry.state.name} holds {entry.holds}"
        way: dict[Entry, None] = {}
        at: Entry | None = entry
        while at is not None and at not in rooted:
            assert at not in way, "a circle of parents"
            way[at] = None
            at = at.parent
        rooted.update(way)
    assert len(core.policy) == sum(not e.holds and not e.children for e in alive)
    for entry in alive:
        assert entry.children == children[entry]


def _check_memory(core: Core, everything: set[Entry], holds: Counter[Entry]) -> None:
    extents = core.extents
    addresses = list(core.earlier.extents)
    quarantined = sum(extents.size_of(address) for address in core.earlier.extents)
    usage: Counter[str] = Counter()
    for entry in everything:
        assert entry.holds == holds[entry], f"{entry.holds} holds, {holds[entry]} known"
        mine = [address for address in entry.extents if address is not None]
        nbytes = sum(map(extents.size_of, mine))
        addresses += mine
        usage[entry.tenant] += nbytes
        quarantined += nbytes * (entry.state is EntryState.DEAD)
    assert len(addresses) == len(set(addresses)) == extents.allocated
    assert quarantined == extents.quarantined_bytes
    assert +usage == core.usage, "nor is anything kept of a tenant that has nothing"


def _check_tiers(core: Core) -> None:
    jobs = core.jobs.values()
    puts = [job for job in jobs if job.kind is JobKind.PUT]
    leaving = [entry for job in puts if job.leaving is not None for entry in job.entries]
    assert core.writing.leaving_bytes == sum(entry.space.chunk_bytes for entry in leaving)
    queued: Counter[Entry] = Counter()
    for tier, state in enumerate(core.tiers):
        written = [entry for job in puts if job.tier == tier for entry in job.entries]
        assert state.queued_bytes == sum(entry.space.chunk_bytes for entry in written)
        waiting = [entry for _, run in state.waiting for entry in run]
        assert state.waiting_bytes == sum(entry.space.chunk_bytes for entry in waiting)
        mine = written + waiting
        assert len(mine) == len(set(mine)), "nothing is written twice"
        for entry in mine:
            queued[entry] |= 1 << tier
        hung = [job for job in jobs if job.kind is JobKind.FETCH and job.tier == tier and job.abandoned]
        assert state.hung_reads == len(hung) and all(job.started for job in hung)
        assert state.hung_probes == sum(probe.tier == tier and probe.abandoned for probe in core.probes)
    alive = {entry for space in core.spaces.values() for entry in space.entries.values()}
    assert all(entry.queued == queued[entry] for entry in alive | set(queued))
    reads = [job for job in jobs if job.kind in (JobKind.FETCH, JobKind.VERIFY)]
    for tier in (*range(len(core.tiers)), -1):
        asked = sum(entry.space.chunk_bytes for job in reads if job.tier == tier for entry in job.entries)
        assert core.reading[tier].asked - core.reading[tier].ended == asked
