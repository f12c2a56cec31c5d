"""KV of a store as numbers, and numbers as KV of a store: what an independent check of the engines' KV needs."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import numpy.typing as npt

from lmcache_sdk.api import Cache
from lmcache_sdk.keys import Chain

# [chunk, layer, K or V, token, head, dim]
KV = npt.NDArray[np.float32]

_numbers = itertools.count(1)


def read(cache: Cache, chain: Chain) -> KV:
    """What a cache has of a chain of bf16 KV, whose chunks are one cell each."""
    rid = f"read-{next(_numbers)}"
    cache.lookup(rid, chain)
    ticket = cache.claim(rid, cache.wait(rid, 10.0).chunks)
    cache.forget(rid)
    assert ticket is not None
    assert cache.take(ticket)
    group, cells = cache.namespace.spec.groups[0], cache.namespace.spec.cells
    assert (group.dtype, len(cells)) == ("bfloat16", 1)
    segments = cache.segments(ticket.boot)
    raw = np.stack(
        [segments[segment][offset : offset + cells[0].nbytes] for segment, offset in ticket.places()[:, 0].tolist()]
    )
    cache.release(ticket)
    shape = (len(raw), len(group.layers), 2, chain.chunk_tokens, group.heads, group.dim)
    return (raw.view("<u2").astype("<u4") << 16).view("<f4").reshape(shape)


def write(cache: Cache, chain: Chain, kv: KV) -> None:
    """Store KV as the chunks of a chain, from the first on; rounded to bf16."""
    reservation = cache.reserve(f"write-{next(_numbers)}", chain, 0, len(kv))
    assert reservation is not None
    assert reservation.chunks == tuple(range(len(kv)))
    bits = np.ascontiguousarray(kv, "<f4").view("<u4")
    rounded = ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype("<u2")  # to the nearest, ties to even
    segments = cache.segments(reservation.boot)
    for chunk, (segment, offset) in zip(rounded, reservation.places()[:, 0].tolist(), strict=True):
        raw = chunk.reshape(-1).view(np.uint8)
        segments[segment][offset : offset + raw.size] = raw
    cache.publish(reservation)


def errors(kv: KV, own: KV) -> tuple[float, float]:
    """The relative errors of K and of V, ``|kv - own| / |own|``, in the layer that is worst."""
    distance, size = (np.square(some, dtype=np.float64).sum(axis=(0, 3, 4, 5)) for some in (kv - own, own))
    worst = np.sqrt(distance / size).max(axis=0)
    return float(worst[0]), float(worst[1])


def head_errors(kv: KV, own: KV) -> tuple[float, float]:
    """The same in the worst head of a layer of a chunk, which is what a store compares."""
    distance, size = (np.square(some, dtype=np.float64).sum(axis=(3, 5)) for some in (kv - own, own))
    worst = np.sqrt(distance / size).max(axis=(0, 1, 3))
    return float(worst[0]), float(worst[1])


def wrong_conventions(kv: KV) -> dict[str, KV]:
    """The same KV as engines with another idea of it would store it. Nothing but the numbers tells them apart."""
    chunks, layers, _, tokens, heads, dim = kv.shape
    negated, rows, interleaved = kv.copy(), kv.copy(), kv.copy()
    negated[:, :, 0] *= -1
    rows[:, :, 0] = kv[:, :, 0].swapaxes(2, 3).reshape(chunks, layers, tokens, heads, dim)
    pairs = np.arange(dim).reshape(2, dim // 2).T.ravel()  # 0, dim/2, 1, dim/2 + 1 …
    interleaved[:, :, 0] = kv[:, :, 0][..., pairs]
    flat = kv.transpose(1, 2, 0, 3, 4, 5).reshape(layers, 2, chunks * tokens, heads, dim)
    shifted = np.concatenate([flat[:, :, :1], flat[:, :, :-1]], axis=2)
    shifted = shifted.reshape(layers, 2, chunks, tokens, heads, dim).transpose(2, 0, 1, 3, 4, 5)
    return {
        "keys negated": negated,
        "keys by head first": rows,
        "interleaved rotation": interleaved,
        "shifted by a token": shifted,
    }


def noisy(kv: KV, relative: float, seed: int) -> KV:
    """As another right engine computes it: every number off by about so much of its layer's."""
    random: Any = np.random.default_rng(seed)
    scale = np.sqrt(np.square(kv).mean(axis=(3, 4, 5), keepdims=True)) * relative
    noise: KV = random.standard_normal(kv.shape, np.float32)
    return kv + noise * scale
