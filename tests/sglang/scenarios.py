"""What whole engines go through by either way in: restored to the last bit, and a daemon that is lost under load."""

from __future__ import annotations

import signal
import time
from typing import Any

import numpy as np

from lmcache_sdk.keys import Chain
from lmcache_sdk.testing.engines import cache_of, negate
from lmcache_sdk.testing.harness import EngineHarness
from tests.core.served import Served
from tests.daemon.daemon_process import until
from tests.vllm.tiny import KV_HEADS

MOST_ADDED_S = 2.0
PAGE = 64
HIT = 256  # of a prompt's 300 tokens


def prompt(number: int, tokens: int = 300) -> list[int]:
    """Another one for each number."""
    return [int(token) for token in np.random.default_rng([9, number]).integers(10, 1000, tokens)]


def prompts(number: int) -> list[list[int]]:
    """Six short ones, for one moment."""
    return [prompt(number + one, 200) for one in range(6)]


def run(harness: EngineHarness, ids: list[int]) -> dict[str, Any]:
    return harness.generate(ids, 8, logits=True)


def restored(harness: EngineHarness, ids: list[int], source: str) -> None:
    """Cold, from the cache, by SGLang's name for where it comes from, and after others have taken all of the device's
    memory: the same to the last bit.
    """
    cold = run(harness, ids)
    assert cold["cached_tokens"] == 0
    assert harness.flush() and harness.call("forget", 30)["forgotten"]
    warm = run(harness, ids)
    assert warm["cached_details"][source] == warm["cached_tokens"] == HIT
    for number in (1000, 1001):
        run(harness, prompt(number, 1200))
    again = run(harness, ids)
    assert (again["cached_details"]["device"], again["cached_tokens"]) == (0, HIT)
    for reply in (warm, again):
        assert (reply["token_ids"], reply["top"]) == (cold["token_ids"], cold["top"])


def each_rank_loads(harness: EngineHarness, url: str, ids: list[int]) -> None:
    """Two of them. The sign of the stored KV is turned, of the second's heads and then of the first's: the reply is
    another one each time, and what is computed is as before. Wants cells of one head.
    """
    cold = run(harness, ids)
    assert harness.flush()
    replies = [cold["top"]]
    cache = cache_of(harness, url)
    try:
        for heads in (range(KV_HEADS // 2, KV_HEADS), range(KV_HEADS // 2)):
            assert negate(cache, Chain(ids, PAGE), heads) == HIT // PAGE
            assert harness.call("forget", 30)["forgotten"]
            wrong = run(harness, ids)
            assert wrong["cached_tokens"] == HIT
            assert wrong["top"] not in replies
            replies.append(wrong["top"])
        alone = harness.generate(ids, 8, logits=True, load=False)
        assert (alone["cached_tokens"], alone["top"]) == (0, cold["top"])
    finally:
        cache.delete(Chain(ids, PAGE))
        cache.close()
    assert harness.call("forget", 30)["forgotten"]


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
