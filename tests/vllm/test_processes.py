"""Whole engines beside the matrix: tensor parallelism, another block size, a real model."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lmcache_sdk.testing.harness import EngineError, EngineHarness
from tests.core.served import Served
from tests.vllm.process import engine
from tests.vllm.tiny import make_model_with_windows

SEVERAL = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}


def prompt(tokens: int, seed: int, high: int = 1000) -> list[int]:
    return np.random.default_rng([11, seed]).integers(10, high, tokens).tolist()


def near(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether two replies begin alike but for rounding: nearly the same 20 tokens, of nearly the same chances."""
    here, there = (dict(map(tuple, answer["top"])) for answer in (one, other))
    shared = here.keys() & there.keys()
    return len(shared) >= 17 and max(abs(here[token] - there[token]) for token in shared) < 0.6


@pytest.mark.timeout(400)
def test_tensor_parallel_engines_share_both_ways(tiny_directory: Path, served: Served) -> None:
    """Two workers that are processes of their own; then one, with another block size. What each computes behind the
    other's KV is rounded otherwise, and no more.
    """
    ids, other = prompt(300, 1), prompt(300, 2)
    fine = {"heads_per_cell": 2}
    with engine(tiny_directory, served.url, extra=fine) as one:
        alone = one.generate(ids, 1, logits=True)
        assert one.flush()
        one.kill()
    with engine(tiny_directory, served.url, extra=fine, variables=SEVERAL, tensor_parallel_size=2) as two:
        warm = two.generate(ids, 1, logits=True, timeout_s=120)
        assert warm["cached_tokens"] == 256
        assert near(warm, alone)
        cold = two.generate(other, 8, logits=True, timeout_s=120)
        assert two.flush()
        assert two.call("forget", 60)["forgotten"]
        warm = two.generate(other, 8, logits=True, timeout_s=120)
        assert warm["cached_tokens"] == 256
        assert (warm["token_ids"], warm["top"]) == (cold["token_ids"], cold["top"])
        assert not near(warm, alone)
        assert two.stop() == 0  # killed, vLLM would leave shared memory behind
    with engine(tiny_directory, served.url, extra=fine, block_size=64) as one:
        warm = one.generate(other, 1, logits=True)
        assert warm["cached_tokens"] == 256
        assert near(warm, cold)


@pytest.mark.timeout(120)
def test_what_is_refused_says_why(tiny_directory: Path, served: Served) -> None:
    with pytest.raises(EngineError, match="unknown setting 'uri'"):
        engine(tiny_directory, served.url, extra={"uri": "x"}).start()


@pytest.mark.timeout(180)
def test_a_hybrid_model_is_refused_or_served_without(served: Served, tmp_path: Path) -> None:
    """It has several KV cache groups, whose block ids vLLM hands over all the same."""
    model = make_model_with_windows(tmp_path / "tiny-gemma")
    with pytest.raises(EngineError, match="KV cache groups SlidingWindowSpec, FullAttentionSpec"):
        engine(model, served.url).start()
    _serves_without(engine(model, served.url, extra={"on_error": "degrade"}), served)


@pytest.mark.timeout(120)
def test_speculative_decoding_is_served_without(tiny_directory: Path, served: Served) -> None:
    method = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 4}
    harness = engine(tiny_directory, served.url, extra={"on_error": "degrade"}, speculative_config=method)
    _serves_without(harness, served)


def _serves_without(harness: EngineHarness, served: Served) -> None:
    ids = prompt(300, 4)
    with harness:
        first = harness.generate(ids, 8)
        together = [harness.send("generate", ids=ids[cut:], max_new_tokens=8) for cut in range(3)]
        for number in together:
            harness.receive(number, 60)
        assert harness.call("forget", 60)["forgotten"]
        again = harness.generate(ids, 8)
        assert (again["cached_tokens"], again["token_ids"]) == (0, first["token_ids"])
        assert served.status()["stats"]["chunks"] == 0
        assert harness.stop() == 0


@pytest.mark.timeout(400)
def test_a_real_model_is_exact(shared_daemon: Served) -> None:
    """Not against the cold run, from which vLLM's own prefix hit differs too, but against that hit."""
    directory = os.environ.get("LMCACHE_SDK_TEST_MODEL")
    if not directory:
        pytest.skip("LMCACHE_SDK_TEST_MODEL names no model directory")
    prompts = [prompt(700, seed, 40_000) for seed in range(3)]
    options = {"memory_bytes": 256 << 20, "block_size": 64, "max_model_len": 4096}
    with engine(Path(directory), shared_daemon.url, **options) as first:
        own = []
        for ids in prompts:
            first.generate(ids, 1, timeout_s=120)
            own.append(first.generate(ids, 16, logits=True))
        assert first.flush()
        assert first.call("forget", 60)["forgotten"]
        for ids, hit in zip(prompts, own, strict=True):
            loaded = first.generate(ids, 16, logits=True)
            assert loaded["cached_tokens"] == hit["cached_tokens"] == 640
            assert (loaded["token_ids"], loaded["top"]) == (hit["token_ids"], hit["top"])
        first.kill()
    with engine(Path(directory), shared_daemon.url, **options) as second:
        for ids, hit in zip(prompts, own, strict=True):
            loaded = second.generate(ids, 16, logits=True, timeout_s=120)
            assert (loaded["cached_tokens"], loaded["token_ids"], loaded["top"]) == (640, hit["token_ids"], hit["top"])
