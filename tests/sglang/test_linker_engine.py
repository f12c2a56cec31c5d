"""Whole engines with a linker, in ways that the matrix does not have: tensor parallelism, and trouble under load."""

from __future__ import annotations

import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lmcache_sdk.testing.harness import EngineHarness
from tests.core.served import Served
from tests.daemon.daemon_process import until
from tests.sglang.process import engine

PATIENT = {"lookup_timeout_s": 0.5}  # two cores, and three processes that start
MOST_ADDED_S = 2.0


def prompt(number: int, tokens: int = 300) -> list[int]:
    return [int(token) for token in np.random.default_rng([11, number]).integers(10, 1000, tokens)]


def run(harness: EngineHarness, ids: list[int]) -> dict[str, Any]:
    return harness.generate(ids, 8, logits=True)


def restored(harness: EngineHarness, ids: list[int]) -> None:
    """Cold, and then from the cache: the same to the last bit."""
    cold = run(harness, ids)
    assert cold["cached_tokens"] == 0
    assert harness.flush() and harness.call("forget", 30)["forgotten"]
    warm = run(harness, ids)
    assert warm["cached_details"]["host"] == warm["cached_tokens"] == 256  # SGLang's name for it
    assert (warm["token_ids"], warm["top"]) == (cold["token_ids"], cold["top"])


@pytest.mark.timeout(300)
def test_one_rank_and_two(tiny_directory: Path, served: Served) -> None:
    """Each exact, and undisturbed when the daemon is; by a finer grid each finds what the other stored, whose sums are
    rounded otherwise.
    """
    extra = {"heads_per_cell": 1, **PATIENT}
    variables = {"SGLANG_CPU_OMP_THREADS_BIND": "0|1"}
    with engine(tiny_directory, served.url, linker=True, extra=extra, variables=variables, tp_size=2) as pair:
        restored(pair, prompt(2))
        with engine(tiny_directory, served.url, linker=True, extra=extra) as single:
            assert single.hello["namespace"] == pair.hello["namespace"]
            assert run(single, prompt(2))["cached_details"]["host"] == 256
            restored(single, prompt(3))
            assert run(pair, prompt(3))["cached_details"]["host"] == 256
            lost(single, served, [prompt(10 + number, 200) for number in range(6)])
            assert single.stop() == 0
        lost(pair, served, [prompt(20 + number, 200) for number in range(6)])
        assert pair.stop() == 0


def lost(harness: EngineHarness, served: Served, prompts: list[list[int]]) -> None:
    """The daemon hangs, is killed and comes back while requests run: each is answered, none is aborted, none is late,
    and when it is back there are hits again.
    """
    colds = [run(harness, ids)["token_ids"] for ids in prompts]
    assert harness.flush()
    assert served.process is not None

    def ask() -> list[int]:
        return [harness.send("generate", ids=ids, max_new_tokens=8) for ids in prompts]

    def answers(numbers: list[int]) -> list[dict[str, Any]]:
        replies = [harness.receive(number, 30) for number in numbers]
        assert [reply["token_ids"] for reply in replies] == colds
        return replies

    def again() -> tuple[float, list[dict[str, Any]]]:
        assert harness.call("forget", 30)["forgotten"]
        began = time.monotonic()
        replies = answers(ask())
        return time.monotonic() - began, replies

    seconds, replies = again()
    assert all(reply["cached_tokens"] for reply in replies)
    assert harness.call("forget", 30)["forgotten"]
    computed_s, _ = again()
    longest_s = max(seconds, computed_s) + MOST_ADDED_S

    for number in (signal.SIGSTOP, signal.SIGKILL):
        assert harness.call("forget", 30)["forgotten"]
        numbers = ask()
        served.process.send_signal(number)  # while they are looked up, loaded and stored
        began = time.monotonic()
        answers(numbers)
        assert time.monotonic() - began < longest_s
        taken, _ = again()
        assert taken < longest_s
        if number == signal.SIGSTOP:
            served.process.send_signal(signal.SIGCONT)
            until(lambda: any(reply["cached_tokens"] for reply in again()[1]), 30.0, "a hit")
    served.process.wait(20)
    served.start(pool="32MiB")

    def hits() -> bool:
        again()
        harness.flush(1.0)
        return all(reply["cached_tokens"] for reply in again()[1])

    until(hits, 30.0, "hits")
