"""S3-FIFO: the suite of all policies, and where it is better than LRU, and where not."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest

from lmcache_sdk.core import Core
from lmcache_sdk.core.extents import Extents
from lmcache_sdk.eviction import LRU, QUEUES, S3FIFO, Fair, Policy
from lmcache_sdk.keys import Chain, Origin
from lmcache_sdk.testing.eviction import Item, PolicyTests

ORIGIN = Origin("0" * 32, "1" * 16)
SIZE = 64
ROOM = 100


class TestS3FIFO(PolicyTests):
    def make(self, pool_bytes: int = 1 << 20) -> Policy[Item]:
        return S3FIFO()


class TestFairOverS3FIFO(PolicyTests):
    def make(self, pool_bytes: int = 1 << 20) -> Policy[Item]:
        return Fair(pool_bytes, weights={"a": 3}, queue=S3FIFO)


def hits(policy: Policy[Item], trace: Iterator[str]) -> tuple[int, int]:
    """(hits, accesses) of a cache with room for 100 items."""
    has: dict[str, Item] = {}
    found = count = 0
    for tick, name in enumerate(trace):
        count += 1
        item = has.get(name)
        if item is not None:
            found += 1
            policy.discard(item)
            item.uses += 1
        else:
            if len(has) == ROOM:
                victim = policy.victim("", SIZE)
                assert victim is not None
                del has[victim.name]
                policy.charge("", -SIZE)
            item = has[name] = Item(name)
            policy.charge("", SIZE)
        policy.insert(item, tick)
    return found, count


def scans() -> Iterator[str]:
    """Half of the room is asked for again and again; between two rounds come as many as fit, once each."""
    for around in range(20):
        for hot in range(ROOM // 2):
            yield f"hot{hot}"
        for once in range(ROOM):
            yield f"once{around}.{once}"


def conversations() -> Iterator[str]:
    """Each is used a few times soon after it began, and then no more."""
    r = random.Random(7)
    for began in range(20_000):
        yield f"c{max(0, began - int(r.expovariate(1 / 40)))}"


def test_a_hot_set_outlasts_scans_and_under_lru_it_does_not() -> None:
    lru, count = hits(LRU(), scans())
    s3fifo, _ = hits(S3FIFO(), scans())
    assert lru == 0
    most = 19 * ROOM // 2  # all but the first round
    assert s3fifo >= 0.85 * most, f"{s3fifo} of {count}, where {most} are possible"


def test_where_the_latest_is_the_likeliest_lru_is_not_worse() -> None:
    lru, count = hits(LRU(), conversations())
    s3fifo, _ = hits(S3FIFO(), conversations())
    assert lru >= s3fifo >= 0.5 * lru, f"LRU {lru}, S3-FIFO {s3fifo}, of {count}"


def test_a_newcomer_that_was_used_outlasts_one_that_was_not() -> None:
    policy = S3FIFO[Item]()
    used, unused = Item("used"), Item("unused")
    policy.insert(used, 1)
    policy.insert(unused, 2)
    policy.discard(used)
    used.uses += 1
    policy.insert(used, 3)
    assert [policy.victim("", 1), policy.victim("", 1)] == [unused, used]


def test_who_comes_back_after_eviction_belongs_to_the_main_queue() -> None:
    policy = S3FIFO[Item]()
    policy.charge("", 10)
    policy.insert(Item("back"), 1)
    assert policy.victim("", 1) is not None
    back, other = Item("back"), Item("other")
    policy.insert(back, 2)
    policy.insert(other, 3)
    assert [policy.victim("", 1), policy.victim("", 1)] == [other, back]


def test_uses_are_worth_so_many_rounds_and_no_more() -> None:
    policy = S3FIFO[Item]()
    items = [Item("once", uses=1), Item("often", uses=1000)]
    for tick, item in enumerate(items):
        policy.insert(item, tick)
    assert [policy.victim("", 1), policy.victim("", 1), policy.victim("", 1)] == [*items, None]


def test_names_of_the_evicted_are_as_many_as_would_fit() -> None:
    policy = S3FIFO[Item]()
    policy.charge("", 50 * SIZE)
    for number in range(1000):
        policy.insert(Item(str(number)), number)
        policy.victim("", SIZE)
    assert len(policy._evicted) == 50
    policy.charge("", -50 * SIZE)
    assert not policy._evicted


# In the core, where prompts are chains


def prompt(seed: int, chunks: int) -> Chain:
    return Chain(range(seed, seed + 2 * chunks), 2)


def ask(core: Core, chain: Chain) -> int:
    """Look a prompt up, then store what is lacking; the answer is how much was found."""
    space = core.spaces[ORIGIN]
    found = core.lookup(space, "r", chain, 0.0).limit
    core.forget("r")
    answer = core.reserve(space, chain.digests(), 0, (0,), 0.0)
    if answer is not None:
        core.publish(answer[0], None, 0.0)
    return found


@pytest.mark.parametrize("queue", QUEUES)
def test_hot_prompts_between_prompts_that_never_come_back(queue: str) -> None:
    pool_bytes = 40 * SIZE
    core = Core(Extents([pool_bytes]), policy=Fair(pool_bytes, queue=QUEUES[queue]), seal=False)
    core.open_space(ORIGIN, [SIZE])
    hot = [prompt(1000 * number, 4) for number in range(5)]
    found = 0
    for around in range(20):
        found += sum(ask(core, chain) for chain in hot)
        for once in range(8):
            ask(core, prompt(100_000 + 10_000 * around + 100 * once, 4))
        core.check_integrity()
    assert (found >= 0.8 * 20 * 20) == (queue == "s3fifo"), f"{found} of {20 * 20} hot chunks were found"
