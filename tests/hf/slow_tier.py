"""Prompts whose KV is in a tier of 20 MB/s, slower than computing or faster, and what a request waits for it."""

from __future__ import annotations

from pathlib import Path

from lmcache_adapters.hf import Model, Result, Runner, load_model
from lmcache_backends.memory import MemoryBackend
from lmcache_sdk.keys import Chain
from lmcache_sdk.open import LocalCache
from lmcache_sdk.store import Store, Tier
from lmcache_sdk.testing.throttled import Throttled
from tests.hf.tiny import make_model, some_ids

RATE = 20e6  # bytes a second
TOKENS = 1100
CACHED = (TOKENS - 1) // 64 * 64
UNRELATED, FIRST, SECOND = 99, 0, 1  # prompts


def model_of(folder: Path, kv_heads: int) -> Model:
    """About a second of computing for a prompt, whose KV has 16 KiB a token and head of KV."""
    return load_model(
        make_model(
            folder,
            hidden_size=512,
            intermediate_size=1024,
            num_hidden_layers=4 if kv_heads == 1 else 8,
            num_attention_heads=8,
            num_key_value_heads=kv_heads,
        )
    )


def ask(runner: Runner, seed: int) -> Result:
    return runner.generate(some_ids(TOKENS, seed), max_new_tokens=1, store=False)


def open_cache(model: Model, records: MemoryBackend) -> LocalCache:
    tier = Tier("slow", Throttled(records, RATE))
    return LocalCache(Store([tier], pool_bytes=256 << 20), model.namespace, model.producer)


def measure(model: Model, records: MemoryBackend) -> tuple[float, float, int]:
    """TTFT to that of computing, with a tier of unknown speed and of a known one; tokens from the latter."""
    cache = open_cache(model, records)
    with Runner(model, cache) as runner:
        computed = ask(runner, UNRELATED)  # tells the runner how long computing takes
        assert computed.cached_tokens == 0
        unknown = ask(runner, FIRST)
        # What was not waited for comes nevertheless, and tells how fast the tier is.
        cache.lookup("coming", Chain(some_ids(TOKENS, FIRST), 64))
        assert cache.wait("coming", 60).chunks == TOKENS // 64
        cache.forget("coming")
        assert ask(runner, FIRST).cached_tokens == CACHED, "from memory"
        known = ask(runner, SECOND)
    cache.close()
    return unknown.ttft_s / computed.ttft_s, known.ttft_s / computed.ttft_s, known.cached_tokens


def stored(model: Model) -> MemoryBackend:
    """The records of two prompts."""
    records = MemoryBackend()
    cache = open_cache(model, records)
    with Runner(model, cache) as runner:
        for seed in (FIRST, SECOND):
            runner.generate(some_ids(TOKENS, seed), max_new_tokens=1)
        assert runner.drain()
    cache.close()
    return records
