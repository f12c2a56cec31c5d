"""Chunks of other producers: whose are served to whom, how far, and what becomes of what is computed behind them."""

from __future__ import annotations

import re
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from lmcache_backends.memory import MemoryBackend
from lmcache_sdk import ConfigError, open_cache
from lmcache_sdk.api import Cache, PairStats, Ticket
from lmcache_sdk.backend import open_backend
from lmcache_sdk.keys import Chain, Origin
from lmcache_sdk.lineage import Lineage
from lmcache_sdk.open import LocalCache
from lmcache_sdk.pool.shared import SharedPool
from lmcache_sdk.sharing import LEAVE_OUT, Known, Turn, relative_errors
from lmcache_sdk.spec import CellGrid, Group, GroupKind, KVSpec, Namespace, Producer, Share
from lmcache_sdk.store import Store, Tier
from tests.core.test_store import wait_until

CHUNK, LAYERS, HEADS, DIM = 8, 3, 2, 16
ONE, TWO, THREE = Producer("one", "1", "cpu"), Producer("two", "1", "cpu"), Producer("three", "1", "cpu")
SPEC = KVSpec((Group("full", GroupKind.FULL, tuple(range(LAYERS)), HEADS, DIM, "bfloat16"),), CHUNK)
NAMESPACE = Namespace("f", SPEC, label="shared")
NAMES = (ONE.name, TWO.name)

KV = npt.NDArray[np.float32]
Change = Callable[[KV], KV]


def bf16(values: KV) -> npt.NDArray[np.uint16]:
    bits = values.astype("<f4").view("<u4")
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2")


def kv_of(producer: Producer, digest: bytes) -> KV:
    """``[layer, 2, token, head, dim]`` of one chunk: the same for all, but for the noise of each."""
    shape = (LAYERS, 2, CHUNK, HEADS, DIM)
    true = np.random.default_rng(int.from_bytes(digest[:8])).standard_normal(shape)
    noise = np.random.default_rng(int.from_bytes(digest[:8]) ^ int(producer.id, 16)).standard_normal(shape)
    scale = np.array([0.008, 0.016])[None, :, None, None, None]
    return (true + 0.7 * scale * noise).astype("<f4")


def tokens(seed: int, chunks: int) -> npt.NDArray[np.uint32]:
    return np.random.default_rng([seed, 2]).integers(0, 50_000, chunks * CHUNK).astype(np.uint32)


def text(seed: int, chunks: int) -> Chain:
    chain = Chain(tokens(seed, chunks), CHUNK)
    assert seed >= 100 or not is_left_out(chain), "that it is not served would prove nothing"
    return chain


def is_left_out(chain: Chain) -> bool:
    return int.from_bytes(chain.digests()[0][-8:]) % LEAVE_OUT == 0


def unchanged(kv: KV) -> KV:
    return kv


def write(cache: Cache, chain: Chain, first: int = 0, end: int | None = None, change: Change = unchanged) -> int:
    """Store chunks as an engine would that has computed them; the answer is how many there was room for."""
    end = len(chain) if end is None else end
    reservation = cache.reserve("w", chain, first, end - first)
    if reservation is None:
        return 0
    segments = cache.segments(reservation.boot)
    for chunk, cells in zip(reservation.chunks, reservation.places(), strict=True):
        data = bf16(change(kv_of(cache.producer, chain.digests()[chunk]))).tobytes()
        for segment, offset in cells:
            segments[segment][offset : offset + len(data)] = np.frombuffer(data, np.uint8)
    cache.publish(reservation)
    return len(reservation.chunks)


def read(cache: Cache, chain: Chain, rid: str = "r") -> tuple[list[str], str]:
    """Whose each chunk of the prefix is, by its bytes; and the ticket's fidelity."""
    cache.lookup(rid, chain)
    found = cache.wait(rid, 10).chunks
    ticket = cache.claim(rid, found) if found else None
    cache.forget(rid)
    if ticket is None:
        return [], ""
    assert cache.take(ticket)
    whose, segments = [], cache.segments(ticket.boot)
    for digest, cells in zip(chain.digests(), ticket.places(), strict=False):
        segment, offset = cells[0]
        data = bytes(segments[segment][offset : offset + SPEC.chunk_bytes])
        owners = [p.engine for p in (ONE, TWO, THREE) if bf16(kv_of(p, digest)).tobytes() == data]
        whose.append(owners[0] if owners else "?")
    cache.release(ticket)
    return whose, ticket.fidelity


class Kept(MemoryBackend):
    """Another store follows on it."""

    def close(self, timeout_s: float) -> None:
        pass


class World:
    """Some engines on one store."""

    def __init__(self, tier: MemoryBackend | None = None) -> None:
        self.tier = tier or MemoryBackend()
        self.store = Store([Tier("memory", self.tier)], pool_bytes=4 << 20)

    def engine(
        self,
        producer: Producer,
        share: Share = Share.VERIFIED,
        namespace: Namespace = NAMESPACE,
        lineage: Lineage | None = None,
    ) -> LocalCache:
        return LocalCache(self.store, namespace, producer, share=share, lineage=lineage)

    def settle(self) -> None:
        assert self.store.drain(10)
        self.store.check_integrity()

    def agree(self) -> None:
        """All that is to be compared has been."""
        self.settle()
        done = threading.Event()
        self.store._producers.overlap.worker.submit(done.set)
        assert done.wait(10)

    def spaces(self) -> set[tuple[str | int, ...]]:
        return {(s["producer"], s["fidelity"], s["chunks"]) for s in self.store.describe_spaces()}


@pytest.fixture
def world() -> Iterator[World]:
    world = World()
    yield world
    world.settle()
    world.store.close()


def test_any_takes_what_its_own_lacks(world: World) -> None:
    one, two, chain = world.engine(ONE), world.engine(TWO, Share.ANY), text(1, 6)
    write(one, chain)
    write(two, chain, 0, 2)
    assert read(two, chain) == (["two"] * 2 + ["one"] * 4, "foreign")
    assert read(one, chain) == (["one"] * 6, "exact")


def test_own_takes_nothing(world: World) -> None:
    one, two, chain = world.engine(ONE), world.engine(TWO, Share.OWN), text(1, 6)
    write(one, chain)
    write(two, chain, 0, 2)
    assert read(two, chain) == (["two"] * 2, "exact")
    assert read(world.engine(THREE, Share.OWN), chain) == ([], "")


def test_a_hole_is_filled_and_ones_own_goes_on(world: World) -> None:
    one, two, chain = world.engine(ONE), world.engine(TWO, Share.ANY), text(1, 8)
    write(one, chain, 2, 4)
    write(two, chain, 0, 2)
    write(two, chain, 4, 6)
    write(world.engine(THREE), chain)
    found = read(two, chain)
    assert found == (["two"] * 2 + ["one"] * 2 + ["two"] * 2 + ["three"] * 2, "foreign")


def test_another_namespace_is_another_world(world: World) -> None:
    chain = text(1, 3)
    write(world.engine(ONE, namespace=Namespace("g", SPEC)), chain)
    assert read(world.engine(TWO, Share.ANY), chain) == ([], "")


def test_native_bytes_are_not_shared(world: World) -> None:
    native, chain = Namespace("f", SPEC, form="native:x"), text(1, 3)
    write(world.engine(ONE, namespace=native), chain)
    assert read(world.engine(TWO, Share.ANY, native), chain) == ([], "")


def test_another_word_is_refused() -> None:
    with pytest.raises(ConfigError, match="share is 'all'; it is one of: verified, any, own"):
        open_cache("memory://", namespace=NAMESPACE, producer=ONE, share="all")


def test_from_a_tier_that_another_store_has_written(tmp_path: Path) -> None:
    """Nobody of this store knows the producer; the tier does."""
    url, chain = f"lmdb://{tmp_path}/store?size=64MiB", text(1, 5)
    one = open_cache(url, namespace=NAMESPACE, producer=ONE, pool_bytes=1 << 20)
    write(one, chain)
    one.close()
    two = open_cache(url, namespace=NAMESPACE, producer=TWO, pool_bytes=1 << 20, share="any")
    assert two.drain(10)
    write(two, chain, 0, 1)
    assert read(two, chain) == (["two"] + ["one"] * 4, "foreign")
    two.close()


def test_what_is_computed_behind_foreign_chunks_is_not_exact(world: World) -> None:
    one, two, chain = world.engine(ONE), world.engine(TWO, Share.ANY), text(1, 8)
    write(one, chain, 0, 4)
    write(two, chain, 0, 2)
    assert read(two, chain) == (["two"] * 2 + ["one"] * 2, "foreign")
    assert write(two, chain) == 4, "what another producer has is not stored again"
    assert world.spaces() == {("one-1-cpu", "exact", 4), ("two-1-cpu", "exact", 2), ("two-1-cpu", "foreign.any", 4)}
    assert read(two, chain) == (["two"] * 2 + ["one"] * 2 + ["two"] * 4, "foreign")
    assert read(one, chain) == (["one"] * 4, "exact")
    assert read(world.engine(THREE, Share.ANY), chain) == (["one"] * 4, "foreign"), "nor is it anybody else's"
    other = text(2, 3)
    assert write(two, other) == 3
    assert ("two-1-cpu", "exact", 5) in world.spaces(), "what has nothing before it is exact"


def test_without_positions_all_after_a_foreign_load_is_foreign(world: World) -> None:
    one, two, chain = world.engine(ONE), world.engine(TWO, Share.ANY), text(1, 4)
    write(one, chain, 0, 2)
    read(two, chain)
    write(two, Chain.from_digests(chain.digests()[2:], CHUNK))
    assert ("two-1-cpu", "foreign.any", 2) in world.spaces()
    assert ("two-1-cpu", "exact", 0) in world.spaces()


def test_deleted_means_gone(world: World) -> None:
    one, two, chain = world.engine(ONE), world.engine(TWO, Share.ANY), text(1, 4)
    write(one, chain)
    two.lookup("r", chain)
    assert one.delete(chain) == 4
    assert read(two, chain, "r") == ([], "")


def test_the_origin_of_every_record_is_right(world: World) -> None:
    one, two, chain = world.engine(ONE), world.engine(TWO, Share.ANY), text(1, 6)
    write(one, chain, 0, 3)
    read(two, chain)
    write(two, chain)
    world.settle()
    kept = {stat.key.rsplit("/", 3)[0] for stat in world.tier.scan() if not stat.key.endswith("manifest")}
    assert kept == {
        Origin(NAMESPACE.id, ONE.id).prefix().rstrip("/"),
        Origin(NAMESPACE.id, TWO.id, "foreign.any").prefix().rstrip("/"),
    }


# The overlap check


def overlap_of(*caches: Cache, seed: int = 1, chunks: int = 9, change: Change = unchanged) -> Chain:
    """All store the same text; the last one with a change."""
    chain = text(seed, chunks)
    for cache in caches[:-1]:
        write(cache, chain)
    write(caches[-1], chain, change=change)
    return chain


def overlap(world: World, *caches: Cache, seed: int = 1, chunks: int = 9, change: Change = unchanged) -> Chain:
    """And all that is to be compared has been."""
    chain = overlap_of(*caches, seed=seed, chunks=chunks, change=change)
    world.agree()
    return chain


def only(world: World) -> PairStats:
    (pair,) = world.store.stats().pairs
    return pair


def test_a_pair_opens_after_three_chunks_as_deep_as_they_reach(world: World) -> None:
    one, two, other = world.engine(ONE), world.engine(TWO), text(2, 12)
    write(one, other)
    assert read(two, other) == ([], ""), "not before there is proof"
    assert only(world).state == "checking"
    overlap(world, one, two, chunks=9)
    pair = only(world)
    assert (pair.state, pair.compared, pair.failed, pair.depth) == ("open", 3, 0, 9 * CHUNK)
    assert 0.004 < pair.worst["k"] < 0.02 and 0.008 < pair.worst["v"] < 0.04, "the noise of the test"
    assert read(two, other) == (["one"] * 9, "foreign"), "no further than the deepest that agreed"
    more = text(3, 4)
    write(two, more)
    assert read(one, more) == (["two"] * 4, "foreign"), "what agrees agrees both ways"


@pytest.mark.parametrize(("chunks", "state"), [(1, "checking"), (2, "checking"), (3, "open")])
def test_two_chunks_are_no_proof(world: World, chunks: int, state: str) -> None:
    overlap(world, world.engine(ONE), world.engine(TWO), chunks=chunks)
    assert only(world).state == state


def test_without_the_first_chunk_there_is_no_proof(world: World) -> None:
    one, two, chain = world.engine(ONE), world.engine(TWO), text(1, 9)
    write(one, chain)
    write(two, chain, 4)
    world.agree()
    assert (only(world).state, only(world).compared, only(world).depth) == ("checking", 3, 0)
    assert read(two, Chain.from_digests(chain.digests()[:4], CHUNK)) == ([], "")
    write(two, chain, 0, 1)
    world.agree()
    assert only(world).depth == 9 * CHUNK


def test_the_depth_grows(world: World) -> None:
    one, two = world.engine(ONE), world.engine(TWO)
    overlap(world, one, two, chunks=4)
    long = text(5, 12)
    write(two, long)
    world.agree()
    write(one, long)
    world.agree()
    assert only(world).depth == 12 * CHUNK


def unplaced(chain: Chain) -> Chain:
    """As an engine names it that does not tell where in a request its pages are."""
    return Chain.from_digests(chain.digests(), CHUNK)


def test_where_nobody_tells_positions_there_is_no_proof(world: World) -> None:
    one, two, other = world.engine(ONE), world.engine(TWO), text(2, 3)
    write(one, unplaced(other))
    for seed in (10, 11, 12, 13):
        write(one, unplaced(text(seed, 3)))
        write(two, unplaced(text(seed, 3)))
        world.agree()
    assert (only(world).state, only(world).depth) == ("checking", 0) and only(world).compared >= 12
    assert read(two, other) == read(two, unplaced(other)) == ([], "")
    overlap(world, one, two, seed=14, chunks=2)
    assert only(world).state == "checking", "nor is such a chunk the third"


@pytest.mark.parametrize("late", [True, False])
def test_one_of_the_two_that_tells_positions_is_enough(world: World, late: bool) -> None:
    """SGLang's linker hands over digests alone, vLLM all tokens."""
    chain, other = text(1, 9), text(2, 9)
    one, two = world.engine(ONE), world.engine(TWO)
    write(one, other)
    for cache, placed in ((one, late), (two, not late)):
        write(cache, chain if placed else unplaced(chain))
        world.agree()
    assert (only(world).state, only(world).depth) == ("open", 9 * CHUNK)
    assert read(two, other) == (["one"] * 9, "foreign")


def test_the_first_chunks_of_texts_are_no_proof_for_what_lies_deeper(world: World) -> None:
    one, two, deep = world.engine(ONE), world.engine(TWO), text(9, 20)
    write(one, deep, 0, 1)
    write(one, deep, 1, change=shifted)
    for seed in (1, 2, 3, 4):
        overlap(world, one, two, seed=seed, chunks=1)
        assert (only(world).compared, only(world).state) == (seed, "checking")
        assert read(two, deep) == read(two, unplaced(deep)) == ([], "")


def test_where_depth_is_proven_all_is_served_without_positions(world: World) -> None:
    one, two, other = world.engine(ONE), world.engine(TWO), text(2, 12)
    write(one, other)
    overlap(world, one, two, chunks=9)
    assert read(two, unplaced(other)) == (["one"] * 12, "foreign")


def test_a_chunk_that_agreed_once_is_judged_again(world: World) -> None:
    one, two = world.engine(ONE), world.engine(TWO)
    chain = overlap(world, one, two, chunks=3)
    two.delete(chain)
    write(two, chain)
    world.agree()
    agreed = 'lmcache_overlap_chunks_total{result="agreed"}'
    assert (only(world).state, only(world).compared, world.store.stats().counters[agreed]) == ("open", 3, 3)
    two.delete(chain)
    write(two, chain, change=shifted)
    world.agree()
    assert (only(world).state, only(world).compared, only(world).failed) == ("closed", 4, 1)


def shifted(kv: KV) -> KV:
    return np.roll(kv, 1, axis=2)


def interleaved(kv: KV) -> KV:
    k = kv[:, 0].reshape(*kv[:, 0].shape[:-1], 2, -1).swapaxes(-1, -2).reshape(kv[:, 0].shape)
    return np.stack([k, kv[:, 1]], axis=1)


def transposed(kv: KV) -> KV:
    k = kv[:, 0].swapaxes(1, 3).reshape(kv[:, 0].shape)
    return np.stack([k, kv[:, 1]], axis=1)


def other_weights(kv: KV) -> KV:
    return np.random.default_rng(7).standard_normal(kv.shape).astype("<f4")


def one_layer(kv: KV) -> KV:
    return kv * np.where(np.arange(LAYERS) == 1, 1.05, 1.0).astype("<f4")[:, None, None, None, None]


def no_numbers(kv: KV) -> KV:
    return np.full_like(kv, np.nan)


@pytest.mark.parametrize("wrong", [shifted, interleaved, transposed, other_weights, one_layer, no_numbers])
def test_a_wrong_convention_closes_and_is_never_served(
    world: World, caplog: pytest.LogCaptureFixture, wrong: Change
) -> None:
    one, two, other = world.engine(ONE), world.engine(TWO), text(2, 6)
    write(two, other, change=wrong)
    chain = overlap(world, one, two, change=wrong)
    pair = only(world)
    assert (pair.state, pair.depth) == ("closed", 0) and pair.failed
    assert read(one, other) == ([], "") and read(one, chain)[1] == "exact"
    overlap(world, one, two, seed=8)
    assert only(world).state == "closed", "whatever follows"
    assert [record.levelname for record in caplog.records if "neither reads the other's" in record.message] == ["ERROR"]
    counters = world.store.stats().counters
    assert counters['lmcache_overlap_chunks_total{result="disagreed"}'] == pair.failed
    assert counters['lmcache_pairs{state="closed"}'] == 1
    assert read(world.engine(ONE, Share.ANY), other)[1] == "foreign", "who asks for it gets it"


def test_what_was_open_closes_with_all_that_came_of_it(world: World) -> None:
    one, two = world.engine(ONE), world.engine(TWO)
    overlap(world, one, two)
    third = text(3, 8)
    write(one, third, 0, 4)
    assert read(two, third) == (["one"] * 4, "foreign")
    assert write(two, third) == 4
    assert read(two, third) == (["one"] * 4 + ["two"] * 4, "foreign")
    two.lookup("late", third)
    overlap(world, one, two, seed=4, change=shifted)
    assert two.claim("late", 1) is None
    assert read(two, third) == ([], "")
    assert not write(two, third), "nobody would read it"
    assert read(one, third) == (["one"] * 4, "exact")


def test_one_in_so_many_is_left_to_be_computed(world: World) -> None:
    one, two = world.engine(ONE), world.engine(TWO)
    overlap(world, one, two)
    seen = [text(seed, 2) for seed in range(100, 500)]
    left = [chain for chain in seen if is_left_out(chain)]
    assert left, "of 400 texts some are"
    served = next(chain for chain in seen if chain not in left)
    write(one, served)
    assert read(two, served)[1] == "foreign", "and no others"
    for chain in left[:2]:
        write(one, chain)
        assert read(two, chain) == ([], "")
        write(two, chain)
        before = only(world).compared
        world.agree()
        assert only(world).compared > before and read(two, chain) == (["two"] * 2, "exact")


def test_a_dtype_that_is_not_compared_stays_closed(world: World) -> None:
    spec = KVSpec((Group("full", GroupKind.FULL, (0,), 1, 4, "float8_e4m3fn"),), CHUNK)
    world.engine(ONE, namespace=Namespace("8", spec))
    world.engine(TWO, namespace=Namespace("8", spec))
    assert (only(world).state, only(world).why) == ("checking", "float8_e4m3fn is not compared")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_errors_are_relative_and_of_the_worst_head(dtype: str) -> None:
    spec = KVSpec((Group("full", GroupKind.FULL, (0, 1), 4, 8, dtype),), CHUNK, CellGrid(1, 2))
    kv = np.random.default_rng(1).standard_normal((2, 2, CHUNK, 4, 8)).astype("<f4")
    other = kv.copy()
    other[1, 0, :, 2] *= 1.25
    cut = [(layer, slice(first, first + 2)) for layer in (0, 1) for first in (0, 2)]

    def cells(values: KV) -> list[npt.NDArray[np.uint8]]:
        parts = [np.ascontiguousarray(values[layer, :, :, heads]) for layer, heads in cut]
        encode = {"bfloat16": bf16, "float16": lambda part: part.astype("<f2"), "float32": lambda part: part}[dtype]
        return [np.frombuffer(encode(part).tobytes(), np.uint8) for part in parts]

    errors = relative_errors(spec, cells(kv), cells(other))
    assert errors == pytest.approx({"k": 0.25, "v": 0.0}, abs=0.01)


def test_a_latent_group_has_one_bound(world: World) -> None:
    spec = KVSpec((Group("latent", GroupKind.LATENT, (0, 1), 1, 24, "float32"),), CHUNK)
    zeros = [np.zeros(spec.chunk_bytes, np.uint8)]
    ones = [np.ones(spec.chunk_bytes // 4, "<f4").view(np.uint8)]
    assert relative_errors(spec, zeros, zeros) == {"latent": 0.0}
    assert relative_errors(spec, zeros, ones)["latent"] == np.inf
    assert relative_errors(spec, ones, ones) == {"latent": 0.0}


def test_the_next_life_proves_it_anew_from_what_is_stored(tmp_path: Path) -> None:
    url, chain, other = f"lmdb://{tmp_path}/store?size=64MiB", text(1, 9), text(2, 6)
    for producer in (ONE, TWO):
        cache = open_cache(url, namespace=NAMESPACE, producer=producer, pool_bytes=1 << 20)
        write(cache, chain)
        if producer is ONE:
            write(cache, other)
        cache.close()
    two = open_cache(url, namespace=NAMESPACE, producer=TWO, pool_bytes=1 << 20)
    assert isinstance(two, LocalCache) and two.drain(10)
    assert read(two, other) == ([], "")
    assert read(two, chain) == (["two"] * 9, "exact")
    wait_until(lambda: two.stats().pairs[0].state == "open")
    assert read(two, other) == (["one"] * 6, "foreign")
    two.close()


def test_the_next_life_knows_who_is_closed(tmp_path: Path) -> None:
    url, chain, other = f"lmdb://{tmp_path}/store?size=64MiB", text(1, 9), text(2, 6)
    with closing(Store([Tier("lmdb", open_backend(url))], pool_bytes=1 << 20)) as store:
        one, two = LocalCache(store, NAMESPACE, ONE), LocalCache(store, NAMESPACE, TWO)
        write(one, chain)
        write(one, other)
        write(two, chain, change=shifted)
        wait_until(lambda: store.stats().pairs[0].state == "closed")
    with closing(open_cache(url, namespace=NAMESPACE, producer=TWO, pool_bytes=1 << 20)) as later:
        wait_until(lambda: [pair.state for pair in later.stats().pairs] == ["closed"])
        assert read(later, other) == ([], "")


def lives(count: int) -> Iterator[tuple[int, Store, LocalCache, LocalCache]]:
    """Of one pool, without a tier, so that the journal alone remembers: its store, and two engines."""
    folder = Path(tempfile.mkdtemp(prefix="lmcache-sdk-test-", dir="/dev/shm"))
    try:
        for life in range(count):
            pool = SharedPool.open(folder / "pool", 2 << 20)
            store = Store(pool=pool)
            store.end_earlier_life()
            yield life, store, LocalCache(store, NAMESPACE, ONE), LocalCache(store, NAMESPACE, TWO)
            assert store.drain(10)
            store.close()
            pool.close(keep=life < count - 1)
    finally:
        shutil.rmtree(folder)


def test_the_pool_alone_remembers_it() -> None:
    chain, other, states = text(1, 9), text(2, 6), ["closed", "closed", "checking"]
    for life, store, one, two in lives(3):
        if life == 0:
            write(one, other)
            write(one, chain)
            write(two, chain, change=no_numbers)
        wait_until(lambda store=store, life=life: [pair.state for pair in store.stats().pairs] == [states[life]])
        assert read(two, other) == ([], "") and read(one, other) == (["one"] * 6, "exact")
        assert store.drain(10)
        if life == 1:
            wait_until(lambda store=store: store.reopen(NAMESPACE.id, NAMES))
            two.clear()


def test_the_pool_alone_remembers_what_agreed() -> None:
    chain, other, deeper = text(1, 9), text(2, 12), text(3, 12)
    for life, store, one, two in lives(3):
        if life == 0:
            write(one, other)
            overlap_of(one, two, chunks=9)
        if life == 1:
            write(two, deeper, 11)
            write(one, deeper, 11)
        chunks = [9, 12, 12][life]
        wait_until(lambda store=store, chunks=chunks: store.stats().pairs[0].depth == chunks * CHUNK)
        (pair,) = store.stats().pairs
        assert (pair.state, pair.compared, pair.failed) == ("open", [3, 4, 4][life], 0)
        assert 0 < pair.worst["k"] < 0.02
        if life:
            assert read(two, other) == (["one"] * chunks, "foreign")
        assert read(one, chain) == (["one"] * 9, "exact")


# Reopening


def test_a_closed_pair_is_reopened_and_compared_anew(world: World) -> None:
    one, two, other = world.engine(ONE), world.engine(TWO), text(2, 6)
    assert not world.store.reopen(NAMESPACE.id, NAMES), "it is not closed"
    overlap(world, one, two, change=shifted)
    write(one, other)
    assert not world.store.reopen(NAMESPACE.id, (ONE.name, THREE.name))
    assert world.store.reopen(NAMESPACE.id, (TWO.name, ONE.name))
    assert (only(world).state, only(world).compared, only(world).failed) == ("checking", 0, 0)
    assert read(two, other) == ([], "")
    overlap(world, one, two, seed=8)
    assert only(world).state == "open"
    assert read(two, other) == (["one"] * 6, "foreign")
    overlap(world, one, two, seed=9, change=shifted)
    assert only(world).state == "closed"
    assert world.store.reopen(NAMESPACE.id, NAMES), "as often as it takes"


def test_what_is_still_wrong_closes_it_again(world: World) -> None:
    one, two = world.engine(ONE), world.engine(TWO)
    chain = overlap(world, one, two, change=shifted)
    assert world.store.reopen(NAMESPACE.id, NAMES)
    assert read(one, chain)[1] == "exact"
    world.agree()
    assert only(world).state == "closed"


def test_what_came_of_a_closed_pair_is_not_read_when_it_is_reopened(world: World) -> None:
    one, two, third = world.engine(ONE), world.engine(TWO), text(3, 8)
    overlap(world, one, two)
    write(one, third, 0, 4)
    assert read(two, third) == (["one"] * 4, "foreign")
    assert write(two, third) == 4
    overlap(world, one, two, seed=4, change=shifted)
    assert world.store.reopen(NAMESPACE.id, NAMES)
    overlap(world, one, two, seed=5)
    assert read(two, third) == (["one"] * 4, "foreign")
    assert write(two, third) == 4
    assert read(two, third) == (["one"] * 4 + ["two"] * 4, "foreign")
    derived = sorted((fidelity, chunks) for name, fidelity, chunks in world.spaces() if name == TWO.name and chunks)
    assert [chunks for fidelity, chunks in derived if fidelity != "exact"] == [4, 4]
    assert re.fullmatch(r"foreign\.[0-9a-f]{8}", derived[-1][0])
    assert two.clear() and not any(chunks for name, _, chunks in world.spaces() if name == TWO.name)


def test_the_stores_of_a_tier_hear_of_it() -> None:
    worlds = [World(tier := Kept()), World(tier)]
    opened = []
    for world in worlds:
        opened.append([world.engine(producer) for producer in (ONE, TWO)])
        world.settle()

    def states() -> list[str]:
        for world, (one, _) in zip(worlds, opened, strict=True):
            world.store._producers.meet(one._opened)
            world.settle()
        return [only(world).state for world in worlds]

    overlap(worlds[0], *opened[0], change=shifted)
    assert states() == ["closed", "closed"]
    assert worlds[1].store.reopen(NAMESPACE.id, NAMES)
    worlds[1].settle()
    assert states() == ["checking", "checking"]
    with closing(Store([Tier("memory", tier)], pool_bytes=1 << 20)) as later:
        LocalCache(later, NAMESPACE, ONE)
        assert later.drain(10) and [pair.state for pair in later.stats().pairs] == ["checking"]
    for world in worlds:
        world.store.close()


def test_what_was_derived_is_no_proof(world: World) -> None:
    one, two, three, chain = world.engine(ONE), world.engine(TWO, Share.ANY), world.engine(THREE), text(1, 9)
    write(one, chain, 0, 1)
    read(two, chain)
    write(two, chain)
    write(three, chain)
    world.agree()
    pairs = {pair.producers: pair.compared for pair in world.store.stats().pairs}
    assert {names for names, compared in pairs.items() if compared} == {
        names for names in pairs if set(names) == {ONE.name, THREE.name}
    }


def test_one_closed_pair_is_the_end_of_what_was_derived(world: World) -> None:
    """Nobody can tell which of the others it came from."""
    one, two, three = world.engine(ONE), world.engine(TWO), world.engine(THREE)
    overlap(world, one, two)
    chain = text(3, 8)
    write(one, chain, 0, 4)
    read(two, chain)
    assert write(two, chain) == 4
    assert read(two, chain) == (["one"] * 4 + ["two"] * 4, "foreign")
    overlap(world, two, three, seed=4, change=shifted)
    assert read(two, chain) == (["one"] * 4, "foreign"), "the pair that agrees goes on"
    assert not write(two, chain), "nobody would read it"


def test_who_is_closed_stays_so_however_late_they_come() -> None:
    first, second = sorted((ONE.id, TWO.id))
    with closing(Store(pool_bytes=1 << 20)) as store:
        store._producers.sharing.learn(NAMESPACE.id, Known(closed=(Turn(first, second),)))
        for producer in (ONE, TWO):
            LocalCache(store, NAMESPACE, producer)
        assert [pair.state for pair in store.stats().pairs] == ["closed"]
    assert not store.reopen(NAMESPACE.id, NAMES), "the store is closed"


def test_who_splits_chunks_stores_nothing_exact_after_a_foreign_load(world: World) -> None:
    """vLLM with blocks that are smaller: another request gets the first half of a chunk that was loaded."""
    one, chain = world.engine(ONE), text(1, 2)
    two = world.engine(TWO, Share.ANY, lineage=Lineage(splits_chunks=True))
    before = text(2, 2)
    assert write(two, before) == 2
    write(one, chain)
    assert read(two, before)[1] == "exact" and write(two, text(3, 2)) == 2
    assert {("two-1-cpu", "exact", 4), ("two-1-cpu", "foreign.any", 0)} < world.spaces()
    assert read(two, chain)[1] == "foreign"
    other = tokens(1, 2)
    other[CHUNK // 2 :] += 1
    assert write(two, Chain(other, CHUNK)) == 2
    assert {("two-1-cpu", "exact", 4), ("two-1-cpu", "foreign.any", 2)} < world.spaces()


def test_what_an_engine_keeps_outlives_its_cache(world: World) -> None:
    one, chain = world.engine(ONE), text(1, 6)
    write(one, chain, 0, 3)
    read(world.engine(TWO, Share.ANY, lineage=Lineage.of_process("outlives")), chain)
    again = world.engine(TWO, Share.ANY, lineage=Lineage.of_process("outlives"))
    assert write(again, chain, 3) == 3
    assert {("two-1-cpu", "exact", 0), ("two-1-cpu", "foreign.any", 3)} < world.spaces()


def test_a_process_keeps_so_many_lineages() -> None:
    lineages = [Lineage.of_process(f"bound {number}") for number in range(100)]
    assert lineages == [Lineage.of_process(f"bound {number}") for number in range(100)]
    assert lineages[98] is lineages[99], "further ones are one"


def test_beyond_its_bound_a_lineage_calls_nothing_exact() -> None:
    lineage, chains = Lineage(2), [text(seed, 3) for seed in range(3)]
    tickets = [Ticket(1, "b", (0,), b"", 0, 3, inexact=chain.digests()[1]) for chain in chains]
    assert lineage.first_inexact(chains[0], 3) is None
    lineage.loaded(tickets[0])
    assert [lineage.first_inexact(chain, 3) for chain in chains] == [1, None, None]
    assert lineage.first_inexact(chains[0], 1) is None
    lineage.loaded(tickets[1])
    assert [lineage.first_inexact(chain, 3) for chain in chains] == [0, 0, 0]


def test_chunks_that_lie_scattered_are_not_looked_for_without_end() -> None:
    """An instant tier is asked within the lookup, each time from within the answer to the last question."""
    tier, chain = Kept(), text(1, 200)
    with closing(Store([Tier("memory", tier)], pool_bytes=4 << 20)) as store:
        one, two = LocalCache(store, NAMESPACE, ONE), LocalCache(store, NAMESPACE, TWO)
        for at in range(0, 200, 2):
            write(one, chain, at, at + 1)
            write(two, chain, at + 1, at + 2)
        assert store.drain(10)
    with closing(Store([Tier("memory", tier)], pool_bytes=4 << 20)) as store:
        two = LocalCache(store, NAMESPACE, TWO, share=Share.ANY)
        assert store.drain(10)
        whose, fidelity = read(two, chain)
        assert whose == ["one", "two"] * (len(whose) // 2) and 16 <= len(whose) < 200 and fidelity == "foreign"
        store.check_integrity()
