"""What comes back is what was stored, to the bit, and it is what the model computes with."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from lmcache_adapters.hf import Model, Runner
from lmcache_sdk.api import Cache, Chain
from tests.hf.tiny import digest, engine, some_ids, split_logits

CHUNK = 64


def test_warm_logits_are_those_of_the_same_split(runner: Runner, plain: Runner) -> None:
    ids = some_ids(500)
    cold = runner.generate(ids, max_new_tokens=8, keep_logits=True)
    assert cold.cached_tokens == 0
    assert runner.drain()
    runner.memory.rows.fill_(torch.nan)  # whatever is not loaded would show

    warm = runner.generate(ids, max_new_tokens=8, keep_logits=True)

    assert warm.cached_tokens == 500 // CHUNK * CHUNK
    assert warm.token_ids == cold.token_ids
    np.testing.assert_array_equal(warm.logits, split_logits(plain, ids, warm.cached_tokens))
    np.testing.assert_allclose(warm.logits, cold.logits, atol=1e-3)


def test_warm_logits_are_those_of_the_same_split_in_another_process(
    tiny_directory: Path, runner: Runner, store_url: str
) -> None:
    ids = some_ids(700, seed=1)
    cold = runner.generate(ids, max_new_tokens=8)
    expected = split_logits(runner, ids, 640)
    runner.close()

    with engine(tiny_directory, "--cache", store_url) as process:
        assert process.hello["namespace"] == runner.model.namespace.id
        warm = process.generate(ids, 8, logits=True)
        assert process.stop() == 0

    assert warm["cached_tokens"] == 640
    assert warm["token_ids"] == cold.token_ids
    assert warm["logits_sha256"] == digest(expected)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_every_dtype_comes_back_exactly(tiny_directory: Path, store_url: str, dtype: str) -> None:
    ids = some_ids(200)
    with Runner(tiny_directory, store_url, dtype=dtype) as runner:
        runner.generate(ids, max_new_tokens=1)
        assert runner.drain()
        warm = runner.generate(ids, max_new_tokens=1, keep_logits=True)
        assert warm.cached_tokens == 192
        np.testing.assert_array_equal(warm.logits, split_logits(runner, ids, 192))


def test_the_real_model_is_exact(real_directory: Path, store_url: str) -> None:
    with Runner(real_directory, store_url) as runner:
        document = "The cache outlives the engine, and every engine can read it. " * 40
        ids = runner.model.encode([{"role": "user", "content": document + "What outlives the engine?"}])
        cold = runner.generate(ids, max_new_tokens=8)
        assert runner.drain()
        runner.memory.rows.fill_(torch.nan)
        warm = runner.generate(ids, max_new_tokens=8, keep_logits=True)
        assert warm.cached_tokens == (len(ids) - 1) // CHUNK * CHUNK > 512
        assert warm.token_ids == cold.token_ids
        np.testing.assert_array_equal(warm.logits, split_logits(runner, ids.tolist(), warm.cached_tokens))


def test_negated_keys_in_the_store_change_the_output(runner: Runner) -> None:
    """The control: if the loaded bytes were not used, this would change nothing."""
    ids = some_ids(500)
    runner.generate(ids, max_new_tokens=1)
    assert runner.drain()
    true = runner.generate(ids, max_new_tokens=1, keep_logits=True)

    assert runner.cache is not None
    _negate_keys(runner.cache, Chain(ids, CHUNK), runner.model)
    false = runner.generate(ids, max_new_tokens=1, keep_logits=True)

    assert false.cached_tokens == true.cached_tokens == 448
    assert np.abs(false.logits - true.logits).max() > 0.1


def _negate_keys(cache: Cache, chain: Chain, model: Model) -> None:
    """Store the same chunks again with other bytes, in the way that anyone stores: checksums are right."""
    spec = model.namespace.spec
    lookup = cache.lookup("negate", chain)
    lookup = cache.wait("negate", 10)
    ticket = cache.claim("negate", lookup.chunks)
    assert ticket is not None
    chunks = [
        cache.segments(ticket.boot)[segment][offset : offset + spec.chunk_bytes].copy()
        for segment, offset in ticket.places()[:, 0].tolist()
    ]
    cache.release(ticket)
    cache.forget("negate")
    assert cache.delete(chain) == len(chunks)

    reservation = cache.reserve("negate-2", chain, 0, len(chunks))
    assert reservation is not None
    assert reservation.chunks == tuple(range(len(chunks)))
    layers, heads = len(model.group.layers), model.group.heads
    for chunk, (segment, offset) in zip(chunks, reservation.places()[:, 0].tolist(), strict=True):
        cell = chunk.view(np.float32).reshape(layers, 2, CHUNK, heads, model.group.dim)
        cell[:, 0] *= -1
        cache.segments(reservation.boot)[segment][offset : offset + spec.chunk_bytes] = chunk
    cache.publish(reservation)
    assert cache.drain(10)
