"""Memory for both sides of a copy, provided in the same way: touched, and in huge pages where the kernel has them."""

from __future__ import annotations

from threading import Event

import numpy as np
import numpy.typing as npt

from lmcache_sdk.layout import KVLayout, Plane
from lmcache_sdk.pool import PrivatePool

Bytes = npt.NDArray[np.uint8]
Slots = npt.NDArray[np.int64]

LAYERS, HEADS, DIM, TOKENS = 32, 8, 128, 4096  # 128 KiB of KV a token
ROW_BYTES = HEADS * DIM * 2
NBYTES = LAYERS * 2 * TOKENS * ROW_BYTES
AXES = ("page", "token", "head", "dim")
_PAGE_BYTES = 4096


def buffer(nbytes: int, seed: int | None = None) -> Bytes:
    """Fresh memory, filled at random if there is a seed."""
    pool = PrivatePool([nbytes])
    pool.prefault(Event())
    (memory,) = pool.segments
    if seed is not None:
        memory[:] = np.random.default_rng(seed).integers(0, 2**62, nbytes // 8).view(np.uint8)
    return memory


def arrays(count: int, shape: tuple[int, ...], seed: int = 0) -> list[npt.NDArray[np.uint16]]:
    """Arrays as an allocator gives them out: each at some page of 4 KiB, none next to another."""
    nbytes = 2 * int(np.prod(shape))
    stride = nbytes + _PAGE_BYTES
    memory = buffer(count * stride, seed)
    return [memory[at : at + nbytes].view(np.uint16).reshape(shape) for at in range(0, count * stride, stride)]


class PagedMemory:
    """An engine's KV memory, NHD: each layer and role an array ``[page, token, head, dim]`` of uint16, for bf16."""

    def __init__(self, page_tokens: int) -> None:
        self.page_tokens = page_tokens
        planes = arrays(2 * LAYERS, (TOKENS // page_tokens, page_tokens, HEADS, DIM))
        self.kv = [planes[at : at + 2] for at in range(0, len(planes), 2)]
        self.layout = KVLayout(
            tuple(
                Plane.of(self.kv[layer][at], AXES, group="full", layer=layer, role=role, dtype="bfloat16")
                for layer in range(LAYERS)
                for at, role in enumerate("kv")
            )
        )

    def write(self, layer: int, slots: Slots, k: Bytes, v: object) -> None:
        """The engine's own operation, for the proof at registration."""
        assert isinstance(v, np.ndarray)
        for memory, rows in zip(self.kv[layer], (k, v), strict=True):
            memory[slots // self.page_tokens, slots % self.page_tokens] = rows.view(np.uint16).reshape(-1, HEADS, DIM)

    def permuted(self, seed: int = 0) -> Slots:
        """Slots of all tokens, pages in random order."""
        pages = np.random.default_rng(seed).permutation(TOKENS // self.page_tokens)
        return np.add.outer(pages * self.page_tokens, np.arange(self.page_tokens)).reshape(-1)
