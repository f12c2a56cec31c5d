"""Tiers as a store uses them: far ones, ones that hang, shared ones, and the rules that users choose."""

from __future__ import annotations

import os
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest

from lmcache_backends.file import FileBackend
from lmcache_backends.memory import MemoryBackend
from lmcache_sdk.api import Cache, LookupState
from lmcache_sdk.backend import Backend, Buffer, Miss, open_backend
from lmcache_sdk.core import Limits
from lmcache_sdk.core.rules import Admit, TierRules, Write
from lmcache_sdk.errors import BackendUnavailable
from lmcache_sdk.keys import Chain
from lmcache_sdk.open import LocalCache, open_cache
from lmcache_sdk.pool.shared import SharedPool
from lmcache_sdk.store import Store, Tier
from lmcache_sdk.testing.latency import Latency
from tests.core.engine import CHUNK, PRODUCER, PagedEngine, load, namespace, slots_of, store, tokens_of
from tests.core.served import Served, command

CHUNKS = 5
TOKENS = tokens_of(0, CHUNKS * CHUNK)
CHAIN = Chain(TOKENS, CHUNK)


class Far(MemoryBackend):
    """Asked in threads of its own."""

    instant: ClassVar[bool] = False

    def __init__(self) -> None:
        super().__init__()
        self.probes = 0

    def prefix_len(self, keys: Sequence[str]) -> int:
        self.probes += 1
        return super().prefix_len(keys)


class Hanging(Far):
    """Hangs where it is told to, until it is let go."""

    def __init__(self, call: str = "") -> None:
        super().__init__()
        self.call = call
        self.let_go = threading.Event()

    def prefix_len(self, keys: Sequence[str]) -> int:
        if self.call == "prefix_len":
            self.let_go.wait()
        return super().prefix_len(keys)

    def get(self, keys: Sequence[str], buffers: Sequence[Buffer]) -> list[int | Miss]:
        if self.call == "get":
            self.let_go.wait()
        return super().get(keys, buffers)


def cache_over(*tiers: Tier, **arguments: object) -> LocalCache:
    return LocalCache(Store(tiers, **{"pool_bytes": 1 << 20} | arguments), namespace(), PRODUCER)  # type: ignore[arg-type]


def shared(backend: Backend) -> Latency:
    """The same records for another store, whose end does not close them."""
    return Latency(backend, 0.0)


def put(cache: Cache, tokens: np.ndarray = TOKENS) -> np.ndarray:
    """Store a prompt; the answer is its rows."""
    engine = PagedEngine()
    connector = engine.connect(cache)
    chain = store(cache, engine, connector, tokens)
    connector.close()
    return engine.rows(slots_of(1, len(chain) * CHUNK))


def get(cache: LocalCache, tokens: np.ndarray = TOKENS) -> np.ndarray:
    """Load what there is of a prompt; the answer is its rows."""
    engine = PagedEngine()
    connector = engine.connect(cache)
    slots = slots_of(2, len(tokens))
    chunks, transfer = load(cache, connector, tokens, slots)
    assert transfer is None or not transfer.failed_chunks()
    connector.close()
    return engine.rows(slots[: chunks * CHUNK])


def found(cache: LocalCache, chain: Chain = CHAIN) -> int:
    """How many chunks a request gets."""
    cache.lookup("found", chain)
    chunks = cache.wait("found", 10, settle=False).chunks
    cache.forget("found")
    return chunks


def records(backend: MemoryBackend) -> int:
    return sum(not stat.key.endswith("/manifest") for stat in backend.scan())


def eventually(condition: Callable[[], bool], timeout_s: float = 10.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "did not come true in time"
        time.sleep(0.005)


# When and which


def test_back_is_written_by_itself_after_a_while() -> None:
    tier = Far()
    cache = cache_over(Tier("t", tier, rules=TierRules(write=Write.BACK, back_s=0.3)))
    put(cache)
    assert records(tier) == 0
    assert cache.stats().tiers[0].write == "back"
    eventually(lambda: records(tier) == CHUNKS)
    cache.store.check_integrity()
    cache.close()


def test_a_drain_writes_what_waits_and_a_close_too() -> None:
    tier = Far()
    cache = cache_over(Tier("t", tier, rules=TierRules(write=Write.BACK, back_s=600.0)))
    put(cache)
    eventually(lambda: cache.stats().tiers[0].unwritten_bytes > 0)
    assert cache.drain(10)
    assert records(tier) == CHUNKS and cache.stats().tiers[0].unwritten_bytes == 0
    put(cache, tokens_of(1, CHUNK))
    records_after = []
    close = tier.close
    tier.close = lambda timeout_s: (records_after.append(records(tier)), close(timeout_s))  # type: ignore[method-assign]
    cache.close()
    assert records_after == [CHUNKS + 1]


def test_evict_writes_nothing_before_and_everything_when_its_room_is_needed() -> None:
    tier = Far()
    cache = cache_over(Tier("t", tier, rules=TierRules(write=Write.EVICT)), pool_bytes=256 << 10)
    rows = {0: put(cache)}
    assert cache.drain(10)
    assert records(tier) == 0
    for seed in range(1, 80):  # five pools full, no faster than the tier
        rows[seed] = put(cache, tokens_of(seed, CHUNKS * CHUNK))
        assert cache.drain(10)
    assert records(tier) > 60 * CHUNKS
    for seed in (0, 1, 20, 60, 79):
        assert np.array_equal(get(cache, tokens_of(seed, CHUNKS * CHUNK)), rows[seed])
    counters = cache.stats().counters
    assert not any(name.startswith("lmcache_dropped_chunks") and value for name, value in counters.items())
    cache.store.check_integrity()
    cache.close()


@pytest.fixture
def directory() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="lmcache-sdk-test-", dir="/dev/shm") as folder:
        yield Path(folder) / "pool"


@pytest.mark.parametrize("keep", [True, False])
def test_what_is_in_a_pool_that_is_kept_need_not_be_written_at_the_end(directory: Path, keep: bool) -> None:
    tier = Far()
    pool = SharedPool.open(directory, 2 << 20)
    rules = TierRules(write=Write.EVICT)
    cache = LocalCache(Store([Tier("t", shared(tier), rules=rules)], pool=pool, keep_pool=keep), namespace(), PRODUCER)
    rows = put(cache)
    cache.close()
    pool.close(keep=keep)
    assert records(tier) == (0 if keep else CHUNKS)
    pool = SharedPool.open(directory, 2 << 20)
    cache = LocalCache(Store([Tier("t", tier, rules=rules)], pool=pool), namespace(), PRODUCER)
    assert np.array_equal(get(cache), rows)
    cache.close()
    pool.close(keep=False)


def test_second_writes_what_is_used_and_nothing_else() -> None:
    tier = Far()
    cache = cache_over(Tier("t", tier, rules=TierRules(admit=Admit.SECOND)))
    put(cache)
    put(cache, tokens_of(1, CHUNKS * CHUNK))
    get(cache, TOKENS[: 3 * CHUNK])
    assert cache.drain(10)
    assert records(tier) == 3
    cache.close()


# Reading


def test_two_stores_on_one_see_each_others_chunks_and_a_no_expires() -> None:
    common = Far()
    one, two = (cache_over(Tier("far", shared(common), rules=TierRules(missing_s=0.5))) for _ in range(2))
    assert found(two) == 0
    asked = common.probes
    rows = put(one)
    assert one.drain(10)
    assert found(two) == 0 and common.probes == asked, "it has said no just now"
    assert two.stats().counters['lmcache_negative_hits_total{tier="far"}'] >= 1
    eventually(lambda: found(two) == CHUNKS, 5.0)
    assert np.array_equal(get(two), rows)
    for cache in (one, two):
        cache.store.check_integrity()
        cache.close()


def test_what_comes_from_a_far_tier_goes_to_the_near_one() -> None:
    near, far = Far(), Far()
    first = cache_over(Tier("far", shared(far)))
    rows = put(first)
    first.close()
    cache = cache_over(Tier("near", shared(near)), Tier("far", shared(far)))
    assert np.array_equal(get(cache), rows)
    assert cache.drain(10)
    cache.close()
    assert records(near) == CHUNKS
    alone = cache_over(Tier("near", near))
    assert np.array_equal(get(alone), rows)
    alone.close()


def test_a_tier_that_does_not_say_what_it_has_is_passed_over() -> None:
    hung, behind = Hanging("prefix_len"), Far()
    first = cache_over(Tier("far", shared(behind)))
    rows = put(first)
    first.close()
    cache = cache_over(
        Tier("hung", hung, rules=TierRules(probe_s=0.2, failures=1, retry_s=60.0, write=Write.EVICT)),
        Tier("behind", behind),
    )
    started = time.monotonic()
    assert cache.lookup("a", CHAIN).state is LookupState.PENDING
    assert time.monotonic() - started < 0.1
    assert cache.wait("a", 10, settle=False).sources == {"behind": CHUNKS}
    assert 0.2 <= time.monotonic() - started < 2.0
    assert [tier.breaker for tier in cache.stats().tiers] == ["open", "closed"]
    assert cache.stats().counters['lmcache_abandoned_probes_total{tier="hung"}'] == 1
    other = tokens_of(3, CHUNK)
    assert cache.lookup("b", Chain(other, CHUNK)).state is LookupState.PENDING
    assert cache.wait("b", 0.15, settle=False).why in ("hung paused after failures", "not stored"), "not asked again"
    assert np.array_equal(get(cache), rows)
    hung.let_go.set()
    cache.store.check_integrity()
    cache.close()


def test_a_read_that_hangs_owns_its_memory_until_it_returns() -> None:
    tier = Hanging()
    first = cache_over(Tier("t", shared(tier)))
    rows = put(first)
    first.close()
    cache = cache_over(Tier("t", tier, rules=TierRules(retry_s=0.05)), limits=Limits(fetch_s=0.2))
    tier.call = "get"
    assert found(cache) == 0
    stats = cache.stats()
    assert stats.pool.quarantined_bytes > 0 and stats.counters['lmcache_abandoned_jobs_total{tier="t"}'] > 0
    written = put(cache)  # computed instead; into other memory
    tier.let_go.set()
    eventually(lambda: cache.stats().pool.quarantined_bytes == 0)
    assert np.array_equal(get(cache), written) and np.array_equal(written, rows)
    cache.store.check_integrity()
    cache.close()


def lookup_s(cache: LocalCache, first: int, count: int = 40) -> float:
    """Median time of a lookup: half of the prompt is in the pool, half of it nowhere."""
    times = []
    for number in range(count):
        rest = tokens_of(first + number, 200 * CHUNK)
        chain = Chain(np.concatenate([TOKENS, rest]), CHUNK)
        started = time.perf_counter()
        answer = cache.lookup(f"r{first}.{number}", chain)
        times.append(time.perf_counter() - started)
        assert answer.chunks in (0, CHUNKS)
        cache.forget(f"r{first}.{number}")
    return statistics.median(times)


def test_a_lookup_is_as_fast_with_a_tier_that_takes_half_a_second() -> None:
    far = Latency(Far(), 0.5)
    with_it, without = cache_over(Tier("far", far, rules=TierRules(missing_s=0.0))), cache_over()
    for cache in (with_it, without):
        put(cache)
    slow, plain = min((lookup_s(with_it, 1000 * i), lookup_s(without, 1000 * i)) for i in range(1, 5))
    assert slow < 0.01, "PENDING at once"
    assert slow < 3 * plain + 0.0002, f"{slow * 1e6:.0f} and {plain * 1e6:.0f} us"
    for cache in (with_it, without):
        cache.close(2.0)


# What a backend may be


class Registered(Far):
    """Wants to be shown memory before it is used."""

    def __init__(self, *, refuse: bool = False) -> None:
        super().__init__()
        self.segments: list[tuple[int, int]] = []
        self.calls: list[str] = []
        self.refuse = refuse

    @staticmethod
    def _place(segment: memoryview) -> tuple[int, int]:
        return np.frombuffer(segment, np.uint8).ctypes.data, len(segment)

    def register_memory(self, segment: memoryview) -> None:
        if self.refuse:
            raise BackendUnavailable("no more memory can be registered")
        self.segments.append(self._place(segment))

    def unregister_memory(self, segment: memoryview) -> None:
        self.segments.remove(self._place(segment))

    def get(self, keys: Sequence[str], buffers: Sequence[Buffer]) -> list[int | Miss]:
        for buffer in buffers:
            at = np.frombuffer(buffer, np.uint8).ctypes.data
            assert any(start <= at and at + len(buffer) <= start + size for start, size in self.segments)
        return super().get(keys, buffers)

    def close(self, timeout_s: float) -> None:
        assert not self.segments, "the memory is about to go"
        self.calls.append("close")
        super().close(timeout_s)


def test_the_pool_is_registered_with_who_wants_it_before_use_and_given_back_at_the_end() -> None:
    tier = Registered()
    first = cache_over(Tier("t", shared(tier)))
    rows = put(first)
    first.close()
    cache = cache_over(Tier("t", tier))
    assert sum(size for _, size in tier.segments) == sum(cache.store.pool.sizes)
    assert np.array_equal(get(cache), rows)
    cache.close()
    assert tier.calls == ["close"]


def test_a_tier_that_refuses_the_pool_is_told_at_start() -> None:
    before = threading.active_count()
    with pytest.raises(BackendUnavailable, match="no more memory"):
        Store([Tier("t", Registered(refuse=True))], pool_bytes=1 << 20)
    assert threading.active_count() == before


def test_the_store_keeps_a_tier_to_its_bounds(tmp_path: Path) -> None:
    url = f"file://{tmp_path}/store?size=64MiB"
    first = cache_over(Tier("file", open_backend(url)))
    rows = put(first)
    put(first, tokens_of(1, CHUNKS * CHUNK))
    first.close()
    files = open_backend(url)
    assert isinstance(files, FileBackend)
    chunk = Chain(tokens_of(1, CHUNKS * CHUNK), CHUNK).digests()[0].hex()
    old = time.time() - 7200
    stale = [stat.key for stat in files.scan() if chunk in stat.key]
    assert len(stale) == 1
    os.utime(files.path_of(stale[0]), (old, old))
    files.close(1.0)
    cache = cache_over(Tier("file", open_backend(url), ttl_s=3600.0))
    tier = cache.store.tiers[0].backend
    eventually(lambda: tier.contains(stale) == [False])
    assert found(cache, Chain(tokens_of(1, CHUNKS * CHUNK), CHUNK)) == 0
    assert np.array_equal(get(cache), rows)
    cache.close()


def test_what_is_in_the_pool_is_told_from_its_key() -> None:
    cache = cache_over()
    put(cache)
    opened = cache._opened
    keys = [key for digest in CHAIN.digests() for key in opened.keys(digest)]
    assert all(map(cache.store._has, keys))
    other = opened.keys(bytes(32))[0]
    assert not any(map(cache.store._has, [other, keys[0].replace("exact", "lossy"), "a/b/c/zz/d", "a/manifest", ""]))
    cache.close()


# A real daemon


@pytest.fixture
def served() -> Iterator[Served]:
    place = Served()
    yield place
    place.close()


def files(place: Served, name: str) -> int:
    backend = open_backend(f"file://{place.folder}/{name}?size=64MiB")
    assert isinstance(backend, FileBackend)
    count = sum(not stat.key.endswith("/manifest") for stat in backend.scan())
    backend.close(1.0)
    return count


def put_through(url: str) -> None:
    cache = open_cache(url, namespace=namespace(), producer=PRODUCER)
    put(cache)
    cache.close()


@pytest.mark.parametrize("options", [[], ["--no-keep-pool"]])
def test_a_daemons_tiers_at_its_end(served: Served, options: list[str]) -> None:
    tiers = [f"file://{served.folder}/{name}?size=64MiB" for name in ("back", "evict", "second")]
    rules = ["#name=back&write=back&back=1h", "#name=evict&write=evict", "#name=second&admit=second"]
    arguments = [part for tier, rule in zip(tiers, rules, strict=True) for part in ("--tier", tier + rule)]
    served.start(*arguments, "--eviction", "s3fifo", *options)
    put_through(served.url)
    eventually(lambda: served.status()["stats"]["tiers"][0]["unwritten_bytes"] > 0)
    shown = command("status", "--socket", served.socket).stdout
    (line,) = [line for line in shown.splitlines() if line.startswith("back")]
    assert "back" in line.split()[1:] and line.split()[-1] == "closed"
    assert files(served, "back") == files(served, "evict") == 0
    assert served.stop() == 0
    assert [files(served, name) for name in ("back", "evict", "second")] == [CHUNKS, CHUNKS if options else 0, 0]


@pytest.mark.parametrize(
    ("tier", "message"),
    [
        ("redis://u:hunter2@h/0#wirte=back", "tier redis://u:***@h/0: unknown option 'wirte'; did you mean 'write'?"),
        ("noop://#ttl=1h", "tier noop://: size and ttl need a store that can list its records"),
        ("memory://", "two tiers are called 'memory'"),
    ],
)
def test_a_wrong_tier_is_refused_at_start(served: Served, tier: str, message: str) -> None:
    done = command("serve", "--socket", served.socket, "--pool", "8MiB", "--tier", "memory://", "--tier", tier)
    assert done.returncode == 2
    assert message in " ".join(done.stderr.split()) and "hunter2" not in done.stderr
