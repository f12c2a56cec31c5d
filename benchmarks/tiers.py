"""What a far tier costs an engine: nothing, where it is not waited for."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from functools import partial

import numpy as np

from benchmarks.harness import Row, at_most, paired, table
from benchmarks.prompts import LONG_PROMPT, PRODUCER, TINY, namespace, store, tokens
from lmcache_backends.memory import MemoryBackend
from lmcache_sdk.api import LookupState
from lmcache_sdk.keys import Chain
from lmcache_sdk.open import LocalCache
from lmcache_sdk.store import Store, Tier
from lmcache_sdk.testing.latency import Latency

FAR_S = 0.5
CHUNK_TOKENS = 256
AT_ONCE = 16  # lookups in one measurement


def _cache(*tiers: Tier) -> LocalCache:
    # A tiny model, so that a long prompt fits the pool: a lookup does not see sizes.
    return LocalCache(Store(tiers, pool_bytes=64 << 20), namespace(CHUNK_TOKENS, *TINY), PRODUCER)


def _look(cache: LocalCache, prompts: Iterator[np.ndarray], state: LookupState) -> None:
    for number in range(AT_ONCE):
        rid = str(number)
        assert cache.lookup(rid, Chain(next(prompts), CHUNK_TOKENS)).state is state
        cache.forget(rid)


def lookups(repeats: int) -> Iterator[Row]:
    """Of prompts whose first half is in the pool, or nothing; the rest has the far tier to be asked for."""
    first = tokens(0, LONG_PROMPT // 2)
    far, alone = _cache(Tier("far", Latency(MemoryBackend(), FAR_S))), _cache()
    for cache in (far, alone):
        store(cache, Chain(first, CHUNK_TOKENS))
        cache.drain(60)
    for what, found in (("half in the pool", first), ("not in the pool", first[:0])):
        prompts = [
            np.concatenate([found, tokens(seed, LONG_PROMPT - len(found))]) for seed in range(1, 1 + 8 * AT_ONCE)
        ]
        with_it, without = itertools.cycle(prompts), itertools.cycle(prompts)
        result = paired(
            partial(_look, far, with_it, LookupState.PENDING),
            partial(_look, alone, without, LookupState.READY if len(found) else LookupState.MISS),
            0,
            repeats,
        )
        name = f"lookup call, 128k tokens, {what}, a tier {FAR_S} s away / no tier"
        yield at_most(name, result, 1.1)
    for cache in (far, alone):
        cache.close(5.0)


def rows() -> Iterator[Row]:
    yield from lookups(repeats=31)


if __name__ == "__main__":
    print(table(list(rows())))
