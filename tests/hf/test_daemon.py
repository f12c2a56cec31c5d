"""The runner over a daemon: either may die, and the other goes on; whatever is loaded gives the same bits."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from lmcache_adapters.hf import Model, Runner
from lmcache_sdk.daemon.client import DaemonCache
from tests.core.served import Served
from tests.hf.tiny import engine, some_ids, split_logits

IDS = some_ids(300)
CACHED = 256


@pytest.fixture
def served() -> Iterator[Served]:
    served = Served()
    served.start()
    yield served
    served.close()


@pytest.fixture
def runner(tiny: Model, served: Served) -> Iterator[Runner]:
    with Runner(tiny, served.url) as runner:
        yield runner


def until(true: Callable[[], bool], seconds: float = 10.0) -> None:
    started, pause = time.monotonic(), threading.Event()
    while not true():
        assert time.monotonic() - started < seconds
        pause.wait(0.005)


def connected(runner: Runner) -> bool:
    assert isinstance(runner.cache, DaemonCache)
    return runner.cache.connected


@pytest.mark.timeout(120)
def test_an_engine_is_killed_and_the_next_one_hits(tiny_directory: Path, tiny: Model, served: Served) -> None:
    with engine(tiny_directory, "--cache", served.url) as first:
        cold = first.generate(IDS, 12)
        assert first.flush()
        first.kill()
    with Runner(tiny, served.url) as runner:
        warm = runner.generate(IDS, max_new_tokens=12, keep_logits=True)
        assert warm.cached_tokens == CACHED
        assert warm.sources == {"pool": CACHED // 64}
        assert warm.token_ids == cold["token_ids"]
        assert np.array_equal(warm.logits, split_logits(runner, IDS, CACHED))


def test_the_daemon_is_killed_while_a_reply_is_generated(served: Served, runner: Runner, plain: Runner) -> None:
    expected = plain.generate(IDS, max_new_tokens=200)
    runner.generate(IDS, max_new_tokens=1)
    assert runner.drain()

    def kill(text: str) -> None:
        pieces.append(text)
        if len(pieces) == 20:
            served.stop(signal.SIGKILL)

    pieces: list[str] = []
    reply = runner.generate(IDS, max_new_tokens=200, stream=kill)
    assert reply.cached_tokens == CACHED
    assert reply.token_ids == expected.token_ids

    begin = time.perf_counter()
    alone = runner.generate(IDS, max_new_tokens=200)
    assert alone.cached_tokens == 0
    assert alone.token_ids == expected.token_ids
    assert alone.ttft_s < time.perf_counter() - begin < 30

    served.start()
    until(lambda: connected(runner))
    back = runner.generate(IDS, max_new_tokens=200, keep_logits=True)
    assert back.cached_tokens == CACHED, "adopted by the daemon's next life"
    assert back.token_ids == expected.token_ids
    assert np.array_equal(back.logits, split_logits(runner, IDS, CACHED))


def test_a_daemon_that_stops_in_order_leaves_its_pool_to_the_next(served: Served, runner: Runner) -> None:
    cold = runner.generate(IDS, max_new_tokens=80)
    assert runner.drain()
    assert served.stop() == 0
    served.start()
    until(lambda: connected(runner))
    warm = runner.generate(IDS, max_new_tokens=80)
    assert (warm.cached_tokens, warm.token_ids) == (CACHED, cold.token_ids)


def test_a_runner_that_is_there_before_the_daemon(tiny: Model, plain: Runner) -> None:
    served = Served()
    try:
        with Runner(tiny, served.url) as runner:
            alone = runner.generate(IDS, max_new_tokens=4)
            assert alone.token_ids == plain.generate(IDS, max_new_tokens=4).token_ids
            served.start()
            until(lambda: connected(runner))
            runner.generate(IDS, max_new_tokens=4)
            assert runner.drain()
            assert runner.generate(IDS, max_new_tokens=4).cached_tokens == CACHED
    finally:
        served.close()


def test_a_daemon_that_requires_a_salt(tiny: Model) -> None:
    served = Served()
    try:
        served.start("--require-salt")
        with Runner(tiny, served.url) as runner:
            for salt, cached in ((None, 0), (None, 0), ("a", 0), ("a", CACHED), ("b", 0)):
                assert runner.generate(IDS, max_new_tokens=1, cache_salt=salt).cached_tokens == cached
                assert runner.drain()
    finally:
        served.close()
