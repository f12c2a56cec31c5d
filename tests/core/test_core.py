"""The core alone: a seeded simulator, and the rules that deserve a name."""

from __future__ import annotations

import os

import pytest

from lmcache_sdk.core import Breaker, Core, EntryState, Job, Limits, Request, RequestState, Resolved, StartJob
from lmcache_sdk.core.extents import Extents
from lmcache_sdk.keys import Chain, Origin
from tests.core.simulator import Simulator

SCHEDULES = 2000
BLOCKS = 10
BASE_SEED = int(os.environ.get("LMCACHE_SDK_SEED", "20261124"))
ORIGIN = Origin("0" * 32, "1" * 16)


def run(seed: int, steps: int = 80) -> None:
    simulator = Simulator(seed)
    try:
        for _ in range(steps):
            simulator.step()
        simulator.finish()
    except BaseException as error:
        error.add_note(f"simulator seed {seed}; repeat with LMCACHE_SDK_SEED={seed}")
        raise


@pytest.mark.parametrize("block", range(BLOCKS))
def test_simulated_schedules(block: int) -> None:
    size = SCHEDULES // BLOCKS
    for seed in range(BASE_SEED + block * size, BASE_SEED + (block + 1) * size):
        run(seed)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_many_simulated_schedules() -> None:
    for seed in range(BASE_SEED + 100_000, BASE_SEED + 120_000):
        run(seed, steps=120)


def chain(chunks: int, first: int = 0) -> Chain:
    return Chain(list(range(first, first + 2 * chunks)), 2)


def fill(core: Core, chain: Chain, now: float = 0.0) -> None:
    answer = core.reserve(core.spaces[ORIGIN], chain.digests(), 0, (0,))
    assert answer is not None
    core.publish(answer[0], None, now)


def make(pool_chunks: int, tiers: tuple[tuple[str, bool], ...] = (), **limits: float) -> Core:
    core = Core(Extents([64 * pool_chunks]), tiers, limits=Limits(**limits), seal=bool(tiers))  # type: ignore[arg-type]
    core.open_space(ORIGIN, [64])
    return core


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
    assert core.reserve(core.spaces[ORIGIN], chain(2, first=50).digests(), 0, (0,)) is None
    assert core.counters["store_dropped_chunks.pool_full"] == 2
    core.forget("a")
    fill(core, chain(2, first=50))


def test_a_lease_outlasts_deletion() -> None:
    core = make(4)
    space = core.spaces[ORIGIN]
    fill(core, chain(3))
    core.lookup(space, "a", chain(3), 0.0)
    claimed = core.claim("a", 3, 0, 1)
    assert claimed is not None
    assert core.delete(space, chain(3).digests()) == 3
    assert core.extents.quarantined_bytes == 3 * 64
    assert core.reserve(space, chain(3, first=9).digests(), 0, (0,)) is not None  # one chunk of room is left, no more
    assert core.counters["store_dropped_chunks.pool_full"] == 2
    core.release(claimed[0], 0)
    assert core.extents.quarantined_bytes == 0
    core.check_integrity()


def test_one_load_serves_all_who_wait_for_it() -> None:
    core = make(8, (("disk", True),))
    space = core.spaces[ORIGIN]
    first = core.lookup(space, "a", chain(4), 0.0)
    core.probed(first, 0, 4, 0.0)
    core.probed(first, 0, 0, 0.0)  # a late answer changes nothing
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
        core.actions.clear()
        for asked in range(tier + 1):
            core.probed(request, asked, chunks if asked == tier else 0, now)
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
    core.probed(request, 0, 30, 0.0)
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
    for job in jobs[20:]:
        core.job_done(job, [True], 40.0)
    core.check_integrity()


def test_an_abandoned_load_is_a_miss_and_its_memory_waits_for_the_call() -> None:
    core = make(2, (("disk", True),), fetch_s=1.0)
    space = core.spaces[ORIGIN]
    request = core.lookup(space, "a", chain(2), 0.0)
    core.probed(request, 0, 2, 0.0)
    job = next(action.job for action in core.actions if isinstance(action, StartJob))
    core.tick(1.0)
    assert request.state is RequestState.MISS and request.why == "load abandoned"
    assert core.extents.quarantined_bytes == 2 * 64
    assert core.reserve(space, chain(1, first=9).digests(), 0, (0,)) is None
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
    assert core.reserve(core.spaces[ORIGIN], chain(1, first=9).digests(), 0, (0,)) is None
    core.tick(5.0)
    fill(core, chain(1, first=9))
    core.check_integrity()


def test_cells_of_several_writers_make_a_chunk_ready_together() -> None:
    core = Core(Extents([64 * 8]))
    space = core.open_space(ORIGIN, [64, 64])
    one, two = (core.reserve(space, chain(1).digests(), 0, (cell,)) for cell in (0, 1))
    assert one is not None and two is not None
    core.publish(one[0], None, 0.0)
    assert core.lookup(space, "a", chain(1), 0.0).state is RequestState.MISS
    core.forget("a")
    core.publish(two[0], None, 0.0)
    assert core.lookup(space, "a", chain(1), 0.0).state is RequestState.READY
    assert next(iter(space.entries.values())).state is EntryState.PUBLISHED
    core.check_integrity()
