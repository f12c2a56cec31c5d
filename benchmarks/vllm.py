"""vLLM's CPU build with a real model: what a hit saves, and what being there costs.

The model is the directory in ``LMCACHE_SDK_TEST_MODEL``; without it the small one that ``tools/model.py`` makes.
What is compared works in turns, one at a time, in an order that is drawn anew for every turn. A row has the
Hodges-Lehmann estimate of the ratio and the bound that it is below with 95 % confidence (Wilcoxon's signed ranks); a
row with a bar holds where that bound does not exceed it.

What being there costs is measured within one process (:mod:`benchmarks.vllm_engine`): against the same engine without
its connector, which is compared with itself, too.
"""

from __future__ import annotations

import contextlib
import math
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
ROUNDS = 3  # starts of the engines whose misses are measured
MISSES = 40  # turns after each start, with the daemon and without
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


def engine(model: str, url: str | None, *transfer: str, module: str = "lmcache_adapters.vllm.engine") -> EngineHarness:
    options = {
        "block_size": BLOCK,
        "max_model_len": 4096,
        "max_num_seqs": 4,
        "kv_cache_memory_bytes": 1 << 29,
        "dtype": "bfloat16",
    }
    line = [sys.executable, "-m", module, "--model", model]
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


Run = Callable[[], tuple[float, ...]]
Samples = list[tuple[float, float]]


def turns(runs: Sequence[Run], count: int = PAIRS) -> list[list[tuple[float, ...]]]:
    """For each run, its figures in every turn."""
    for run in runs:
        run()
    found: list[list[tuple[float, ...]]] = [[] for _ in runs]
    for _ in range(count):
        for at in _random.permutation(len(runs)):
            found[at].append(runs[at]())
    return found


def pairs(measured: Run, reference: Run, count: int = PAIRS) -> list[Samples]:
    """For each figure that both give: (measured, reference) of every turn."""
    return against(*turns([measured, reference], count))


def against(measured: list[tuple[float, ...]], reference: list[tuple[float, ...]]) -> list[Samples]:
    """Of two runs of :func:`turns`, for each figure."""
    return [[(a[at], b[at]) for a, b in zip(measured, reference, strict=True)] for at in range(len(measured[0]))]


def cost(name: str, samples: Samples, bar: float) -> Row:
    """Measured / reference."""
    logs = np.log([a / b for a, b in samples])
    count = len(logs)
    middles = np.sort((logs[:, None] + logs)[np.triu_indices(count)] / 2)
    rank = count * (count + 1) / 4 + 1.645 * math.sqrt(count * (count + 1) * (2 * count + 1) / 24)
    ratio, bound = math.exp(np.median(middles)), math.exp(middles[min(len(middles) - 1, math.ceil(rank))])
    facts: dict[str, Any] = {
        "bound_95": bound,
        "measured_s": [a for a, _ in samples],
        "reference_s": [b for _, b in samples],
        "median_measured_s": statistics.median(a for a, _ in samples),
        "median_reference_s": statistics.median(b for _, b in samples),
    }
    print(
        f"{name}: {ratio:.3f}, below {bound:.3f} with 95 % confidence ({facts['median_measured_s']:.4f} s against "
        f"{facts['median_reference_s']:.4f} s, {count} pairs)",
        file=sys.stderr,
    )
    return Row(name, ratio, bar, not bar or bound <= bar, facts)


def misses(model: str) -> Iterator[Row]:
    """Prompts that nobody has seen: looked up, computed and stored, against the same engine without a connector."""
    states = ("no hit, stored", "daemon dead")
    connectors = ("ours", "none", "none", "idle")
    found: dict[str, list[list[tuple[float, ...]]]] = {state: [[] for _ in connectors] for state in states}
    processes: list[Samples] = [[], [], []]
    module = "benchmarks.vllm_engine"
    for _ in range(ROUNDS):
        with served() as (url, daemon), engine(model, url, module=module) as harness:
            for state in states:
                if state == "daemon dead":
                    daemon.send_signal(signal.SIGKILL)
                    daemon.wait()
                runs = [_miss(harness, connector, alive=daemon.poll() is None) for connector in connectors]
                for samples, more in zip(found[state], turns(runs, MISSES), strict=True):
                    samples += more
            with engine(model, None, module=module) as plain:
                more_pairs = pairs(_miss(harness, "none"), _miss(plain, "none"), PAIRS // ROUNDS)
                for pairs_so_far, more in zip(processes, more_pairs, strict=True):
                    pairs_so_far += more
    figures = (
        (f"{MISS_TOKENS} tokens, {{}}: TTFT", 1.02),
        (f"{MISS_TOKENS} + {NEW_TOKENS} tokens, {{}}: time until stored", 1.02),
        (f"{MISS_TOKENS} + {NEW_TOKENS} tokens, {{}}: CPU time", 0.0),
    )
    for state, (ours, plain, again, idle) in found.items():
        both = [
            tuple(statistics.mean(two) for two in zip(*turn, strict=True)) for turn in zip(plain, again, strict=True)
        ]
        measured, nothing, control = against(ours, both), against(idle, both), against(plain, again)
        for at, (figure, bar) in enumerate(figures):
            name = f"vllm, {figure.format(state)}"
            yield cost(f"{name}: with the connector / without", measured[at], bar)
            yield cost(f"{name}: with one that does nothing / without", nothing[at], 0.0)
            yield cost(f"{name}: without / without (control)", control[at], 0.0)
    for (figure, _), samples in zip(figures, processes, strict=True):
        name = f"vllm, {figure.format('no connector')}"
        yield cost(f"{name}: taken out / never there (other processes)", samples, 0.0)


def _miss(harness: EngineHarness, connector: str, *, alive: bool = False) -> Run:
    """Time to the first token, to the end of the last copy, and CPU time of the engine."""

    def run() -> tuple[float, ...]:
        harness.call("connect", 30, connector=connector)
        ids = unique(MISS_TOKENS)
        before, begin = harness.call("cpu", 30)["cpu_s"], time.perf_counter()
        answer = harness.generate(ids, NEW_TOKENS, timeout_s=300)
        if connector == "ours":
            assert harness.flush(60) or not alive
        taken, after = time.perf_counter() - begin, harness.call("cpu", 30)["cpu_s"]
        assert answer["cached_tokens"] == 0
        return answer["ttft_s"], taken, after - before

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
