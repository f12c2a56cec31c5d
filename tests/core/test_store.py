"""The way of a chunk through the store: engine memory, pool, tier, a new life, and back; and what can go wrong."""

from __future__ import annotations

import gc
import tempfile
import threading
import weakref
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest

from lmcache_backends.memory import MemoryBackend
from lmcache_sdk import ConfigError, LayoutError, Lookup, LookupState, UnsupportedError, open_cache
from lmcache_sdk.backend import Item, Miss, open_backend
from lmcache_sdk.core import Limits
from lmcache_sdk.core.rules import TierRules
from lmcache_sdk.keys import Chain, Origin, key_text
from lmcache_sdk.open import LocalCache
from lmcache_sdk.pool.shared import SharedPool
from lmcache_sdk.records import HEADER_BYTES, checksum, read_header, write_header
from lmcache_sdk.spec import CellGrid
from lmcache_sdk.store import Store, Tier
from tests.core.engine import (
    CHUNK,
    PRODUCER,
    PagedEngine,
    load,
    namespace,
    slots_of,
    store,
    tokens_of,
)

TOKENS = tokens_of(0, 5 * CHUNK + 3)


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"lmdb://{tmp_path}/store?size=64MiB"


def open_it(url: str | list[str], **arguments: object) -> LocalCache:
    space = arguments.pop("namespace", None) or namespace()
    return open_cache(url, namespace=space, producer=PRODUCER, pool_bytes=1 << 20, **arguments)  # type: ignore[arg-type]


@pytest.fixture
def cache(url: str) -> Iterator[LocalCache]:
    cache = open_it(url)
    yield cache
    cache.store.check_integrity()
    cache.close()


def fill(url: str, tokens: np.ndarray = TOKENS, **arguments: object) -> np.ndarray:
    """Store a prompt in one life of a store; the answer is its rows."""
    cache, engine = open_it(url, **arguments), PagedEngine()
    connector = engine.connect(cache)
    chain = store(cache, engine, connector, tokens)
    rows = engine.rows(slots_of(1, len(chain) * CHUNK))
    connector.close()
    cache.close()
    return rows


def read(
    url: str | list[str], tokens: np.ndarray = TOKENS, **arguments: object
) -> tuple[int, np.ndarray, dict[str, float]]:
    """Load it in another: chunks found, rows at other slots, counters."""
    cache, engine = open_it(url, **arguments), PagedEngine()
    connector = engine.connect(cache)
    slots = slots_of(2, len(tokens))
    chunks, transfer = load(cache, connector, tokens, slots)
    assert transfer is None or not transfer.failed_chunks()
    counters = cache.stats().counters
    cache.store.check_integrity()
    connector.close()
    cache.close()
    return chunks, engine.rows(slots[: chunks * CHUNK]), counters


def test_bytes_survive_a_new_life_of_the_store(url: str) -> None:
    rows = fill(url)
    chunks, found, counters = read(url)
    assert chunks == 5
    assert np.array_equal(rows, found)
    assert counters['lmcache_lookup_tokens_total{source="lmdb"}'] == 5 * CHUNK


def test_bytes_come_from_the_pool_within_one_life(cache: LocalCache) -> None:
    engine = PagedEngine()
    connector = engine.connect(cache)
    chain = store(cache, engine, connector, TOKENS)
    rows = engine.rows(slots_of(1, 5 * CHUNK))
    slots = slots_of(2, len(TOKENS))
    assert cache.lookup("a", chain).sources == {"pool": 5}
    chunks, transfer = load(cache, connector, TOKENS, slots)
    assert chunks == 5 and transfer is not None and not transfer.failed_chunks()
    assert np.array_equal(engine.rows(slots[: 5 * CHUNK]), rows)
    assert cache.stats().leases == 0


def test_a_shared_prefix_is_shared_and_the_rest_is_not(url: str) -> None:
    rows = fill(url)
    other = np.concatenate([TOKENS[: 2 * CHUNK], tokens_of(9, 3 * CHUNK)])
    chunks, found, _ = read(url, other)
    assert chunks == 2
    assert np.array_equal(found, rows[:, : 2 * CHUNK])


def test_what_exists_is_not_copied_again(cache: LocalCache) -> None:
    engine = PagedEngine()
    connector = engine.connect(cache)
    chain = store(cache, engine, connector, TOKENS)
    assert cache.reserve("again", chain, 0, len(chain)) is None


@pytest.mark.parametrize(
    "other",
    [
        namespace(fingerprint="other weights"),
        namespace(grid=CellGrid(layers_per_cell=1)),
    ],
    ids=["weights", "grid"],
)
def test_another_namespace_misses(url: str, other: object) -> None:
    fill(url)
    assert read(url, namespace=other)[0] == 0


def test_another_chunk_size_misses(url: str) -> None:
    fill(url)
    cache = open_it(url, namespace=namespace(chunk_tokens=CHUNK // 2))
    assert cache.lookup("a", Chain(TOKENS, CHUNK // 2)).state is LookupState.MISS
    assert cache.lookup("b", Chain(TOKENS, CHUNK)).why == f"chunks of {CHUNK} tokens, not {CHUNK // 2}"
    cache.close()


def test_salts_are_apart(cache: LocalCache) -> None:
    engine = PagedEngine()
    connector = engine.connect(cache)
    store(cache, engine, connector, TOKENS)
    assert cache.lookup("a", Chain(TOKENS, CHUNK, cache_salt="x")).state is LookupState.MISS


def test_a_prompt_shorter_than_a_chunk_is_a_miss(cache: LocalCache) -> None:
    found = cache.lookup("a", Chain(TOKENS[: CHUNK - 1], CHUNK))
    assert (found.state, found.why) == (LookupState.MISS, "no full chunk")


# Records that are not what was stored

RECORD = HEADER_BYTES + namespace().spec.chunk_bytes
REGIONS = {
    "magic": 0, "version": 8, "header bytes": 10, "flags": 12, "namespace": 20, "producer": 35, "digest": 50,
    "group": 73, "cell": 90, "token count": 120, "reserved": 124, "first position": 130, "fidelity": 137, "codec": 169,
    "codec parameter": 185, "logical": 193, "stored": 201, "payload checksum": 210, "reserved end": 230,
    "header checksum": 250, "payload front": HEADER_BYTES, "payload middle": RECORD // 2, "payload end": RECORD - 1,
}  # fmt: skip


def tamper(url: str, chunk: int, change: object) -> None:
    backend = open_backend(url)
    key = key_text(Origin(namespace().id, PRODUCER.id), Chain(TOKENS, CHUNK).digests()[chunk], "full", "L0-3.H0-4")
    buffer = bytearray(RECORD)
    assert backend.get([key], [memoryview(buffer)]) == [RECORD]
    assert callable(change)
    changed = change(buffer)
    assert backend.put([Item(key, memoryview(changed))], if_absent=False) == [True]
    backend.close(5)


@pytest.mark.parametrize("at", REGIONS.values(), ids=REGIONS.keys())
def test_a_flipped_bit_is_a_miss_and_a_counter(tmp_path: Path, at: int) -> None:
    url = f"lmdb://{tmp_path}/store?size=64MiB"
    rows = fill(url)

    def flip(record: bytearray) -> bytearray:
        record[at] ^= 0x10
        return record

    tamper(url, 3, flip)
    chunks, found, counters = read(url)
    assert chunks == 3
    assert np.array_equal(found, rows[:, : 3 * CHUNK])
    assert sum(v for name, v in counters.items() if name.startswith("lmcache_record_failures_total")) == 1
    # The broken record is gone: what is computed anew takes its place.
    assert np.array_equal(fill(url), rows)
    assert read(url)[0] == 5


@pytest.mark.parametrize("length", [0, 1, HEADER_BYTES - 1, HEADER_BYTES, RECORD - 1, RECORD + 1])
def test_a_record_of_another_length_is_a_miss(url: str, length: int) -> None:
    fill(url)
    tamper(url, 0, lambda record: (record + b"\0")[:length])
    assert read(url)[0] == 0


def test_a_record_of_another_chunk_is_a_miss(url: str) -> None:
    fill(url)
    backend = open_backend(url)
    keys = [
        key_text(Origin(namespace().id, PRODUCER.id), digest, "full", "L0-3.H0-4")
        for digest in Chain(TOKENS, CHUNK).digests()
    ]
    buffer = memoryview(bytearray(RECORD))
    backend.get([keys[1]], [buffer])
    backend.put([Item(keys[0], buffer)], if_absent=False)
    backend.close(5)
    chunks, _, counters = read(url)
    assert chunks == 0
    assert counters['lmcache_record_failures_total{tier="lmdb",reason="key"}'] == 1


def test_a_record_with_negated_k_and_a_valid_checksum_is_used(url: str) -> None:
    """The control for all tests of exactness: other bytes under the right key do arrive."""
    rows = fill(url)

    def negate(record: bytearray) -> bytearray:
        view = memoryview(record)
        np.frombuffer(view, np.uint8, offset=HEADER_BYTES)[:] ^= 0x80
        write_header(view, read_header(view)._replace(payload_checksum=checksum(view[HEADER_BYTES:])))
        return record

    tamper(url, 0, negate)
    chunks, found, _ = read(url)
    assert chunks == 5
    assert not np.array_equal(found, rows)
    assert np.array_equal(found[:, CHUNK:], rows[:, CHUNK:])


# Ranks and cells


def test_ranks_with_a_finer_grid_read_what_one_wrote(url: str) -> None:
    fine = namespace(grid=CellGrid(layers_per_cell=2, heads_per_cell=2))
    rows = fill(url, namespace=fine)
    cache = open_it(url, namespace=fine)
    ranks = [PagedEngine(heads=(0, 2)), PagedEngine(heads=(2, 4))]
    connectors = [engine.connect(cache, rank=rank) for rank, engine in enumerate(ranks)]
    chain = Chain(TOKENS, CHUNK)
    cache.lookup("a", chain)
    assert cache.wait("a", 10).chunks == 5
    ticket = cache.claim("a", 4, first=1, parts=2)
    assert ticket is not None
    slots = slots_of(3, 3 * CHUNK)
    for engine, connector, heads in zip(ranks, connectors, [slice(0, 2), slice(2, 4)], strict=True):
        transfer = connector.load(ticket, slots)
        assert transfer.wait(10) and not transfer.failed_chunks()
        assert np.array_equal(engine.rows(slots), rows[:, CHUNK : 4 * CHUNK, heads])
        connector.close()
    assert cache.stats().leases == 0
    cache.close()


def test_ranks_write_a_chunk_together(cache: LocalCache, url: str, tmp_path: Path) -> None:
    fine = namespace(grid=CellGrid(heads_per_cell=2))
    other = open_it(f"lmdb://{tmp_path}/other?size=64MiB", namespace=fine)
    chain, slots = Chain(TOKENS, CHUNK), slots_of(1, len(TOKENS))
    for at, heads in enumerate([(0, 2), (2, 4)]):
        assert other.lookup(f"r{at}", chain).state is LookupState.MISS
        engine = PagedEngine(heads=heads)
        connector = engine.connect(other)
        engine.compute(TOKENS, slots)
        transfer = connector.store("a", chain, 0, slots[: 5 * CHUNK])
        assert transfer.wait(10) and not transfer.failed_chunks()
        connector.close()
    assert other.lookup("both", chain).chunks == 5
    whole, expected = PagedEngine(), PagedEngine()
    connector = whole.connect(other)
    target = slots_of(4, 5 * CHUNK)
    load(other, connector, TOKENS, target)
    expected.compute(TOKENS, target if len(target) == len(TOKENS) else slots)
    assert np.array_equal(whole.rows(target), expected.rows(slots[: 5 * CHUNK]))
    connector.close()
    other.close()


def test_a_part_that_cuts_a_cell_is_refused_with_the_fix(cache: LocalCache) -> None:
    with pytest.raises(ConfigError, match="heads_per_cell"):
        PagedEngine(heads=(0, 2)).connect(cache)


# The proof at registration


def test_a_wrong_table_is_refused(cache: LocalCache) -> None:
    with pytest.raises(LayoutError, match="does not read what the engine wrote"):
        PagedEngine(wrong=True).connect(cache)


def test_an_engine_that_writes_elsewhere_is_refused(cache: LocalCache) -> None:
    engine, other = PagedEngine(), PagedEngine()
    engine.write = other.write  # type: ignore[method-assign]
    with pytest.raises(LayoutError, match="does not read"):
        engine.connect(cache)


def test_memory_of_another_model_is_refused(cache: LocalCache, tmp_path: Path) -> None:
    other = open_it(f"lmdb://{tmp_path}/other?size=64MiB", namespace=namespace(dtype="float16"))
    with pytest.raises(LayoutError, match="bfloat16"):
        PagedEngine().connect(other)
    other.close()


# A tier that misbehaves


class Gate(MemoryBackend):
    """A tier that answers when it is told to."""

    instant: ClassVar[bool] = False

    def __init__(self) -> None:
        super().__init__()
        self.open = threading.Event()
        self.open.set()
        self.gets = 0

    def get(self, keys, buffers):  # type: ignore[no-untyped-def]
        self.gets += not keys[0].endswith("/manifest")
        self.open.wait()
        return super().get(keys, buffers)


def gated(limits: Limits | None = None) -> tuple[LocalCache, Gate, PagedEngine, object]:
    """A cache whose chunks are only in its (slow) tier."""
    gate = Gate()
    first = LocalCache(Store([Tier("slow", gate)], pool_bytes=1 << 20), namespace(), PRODUCER)
    engine = PagedEngine()
    connector = engine.connect(first)
    store(first, engine, connector, TOKENS)
    connector.close()
    assert first.drain(10)
    cache = LocalCache(Store([Tier("slow", gate)], pool_bytes=1 << 20, limits=limits), namespace(), PRODUCER)
    return cache, gate, engine, first


def test_a_hung_tier_is_a_miss_at_the_deadline_and_nothing_waits() -> None:
    cache, gate, _, first = gated(Limits(fetch_s=0.3))
    gate.open.clear()
    chain = Chain(TOKENS, CHUNK)
    assert cache.lookup("a", chain).state is LookupState.PENDING
    found = cache.wait("a", 10)
    assert (found.state, found.why) == (LookupState.MISS, "load abandoned")
    pool = cache.stats().pool
    assert pool.quarantined_bytes > 0
    assert pool.free_bytes + pool.used_bytes + pool.quarantined_bytes == pool.total_bytes
    gate.open.set()
    wait_until(lambda: cache.stats().pool.quarantined_bytes == 0)
    cache.store.check_integrity()
    cache.forget("a")
    cache.lookup("b", chain)
    assert cache.wait("b", 10).chunks == 5
    cache.close()
    first.close()  # type: ignore[attr-defined]


def test_an_asker_that_waits_no_longer_computes_itself() -> None:
    cache, gate, _, first = gated()
    gate.open.clear()
    assert cache.lookup("a", Chain(TOKENS, CHUNK)).state is LookupState.PENDING
    found = cache.wait("a", 0.05)
    assert (found.state, found.why) == (LookupState.MISS, "timed out")
    gate.open.set()
    cache.close()
    first.close()  # type: ignore[attr-defined]


def test_ten_askers_read_once() -> None:
    cache, gate, _, first = gated(Limits(batch_bytes=1 << 20))
    gate.open.clear()
    for number in range(10):
        cache.lookup(f"r{number}", Chain(TOKENS, CHUNK))
    gate.open.set()
    assert [cache.wait(f"r{number}", 10).chunks for number in range(10)] == [5] * 10
    assert gate.gets == 1
    cache.close()
    first.close()  # type: ignore[attr-defined]


def test_a_tier_that_raises_anything_is_a_miss_and_is_left_alone() -> None:
    cache, gate, _, first = gated()
    assert cache.drain(10)  # it has read the manifest

    def explode(keys: object, buffers: object) -> list[int | Miss]:
        raise ZeroDivisionError("a bug in somebody's backend")

    gate.get = explode  # type: ignore[method-assign]
    chain = Chain(TOKENS, CHUNK)
    for number in range(3):
        cache.lookup(f"r{number}", chain)
        assert cache.wait(f"r{number}", 10).why == "load failed"
    found = cache.lookup("r3", chain)
    assert (found.state, found.why) == (LookupState.MISS, "slow paused after failures")
    assert cache.stats().tiers[0].breaker == "open"
    assert cache.stats().counters['lmcache_tier_errors_total{tier="slow",error="ZeroDivisionError"}'] == 3
    cache.close()
    first.close()  # type: ignore[attr-defined]


def test_a_probe_does_not_wait_behind_loads() -> None:
    cache, gate, _, first = gated()
    gate.open.clear()
    for number in range(4):  # all readers are busy, and more wait in line
        cache.lookup(f"r{number}", Chain(TOKENS[: (number + 1) * CHUNK], CHUNK))
    wait_until(lambda: gate.gets == Limits().readers)
    assert cache.lookup("other", Chain(tokens_of(7, CHUNK), CHUNK)).state is LookupState.PENDING
    found = cache.wait("other", 10, settle=False)
    assert (found.state, found.why) == (LookupState.MISS, "not stored")
    gate.open.set()
    cache.close()
    first.close()  # type: ignore[attr-defined]


class Doorkeeper(MemoryBackend):
    """A tier that does not say what it has until it is told to."""

    instant: ClassVar[bool] = False

    def __init__(self) -> None:
        super().__init__()
        self.open = threading.Event()
        self.asked = 0

    def prefix_len(self, keys):  # type: ignore[no-untyped-def]
        self.asked += 1
        self.open.wait()
        return super().prefix_len(keys)


def test_a_tier_that_does_not_answer_gathers_no_tasks() -> None:
    tier = Doorkeeper()
    cache = LocalCache(
        Store([Tier("hung", tier, rules=TierRules(probe_s=0.2))], pool_bytes=1 << 20), namespace(), PRODUCER
    )
    chain = Chain(TOKENS, CHUNK)
    for number in range(20):
        cache.lookup(f"r{number}", chain)
    assert {cache.wait(f"r{number}", 10, settle=False).why for number in range(20)} == {"hung does not answer"}
    waiting = cache.store._probers[0].waiting
    for number in range(100):
        assert cache.lookup(f"later{number}", chain).state is LookupState.MISS
    assert tier.asked == Limits().readers and cache.store._probers[0].waiting == waiting < 20
    tier.open.set()
    wait_until(lambda: not cache.store._core.tiers[0].hung_probes)
    cache.lookup("now", chain)
    assert cache.wait("now", 10, settle=False).why == "not stored"
    assert tier.asked == Limits().readers + 1, "what nobody waits for any more is not asked"
    cache.store.check_integrity()
    cache.close()


class SlowToTell(MemoryBackend):
    """How full it is takes it long to find out."""

    def __init__(self) -> None:
        super().__init__()
        self.open = threading.Event()
        self.asking = threading.Event()
        self.asked = 0

    def usage(self):  # type: ignore[no-untyped-def]
        self.asked += 1
        self.asking.set()
        self.open.wait()
        return super().usage()


def test_stats_never_wait_for_a_tier_and_are_right_soon() -> None:
    tier = SlowToTell()
    cache = LocalCache(Store([Tier("slow", tier)], pool_bytes=1 << 20), namespace(), PRODUCER)
    assert tier.asking.wait(10)
    assert [cache.stats().tiers[0].records for _ in range(100)] == [0] * 100
    assert tier.asked == 1
    tier.open.set()
    engine = PagedEngine()
    connector = engine.connect(cache)
    store(cache, engine, connector, TOKENS)
    assert cache.drain(10)
    connector.close()
    manifests = 2
    wait_until(lambda: cache.store._usage[0].report and cache.store._usage[0].report.records == 5 + manifests)
    found = cache.stats().tiers[0]
    assert (found.records, found.used_bytes) == (5 + manifests, tier.usage().used_bytes)
    tier.delete([stat.key for stat in tier.scan()])  # as another process would
    wait_until(lambda: cache.stats().tiers[0].records == 0)
    cache.close()


def test_a_store_says_at_its_end_whether_a_tier_may_still_write_to_the_pool() -> None:
    cache, gate, _, first = gated(Limits(fetch_s=0.1))
    gate.open.clear()
    cache.lookup("a", Chain(TOKENS, CHUNK))
    assert cache.wait("a", 10).why == "load abandoned"
    assert not cache.store.close(0.2)
    assert not cache.store.close(0.2)
    reader, pool = cache.store._readers[0], weakref.ref(cache.store.pool)
    del cache
    gc.collect()
    assert pool() is not None, "the call may still write to it"
    gate.open.set()
    wait_until(lambda: not reader.alive)
    assert first.store.close()  # type: ignore[attr-defined]


def test_forgetting_tells_who_waits() -> None:
    cache, gate, _, first = gated()
    gate.open.clear()
    cache.lookup("a", Chain(TOKENS, CHUNK))
    wait_until(lambda: cache.wait("a", 0, settle=False).missing)
    told: list[Lookup] = []
    cache.store.on_change = lambda: told.append(cache.store.found("a")[0])
    cache.forget("a")
    assert [(found.state, found.why) for found in told] == [(LookupState.MISS, "no such request")]
    gate.open.set()
    cache.close()
    first.close()  # type: ignore[attr-defined]


class SlowToDelete(MemoryBackend):
    def __init__(self) -> None:
        super().__init__()
        self.open = threading.Event()
        self.open.set()

    def delete(self, keys):  # type: ignore[no-untyped-def]
        self.open.wait()
        return super().delete(keys)


@pytest.mark.parametrize("clear", [False, True], ids=["delete", "clear"])
def test_what_is_deleted_is_not_found_though_the_tier_still_has_it(clear: bool) -> None:
    tier = SlowToDelete()
    cache = LocalCache(Store([Tier("slow", tier)], pool_bytes=1 << 20), namespace(), PRODUCER)
    engine = PagedEngine()
    connector = engine.connect(cache)
    chain = store(cache, engine, connector, TOKENS)
    assert cache.drain(10)
    tier.open.clear()
    assert (cache.clear() if clear else cache.delete(chain)) == 5
    assert cache.lookup("a", chain).state is LookupState.MISS
    store(cache, engine, connector, TOKENS[: 2 * CHUNK])
    assert cache.lookup("b", chain).chunks == 2, "what is stored after that is there"
    tier.open.set()
    assert cache.drain(10)
    assert cache.lookup("c", chain).chunks == 2
    (space,) = cache.store._core.spaces.values()
    assert not space.deleting and not space.clearing, "the tier may be read again"
    assert left(tier, TOKENS) == 2
    connector.close()
    cache.store.check_integrity()
    cache.close()


def test_a_pool_remembers_only_the_models_that_it_has_chunks_of(tmp_path: Path) -> None:
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        saved = []
        for life in range(3):
            pool = SharedPool.open(Path(folder) / "pool", 1 << 20)
            saved.append(len(pool.recovered_spaces))
            shared = Store(pool=pool)
            shared.end_earlier_life()
            cache = LocalCache(shared, namespace(), PRODUCER)
            for number in range(3):
                shared.open_space(namespace(fingerprint=f"seen once {life} {number}"), PRODUCER)
            engine = PagedEngine()
            connector = engine.connect(cache)
            if not life:
                chain = store(cache, engine, connector, TOKENS)
                assert cache.drain(10)
            cache.lookup("a", chain)
            assert cache.wait("a", 10).chunks == 5
            connector.close()
            assert shared.close()
            pool.close(keep=life < 2)
        assert saved == [0, 4, 4]


def test_two_tiers_are_read_in_order_and_written_both(tmp_path: Path) -> None:
    urls = ["memory://", f"lmdb://{tmp_path}/store?size=64MiB"]
    rows = fill(urls)  # type: ignore[arg-type]
    chunks, found, counters = read(urls)  # the memory is new, the disk is not
    assert chunks == 5 and np.array_equal(found, rows)
    assert counters['lmcache_lookup_tokens_total{source="lmdb"}'] == 5 * CHUNK


class ZlibCodec:
    name: ClassVar[str] = "zlib"
    lossless: ClassVar[bool] = True
    identity: ClassVar[bool] = False

    def max_encoded(self, nbytes: int) -> int:
        return nbytes + 1024

    def encode(self, payload: memoryview, out: memoryview) -> int:
        encoded = zlib.compress(payload)
        out[: len(encoded)] = encoded
        return len(encoded)

    def decode(self, encoded: memoryview, out: memoryview) -> None:
        try:
            out[:] = zlib.decompress(encoded)
        except zlib.error as error:
            raise ValueError(str(error)) from error


def test_a_codec_between_pool_and_tier(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lmcache_sdk.jobs.codec_by_name", lambda name: {"zlib": ZlibCodec()}[name])
    backend = MemoryBackend()
    lives = []
    for _ in range(2):
        cache = LocalCache(Store([Tier("memory", backend, ZlibCodec())], pool_bytes=1 << 20), namespace(), PRODUCER)
        engine = PagedEngine()
        connector = engine.connect(cache)
        slots = slots_of(2, len(TOKENS))
        if not lives:
            store(cache, engine, connector, TOKENS)
            lives.append(engine.rows(slots_of(1, 5 * CHUNK)))
            assert cache.drain(10)
        else:
            assert load(cache, connector, TOKENS, slots)[0] == 5
            lives.append(engine.rows(slots[: 5 * CHUNK]))
        cache.store.check_integrity()
        connector.close()
    assert np.array_equal(lives[0], lives[1])
    sizes = {stat.nbytes for stat in backend.scan(namespace().id + "/" + PRODUCER.id + "/exact")}
    assert max(sizes) < RECORD


def test_a_lossy_codec_is_refused() -> None:
    class Lossy(ZlibCodec):
        lossless = False

    with pytest.raises(UnsupportedError, match="lossy"):
        Store([Tier("memory", MemoryBackend(), Lossy())], pool_bytes=1 << 20)


def lives(backend: MemoryBackend, *prompts: np.ndarray, hit: np.ndarray | None = None) -> None:
    """Store prompts one after another in one life of a store over this tier, using ``hit`` again between them."""
    limits = Limits(batch_bytes=1)
    cache = LocalCache(Store([Tier("memory", backend)], pool_bytes=1 << 20, limits=limits), namespace(), PRODUCER)
    engine = PagedEngine()
    connector = engine.connect(cache)
    for prompt in prompts:
        store(cache, engine, connector, prompt)
        assert cache.drain(10)
        if hit is not None:
            load(cache, connector, hit, slots_of(2, len(hit)))
    assert cache.drain(10)
    connector.close()
    cache.store.check_integrity()


def left(backend: MemoryBackend, prompt: np.ndarray) -> int:
    """How many chunks of it a new life finds in the tier."""
    cache = LocalCache(Store([Tier("memory", backend)], pool_bytes=1 << 20), namespace(), PRODUCER)
    cache.lookup("left", Chain(prompt, CHUNK))
    return cache.wait("left", 10).chunks


def test_a_tier_that_is_too_small_keeps_the_front_of_a_prefix() -> None:
    backend = MemoryBackend(3 * RECORD + RECORD // 2)
    lives(backend, TOKENS)
    assert left(backend, TOKENS) == 2  # the third place went to the last chunk


def test_hits_in_the_pool_keep_a_prefix_in_the_tier() -> None:
    prompts = [tokens_of(seed, 2 * CHUNK) for seed in range(50, 54)]
    backend = MemoryBackend(6 * RECORD + RECORD // 2)
    lives(backend, *prompts, hit=prompts[0])
    assert left(backend, prompts[0]) == 2
    assert left(backend, prompts[1]) < 2


def test_an_interrupt_loses_no_action(monkeypatch: pytest.MonkeyPatch) -> None:
    cache = open_it("memory://")
    engine = PagedEngine()
    connector = engine.connect(cache)
    store(cache, engine, connector, TOKENS)
    assert cache.drain(10)
    carry_out, interrupts = cache.store._carry_out, [KeyboardInterrupt]

    def interrupted(action: object) -> None:
        if interrupts:
            raise interrupts.pop()
        carry_out(action)  # type: ignore[arg-type]

    monkeypatch.setattr(cache.store, "_carry_out", interrupted)
    other = Chain(tokens_of(7, 2 * CHUNK), CHUNK)
    reservation = cache.reserve("a", other, 0, 2)
    assert reservation is not None
    with pytest.raises(KeyboardInterrupt):
        cache.publish(reservation)
    cache.forget("a")  # any event
    assert cache.drain(10), "the checksum's job was started after all"
    connector.close()
    cache.close()


def test_a_closed_connector_gives_its_lease_back(cache: LocalCache) -> None:
    engine = PagedEngine()
    connector = engine.connect(cache)
    chain = store(cache, engine, connector, TOKENS)
    cache.lookup("a", chain)
    ticket = cache.claim("a", 5)
    assert ticket is not None
    connector.close()
    transfer = connector.load(ticket, slots_of(2, 5 * CHUNK))
    assert transfer.done() and list(transfer.failed_chunks()) == [0, 1, 2, 3, 4]
    assert cache.stats().leases == 0


# Bad input, before anything is written


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("", "no cache URL|is not a URL"),
        ("/var/lib/kv", "is not a URL"),
        ("nosuch://x", "unknown scheme 'nosuch'.*lmdb"),
        ("memory://?sise=1GiB", "unknown parameter 'sise'.*size"),
        ("memory://?size=lots", "'lots' is not a size"),
        ("memory://?size=0", "must be positive"),
    ],
)
def test_a_wrong_url_is_refused_with_the_fix(url: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        open_it(url)


def test_a_pool_smaller_than_a_chunk_is_refused() -> None:
    with pytest.raises(ConfigError, match="raise pool_bytes"):
        open_cache("memory://", namespace=namespace(), producer=PRODUCER, pool_bytes=1000)


def test_deleted_chunks_are_gone_from_pool_and_tier(url: str) -> None:
    fill(url)
    cache = open_it(url)
    chain = Chain(TOKENS, CHUNK)
    cache.lookup("a", chain)
    assert cache.wait("a", 10).chunks == 5
    cache.forget("a")
    assert cache.delete(chain) == 5
    assert cache.lookup("b", chain).chunks == 0
    cache.close()
    assert read(url)[0] == 0


def test_clear_empties_this_namespace_only(url: str) -> None:
    fill(url)
    rows = fill(url, namespace=namespace(fingerprint="other"))
    cache = open_it(url)
    cache.clear()
    cache.close()
    assert read(url)[0] == 0
    chunks, found, _ = read(url, namespace=namespace(fingerprint="other"))
    assert chunks == 5 and np.array_equal(found, rows)


def test_after_close_everything_is_a_miss(url: str) -> None:
    cache = open_it(url)
    chain = Chain(TOKENS, CHUNK)
    cache.close()
    cache.close()
    assert cache.lookup("a", chain).why == "closed"
    assert cache.reserve("a", chain, 0, 1) is None
    assert cache.claim("a", 1) is None


def test_a_ticket_travels(cache: LocalCache) -> None:
    import pickle

    import msgspec

    from lmcache_sdk import Ticket

    engine = PagedEngine()
    connector = engine.connect(cache)
    chain = store(cache, engine, connector, TOKENS)
    cache.lookup("a", chain)
    ticket = cache.claim("a", 5)
    assert ticket is not None
    assert pickle.loads(pickle.dumps(ticket)) == ticket
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(ticket), type=Ticket) == ticket
    cache.release(ticket)
    connector.close()


def wait_until(condition: object, timeout_s: float = 10.0) -> None:
    """Poll something that has no event of its own, to a deadline."""
    import time

    assert callable(condition)
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "did not come true in time"
        time.sleep(0.01)


def test_a_router_hears_of_a_chunk_in_order(cache: LocalCache) -> None:
    """Told after the lock is given up, "stored" by one thread could follow "removed" by another."""
    engine, log, inside = PagedEngine(), cache.store.events, []
    add = log.add

    def watched(**event: object) -> None:
        inside.append(cache.store._lock.locked())
        add(**event)  # type: ignore[arg-type]

    log.add = watched  # type: ignore[method-assign]
    connector = engine.connect(cache)
    chain = store(cache, engine, connector, TOKENS)
    assert cache.delete(chain) == len(chain)
    connector.close()
    assert inside == [True] * (2 * len(chain))
