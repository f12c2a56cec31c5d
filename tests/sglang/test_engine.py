"""Whole engines in the ways that the matrix does not have: other layouts, tensor parallelism, SGLang's own faults."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lmcache_sdk.testing.harness import EngineHarness
from tests.core.served import Served
from tests.sglang.process import engine


def prompt(number: int, tokens: int = 300) -> list[int]:
    return [int(token) for token in np.random.default_rng([9, number]).integers(10, 1000, tokens)]


def run(harness: EngineHarness, ids: list[int]) -> dict[str, Any]:
    return harness.generate(ids, 8, logits=True)


def restored(harness: EngineHarness, ids: list[int]) -> None:
    """Cold, and then from the store: the same to the last bit."""
    cold = run(harness, ids)
    assert cold["cached_tokens"] == 0
    assert harness.flush() and harness.call("forget", 30)["forgotten"]
    warm = run(harness, ids)
    assert warm["cached_details"]["storage"] == warm["cached_tokens"] == 256
    assert (warm["token_ids"], warm["top"]) == (cold["token_ids"], cold["top"])


@pytest.mark.timeout(180)
@pytest.mark.parametrize(
    ("layout", "io_backend"), [("page_first_direct", "direct"), ("layer_first", "direct"), ("page_head", "kernel")]
)
def test_layouts(tiny_directory: Path, shared_daemon: Served, layout: str, io_backend: str) -> None:
    # A finer grid is another namespace: what one layout has stored would be found by the next.
    extra = {"layers_per_cell": {"page_first_direct": 1, "layer_first": 2, "page_head": 4}[layout]}
    options = {"hicache_mem_layout": layout, "hicache_io_backend": io_backend}
    with engine(tiny_directory, shared_daemon.url, extra=extra, **options) as harness:
        restored(harness, prompt(1))
        assert harness.stop() == 0


@pytest.mark.timeout(300)
def test_tensor_parallelism_shares_with_a_single_rank(tiny_directory: Path, served: Served) -> None:
    """Both ways, by a finer grid; each alone is exact. Between them sums are rounded otherwise."""
    extra = {"heads_per_cell": 1}
    with engine(
        tiny_directory, served.url, extra=extra, tp_size=2, variables={"SGLANG_CPU_OMP_THREADS_BIND": "0|1"}
    ) as pair:
        restored(pair, prompt(2))
        with engine(tiny_directory, served.url, extra=extra) as single:
            assert single.hello["namespace"] == pair.hello["namespace"]
            assert run(single, prompt(2))["cached_details"]["storage"] == 256
            restored(single, prompt(3))
            single.stop()
        assert run(pair, prompt(3))["cached_details"]["storage"] == 256
        pair.stop()


@pytest.mark.timeout(240)
def test_under_load_and_sglangs_own_faults(tiny_directory: Path, served: Served) -> None:
    """A tenth of all calls fails, all are late, and the daemon is stopped and killed meanwhile: no request notices."""
    variables = {
        "SGLANG_TEST_HICACHE_BACKEND_RANDOM_DELAY": "0.02",
        "SGLANG_TEST_HICACHE_BACKEND_RANDOM_FAILURE": "0.1",
    }
    with engine(tiny_directory, served.url, variables=variables) as harness:
        prompts = [prompt(10 + number, 200) for number in range(6)]
        colds = [run(harness, ids)["token_ids"] for ids in prompts]

        def all_as_before() -> None:
            harness.call("forget", 30)
            numbers = [harness.send("generate", ids=ids, max_new_tokens=8) for ids in prompts]
            for number, cold in zip(numbers, colds, strict=True):
                assert harness.receive(number, 30)["token_ids"] == cold

        all_as_before()
        assert served.process is not None
        served.process.send_signal(signal.SIGSTOP)
        later = threading.Timer(3.0, served.process.send_signal, [signal.SIGCONT])
        later.start()
        all_as_before()
        later.join()
        served.stop(signal.SIGKILL)
        all_as_before()
        served.start(pool="32MiB")
        _until_it_hits(harness, all_as_before)
        assert harness.stop() == 0


def _until_it_hits(harness: EngineHarness, again: Callable[[], None]) -> None:
    for number in range(20):
        ids = prompt(100 + number, 200)
        run(harness, ids)
        harness.flush(1.0)
        harness.call("forget", 30)
        if run(harness, ids)["cached_tokens"]:
            again()
            return
    pytest.fail("no hit since the daemon is back")
