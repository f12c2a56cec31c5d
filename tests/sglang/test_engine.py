"""A whole engine behind SGLang's hierarchical cache, under load and SGLang's own faults."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from lmcache_sdk.testing.harness import EngineHarness
from tests.core.served import Served
from tests.sglang.process import engine
from tests.sglang.scenarios import MOST_ADDED_S, prompt, prompts, run


@pytest.mark.timeout(240)
def test_under_load_and_sglangs_own_faults(tiny_directory: Path, served: Served) -> None:
    """A tenth of all calls fails, all are late, and the daemon is stopped and killed meanwhile: no request notices."""
    variables = {
        "SGLANG_TEST_HICACHE_BACKEND_RANDOM_DELAY": "0.02",
        "SGLANG_TEST_HICACHE_BACKEND_RANDOM_FAILURE": "0.1",
    }
    with engine(tiny_directory, served.url, variables=variables) as harness:
        asked = prompts(10)
        colds = [run(harness, ids)["token_ids"] for ids in asked]

        def all_as_before(*, load: bool = True) -> float:
            """All of them at once; the answer is how long that took."""
            harness.call("forget", 30)
            began = time.monotonic()
            numbers = [harness.send("generate", ids=ids, max_new_tokens=8, load=load) for ids in asked]
            for number, cold in zip(numbers, colds, strict=True):
                assert harness.receive(number, 30)["token_ids"] == cold
            return time.monotonic() - began

        longest_s = max(all_as_before(), all_as_before(load=False)) + MOST_ADDED_S
        assert served.process is not None
        served.process.send_signal(signal.SIGSTOP)
        later = threading.Timer(3.0, served.process.send_signal, [signal.SIGCONT])
        later.start()
        assert all_as_before() < longest_s
        later.join()
        served.stop(signal.SIGKILL)
        assert all_as_before() < longest_s
        served.start(pool="32MiB")
        _until_it_hits(harness, all_as_before)
        assert harness.stop() == 0


def _until_it_hits(harness: EngineHarness, again: Callable[[], float]) -> None:
    for number in range(20):
        ids = prompt(100 + number, 200)
        run(harness, ids)
        harness.flush(1.0)
        harness.call("forget", 30)
        if run(harness, ids)["cached_tokens"]:
            again()
            return
    pytest.fail("no hit since the daemon is back")
