"""How long SGLang's scheduler waits for an answer, and what it is told: a tier that is fast, slow, or stuck."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from lmcache_adapters.sglang.finder import Finder
from lmcache_backends.memory import MemoryBackend
from lmcache_sdk.connector import GPUConnector
from lmcache_sdk.keys import Chain
from lmcache_sdk.open import LocalCache
from lmcache_sdk.store import Store, Tier
from lmcache_sdk.testing.throttled import Throttled
from tests.core.engine import CHUNK, PRODUCER, PagedEngine, namespace, store, tokens_of
from tests.daemon.daemon_process import until

CHUNKS = 8
CHUNK_BYTES = 3 * 2 * CHUNK * 4 * 8 * 2
TIMEOUT_S = 0.2
TOKENS = tokens_of(1, CHUNKS * CHUNK)
KEYS = [digest.hex() for digest in Chain(TOKENS, CHUNK).digests()]


class Place:
    """A store whose tier has a prompt of which the pool has nothing."""

    def __init__(self) -> None:
        self.engine, inner = PagedEngine(), MemoryBackend()
        self.tier = Throttled(inner, 1e9)
        first = self.open()
        connector = self.engine.connect(first)
        store(first, self.engine, connector, TOKENS)
        assert connector.close()
        first.close()
        self.tier = Throttled(inner, 1e9)
        self.cache = self.open()
        self.connector: GPUConnector = self.engine.connect(self.cache)
        self.finder = Finder(self.cache, self.connector, timeout_s=TIMEOUT_S)

    def open(self) -> LocalCache:
        return LocalCache(Store([Tier("slow", self.tier)], pool_bytes=1 << 20), namespace(), PRODUCER)

    def find(self, rid: str = "r", keys: list[str] = KEYS) -> tuple[int, float]:
        began = time.monotonic()
        return self.finder.find(rid, keys), time.monotonic() - began

    def close(self) -> None:
        self.finder.close(10)
        assert self.connector.close()
        assert self.cache.stats().leases == 0
        self.cache.close(1.0)


@pytest.fixture
def place() -> Iterator[Place]:
    place = Place()
    yield place
    place.close()


def test_what_a_tier_brings_in_time(place: Place) -> None:
    assert place.find()[0] == CHUNKS


def test_a_slow_tier_is_waited_for_once_and_brings_the_rest_later(place: Place) -> None:
    place.tier.bytes_per_s = CHUNKS * CHUNK_BYTES / (5 * TIMEOUT_S)
    found, seconds = place.find()
    assert found < CHUNKS and TIMEOUT_S / 2 < seconds < 2 * TIMEOUT_S
    longest = 0.0

    def all_there() -> bool:
        nonlocal longest
        found, seconds = place.find()
        longest = max(longest, seconds)
        return found == CHUNKS

    until(all_there, 10.0, "the rest")
    assert longest < TIMEOUT_S / 2
    taken = place.finder.take("r", KEYS)
    assert taken is not None and (taken.ticket.first, taken.ticket.boundary) == (0, CHUNKS)
    place.finder.give_back(taken)
    assert place.finder.take("r", KEYS) is None  # it has been forgotten


def test_a_slow_tier_does_not_hide_what_the_pool_has(place: Place) -> None:
    assert place.find("front", KEYS[:3])[0] == 3
    place.tier.latency_s = 10 * TIMEOUT_S
    found, seconds = place.find("all")
    assert (found, seconds < 2 * TIMEOUT_S) == (3, True)


def test_a_part_of_what_was_found(place: Place) -> None:
    """The device has some of it meanwhile; or another rank has less."""
    assert place.find()[0] == CHUNKS
    assert place.find("r", KEYS[2:])[0] == CHUNKS - 2
    assert place.find("r", KEYS[2:6])[0] == 4
    taken = place.finder.take("r", KEYS[2:5])
    assert taken is not None and (taken.ticket.first, taken.ticket.boundary) == (2, 5)
    place.finder.give_back(taken)


def test_what_is_missing_is_remembered_and_no_more_than_that(place: Place) -> None:
    other = [digest.hex() for digest in Chain(tokens_of(2, 3 * CHUNK), CHUNK).digests()]
    assert place.find("r", [*KEYS[:3], *other])[0] == 3
    assert len(place.finder._asked["r"].keys) == 4
    place.cache.lookup = None  # it is not asked
    assert place.find("r", [*KEYS[1:3], *other])[0] == 2
    assert place.find("r", other)[0] == 0
    del place.cache.lookup
    assert place.find("r", [*KEYS[1:3], KEYS[3]])[0] == 3  # another continuation
    assert place.finder.take("r", [*KEYS[1:3], *other]) is None


def test_what_was_not_asked_for_is_not_taken(place: Place) -> None:
    other = [digest.hex() for digest in Chain(tokens_of(2, 3 * CHUNK), CHUNK).digests()]
    assert place.find("r", other)[0] == 0
    assert place.finder.take("r", KEYS) is None
    assert place.finder.take("nobody", KEYS) is None
    assert place.find("r", [])[0] == 0


def test_requests_that_are_gone_are_forgotten(place: Place) -> None:
    for number in range(2000):
        place.finder.find(f"r{number}", KEYS[:1])
    assert len(place.finder._asked) <= 1024
    place.finder.forget_all()
    until(lambda: not place.cache.store._core.requests, 10.0, "that nothing is held")
