"""Namespaces and prompts of the benchmarks."""

from __future__ import annotations

import hashlib

import numpy as np
import numpy.typing as npt

from lmcache_sdk.api import Cache
from lmcache_sdk.keys import Chain
from lmcache_sdk.spec import Group, GroupKind, KVSpec, Namespace, Producer

PRODUCER = Producer("bench", "1", "cpu")
LONG_PROMPT = 131_072
MODEL = (32, 8, 128)  # layers, heads, dim: 128 KiB of KV a token
TINY = (1, 1, 2)  # lookups do not see sizes, and a long prompt fits a small pool


def namespace(chunk_tokens: int, layers: int, heads: int, dim: int) -> Namespace:
    group = Group("full", GroupKind.FULL, tuple(range(layers)), heads, dim, "bfloat16")
    return Namespace("bench", KVSpec((group,), chunk_tokens))


def tokens(seed: int, count: int) -> npt.NDArray[np.uint32]:
    return np.random.default_rng(seed).integers(0, 100_000, count).astype(np.uint32)


def bare_hash_loop(data: bytes, width: int) -> bytes:
    last = b""
    for at in range(0, len(data), width):
        last = hashlib.sha256(last + data[at : at + width]).digest()
    return last


def store(cache: Cache, chain: Chain) -> None:
    """Without any copy."""
    reservation = cache.reserve("bench", chain, 0, len(chain))
    assert reservation is not None and len(reservation.chunks) == len(chain)
    cache.publish(reservation)
