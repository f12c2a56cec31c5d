"""Run as a process by ``test_crash.py``: stores prompts for ever and says which have reached the disk."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import engine

from lmcache_sdk import open_cache

url, first = sys.argv[1], int(sys.argv[2])
cache = open_cache(url, namespace=engine.namespace(), producer=engine.PRODUCER, pool_bytes=256 << 10)
memory = engine.PagedEngine()
connector = memory.connect(cache)
for seed in range(first, first + 100_000):
    tokens = engine.tokens_of(seed, 3 * engine.CHUNK)
    engine.store(cache, memory, connector, tokens)
    if seed % 4 == 0:  # the others are killed at any stage: gathered, sealed, half put
        assert cache.drain(30)
        print(seed, flush=True)
