"""Tensor parallelism in whole engines, by both ways in, and in the layouts of host memory that others do not have: the
matrix has ``page_first``, ``test_server.py`` ``page_first_direct``.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.core.served import Served
from tests.sglang.process import engine
from tests.sglang.scenarios import HIT, each_rank_loads, lost, prompt, prompts, restored, run

FINE = {"heads_per_cell": 1}
BOUND = {"SGLANG_CPU_OMP_THREADS_BIND": "0|1"}
LAYER_FIRST = {"hicache_mem_layout": "layer_first", "hicache_io_backend": "direct"}
PAGE_HEAD = {"hicache_mem_layout": "page_head", "hicache_io_backend": "kernel"}


@pytest.mark.timeout(400)
def test_two_ranks_and_one(tiny_directory: Path, served: Served) -> None:
    """Each is exact, and undisturbed when the daemon is. Two ranks find what two others have left, by either way in, to
    the last bit. By a finer grid one finds what two have stored, and they what it has, from one layout of host memory
    into another; between them sums are rounded otherwise.
    """
    with engine(tiny_directory, served.url, extra=FINE, tp_size=2, variables=BOUND, **LAYER_FIRST) as pair:
        restored(pair, prompt(2), "storage")
        each_rank_loads(pair, served.url, prompt(4))
        with engine(tiny_directory, served.url, extra=FINE, **PAGE_HEAD) as single:
            assert single.hello["namespace"] == pair.hello["namespace"]
            assert run(single, prompt(2))["cached_details"]["storage"] == HIT
            restored(single, prompt(3), "storage")
            assert single.stop() == 0
        assert run(pair, prompt(3))["cached_details"]["storage"] == HIT
        lost(pair, served, prompts(20))
        left = run(pair, prompt(5))
        assert pair.flush() and pair.stop() == 0

    patient = {**FINE, "lookup_timeout_s": 0.5}  # two cores, and three processes that start
    with engine(tiny_directory, served.url, linker=True, extra=patient, tp_size=2, variables=BOUND) as pair:
        found = run(pair, prompt(5))
        assert found["cached_details"]["host"] == HIT
        assert (found["token_ids"], found["top"]) == (left["token_ids"], left["top"])
        restored(pair, prompt(6), "host")
        each_rank_loads(pair, served.url, prompt(7))
        with engine(tiny_directory, served.url, linker=True, extra=patient) as single:
            assert run(single, prompt(6))["cached_details"]["host"] == HIT
            restored(single, prompt(8), "host")
            assert run(pair, prompt(8))["cached_details"]["host"] == HIT
            lost(single, served, prompts(30))
            assert single.stop() == 0
        lost(pair, served, prompts(40))
        assert pair.stop() == 0
