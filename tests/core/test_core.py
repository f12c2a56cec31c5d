"""The core alone: a seeded simulator, and the rules that deserve a name."""

from __future__ import annotations

import pytest

from lmcache_sdk.core import (
    Breaker,
    Core,
    DeleteRecords,
    EntryState,
    Job,
    Limits,
    Probe,
    Request,
    RequestState,
    Resolved,
    StartJob,
)
from lmcache_sdk.core.extents import Extents
from lmcache_sdk.core.rules import TierRules
from lmcache_sdk.keys import Chain, Origin
from tests.core.simulator import play_all

ORIGIN = Origin("0" * 32, "1" * 16)


def test_simulated_schedules() -> None:
    """A first few; the daemon's suite has the others."""
    play_all(range(200))


def chain(chunks: int, first: int = 0) -> Chain:
    return Chain(list(range(first, first + 2 * chunks)), 2)


def fill(core: Core, chain: Chain, now: float = 0.0) -> None:
    answer = core.reserve(core.spaces[ORIGIN], chain.digests(), 0, (0,), 0.0)
    assert answer is not None
    core.publish(answer[0], None, now)


def make(pool_chunks: int, tiers: tuple[tuple[str, bool], ...] = (), **limits: float) -> Core:
    rules = [TierRules(probe_s=limits.get("fetch_s", 2.0))] * len(tiers)
    core = Core(Extents([64 * pool_chunks]), tiers, rules=rules, limits=Limits(**limits), seal=bool(tiers))  # type: ignore[arg-type]
    core.open_space(ORIGIN, [64])
    return core


def asked(core: Core) -> Probe:
    """The one probe among the actions, which are then carried out."""
    (probe,) = (action for action in core.actions if isinstance(action, Probe))
    core.actions.clear()
    return probe


def test_a_stored_prefix_is_ready_at_once_and_only_as_far_as_it_goes() -> None:
    core = make(8)
    fill(core, chain(3))
    request = core.lookup(core.spaces[ORIGIN], "a", chain(5), 0.0)
    assert (request.state, request.limit, request.why) == (RequestState.READY, 3, "not stored")
    assert request.sources([]) == {"pool": 3}


def test_a_miss_hashes_only_the_first_chunks() -> None:
    core = make(8)
    fill(core, chain(3))
    other = chain(2000, first=7)
    assert core.lookup(core.spaces[ORIGIN], "a", other, 0.0).state is RequestState.MISS
    assert other.hashed <= 2


def test_eviction_takes_leaves_of_the_oldest_chain_first() -> None:
    core = make(6)
    fill(core, chain(3))
    fill(core, chain(3, first=100))
    core.lookup(core.spaces[ORIGIN], "a", chain(3), 0.0)
    core.forget("a")  # used again: now the other one is older
    fill(core, chain(2, first=200))
    index = core.spaces[ORIGIN].entries
    assert all(digest in index for digest in chain(3).digests())
    assert [digest in index for digest in chain(3, first=100).digests()] == [True, False, False]


def test_a_held_prefix_is_not_evicted_and_the_store_is_dropped() -> None:
    core = make(3)
    fill(core, chain(3))
    assert core.lookup(core.spaces[ORIGIN], "a", chain(3), 0.0).limit == 3
    assert core.reserve(core.spaces[ORIGIN], chain(2, first=50).digests(), 0, (0,), 0.0) is None
    assert core.counters["store_dropped_chunks.pool_full"] == 2
    core.forget("a")
    fill(core, chain(2, first=50))


def test_a_lease_outlasts_deletion() -> None:
    core = make(4)
    space = core.spaces[ORIGIN]
    fill(core, chain(3))
    core.lookup(space, "a", chain(3), 0.0)
    claimed = core.claim("a", 3, 0, 1, 0.0)
    assert claimed is not None
    assert core.delete(space, chain(3).digests()) == 3
    assert core.extents.quarantined_bytes == 3 * 64
    assert (
        core.reserve(space, chain(3, first=9).digests(), 0, (0,), 0.0) is not None
    )  # one chunk of room is left, no more
    assert core.counters["store_dropped_chunks.pool_full"] == 2
    core.release(claimed[0], 0)
    assert core.extents.quarantined_bytes == 0
    core.check_integrity()


def test_one_load_serves_all_who_wait_for_it() -> None:
    core = make(8, (("disk", True),))
    space = core.spaces[ORIGIN]
    core.lookup(space, "a", chain(4), 0.0)
    probe = asked(core)
    core.probed(probe, 4, 0.0)
    core.probed(probe, 0, 0.0)  # a late answer changes nothing
    started = [action for action in core.actions if isinstance(action, StartJob)]
    core.actions.clear()
    core.lookup(space, "b", chain(4), 0.0)
    assert len(started) == 1 and not core.actions, "b waits for the same load and does not even ask the tier"
    core.actions.clear()
    job = started[0].job
    core.job_done(job, [True, True, False, True], 0.0)
    resolved = [action.request for action in core.actions if isinstance(action, Resolved)]
    assert [(r.rid, r.state, r.limit, r.why) for r in resolved] == [
        ("a", RequestState.READY, 2, "load failed"),
        ("b", RequestState.READY, 2, "load failed"),
    ]
    core.check_integrity()


def test_a_pending_lookup_says_how_long_it_takes_once_the_tier_has_shown_its_speed() -> None:
    core = make(64, (("disk", True), ("net", True)), batch_bytes=64)
    space = core.spaces[ORIGIN]

    def look(rid: str, first: int, tier: int, now: float, chunks: int = 4) -> tuple[Request, list[Job]]:
        request = core.lookup(space, rid, chain(chunks, first), now)
        for number in range(tier + 1):
            core.probed(asked(core), chunks if number == tier else 0, now)
        jobs = [action.job for action in core.actions if isinstance(action, StartJob)]
        core.actions.clear()
        return request, jobs

    first, jobs = look("first", 0, 0, 0.0)
    assert len(jobs) == 4
    assert core.eta_s(first, 0.0) is None
    for number, job in enumerate(jobs, start=1):  # two seconds for each chunk
        core.job_done(job, [True], 2.0 * number)
    second, jobs = look("second", 100, 0, 100.0)
    assert core.eta_s(second, 100.0) == pytest.approx(8.0)
    joined = core.lookup(space, "joined", chain(4, 100), 100.0)
    assert joined.state is RequestState.PENDING
    assert core.eta_s(joined, 100.0) == pytest.approx(8.0), "it waits for the same reads"
    core.job_done(jobs[0], [True], 102.0)
    assert core.eta_s(second, 102.0) == pytest.approx(6.0)
    behind, _ = look("behind", 200, 0, 102.0)
    assert core.eta_s(behind, 102.0) == pytest.approx(14.0), "after those that were asked for before"
    assert core.eta_s(second, 102.0) == pytest.approx(6.0)
    other, _ = look("other", 300, 1, 102.0)
    assert core.eta_s(other, 102.0) is None, "nothing has come from that tier yet"
    core.check_integrity()


def test_reads_that_queue_have_time_to_queue_and_hung_ones_have_not() -> None:
    core = make(64, (("disk", True),), batch_bytes=64, fetch_s=5.0)
    request = core.lookup(core.spaces[ORIGIN], "r", chain(30), 0.0)
    core.probed(asked(core), 30, 0.0)
    jobs = [action.job for action in core.actions if isinstance(action, StartJob)]
    for number, job in enumerate(jobs[:20], start=1):  # a second for each
        core.tick(float(number))
        core.job_done(job, [True], float(number))
    assert not core.counters["abandoned_jobs.disk"]
    core.tick(24.9)
    assert [job.abandoned for job in jobs[20:22]] == [False, False]
    core.tick(27.1)
    assert [job.abandoned for job in jobs[20:23]] == [True, True, False], "they had their time, and five seconds more"
    assert request.limit == 20
    core.tick(36.0)
    assert all(job.abandoned for job in jobs[20:])
    assert not core.jobs and core.extents.free_bytes == 44 * 64, "no call of theirs can write there any more"
    core.check_integrity()


def test_an_abandoned_load_is_a_miss_and_its_memory_waits_for_the_call() -> None:
    core = make(2, (("disk", True),), fetch_s=1.0)
    space = core.spaces[ORIGIN]
    request = core.lookup(space, "a", chain(2), 0.0)
    core.probed(asked(core), 2, 0.0)
    job = next(action.job for action in core.actions if isinstance(action, StartJob))
    core.job_started(job, 0.0)
    core.tick(1.0)
    assert request.state is RequestState.MISS and request.why == "load abandoned"
    assert core.extents.quarantined_bytes == 2 * 64
    assert core.reserve(space, chain(1, first=9).digests(), 0, (0,), 0.0) is None
    core.job_done(job, [True, True], 9.0)
    assert core.extents.free_bytes == 2 * 64
    assert not space.entries
    core.check_integrity()


def test_a_tier_that_fails_is_left_alone_for_a_while() -> None:
    breaker = Breaker(threshold=2, pause_s=1.0)
    breaker.record(False, 0.0)
    assert breaker.allows(0.0)
    breaker.record(False, 0.0)
    assert breaker.state == "open" and not breaker.allows(0.5)
    assert breaker.allows(1.0) and not breaker.allows(1.0), "one caller tries"
    breaker.record(False, 1.0)
    assert not breaker.allows(2.9) and breaker.allows(3.1)
    breaker.record(True, 3.1)
    assert breaker.state == "closed" and breaker.allows(3.1)


def test_write_back_is_bounded() -> None:
    core = make(8, (("disk", True),), queue_bytes=2 * 64)
    fill(core, chain(3))
    seal = next(action.job for action in core.actions if isinstance(action, StartJob))
    core.actions.clear()
    core.job_done(seal, [True] * 3, 0.0)
    assert not core.actions
    assert core.counters["store_dropped_chunks.disk"] == 3
    assert all(entry.sealed for entry in core.spaces[ORIGIN].entries.values())
    core.check_integrity()


def test_pins_hold_until_they_expire() -> None:
    core = make(3)
    fill(core, chain(3))
    assert core.pin(core.spaces[ORIGIN], chain(3).digests(), until=5.0) == 3
    assert core.reserve(core.spaces[ORIGIN], chain(1, first=9).digests(), 0, (0,), 0.0) is None
    core.tick(5.0)
    fill(core, chain(1, first=9))
    core.check_integrity()


def test_cells_of_several_writers_make_a_chunk_ready_together() -> None:
    core = Core(Extents([64 * 8]))
    space = core.open_space(ORIGIN, [64, 64])
    one, two = (core.reserve(space, chain(1).digests(), 0, (cell,), 0.0) for cell in (0, 1))
    assert one is not None and two is not None
    core.publish(one[0], None, 0.0)
    assert core.lookup(space, "a", chain(1), 0.0).state is RequestState.MISS
    core.forget("a")
    core.publish(two[0], None, 0.0)
    assert core.lookup(space, "a", chain(1), 0.0).state is RequestState.READY
    assert next(iter(space.entries.values())).state is EntryState.PUBLISHED
    core.check_integrity()


def test_digests_in_a_circle_can_be_evicted() -> None:
    core = make(4)
    space = core.spaces[ORIGIN]
    fill(core, chain(4))
    digests = chain(4).digests()
    for order in (digests[::-1], [digests[3], digests[0], digests[3]], [digests[0], digests[0]]):
        assert core.reserve(space, order, 0, (0,), 0.0, parent=order[-1]) is None
        assert core.pin(space, order, until=0.0) == len(order)
        core.check_integrity()
    core.tick(0.0)
    fill(core, chain(4, first=100))
    assert set(space.entries) == set(chain(4, first=100).digests())


def test_a_chunk_that_was_stored_alone_gets_its_parent_later() -> None:
    core = make(8)
    space = core.spaces[ORIGIN]
    digests = chain(6).digests()
    for first, count in ((4, 2), (2, 2), (0, 2)):
        answer = core.reserve(space, digests[first : first + count], first, (0,), 0.0)
        assert answer is not None
        core.publish(answer[0], None, 0.0)
    assert core.lookup(space, "a", chain(6), 0.0).limit == 6
    parents = [entry.parent.digest if (entry := space.entries[digest]).parent else None for digest in digests]
    assert parents == [None, *digests[:-1]]
    core.check_integrity()


def test_what_is_being_written_can_be_deleted() -> None:
    core = make(8)
    space = core.spaces[ORIGIN]
    answer = core.reserve(space, chain(3).digests(), 0, (0,), 0.0)
    assert answer is not None
    assert core.delete(space, chain(3).digests()) == 3
    assert core.extents.quarantined_bytes == 3 * 64, "the writer is still at it"
    fill(core, chain(1))
    core.publish(answer[0], None, 0.0)
    assert core.extents.quarantined_bytes == 0
    assert core.lookup(space, "a", chain(3), 0.0).limit == 1, "what was stored after that is there"
    core.check_integrity()


def test_what_is_being_loaded_can_be_deleted() -> None:
    core = make(8, (("disk", True),))
    space = core.spaces[ORIGIN]
    request = core.lookup(space, "a", chain(3), 0.0)
    core.probed(asked(core), 3, 0.0)
    job = next(action.job for action in core.actions if isinstance(action, StartJob))
    core.actions.clear()
    assert core.delete(space, chain(3).digests()) == 3
    assert (request.state, request.limit) == (RequestState.MISS, 0)
    (deletion,) = (action for action in core.actions if isinstance(action, DeleteRecords))
    core.actions.clear()
    later = core.lookup(space, "b", chain(3), 0.0)
    core.probed(asked(core), 3, 0.0)  # the tier has them still
    assert (later.state, later.limit) == (RequestState.MISS, 0)
    core.job_done(job, [True] * 3, 0.0)
    assert not space.entries and core.extents.free_bytes == core.extents.total_bytes
    core.records_deleted(deletion)
    assert not space.deleting
    core.check_integrity()


def test_a_deleted_chunk_is_not_in_the_answer_to_a_repeated_lookup() -> None:
    core = make(8)
    space = core.spaces[ORIGIN]
    fill(core, chain(3))
    assert core.lookup(space, "a", chain(3), 0.0).limit == 3
    core.delete(space, chain(3).digests()[1:2])
    assert core.lookup(space, "a", chain(3), 0.0).limit == 1


def test_a_claimed_request_is_forgotten_when_its_lease_is_gone_and_its_time_over() -> None:
    core = make(8, hold_s=10.0)
    space = core.spaces[ORIGIN]
    fill(core, chain(2))
    core.lookup(space, "a", chain(2), 0.0)
    claimed = core.claim("a", 2, 0, 1, 0.0)
    assert claimed is not None
    core.tick(11.0)
    assert "a" in core.requests
    core.release(claimed[0], 0)
    core.tick(12.0)
    assert not core.requests


def test_requests_that_nobody_forgets_are_bounded() -> None:
    core = make(8, (("net", False),), requests=3)
    first = core.lookup(core.spaces[ORIGIN], "r0", chain(2), 0.0)
    core.actions.clear()
    for number in range(1, 10):
        core.lookup(core.spaces[ORIGIN], f"r{number}", chain(2), 0.0)
    assert list(core.requests) == ["r7", "r8", "r9"]
    assert (first.state, first.why) == (RequestState.MISS, "too many lookups")
    assert first in [action.request for action in core.actions if isinstance(action, Resolved)]


def test_a_tier_whose_probes_hang_is_not_asked_again() -> None:
    core = make(8, (("hung", False), ("net", False)), fetch_s=1.0)
    space = core.spaces[ORIGIN]
    requests = [core.lookup(space, f"r{number}", chain(2), 0.0) for number in range(4)]
    probes = [action for action in core.actions if isinstance(action, Probe)]
    core.actions.clear()
    assert [core.probe_started(probe, 0.5) for probe in probes[:2]] == [True, True]
    core.tick(1.1)
    assert [probe.request for probe in core.actions if isinstance(probe, Probe)] == requests[2:], "still in line"
    core.tick(1.5)
    onwards = [action for action in core.actions if isinstance(action, Probe)]
    core.actions.clear()
    assert [probe.request for probe in onwards] == requests[2:] + requests[:2], "all go on to the next tier"
    assert {probe.tier for probe in onwards} == {1}
    assert not core.probe_started(probes[2], 2.0), "it is not worth a call any more"
    for number in range(10):
        core.lookup(space, f"later{number}", chain(2), 100.0 + number)
    assert {action.tier for action in core.actions if isinstance(action, Probe)} == {1}
    core.actions.clear()
    core.probed(probes[0], 2, 200.0)
    assert requests[0].fetch == {}, "too late"
    core.lookup(space, "again", chain(2), 200.0)
    assert asked(core).tier == 0
    core.check_integrity()


def test_reads_that_hang_do_not_take_the_pool() -> None:
    core = make(64, (("hung", True),), batch_bytes=64, fetch_s=1.0)
    space = core.spaces[ORIGIN]
    for attempt in range(20):
        now = 100.0 * attempt
        core.lookup(space, f"r{attempt}", chain(8, first=1000 * attempt), now)
        if not core.probes:
            continue
        core.probed(asked(core), 8, now)
        jobs = [action.job for action in core.actions if isinstance(action, StartJob)]
        core.actions.clear()
        for job in jobs[: 2 - core.tiers[0].hung_reads]:  # the tier's threads
            core.job_started(job, now)
        core.tick(now + 99.0)
    assert core.extents.quarantined_bytes == 2 * 64 == core.extents.total_bytes - core.extents.free_bytes
    core.check_integrity()
