"""Hugging Face Transformers with a real model: what a hit saves, and what a miss costs.

The model is the directory in ``LMCACHE_SDK_TEST_MODEL``; without it the small one that ``tools/model.py`` makes.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.harness import Row, at_most, paired
from lmcache_adapters.hf.demo import measure
from lmcache_sdk.testing.harness import EngineHarness
from tests.hf.slow_tier import measure as measure_slow_tier
from tests.hf.slow_tier import model_of, stored

DOCUMENT_TOKENS = 4096
MISS_TOKENS = 512
NEW_TOKENS = 8
MODEL_TOOL = Path("tools/model.py")


def model_directory() -> str:
    named = os.environ.get("LMCACHE_SDK_TEST_MODEL")
    if named:
        return named
    made = subprocess.run([sys.executable, str(MODEL_TOOL)], check=True, stdout=subprocess.PIPE, text=True)
    return made.stdout.splitlines()[-1]


def speedup(model: str) -> Iterator[Row]:
    """The demo: an engine without a cache against a new process on a filled store, same document and question."""
    with tempfile.TemporaryDirectory(prefix="lmcache-sdk-bench-") as folder:
        report = measure(
            model,
            f"lmdb://{folder}/kv?size=8GiB",
            tokens=DOCUMENT_TOKENS,
            new_tokens=NEW_TOKENS,
            daemon=False,
            progress=lambda text: print(text, file=sys.stderr),
        )
    ratio = report.rows[0].speedup
    facts: dict[str, Any] = report.summary() | {"speedups": [row.speedup for row in report.rows]}
    yield Row(
        f"hf, TTFT of {report.rows[0].prompt_tokens} tokens: without a cache / from the store, new process",
        ratio,
        8.0,
        ratio >= 8.0 and report.passed,
        facts,
    )


def overhead(model: str, repeats: int = 25) -> Iterator[Row]:
    """Prompts that nobody has seen: an engine that looks them up and stores them, against one without a cache.

    Two processes, one working at a time: what the one writes to its store has ended before the other is asked.
    """
    command = [sys.executable, "-m", "lmcache_adapters.hf.engine", "--model", model]
    generator = np.random.default_rng()
    with (
        tempfile.TemporaryDirectory(prefix="lmcache-sdk-bench-") as folder,
        EngineHarness(command) as plain,
        EngineHarness([*command, "--cache", f"lmdb://{folder}/kv?size=8GiB"]) as cached,
    ):
        first_tokens: dict[EngineHarness, list[float]] = {plain: [], cached: []}

        def ask(engine: EngineHarness) -> None:
            ids = generator.integers(1000, 40_000, MISS_TOKENS).tolist()
            reply = engine.generate(ids, NEW_TOKENS, timeout_s=300)
            assert reply["cached_tokens"] == 0
            first_tokens[engine].append(reply["ttft_s"])

        result = paired(lambda: ask(cached), lambda: ask(plain), 0, repeats, lambda: cached.flush(60))
        cached.stop()
        plain.stop()
    costs = sorted(s / r for s, r in zip(result.seconds, result.reference_seconds, strict=True))
    first = statistics.median(c / p for c, p in zip(first_tokens[cached][1:], first_tokens[plain][1:], strict=True))
    quarter = len(costs) // 4
    spread = {"quartiles": [costs[quarter], costs[-1 - quarter]], "ttft_ratio": first}
    yield at_most(f"hf, {MISS_TOKENS} tokens, no hit, stored: time / without a cache", result, 0.0, **spread)


def slow_tier(attempts: int = 5) -> Iterator[Row]:
    """A tier of 20 MB/s, slower than computing and faster: what waiting for it costs at most, or saves."""
    for what, kv_heads in (("slower", 8), ("faster", 1)):
        with tempfile.TemporaryDirectory(prefix="lmcache-sdk-bench-") as folder:
            model = model_of(Path(folder) / "model", kv_heads)
            records = stored(model)
            measured = [measure_slow_tier(model, records) for _ in range(attempts)]
        for tier, at in (("of unknown speed", 0), ("of known speed", 1)):
            ratios = [ratios[at] for ratios in measured]
            ratio = statistics.median(ratios)
            name = f"hf, TTFT with a tier {what} than computing, {tier} / recompute"
            yield Row(name, ratio, 1.1, ratio <= 1.1, {"ratios": ratios, "loaded_tokens": [m[2] for m in measured]})


def rows() -> Iterator[Row]:
    model = model_directory()
    yield from speedup(model)
    yield from overhead(model)
    yield from slow_tier()
