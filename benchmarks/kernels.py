"""Speed of the CPU kernels, as a share of ``np.copyto`` of the same bytes."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.harness import Row, at_least, paired, table
from benchmarks.memory import DIM, HEADS, LAYERS, NBYTES, ROW_BYTES, TOKENS, PagedMemory, arrays, buffer
from lmcache_sdk.kernels import Kernels, kernels_for
from lmcache_sdk.layout import KVLayout, Plane

PAGE_TOKENS = 16
PAGES = TOKENS // PAGE_TOKENS
# Tokens of a page -> what is asked for: runs of 256, 32, 8 and 2 KiB.
BARS = {128: 0.8, 16: 0.6, 4: 0.5, 1: 0.3}
MERGED = 0.8

Array = npt.NDArray[Any]


def _layout(arrays: list[list[Array]], axes: tuple[tuple[str, ...], tuple[str, ...]]) -> KVLayout:
    planes = (
        Plane.of(arrays[layer][role], axes[role], group="full", layer=layer, role="kv"[role], dtype="bfloat16")
        for layer in range(LAYERS)
        for role in range(2)
    )
    return KVLayout(tuple(planes))


def _nhd(page_tokens: int) -> KVLayout:
    """Each layer and role an array of its own: [pages, page, heads, dim]."""
    return PagedMemory(page_tokens).layout


def _hnd() -> KVLayout:
    """Each layer one array: [2, pages, heads, page, dim]."""
    axes = ("page", "head", "token", "dim")
    return _layout([list(layer) for layer in arrays(LAYERS, (2, PAGES, HEADS, PAGE_TOKENS, DIM))], (axes, axes))


def _vllm_cpu() -> KVLayout:
    """vLLM's CPU blocks: in each block and head K as [dim, token], then V as [token, dim]."""
    layers = []
    for blocks in arrays(LAYERS, (PAGES, HEADS, 2, PAGE_TOKENS * DIM)):
        keys = blocks[:, :, 0].reshape(PAGES, HEADS, DIM, PAGE_TOKENS, copy=False)
        layers.append([keys, blocks[:, :, 1].reshape(PAGES, HEADS, PAGE_TOKENS, DIM, copy=False)])
    return _layout(layers, (("page", "head", "dim", "token"), ("page", "head", "token", "dim")))


def _copy(kernels: Kernels, verb: str, layout: KVLayout, slots: Array, target: Array) -> Callable[[], None]:
    """All slots, chunk by chunk, as a connector copies them: plan, then all layers in one call."""
    planes = layout.planes_of("full", range(LAYERS))
    copy = kernels.gather if verb == "gather" else kernels.scatter

    def run() -> None:
        for part, chunk in zip(slots, target, strict=True):
            copy(planes, (0, HEADS), kernels.plan(layout, part), chunk)

    return run


def _permuted(page_tokens: int) -> Array:
    """All slots, pages in random order."""
    pages = np.random.default_rng(0).permutation(TOKENS // page_tokens)
    return np.add.outer(pages * page_tokens, np.arange(page_tokens)).reshape(-1)


def rows(repeats: int = 12) -> Iterator[Row]:
    """Gather and scatter of 4,096 tokens, 32 layers, 8 heads of 128, bf16: 512 MiB each run.

    The reference is one ``np.copyto`` of the same 512 MiB: in one call it bypasses the caches, which no copy in pieces
    does, and is the faster for it. One thread. All memory is in huge pages.
    """
    kernels = kernels_for("cpu")
    source, target = buffer(NBYTES, seed=1), buffer(NBYTES)
    memories: list[tuple[str, Callable[[], KVLayout], Array, int, float]] = [
        *(
            (f"NHD, runs of {page * ROW_BYTES >> 10} KiB", partial(_nhd, page), _permuted(page), page, bar)
            for page, bar in BARS.items()
        ),
        ("NHD, merged runs", partial(_nhd, PAGE_TOKENS), np.arange(TOKENS), 1, MERGED),
        ("HND, permuted pages", _hnd, _permuted(PAGE_TOKENS), 1, 0.0),
        ("vLLM CPU blocks, permuted pages", _vllm_cpu, _permuted(PAGE_TOKENS), 1, 0.0),
    ]
    for memory, make, slots, least_tokens, bar in memories:
        layout = make()
        for chunk_tokens, verb in itertools.product((64, 256), ("gather", "scatter")):
            if chunk_tokens < least_tokens:  # which would cut the runs
                continue
            chunks = target.reshape(-1, chunk_tokens * NBYTES // TOKENS)
            result = paired(
                _copy(kernels, verb, layout, slots.reshape(-1, chunk_tokens), chunks),
                lambda: np.copyto(target, source),
                NBYTES,
                repeats if bar else 5,
            )
            yield at_least(f"cpu {verb}, {memory}, chunks of {chunk_tokens} / plain copy", result, bar)
        del layout  # 512 MiB; one at a time


if __name__ == "__main__":
    for row in rows():
        print(f"{table([row])}  {row.raw['gbps']:.1f} of {row.raw['reference_gbps']:.1f} GB/s", flush=True)
