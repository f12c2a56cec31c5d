"""Whole engines with a linker, in ways that the matrix does not have: tensor parallelism, and trouble under load."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.core.served import Served
from tests.sglang.process import engine
from tests.sglang.scenarios import HIT, lost, prompt, prompts, restored, run

PATIENT = {"lookup_timeout_s": 0.5}  # two cores, and three processes that start


@pytest.mark.timeout(300)
def test_one_rank_and_two(tiny_directory: Path, served: Served) -> None:
    """Each exact, and undisturbed when the daemon is; by a finer grid each finds what the other stored, whose sums are
    rounded otherwise.
    """
    extra = {"heads_per_cell": 1, **PATIENT}
    variables = {"SGLANG_CPU_OMP_THREADS_BIND": "0|1"}
    with engine(tiny_directory, served.url, linker=True, extra=extra, variables=variables, tp_size=2) as pair:
        restored(pair, prompt(2), "host")
        with engine(tiny_directory, served.url, linker=True, extra=extra) as single:
            assert single.hello["namespace"] == pair.hello["namespace"]
            assert run(single, prompt(2))["cached_details"]["host"] == HIT
            restored(single, prompt(3), "host")
            assert run(pair, prompt(3))["cached_details"]["host"] == HIT
            lost(single, served, prompts(10))
            assert single.stop() == 0
        lost(pair, served, prompts(20))
        assert pair.stop() == 0
