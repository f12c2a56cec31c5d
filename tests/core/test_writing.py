"""When which chunk goes to which tier: each rule that a user may choose, in the core alone."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from lmcache_sdk.core import Core, Entry, Job, JobKind, Limits, Probe, Request, RequestState, StartJob
from lmcache_sdk.core.extents import Extents
from lmcache_sdk.core.rules import Admit, TierRules, Write
from lmcache_sdk.keys import Chain, Origin

ORIGIN = Origin("0" * 32, "1" * 16)
SIZE = 64
TOKENS = 2  # in a chunk


class World:
    """A core whose jobs succeed when they are told to."""

    def __init__(self, *rules: TierRules, chunks: int = 64, **limits: int) -> None:
        names = [(f"tier{number}", False) for number in range(len(rules))]
        self.core = Core(Extents([SIZE * chunks]), names, rules=rules, limits=Limits(**limits))
        self.space = self.core.open_space(ORIGIN, [SIZE], TOKENS)
        self.jobs: list[Job] = []
        self.written: list[tuple[int, Entry]] = []

    def store(self, chain: Chain, now: float = 0.0, first: int = 0) -> int:
        """Store and seal; the answer is how many chunks found room."""
        digests = chain.digests()
        parent = digests[first - 1] if first else None
        answer = self.core.reserve(
            self.space, digests[first:], first, (0,), now, parent=parent, tenant=chain.tenant, chunk_tokens=TOKENS
        )
        if answer is None:
            return 0
        self.core.publish(answer[0], None, now)
        self.finish(JobKind.SEAL, now)
        return len(answer[1].entries)

    def finish(self, kind: JobKind, now: float = 0.0, *, ok: bool = True) -> None:
        """End the jobs of one kind that have been started so far."""
        self.look()
        for job in [job for job in self.jobs if job.kind is kind]:
            self.jobs.remove(job)
            if ok and kind is JobKind.PUT:
                self.written += [(job.tier, entry) for entry in job.entries]
            self.core.job_done(job, [ok] * len(job.entries), now, failed=not ok)
        self.core.check_integrity()
        self.look()

    def look(self) -> None:
        self.jobs += [action.job for action in self.core.actions if isinstance(action, StartJob)]
        self.core.actions.clear()

    def use(self, chain: Chain, now: float = 0.0) -> None:
        """A request that finds it, loads it and ends."""
        request = self.core.lookup(self.space, "r", chain, now, prefetch=False)
        claimed = self.core.claim("r", request.limit, 0, 1, now)
        assert claimed is not None
        self.core.forget("r")
        self.core.release(claimed[0], 0)

    def queued(self, tier: int = 0) -> list[list[bytes]]:
        self.look()
        return [
            [entry.digest for entry in job.entries] for job in self.jobs if job.kind is JobKind.PUT and job.tier == tier
        ]

    def tier_has(self, chain: Chain, tier: int = 0) -> list[bool]:
        got = {entry.digest for at, entry in self.written if at == tier}
        return [digest in got for digest in chain.digests()]

    def pool_has(self, chain: Chain) -> list[bool]:
        return [digest in self.space.entries for digest in chain.digests()]


def prompt(chunks: int, first: int = 0) -> Chain:
    return Chain(range(first, first + TOKENS * chunks), TOKENS)


# through


def test_through_writes_what_is_sealed_at_once() -> None:
    world = World(TierRules())
    world.store(prompt(3))
    assert world.queued() == [prompt(3).digests()]


# back


def test_back_waits_and_writes_together_what_was_stored_meanwhile() -> None:
    world = World(TierRules(write=Write.BACK, back_s=5.0))
    world.store(prompt(2), now=0.0)
    world.store(prompt(2, first=100), now=1.0)
    world.core.tick(4.9)
    assert world.queued() == []
    assert world.core.waits, "it must be told the time"
    world.core.tick(6.0)
    assert world.queued() == [prompt(2).digests() + prompt(2, first=100).digests()]
    assert not world.core.writing.waiting


def test_what_does_not_live_long_is_never_written() -> None:
    world = World(TierRules(write=Write.BACK, back_s=5.0), chunks=4)
    world.store(prompt(4), now=0.0)
    world.store(prompt(4, first=100), now=1.0)
    world.core.tick(9.0)
    assert world.queued() == [prompt(4, first=100).digests()]
    assert world.core.counters["short_lived_chunks.tier0"] == 4


def test_a_drain_does_not_wait() -> None:
    world = World(TierRules(write=Write.BACK))
    world.store(prompt(3))
    world.core.writing.flush(0.0)
    assert world.queued() == [prompt(3).digests()]


def test_back_keeps_its_queue_bounded_and_waits_rather_than_drop() -> None:
    world = World(TierRules(write=Write.BACK, back_s=1.0), queue_bytes=3 * SIZE)
    for number in range(3):
        world.store(prompt(2, first=100 * number), now=0.0)
    world.core.tick(2.0)
    assert world.queued() == [prompt(2).digests()], "two more would be one too many"
    world.finish(JobKind.PUT)
    world.core.tick(2.1)
    assert world.queued() == [prompt(2, first=100).digests()]
    assert not world.core.counters["store_dropped_chunks.tier0"]


def test_back_waits_for_a_tier_in_trouble_but_a_drain_does_not() -> None:
    world = World(TierRules(write=Write.BACK, back_s=1.0, failures=1, retry_s=10.0))
    world.store(prompt(1), now=0.0)
    world.core.tick(1.0)
    world.finish(JobKind.PUT, 1.0, ok=False)
    world.store(prompt(2, first=100), now=1.0)
    world.core.tick(5.0)
    assert world.queued() == []
    world.core.writing.flush(6.0)
    assert world.queued() == [] and not world.core.writing.waiting
    assert world.core.counters["store_dropped_chunks.tier0"] == 3


def test_little_waits_of_much_that_has_gone() -> None:
    world = World(TierRules(write=Write.BACK, back_s=1e9), chunks=8)
    for number in range(200):
        assert world.store(prompt(4, first=100 * number)) == 4
        assert world.core.tiers[0].waiting_bytes <= 2 * 8 * SIZE
    world.core.writing.flush(0.0)
    assert sorted(digest for job in world.queued() for digest in job) == sorted(world.space.entries)


# evict


def test_evict_writes_what_goes_and_its_room_comes_back_when_it_is_written() -> None:
    world = World(TierRules(write=Write.EVICT), chunks=16, batch_bytes=2 * SIZE)
    for number in range(4):
        assert world.queued() == []
        world.store(prompt(4, first=100 * number))
    assert world.queued() == [prompt(4).digests()[2:]], "an eighth of the pool ahead; of the oldest, from its end"
    assert world.pool_has(prompt(4)) == [True] * 4, "readable until it is written"
    world.finish(JobKind.PUT)
    assert world.tier_has(prompt(4)) == [False, False, True, True]
    assert world.pool_has(prompt(4)) == [True, True, False, False]
    assert world.core.extents.free_bytes == 2 * SIZE


def test_what_is_used_while_it_is_written_stays() -> None:
    world = World(TierRules(write=Write.EVICT), chunks=16, batch_bytes=SIZE)
    for number in range(4):
        world.store(prompt(4, first=100 * number))
    assert world.queued()
    world.use(prompt(4))
    world.finish(JobKind.PUT)
    assert world.pool_has(prompt(4)) == [True] * 4
    assert any(world.tier_has(prompt(4))), "and need not be written again"


def test_with_a_tier_that_keeps_up_no_store_is_dropped() -> None:
    world = World(TierRules(write=Write.EVICT), chunks=64, batch_bytes=4 * SIZE)
    chains = [prompt(4, first=100 * number) for number in range(100)]
    for chain in chains:
        assert world.store(chain) == 4
        world.finish(JobKind.PUT)
    assert not any(count for name, count in world.core.counters.items() if name.startswith("store_dropped_chunks"))
    for chain in chains:
        assert [t or p for t, p in zip(world.tier_has(chain), world.pool_has(chain), strict=True)] == [True] * 4


def test_a_tier_that_does_not_keep_up_costs_its_own_chunks_and_no_store() -> None:
    world = World(TierRules(write=Write.EVICT), chunks=64, batch_bytes=4 * SIZE)
    for number in range(100):
        assert world.store(prompt(4, first=100 * number)) == 4, "no write ends"
        assert world.core.writing.leaving_bytes <= 16 * SIZE
    dropped = world.core.counters["store_dropped_chunks.tier0"]
    assert dropped == 400 - 64 + world.core.extents.free_bytes // SIZE
    world.finish(JobKind.PUT)


def test_while_a_tier_fails_what_goes_is_not_written() -> None:
    world = World(TierRules(write=Write.EVICT, failures=1), chunks=16, batch_bytes=SIZE)
    for number in range(4):
        world.store(prompt(4, first=100 * number))
    world.finish(JobKind.PUT, ok=False)
    assert not all(world.pool_has(prompt(4))), "it goes nevertheless"
    for number in range(4, 8):
        assert world.store(prompt(4, first=100 * number)) == 4
    assert world.queued() == []


def test_what_a_tier_has_already_goes_without_a_write() -> None:
    world = World(TierRules(), TierRules(write=Write.EVICT), chunks=16)
    for entry_of in range(8):
        world.store(prompt(4, first=100 * entry_of))
        world.finish(JobKind.PUT)
    assert all(all(world.tier_has(prompt(4, first=100 * number), 0)) for number in range(8))
    written = [entry for tier, entry in world.written if tier == 1]
    assert len(written) == len(set(written))


def test_at_the_end_of_a_pool_that_is_not_kept_all_is_written() -> None:
    world = World(TierRules(write=Write.EVICT))
    world.store(prompt(3))
    assert world.queued() == []
    world.core.writing.leave_all([world.space])
    world.core.writing.flush(0.0)
    assert world.queued() == [prompt(3).digests()]


def test_at_the_end_a_prefix_is_written_that_was_used_though_what_follows_was_not() -> None:
    world = World(TierRules(write=Write.EVICT, admit=Admit.SECOND))
    world.store(prompt(5))
    world.use(prompt(2))
    world.core.writing.leave_all([world.space])
    world.core.writing.flush(0.0)
    assert world.queued() == [prompt(2).digests()]


# admit


def test_second_writes_what_a_request_has_found_with_all_before_it() -> None:
    world = World(TierRules(admit=Admit.SECOND))
    world.store(prompt(4))
    assert world.queued() == []
    world.use(prompt(3))
    assert world.queued() == [prompt(3).digests()]
    world.use(prompt(4))
    assert world.queued()[1:] == [prompt(4).digests()[3:]], "each once"


def test_second_writes_what_is_stored_again_after_it_had_gone() -> None:
    world = World(TierRules(admit=Admit.SECOND), chunks=4)
    world.store(prompt(4))
    world.store(prompt(4, first=100))
    assert world.queued() == [] and not any(world.pool_has(prompt(4)))
    world.store(prompt(4))
    assert world.queued() == [prompt(4).digests()]


def test_second_goes_with_the_other_rules() -> None:
    world = World(TierRules(write=Write.BACK, back_s=1.0, admit=Admit.SECOND), chunks=64)
    world.store(prompt(2), now=0.0)
    world.core.tick(9.0)
    assert world.queued() == []
    world.use(prompt(2), now=9.0)
    world.core.tick(9.5)
    assert world.queued() == []
    world.core.tick(10.0)
    assert world.queued() == [prompt(2).digests()]


# min_tokens


def test_a_short_prefix_is_not_written_until_it_is_long_enough() -> None:
    world = World(TierRules(min_tokens=4 * TOKENS))
    chain = prompt(6)
    world.store(prompt(3))
    assert world.queued() == []
    world.store(prompt(4), first=3)
    assert world.queued() == [prompt(4).digests()], "its first chunks come with it"
    world.store(chain, first=4)
    assert world.queued()[1:] == [chain.digests()[4:]]


def test_a_prefix_of_unknown_depth_is_written() -> None:
    world = World(TierRules(min_tokens=100))
    chain = Chain.from_digests(prompt(2).digests(), TOKENS)
    answer = world.core.reserve(world.space, chain.digests(), 0, (0,), 0.0)
    assert answer is not None
    world.core.publish(answer[0], None, 0.0)
    world.finish(JobKind.SEAL)
    assert world.queued() == [chain.digests()]


def test_a_long_prefix_that_goes_piece_by_piece_is_written_to_its_beginning() -> None:
    world = World(TierRules(write=Write.EVICT, min_tokens=4 * TOKENS), chunks=16, batch_bytes=SIZE)
    world.store(prompt(8))
    short = prompt(3, first=50)
    world.store(short)
    for number in range(1, 20):
        world.store(prompt(4, first=100 * number))
        world.finish(JobKind.PUT)
    assert world.tier_has(prompt(8)) == [True] * 8
    assert world.tier_has(short) == [False] * 3
    assert not any(world.pool_has(prompt(8)) + world.pool_has(short))


# Reading


def load(world: World, chain: Chain, answers: Sequence[int], now: float = 0.0) -> RequestState:
    """Look up, with each tier's answer in turn, and end the loads."""
    request = world.core.lookup(world.space, "r", chain, now)
    for count in answers:
        (probe,) = [action for action in world.core.actions if isinstance(action, Probe)]
        world.look()
        world.core.probed(probe, count, now)
    assert not any(isinstance(action, Probe) for action in world.core.actions)
    world.finish(JobKind.FETCH, now)
    state = request.state
    world.core.forget("r")
    return state


def test_what_was_loaded_goes_to_the_tiers_before() -> None:
    world = World(TierRules(), TierRules(write=Write.BACK), TierRules(), TierRules())
    assert load(world, prompt(3), [0, 0, 3]) is RequestState.READY
    assert (world.queued(0), world.queued(1), world.queued(3)) == ([prompt(3).digests()], [], [])
    assert world.core.writing.waiting


def test_without_promotion_it_goes_nowhere_and_gives_its_room_first() -> None:
    world = World(TierRules(), TierRules(promote=False), TierRules(admit=Admit.SECOND), chunks=8)
    world.store(prompt(4))
    world.finish(JobKind.PUT)
    assert load(world, prompt(4, first=100), [0, 4]) is RequestState.READY
    assert world.queued(0) == []
    world.use(prompt(4, first=100))
    assert world.queued(2) == [], "though it was used"
    world.store(prompt(3, first=200))
    assert world.pool_has(prompt(4, first=100)) == [True, False, False, False], "though it was used last"
    assert world.pool_has(prompt(4)) == [True] * 4


def test_that_a_tier_lacks_a_chunk_is_remembered_for_a_while() -> None:
    world = World(TierRules(missing_s=2.0), TierRules(missing_s=0.0))
    assert load(world, prompt(3), [0, 0], now=0.0) is RequestState.MISS
    assert load(world, prompt(3), [0], now=1.9) is RequestState.MISS, "only the second is asked"
    assert world.core.counters["negative_hits.tier0"] == 1
    assert load(world, prompt(3), [3], now=2.0) is RequestState.READY
    assert world.core.counters["negative_hits.tier0"] == 1


def test_what_it_was_given_it_does_not_lack() -> None:
    world = World(TierRules(missing_s=60.0), chunks=4)
    load(world, prompt(2), [0])
    world.store(prompt(2))
    world.finish(JobKind.PUT)
    world.store(prompt(4, first=100))
    world.finish(JobKind.PUT)
    assert not any(world.pool_has(prompt(2)))
    assert load(world, prompt(2), [2]) is RequestState.READY


def test_it_is_remembered_where_a_prefix_ended() -> None:
    world = World(TierRules(missing_s=60.0))
    assert load(world, prompt(5), [3]) is RequestState.READY
    request = world.core.lookup(world.space, "again", prompt(5), 1.0)
    assert (request.state, request.limit) == (RequestState.READY, 3)


@pytest.mark.parametrize("count", [1 << 16, (1 << 16) + 5])
def test_little_is_remembered_of_much(count: int) -> None:
    world = World(TierRules(missing_s=60.0))
    state = world.core.tiers[0]
    for number in range(count):
        chain = Chain.from_digests([number.to_bytes(32, "big")], TOKENS)
        state.lacked(Request(world.space, "r", chain, True, 0.0, 1.0), 0, 0.0)
    assert len(state._missing) == 1 << 16
    assert state.lacks(Request(world.space, "r", chain, True, 0.0, 1.0), 0, 1.0)
