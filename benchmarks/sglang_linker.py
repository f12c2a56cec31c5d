"""SGLang's CPU engine with a linker and a real model: a hit from the daemon against SGLang's own.

``torch_native`` computes attention for the whole prompt behind a hit of either kind, so both take longer here than they
would elsewhere, and the difference between them is ours.
"""

from __future__ import annotations

import os
import statistics
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from benchmarks.harness import Row
from benchmarks.hf import model_directory
from benchmarks.vllm import ask, cost, pairs, served, unique
from lmcache_sdk.testing.harness import EngineHarness
from tests.sglang.process import engine

PROMPT_TOKENS = 2048
PAGE = 64
PAIRS = 12
MISS_TOKENS = 512
NEW_TOKENS = 4


def start(model: str, url: str | None) -> EngineHarness:
    return engine(
        Path(model),
        url,
        linker=url is not None,
        memory_tokens=3 * PROMPT_TOKENS,
        context_length=4096,
        chunked_prefill_size=4096,
        variables={"OMP_NUM_THREADS": str(os.cpu_count() or 1)},
    )


def hits(model: str) -> Iterator[Row]:
    """The same prompt from the daemon and from SGLang's own prefix cache, and computed."""
    with served() as (url, _), start(model, url) as harness:
        ids = unique(PROMPT_TOKENS)
        known = (PROMPT_TOKENS - 1) // PAGE * PAGE
        ask(harness, ids)

        def loaded() -> tuple[float, ...]:
            assert harness.flush(60) and harness.call("forget", 60)["forgotten"]
            first, _, hit = ask(harness, ids)
            assert hit == known, f"{hit} of {known} tokens were loaded"
            return (first,)

        def own() -> tuple[float, ...]:
            first, _, hit = ask(harness, ids)  # what has just been loaded
            assert hit == known
            return (first,)

        (samples,) = pairs(loaded, own, PAIRS)
        yield cost(
            f"sglang linker, TTFT of {PROMPT_TOKENS} tokens: hit from the daemon / own prefix hit", samples, 1.25
        )
        cold = [ask(harness, unique(PROMPT_TOKENS))[0] for _ in range(3)]
        ratio = statistics.median(cold) / statistics.median(a for a, _ in samples)
        print(f"computed: {cold}", file=sys.stderr)
        name = f"sglang linker, TTFT of {PROMPT_TOKENS} tokens: computed / hit from the daemon"
        yield Row(name, ratio, 0.0, True, {"computed_s": cold})


def misses(model: str) -> Iterator[Row]:
    """Prompts that nobody has seen: looked up, computed and stored, against an SGLang without a linker."""
    with served() as (url, _), start(model, None) as plain, start(model, url) as linked:

        def one(harness: EngineHarness) -> Callable[[], tuple[float, ...]]:
            def run() -> tuple[float, ...]:
                first, last, hit = ask(harness, unique(MISS_TOKENS), NEW_TOKENS)
                assert hit == 0
                if harness is linked:
                    linked.flush(60)
                return first, last

            return run

        first, last = pairs(one(linked), one(plain))
        yield cost(f"sglang linker, {MISS_TOKENS} tokens, no hit, stored: TTFT / plain SGLang", first, 1.02)
        what = f"sglang linker, {MISS_TOKENS} + {NEW_TOKENS} tokens, no hit, stored: time / plain SGLang"
        yield cost(what, last, 1.02)


def rows() -> Iterator[Row]:
    model = model_directory()
    yield from hits(model)
    yield from misses(model)
