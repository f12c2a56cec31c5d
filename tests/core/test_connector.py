"""Loads that leave tokens out, as pages need not begin and end where chunks do; and transposed memory."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from lmcache_sdk import open_cache
from lmcache_sdk.kernels import CPUKernels
from lmcache_sdk.keys import Chain
from lmcache_sdk.layout import KVLayout, Plane, Planes
from lmcache_sdk.open import LocalCache
from lmcache_sdk.spec import CellGrid
from tests.core.engine import CHUNK, LAYERS, PRODUCER, PagedEngine, namespace, slots_of, store, tokens_of

CHUNKS = 3


@pytest.fixture(params=[0, 2], ids=["whole cells", "two heads a cell"])
def cache(request: pytest.FixtureRequest) -> Iterator[LocalCache]:
    grid = CellGrid(layers_per_cell=2, heads_per_cell=request.param) if request.param else None
    cache = open_cache("memory://", namespace=namespace(grid=grid), producer=PRODUCER)
    assert isinstance(cache, LocalCache)
    yield cache
    cache.close()


@pytest.mark.parametrize(
    ("first", "end"),
    [(0, CHUNKS * CHUNK), (3, 21), (CHUNK, CHUNKS * CHUNK - 1), (CHUNK + 2, CHUNK + 3), (CHUNKS * CHUNK, 0)],
)
def test_only_the_tokens_that_have_a_slot_are_written(cache: LocalCache, first: int, end: int) -> None:
    writer, reader = PagedEngine(), PagedEngine()
    connector = writer.connect(cache)
    tokens = tokens_of(1, CHUNKS * CHUNK)
    chain = store(cache, writer, connector, tokens)
    into = reader.connect(cache)
    for layer in reader.kv:
        for memory in layer:
            memory[:] = 7
    cache.lookup("r", chain)
    ticket = cache.claim("r", cache.wait("r", 10).chunks)
    assert ticket is not None

    slots = slots_of(5, len(tokens))
    wanted = np.full_like(slots, -1)
    wanted[first:end] = slots[first:end]
    transfer = into.load(ticket, wanted)
    assert transfer.wait(10)
    assert not transfer.failed_chunks()
    assert cache.stats().leases == 0

    expected = PagedEngine()
    expected.compute(tokens, slots)
    left_out = np.setdiff1d(np.arange(reader.layout.slots), slots[first:end])
    assert np.array_equal(reader.rows(slots[first:end]), expected.rows(slots[first:end]))
    assert (reader.rows(left_out) == 7).all()
    assert connector.close() and into.close()


def test_a_chunk_of_which_nothing_is_wanted_keeps_the_others(cache: LocalCache) -> None:
    engine = PagedEngine()
    connector = engine.connect(cache)
    tokens = tokens_of(2, CHUNKS * CHUNK)
    chain = store(cache, engine, connector, tokens)
    cache.lookup("r", Chain(tokens, CHUNK))
    ticket = cache.claim("r", cache.wait("r", 10).chunks)
    assert ticket is not None and len(chain) == CHUNKS
    before = slots_of(1, len(tokens))
    saved = engine.rows(before)
    slots = slots_of(9, len(tokens)).copy()
    slots[CHUNK : 2 * CHUNK] = -1
    assert connector.load(ticket, slots).wait(10)
    keep = np.r_[0:CHUNK, 2 * CHUNK : 3 * CHUNK]
    assert np.array_equal(engine.rows(slots[keep]), saved[:, keep])
    assert connector.close()


def test_planes_that_are_equally_far_apart_are_one_stack() -> None:
    """K transposed and V not, in turn, as vLLM's CPU blocks have them; one layer lies elsewhere."""
    memory = np.zeros((6, 2, 4, 3, 8, 16), np.uint16)  # layer, role, page, head, dim or token, token or dim

    def plane(layer: int, role: int, at: int) -> Plane:
        axes = ("page", "head", "dim", "token") if role == 0 else ("page", "head", "token", "dim")
        array = memory[at, role] if role == 0 else memory[at, role].reshape(4, 3, 16, 8)
        return Plane.of(array, axes, group="full", layer=layer, role="kv"[role], dtype="bfloat16")

    straight = Planes(plane(layer, role, layer) for layer in range(5) for role in range(2))
    assert [(s.first, s.step, s.size) for s in straight.stacks] == [(0, 2, 5), (1, 2, 5)]
    turned = Planes(plane(layer, role, at) for layer, at in enumerate((0, 1, 5, 4)) for role in range(2))
    assert [(s.first, s.step, s.size) for s in turned.stacks] == [(0, 2, 2), (4, 2, 2), (1, 2, 2), (5, 2, 2)]

    kernels, slots = CPUKernels(), np.array([17, 3, 40, 41, 42])
    for planes in (straight, turned):
        layout = KVLayout(tuple(planes))
        plan = kernels.plan(layout, slots)
        chunk = np.random.default_rng(0).integers(0, 256, len(planes) * 5 * 2 * 8 * 2, dtype=np.uint8)
        memory[:] = 0
        kernels.scatter(planes, (1, 3), plan, chunk)
        for number, one in enumerate(planes):
            row = chunk.reshape(len(planes), -1)[number].view(np.uint16).reshape(5, 2, 8)
            assert np.array_equal(one.view()[slots // 16, slots % 16, 1:3], row)
            assert not one.view()[slots // 16, slots % 16, 0].any()
        assert np.count_nonzero(memory) <= chunk.size // 2
        back = np.empty_like(chunk)
        kernels.gather(planes, (1, 3), plan, back)
        assert np.array_equal(back, chunk)


def test_what_was_taken_is_loaded_though_the_cache_be_gone(cache: LocalCache, monkeypatch: pytest.MonkeyPatch) -> None:
    writer, reader = PagedEngine(), PagedEngine()
    connector, into = writer.connect(cache), reader.connect(cache)
    tokens = tokens_of(3, CHUNKS * CHUNK)
    chain = store(cache, writer, connector, tokens)
    cache.lookup("r", chain)
    ticket = cache.claim("r", cache.wait("r", 10).chunks)
    assert ticket is not None
    taken = into.take(ticket)
    assert taken is not None
    with monkeypatch.context() as gone:
        gone.setattr(cache, "take", lambda *_: False)
        gone.setattr(cache, "segments", lambda *_: ())
        assert into.take(ticket) is None
        transfer = into.load(taken, slots_of(5, len(tokens)))
        assert transfer.wait(10)
    assert not transfer.failed_chunks()
    assert np.array_equal(reader.rows(slots_of(5, len(tokens))), writer.rows(slots_of(1, len(tokens))))
    assert cache.stats().leases == 0
    assert connector.close() and into.close()


@pytest.mark.parametrize("step_bytes", [1, 1 << 20])
def test_layers_are_there_one_after_another(
    cache: LocalCache, step_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lmcache_sdk.connector.STEP_BYTES", step_bytes)
    engine = PagedEngine()
    connector = engine.connect(cache)
    tokens = tokens_of(4, CHUNKS * CHUNK)
    chain = store(cache, engine, connector, tokens)
    cache.lookup("r", chain)
    ticket = cache.claim("r", cache.wait("r", 10).chunks)
    assert ticket is not None
    transfer = connector.load(ticket, slots_of(5, len(tokens)))
    assert all(transfer.wait_layer(layer, 10) for layer in range(LAYERS))
    assert transfer.wait(10)
    assert all(transfer.wait_layer(layer, 0) for layer in range(LAYERS))  # nor are they gone when it has ended
    assert connector.close()
