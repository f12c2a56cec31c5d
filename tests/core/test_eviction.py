"""Eviction policies: the suite for all of them, and what makes the fair one fair."""

from __future__ import annotations

import pytest

from lmcache_sdk.config import Tenant, load_config
from lmcache_sdk.core import Core, Limits, RequestState
from lmcache_sdk.core.extents import Extents
from lmcache_sdk.errors import ConfigError
from lmcache_sdk.eviction import LRU, Fair, Policy
from lmcache_sdk.keys import Chain, Origin
from lmcache_sdk.testing.eviction import Item, PolicyTests

ORIGIN = Origin("0" * 32, "1" * 16)
SIZE = 64


class TestLRU(PolicyTests):
    def make(self, pool_bytes: int = 1 << 20) -> Policy[Item]:
        return LRU()


class TestFair(PolicyTests):
    def make(self, pool_bytes: int = 1 << 20) -> Policy[Item]:
        return Fair(pool_bytes)


class TestFairWithWeights(PolicyTests):
    def make(self, pool_bytes: int = 1 << 20) -> Policy[Item]:
        return Fair(pool_bytes, weights={"a": 3, "*": 2})


def fair(
    holdings: dict[str, int], *, evictable: str = "", pool: int = 120, weights: dict[str, int] | None = None
) -> Fair[Item]:
    """A full pool, by tenant; of the tenants in ``evictable`` one item of 10 bytes may go."""
    policy: Fair[Item] = Fair(pool, weights=weights)
    for tenant, nbytes in holdings.items():
        policy.charge(tenant, nbytes)
        if tenant in evictable:
            policy.insert(Item(f"of {tenant}", tenant), 1)
    return policy


@pytest.mark.parametrize(
    ("holdings", "evictable", "weights", "taker", "giver"),
    [
        ({"a": 90, "b": 30}, "ab", {}, "b", "a"),  # from who has more than its half
        ({"a": 90, "b": 30}, "ab", {}, "a", "a"),  # also for itself
        ({"a": 60, "b": 60}, "ab", {}, "a", "a"),  # both at their share: nobody takes from the other
        ({"a": 60, "b": 60}, "b", {}, "a", None),  # not even if it has nothing of its own to give
        ({"a": 60, "b": 60}, "ab", {}, "c", "a"),  # a newcomer has a share, too
        ({"a": 90, "b": 30}, "b", {}, "a", None),  # a flood whose chunks are all in use is refused
        ({"a": 90, "b": 20, "c": 10}, "b", {}, "c", "b"),  # the poorer of two below their share may take
        ({"a": 90, "b": 20, "c": 10}, "c", {}, "b", None),  # the richer may not
        ({"a": 80, "b": 40}, "ab", {"a": 2}, "b", "b"),  # twice the weight, twice the share
        ({"a": 70, "b": 50}, "ab", {"a": 2}, "a", "b"),
        ({"a": 70, "b": 50}, "ab", {"*": 5}, "b", "a"),  # a weight for all changes nothing
        ({"a": 120}, "a", {}, "a", "a"),
        ({"a": 120}, "", {}, "a", None),
    ],
)
def test_whose_chunk_goes(
    holdings: dict[str, int], evictable: str, weights: dict[str, int], taker: str, giver: str | None
) -> None:
    victim = fair(holdings, evictable=evictable, weights=weights).victim(taker, 10)
    assert (victim.tenant if victim else None) == giver


def test_a_share_is_that_of_those_who_are_there() -> None:
    policy = fair({"a": 10, "b": 10}, pool=120, weights={"b": 2})
    assert (policy.share("a"), policy.share("b"), policy.share("newcomer")) == (40, 80, 30)
    policy.charge("b", -10)
    assert policy.share("a") == 120


def test_a_tenant_at_its_quota_gives_itself() -> None:
    policy: Fair[Item] = Fair(1000, quotas={"a": 30, "*": 50})
    policy.charge("a", 30)
    policy.charge("b", 50)
    mine, other = Item("mine", "a"), Item("other", "b")
    policy.insert(mine, 2)
    policy.insert(other, 1)
    assert policy.full("a", 1)
    assert policy.full("b", 1)
    assert not policy.full("c", 50)
    assert policy.victim("a", 10) is mine
    assert policy.victim("a", 10) is None


# In the core


def make(chunks: int, **arguments: object) -> Core:
    pool_bytes = chunks * SIZE
    core = Core(Extents([pool_bytes]), limits=Limits(), policy=Fair(pool_bytes, **arguments), seal=False)  # type: ignore[arg-type]
    core.open_space(ORIGIN, [SIZE])
    return core


def prompt(seed: int, chunks: int, tenant: str) -> Chain:
    return Chain(range(seed, seed + 2 * chunks), 2, tenant=tenant)


def fill(core: Core, chain: Chain) -> int:
    """Store a prompt; the answer is how many chunks found room."""
    answer = core.reserve(core.spaces[ORIGIN], chain.digests(), 0, (0,), 0.0, tenant=chain.tenant)
    if answer is None:
        return 0
    core.publish(answer[0], None, 0.0)
    core.check_integrity()
    return len(answer[1].entries)


def found(core: Core, chain: Chain) -> int:
    request = core.lookup(core.spaces[ORIGIN], "look", chain, 0.0)
    core.forget("look")
    return request.limit


def test_a_flood_leaves_others_their_share() -> None:
    core = make(30)
    quiet = [prompt(1000 * number, 5, "quiet") for number in range(3)]  # half the pool
    assert [fill(core, chain) for chain in quiet] == [5, 5, 5]
    for number in range(50):
        assert fill(core, prompt(100_000 + 1000 * number, 5, "flood")) == 5
    assert [found(core, chain) for chain in quiet] == [5, 5, 5]
    assert core.usage == {"quiet": 15 * SIZE, "flood": 15 * SIZE}


def test_what_nobody_else_uses_may_be_used_until_they_come() -> None:
    core = make(30)
    for number in range(10):
        fill(core, prompt(1000 * number, 5, "first"))
    assert core.usage == {"first": 30 * SIZE}
    for number in range(10):
        fill(core, prompt(100_000 + 1000 * number, 5, "second"))
    assert core.usage == {"first": 15 * SIZE, "second": 15 * SIZE}


def test_a_flood_under_lease_is_refused_rather_than_others_evicted() -> None:
    core = make(8)
    fill(core, prompt(0, 4, "quiet"))
    flood = prompt(1000, 4, "flood")
    fill(core, flood)
    core.lookup(core.spaces[ORIGIN], "flood", flood, 0.0)
    assert core.claim("flood", 4, 0, 1, 0.0) is not None
    assert fill(core, prompt(2000, 2, "flood")) == 0
    assert core.counters["store_dropped_chunks.pool_full"] == 2
    assert found(core, prompt(0, 4, "quiet")) == 4


def test_beyond_its_quota_a_tenant_evicts_its_own_and_then_is_refused() -> None:
    core = make(30, quotas={"small": 4 * SIZE})
    assert fill(core, prompt(0, 3, "small")) == 3
    assert fill(core, prompt(1000, 3, "small")) == 3, "in the place of its older ones, though the pool is empty"
    assert core.usage == {"small": 4 * SIZE}
    assert core.counters["removed_chunks.quota"] == 2
    assert fill(core, prompt(2000, 6, "small")) == 4
    assert core.counters["store_dropped_chunks.quota"] == 2
    assert fill(core, prompt(3000, 10, "")) == 10, "others have no quota"


def test_what_an_earlier_life_left_becomes_the_first_askers() -> None:
    core = make(8, quotas={"b": 2 * SIZE})
    space, chain = core.spaces[ORIGIN], prompt(0, 4, "a")
    for position in (3, 2, 1, 0):
        address = core.extents.allocate(SIZE)
        assert address is not None
        core.earlier.adopt(space, chain.digests()[position], [address], 2 * position, leased=False)
    assert core.usage == {"": 4 * SIZE}
    core.lookup(space, "nobody", prompt(0, 1, ""), 0.0)
    assert core.usage == {"": 4 * SIZE}, "an asker without a name claims nothing"
    core.lookup(space, "b", prompt(0, 4, "b"), 0.0)
    assert core.usage == {"": 2 * SIZE, "b": 2 * SIZE}, "no further than the quota; and what is being verified already"
    for job in list(core.jobs.values()):
        core.job_done(job, [True] * len(job.entries), 0.0)
    assert core.lookup(space, "a", chain, 0.0).state is RequestState.READY
    assert core.usage == {"": 2 * SIZE, "b": 2 * SIZE}, "it has an owner, or was used by one who did not want it"
    core.check_integrity()


# As people write it


def test_tenants_are_configured() -> None:
    tenants = {"a": {"quota": "2GiB", "weight": 2}, "*": {"quota": "1MiB"}, "b": {}}
    config = load_config({"tenants": tenants}, environment={})
    assert config.tenants == {"a": Tenant(2 << 30, 2), "*": Tenant(1 << 20), "b": Tenant()}
    text = load_config(environment={"LMCACHE_SDK_TENANTS": "{a: {quota: 2GiB, weight: 2}, '*': {quota: 1MiB}, b: {}}"})
    assert text.tenants == config.tenants


@pytest.mark.parametrize(
    ("tenants", "message"),
    [
        ({"a": {"quota": "much"}}, "'much' is not a size"),
        ({"a": {"weight": 0}}, "tenants must have weights from 1"),
        ({"a": {"weight": 1.5}}, "tenants"),
        ({"a": {"wieght": 1}}, "wieght"),
        ({"a": 5}, "tenants"),
        (["a"], "tenants"),
        ("{a: {", "tenants must be like"),
    ],
)
def test_wrong_tenants_are_named(tenants: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config({"tenants": tenants}, environment={})


class Tick(int):
    """Counts how often it is compared."""

    compared = 0

    def __eq__(self, other: object) -> bool:
        Tick.compared += 1
        return int(self) == other

    __hash__ = int.__hash__


def test_no_change_of_a_long_queue_looks_at_all_of_it() -> None:
    """What goes while it is not the oldest is cleaned up in small pieces: all at once was a pause of half a second."""
    queue, items = LRU[Item](), [Item(str(number)) for number in range(20_000)]
    for number, item in enumerate(items):
        queue.insert(item, Tick(number))
    worst = 0
    for number, item in enumerate(items[::-1]):
        Tick.compared = 0
        queue.discard(item)
        worst = max(worst, Tick.compared)
        if number % 2:
            Tick.compared = 0
            queue.insert(item, Tick(20_000 + number))
            worst = max(worst, Tick.compared)
    assert 0 < worst < 500
    again = items[::-1][1::2]
    assert [queue.victim() for _ in range(10_001)] == [*again, None]
