"""Keys, lookups, and the way between pool and LMDB."""

from __future__ import annotations

import itertools
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import lmdb
import numpy as np

from benchmarks.harness import Paired, Row, at_least, at_most, paired
from benchmarks.prompts import LONG_PROMPT, MODEL, PRODUCER, TINY, bare_hash_loop, namespace, store, tokens
from lmcache_sdk.keys import Chain
from lmcache_sdk.open import LocalCache, open_cache
from lmcache_sdk.pool import extent_bytes
from lmcache_sdk.spec import Namespace


def hashing(repeats: int) -> Iterator[Row]:
    prompt = tokens(0, LONG_PROMPT)
    data = prompt.tobytes()
    for chunk_tokens in (64, 256):
        width = 4 * chunk_tokens
        assert Chain(prompt, chunk_tokens).digests()[-1] == bare_hash_loop(data, width)
        result = paired(
            lambda c=chunk_tokens: Chain(prompt, c).digests(),
            lambda w=width: bare_hash_loop(data, w),
            len(data),
            repeats,
        )
        yield at_most(f"hash 128k tokens, chunks of {chunk_tokens}: time / bare hashlib loop", result, 1.3)


def _look(cache: LocalCache, chunk_tokens: int, numbers: Iterator[int], prompt: np.ndarray, expected: int) -> None:
    """One lookup and its end."""
    rid = str(next(numbers))
    found = cache.lookup(rid, Chain(prompt, chunk_tokens))
    assert found.chunks == expected
    cache.forget(rid)


def lookups(repeats: int) -> Iterator[Row]:
    numbers = itertools.count()
    for chunk_tokens in (64, 256):
        # A tiny model, so that a long prompt fits the pool: a lookup does not see sizes.
        cache = open_cache("noop://", namespace=namespace(chunk_tokens, *TINY), producer=PRODUCER, pool_bytes=64 << 20)
        cached, other = tokens(0, LONG_PROMPT), tokens(1, LONG_PROMPT)
        store(cache, Chain(cached, chunk_tokens))

        chunks = LONG_PROMPT // chunk_tokens
        look = partial(_look, cache, chunk_tokens, numbers)
        hit, miss = partial(look, cached, chunks), partial(look, other, 0)
        hashing = partial(bare_hash_loop, cached.tobytes(), 4 * chunk_tokens)
        nbytes = 4 * LONG_PROMPT
        result = paired(miss, hit, nbytes, repeats)
        yield at_most(f"lookup, miss on the first of {chunks} chunks: time / full hit", result, 1 / 20)
        result = paired(hit, hashing, nbytes, repeats)
        yield at_most(f"lookup, full hit of {chunks} chunks: time / bare hashlib loop", result, 2.0)
        cache.close()


def lmdb_rows(repeats: int) -> Iterator[Row]:
    for chunk_tokens, chunks in ((64, 12), (256, 3)):
        space = namespace(chunk_tokens, *MODEL)
        nbytes = space.spec.chunk_bytes * chunks
        with tempfile.TemporaryDirectory(prefix="lmcache-sdk-bench-") as folder:
            source = np.random.default_rng(0).integers(0, 2**62, nbytes // 8).view(np.uint8)
            target = np.zeros_like(source)
            yield at_least(
                f"LMDB -> pool, checked, {chunk_tokens}-token chunks / plain copy",
                _load(Path(folder), space, chunks, source, target, repeats),
                0.5,
            )
            yield at_least(
                f"pool -> LMDB, checksum until visible, {chunk_tokens}-token chunks / LMDB's own put",
                _store(Path(folder), space, chunks, source, repeats),
                0.7,
            )


def _load(folder: Path, space: Namespace, chunks: int, source: np.ndarray, target: np.ndarray, repeats: int) -> Paired:
    """Two prompts in turn through a pool that holds one: each load evicts the other prompt. Page cache warm."""
    nbytes = source.nbytes
    url = f"lmdb://{folder}/load?size={4 * nbytes}"
    pool_bytes = chunks * extent_bytes(space.spec.chunk_bytes)  # one prompt, and not a chunk more
    count = chunks * space.spec.chunk_tokens
    chains = [tokens(seed, count) for seed in range(2)]
    with_pool = {"namespace": space, "producer": PRODUCER, "pool_bytes": pool_bytes}
    cache = open_cache(url, **with_pool)  # type: ignore[arg-type]
    for prompt in chains:
        store(cache, Chain(prompt, space.spec.chunk_tokens))
        assert cache.drain(120)
    numbers = itertools.count()

    def load() -> None:
        number = next(numbers)
        rid = str(number)
        cache.lookup(rid, Chain(chains[number % 2], space.spec.chunk_tokens))
        found = cache.wait(rid, 60)
        assert found.chunks == chunks and found.sources == {"lmdb": chunks}, found
        cache.forget(rid)

    try:
        load()
        load()  # every page of the pool has been touched
        return paired(load, lambda: np.copyto(target, source), nbytes, repeats)
    finally:
        cache.close()


def _store(folder: Path, space: Namespace, chunks: int, source: np.ndarray, repeats: int) -> Paired:
    """New prompts, each evicting old ones from pool and disk, against puts that overwrite in a bare environment."""
    nbytes = source.nbytes
    url = f"lmdb://{folder}/store?size={2 * nbytes + (nbytes >> 1)}"
    cache = open_cache(url, namespace=space, producer=PRODUCER, pool_bytes=nbytes + (nbytes >> 4))
    width = space.spec.chunk_tokens
    numbers = itertools.count(100)
    bare = lmdb.open(
        str(folder / "bare"), map_size=4 * nbytes, sync=False, metasync=False, readahead=False, meminit=False
    )
    values = [memoryview(source)[i * nbytes // chunks : (i + 1) * nbytes // chunks] for i in range(chunks)]

    def write() -> None:
        store(cache, Chain(tokens(next(numbers), chunks * width), width))
        assert cache.drain(120)

    def put() -> None:
        for number, value in enumerate(values):
            with bare.begin(write=True) as txn:
                txn.put(b"%032d" % number, value)

    try:
        for _ in range(3):  # both stores have reached their size, every page of the pool has been touched
            write()
            put()
        result = paired(write, put, nbytes, repeats)
        dropped = {k: v for k, v in cache.stats().counters.items() if "dropped" in k}
        assert not dropped, dropped
        return result
    finally:
        cache.close()
        bare.close()


def importing(repeats: int) -> Iterator[Row]:
    code = "import sys, lmcache_sdk; assert 'torch' not in sys.modules"
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        subprocess.run([sys.executable, "-c", code], check=True)
        seconds.append(time.perf_counter() - start)
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", "pass"], check=True)
    bare = time.perf_counter() - start
    median = sorted(seconds)[len(seconds) // 2]
    raw = {"seconds": seconds, "bare_interpreter_s": bare}
    yield Row("import lmcache_sdk, seconds (interpreter included)", median, 0.5, median < 0.5, raw)


def rows(repeats: int = 9) -> Iterator[Row]:
    yield from importing(5)
    yield from hashing(4 * repeats)
    yield from lookups(20 * repeats)
    yield from lmdb_rows(3 * repeats)
