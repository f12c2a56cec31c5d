"""vLLM's CPU build with a real model: what a hit saves, and what being there costs.

The model is the directory in ``LMCACHE_SDK_TEST_MODEL``; without it the small one that ``tools/model.py`` makes.
Engines are compared in turns of requests, one of them working at a time; each row has the bound that its median is
below with 95 % confidence. What being there costs is measured against two vLLMs without a connector, which are compared
with each other too: that control is what the machine and the order of things do.
"""

from __future__ import annotations

import contextlib
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.harness import Row
from benchmarks.hf import model_directory
from lmcache_sdk.daemon.serve import pool_directory
from lmcache_sdk.pool.shared import SharedPool
from lmcache_sdk.testing.harness import EngineHarness

PROMPT_TOKENS = 2048
MISS_TOKENS = 512
NEW_TOKENS = 16
PAIRS = 24
ROUNDS = 3  # starts of the engines: two processes of one program differ by some per cent, for as long as they run
BLOCK = 64
POOL = "2GiB"

_random = np.random.default_rng()


@contextlib.contextmanager
def served() -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """A daemon with a pool and no store."""
    with tempfile.TemporaryDirectory(prefix="kv-") as folder:
        socket = Path(folder) / "s"
        line = [sys.executable, "-m", "lmcache_sdk.cli", "serve", "--socket", str(socket)]
        line += ["--pool", POOL, "--no-keep-pool"]
        daemon = subprocess.Popen(line, stderr=subprocess.DEVNULL)
        try:
            while not socket.exists():
                assert daemon.poll() is None, "the daemon did not start"
                time.sleep(0.05)
            yield f"unix://{socket}", daemon
        finally:
            daemon.kill()  # nothing of it is to remain
            daemon.wait()
            SharedPool.remove(pool_directory(socket))


def engine(model: str, url: str | None, *transfer: str) -> EngineHarness:
    options = {
        "block_size": BLOCK,
        "max_model_len": 4096,
        "max_num_seqs": 4,
        "kv_cache_memory_bytes": 1 << 29,
        "dtype": "bfloat16",
    }
    line = [sys.executable, "-m", "lmcache_adapters.vllm.engine", "--model", model]
    line += [part for name, value in options.items() for part in ("--option", f"{name}={value}")]
    line += [part for pair in transfer for part in ("--transfer", pair)]
    line += ["--cache", url] if url else []
    return EngineHarness(line, env=os.environ | {"VLLM_LOGGING_LEVEL": "ERROR"}, start_timeout_s=300)


def unique(tokens: int) -> list[int]:
    return [int(token) for token in _random.integers(1000, 40_000, tokens)]


def ask(harness: EngineHarness, ids: list[int], new_tokens: int = 1) -> tuple[float, float, int]:
    """Time to the first token, to the last, and cached tokens."""
    begin = time.perf_counter()
    answer = harness.generate(ids, new_tokens, timeout_s=300)
    return answer["ttft_s"], time.perf_counter() - begin, answer["cached_tokens"]


def cpu_s(harness: EngineHarness) -> float:
    """CPU time of an engine in one process, since its start."""
    fields = Path(f"/proc/{harness.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


Run = Callable[[], tuple[float, ...]]
Samples = list[tuple[float, float]]


def turns(runs: Sequence[Run], count: int = PAIRS) -> list[list[tuple[float, ...]]]:
    """For each run, its figures in every turn. Which of the runs goes first alternates."""
    for run in runs:
        run()
    found: list[list[tuple[float, ...]]] = [[] for _ in runs]
    for turn in range(count):
        for at in range(len(runs)) if turn % 2 else reversed(range(len(runs))):
            found[at].append(runs[at]())
    return found


def pairs(measured: Run, reference: Run, count: int = PAIRS) -> list[Samples]:
    """For each figure that both give: (measured, reference) of every turn."""
    return against(*turns([measured, reference], count))


def against(measured: list[tuple[float, ...]], reference: list[tuple[float, ...]]) -> list[Samples]:
    """Of two runs of :func:`turns`, for each figure."""
    return [[(a[at], b[at]) for a, b in zip(measured, reference, strict=True)] for at in range(len(measured[0]))]


def cost(name: str, samples: Samples, bar: float) -> Row:
    """Median of measured / reference; holds where it does not exceed the bar."""
    ratios = sorted(a / b for a, b in samples)
    median = statistics.median(ratios)
    bound = ratios[min(len(ratios) - 1, _bound_index(len(ratios)))]
    facts: dict[str, Any] = {
        "bound_95": bound,
        "measured_s": [a for a, _ in samples],
        "reference_s": [b for _, b in samples],
        "median_measured_s": statistics.median(a for a, _ in samples),
        "median_reference_s": statistics.median(b for _, b in samples),
    }
    print(
        f"{name}: {median:.3f}, below {bound:.3f} with 95 % confidence ({facts['median_measured_s']:.4f} s against "
        f"{facts['median_reference_s']:.4f} s)",
        file=sys.stderr,
    )
    return Row(name, median, bar, not bar or median <= bar, facts)


def _bound_index(count: int) -> int:
    """Of the order statistic that the median is below with 95 % confidence (binomial, one-sided)."""
    chance, at = 0.0, 0
    term = 0.5**count
    while chance + term < 0.95:
        chance += term
        at += 1
        term = term * (count - at + 1) / at
    return at


def misses(model: str) -> Iterator[Row]:
    """Prompts that nobody has seen: looked up, computed and stored, against two vLLMs without a connector."""
    states = ("no hit, stored", "daemon dead")
    found: dict[str, list[list[tuple[float, ...]]]] = {state: [[], [], []] for state in states}
    for _ in range(ROUNDS):
        with (
            served() as (url, daemon),
            engine(model, url) as cached,
            engine(model, None) as plain,
            engine(model, None) as other,
        ):
            runs = [_miss(harness) for harness in (plain, cached, other)]
            for state in states:
                if state == "daemon dead":
                    daemon.send_signal(signal.SIGKILL)
                    daemon.wait()
                for samples, more in zip(found[state], turns(runs, PAIRS // ROUNDS), strict=True):
                    samples += more
    for state, (plains, ours, others) in found.items():
        both = [
            tuple(statistics.mean(pair) for pair in zip(*turn, strict=True))
            for turn in zip(plains, others, strict=True)
        ]
        figures = (
            f"{MISS_TOKENS} tokens, {state}: TTFT",
            f"{MISS_TOKENS} + {NEW_TOKENS} tokens, {state}: time",
            f"{MISS_TOKENS} + {NEW_TOKENS} tokens, {state}: CPU time",
        )
        for figure, samples, controls in zip(figures, against(ours, both), against(plains, others), strict=True):
            yield cost(f"vllm, {figure} / plain vLLM", samples, 1.02)
            yield cost(f"vllm, {figure}, control: plain vLLM / plain vLLM", controls, 0.0)


def _miss(harness: EngineHarness) -> Run:
    def run() -> tuple[float, ...]:
        before = cpu_s(harness)
        first, last, hit = ask(harness, unique(MISS_TOKENS), NEW_TOKENS)
        assert hit == 0
        harness.flush(60)
        return first, last, cpu_s(harness) - before

    return run


def hits(model: str) -> Iterator[Row]:
    """The same prompt from the daemon, against vLLM's own prefix cache, and against computing it."""
    with served() as (url, _), engine(model, url) as harness:
        ids = unique(PROMPT_TOKENS)
        known = (PROMPT_TOKENS - 1) // BLOCK * BLOCK
        ask(harness, ids)

        def loaded() -> tuple[float, ...]:
            assert harness.flush(60) and harness.call("forget", 60)["forgotten"]
            first, _, hit = ask(harness, ids)
            assert hit == known
            return (first,)

        def own() -> tuple[float, ...]:
            first, _, hit = ask(harness, ids)  # what has just been loaded
            assert hit == known
            return (first,)

        (samples,) = pairs(loaded, own)
        yield cost(f"vllm, TTFT of {PROMPT_TOKENS} tokens: hit from the daemon / own prefix hit", samples, 1.15)
        cold = [ask(harness, unique(PROMPT_TOKENS))[0] for _ in range(5)]
        ratio = statistics.median(cold) / statistics.median(a for a, _ in samples)
        name = f"vllm, TTFT of {PROMPT_TOKENS} tokens: computed / hit from the daemon"
        yield Row(name, ratio, 10.0, ratio >= 10.0, {"computed_s": cold})


def against_example_connector(model: str) -> Iterator[Row]:
    """vLLM's own ExampleConnector (files in shared memory) in the same run: what a hit and a miss take with either."""
    with tempfile.TemporaryDirectory(prefix="example-", dir="/dev/shm") as folder, served() as (url, _):
        example = (
            "kv_connector=ExampleConnector",
            "kv_connector_module_path=null",
            f'kv_connector_extra_config={{"shared_storage_path": "{folder}"}}',
        )
        with engine(model, url) as ours, engine(model, None, *example) as theirs:

            def hit(harness: EngineHarness) -> Run:
                ids = unique(PROMPT_TOKENS)
                ask(harness, ids)
                if harness is ours:
                    ours.flush(60)

                def run() -> tuple[float, ...]:
                    assert harness.call("forget", 60)["forgotten"]
                    first, _, found = ask(harness, ids)
                    assert found == (PROMPT_TOKENS - 1) // BLOCK * BLOCK
                    return (first,)

                return run

            def miss(harness: EngineHarness) -> Run:
                return lambda: ask(harness, unique(MISS_TOKENS), NEW_TOKENS)[:2]

            (samples,) = pairs(hit(ours), hit(theirs))
            yield cost(f"vllm, TTFT of {PROMPT_TOKENS} tokens: hit / ExampleConnector's hit", samples, 0.0)
            first, last = pairs(miss(ours), miss(theirs), 8)
            yield cost(f"vllm, {MISS_TOKENS} tokens, stored: TTFT / ExampleConnector", first, 0.0)
            yield cost(f"vllm, {MISS_TOKENS} + {NEW_TOKENS} tokens, stored: time / ExampleConnector", last, 0.0)


def rows() -> Iterator[Row]:
    model = model_directory()
    yield from hits(model)
    yield from misses(model)
    yield from against_example_connector(model)
