"""SGLang's hierarchical cache over the daemon: pages of its real host memory, and what a miss costs an engine.

Pages go to the daemon's pool and back by the calls that SGLang makes, against a bare copy of as many bytes from one
place in memory to another, and against SGLang's own ``file`` backend with a folder in memory. An engine with SGLang's
hierarchical cache then computes prompts in turns with the backend and without (:mod:`benchmarks.sglang_engine`).
"""

from __future__ import annotations

import copy
import functools
import importlib
import itertools
import json
import os
import shutil
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.harness import Row, at_least, paired
from benchmarks.hf import model_directory
from benchmarks.vllm import against, ask, cost, served, turns, unique
from lmcache_sdk.testing.harness import EngineHarness
from tests.sglang.process import engine

BAR = 0.8
PAGES = 128  # as many as SGLang asks for at once
MISS_TOKENS = 512
NEW_TOKENS = 4
PAIRS = 60
# Of benchmarks.vllm's daemon.
POOL_BYTES = 2 << 30
# 128 KiB a page; the real model's have 1440, those of one with eight billion parameters 8192.
SMALL = {"num_hidden_layers": 4, "num_key_value_heads": 4, "head_dim": 32}
LARGE = {"num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128}
LARGE_PAGES = 32


def model_with(facts: dict[str, int], model: Path, folder: Path) -> Path:
    """A model directory of another shape, whose weights nobody computes with."""
    for file in model.iterdir():
        shutil.copy(file, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").unlink()  # a copy may be read-only
    (folder / "config.json").write_text(json.dumps(config | facts))
    return folder


def batches(model: Path, layout: str, bar: float = 0.0, *, count: int = PAGES, file: bool = False) -> Iterator[Row]:
    """Rows of one layout: a batch to the host memory, and one from it."""
    pools = importlib.import_module("tests.sglang.pools")
    with served() as (url, _), tempfile.TemporaryDirectory(prefix="file-", dir="/dev/shm") as folder:
        rank = pools.Rank(model, url, layout=layout, pages=2 * count + 2)
        theirs = file_backend(rank, folder)
        chosen = list(range(1, count + 1))
        rank.fill(chosen, seed=1)
        nbytes = rank.host.kv_buffer.nbytes // rank.host.page_num * count
        source, target = np.ones(nbytes, np.uint8), np.zeros(nbytes, np.uint8)
        numbers = itertools.count()
        keys = pools.digests(next(numbers), count)
        cache = rank.backend._cache

        def bare() -> None:
            np.copyto(target, source)

        def into() -> None:
            assert all(rank.set(pools.digests(next(numbers), count), chosen, before=[]))

        def back() -> None:
            assert all(rank.get(keys, list(range(count + 1, 2 * count + 1))))

        def found() -> None:
            assert rank.backend.batch_exists(keys) == count

        for _ in range((POOL_BYTES + nbytes) // nbytes):
            into()  # from now on the pool is full: its memory has been used, and each set needs room
        assert all(rank.set(keys, chosen, before=[]))
        found()
        settled = functools.partial(cache.drain, 10)
        of = f"sglang, {count} pages of {nbytes // count >> 10} KiB, {layout}"
        yield at_least(f"{of}: speed of a get / bare copy", paired(back, bare, nbytes, settle=found), bar)
        if file:
            assert theirs.set_generic(keys, chosen)
            result = paired(back, lambda: theirs.get_generic(keys, chosen), nbytes, settle=found)
            yield at_least(f"{of}: speed of a get / SGLang's file backend", result)
        yield at_least(f"{of}: speed of a set / bare copy", paired(into, bare, nbytes, settle=settled), bar)
        if file:

            def into_files() -> None:
                assert theirs.set_generic(pools.digests(next(numbers), count), chosen)

            yield at_least(
                f"{of}: speed of a set / SGLang's file backend", paired(into, into_files, nbytes, settle=settled)
            )
        rank.close()


def file_backend(rank: Any, folder: str) -> Any:
    """SGLang's own ``file`` backend on the same host memory."""
    from sglang.srt.mem_cache.hicache_storage import HiCacheFile

    os.environ["SGLANG_HICACHE_FILE_BACKEND_STORAGE_DIR"] = folder
    backend = HiCacheFile(rank.config)
    backend.register_mem_pool_host(rank.host)
    other = copy.copy(rank)
    other.backend = backend
    return other


def copies(model: Path) -> Iterator[Row]:
    """All layouts with the real model's pages, and pages of smaller and larger models."""
    importlib.import_module("tests.sglang.cpu")  # before SGLang
    yield from batches(model, "page_first_direct", BAR, file=True)
    for layout in ("page_first", "layer_first", "page_head"):
        yield from batches(model, layout)
    with tempfile.TemporaryDirectory() as folder:
        small = model_with(SMALL, model, Path(folder))
        yield from batches(small, "page_first_direct", file=True)
    with tempfile.TemporaryDirectory() as folder:
        large = model_with(LARGE, model, Path(folder))
        yield from batches(large, "page_first_direct", BAR, count=LARGE_PAGES)


def misses(model: Path) -> Iterator[Row]:
    """Prompts that nobody has seen: asked for, computed and stored, against the same engine whose backend is detached,
    which is compared with itself, too.
    """
    with served() as (url, _), start(model, url) as harness:

        def one(*, attached: bool) -> Callable[[], tuple[float, ...]]:
            def run() -> tuple[float, ...]:
                harness.call("storage", 60, attached=attached)
                first, last, hit = ask(harness, unique(MISS_TOKENS), NEW_TOKENS)
                assert hit == 0 and (not attached or harness.flush(60))
                return first, last

            return run

        ours, plain, again = turns([one(attached=True), one(attached=False), one(attached=False)], PAIRS)
    both = [tuple(statistics.mean(two) for two in zip(*turn, strict=True)) for turn in zip(plain, again, strict=True)]
    figures = (f"{MISS_TOKENS} tokens, no hit, stored: TTFT", f"{MISS_TOKENS} + {NEW_TOKENS} tokens, no hit: time")
    for figure, measured, control in zip(figures, against(ours, both), against(plain, again), strict=True):
        yield cost(f"sglang, {figure} / hierarchical cache alone", measured, 1.02)
        yield cost(f"sglang, {figure}: alone / alone (control)", control, 0.0)


def start(model: Path, url: str) -> EngineHarness:
    return engine(
        model,
        url,
        module="benchmarks.sglang_engine",
        memory_tokens=4096,
        enable_hierarchical_cache=True,
        hicache_mem_layout="page_first_direct",
        hicache_io_backend="direct",
        hicache_write_policy="write_through",
        hicache_storage_prefetch_policy="timeout",
        variables={"OMP_NUM_THREADS": str(os.cpu_count() or 1)},
    )


def rows() -> Iterator[Row]:
    model = Path(model_directory())
    print(f"threads of a copy: 1; cores: {os.cpu_count()}", file=sys.stderr)
    yield from copies(model)
    yield from misses(model)
