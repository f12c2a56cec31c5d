"""Speed of the CPU kernels, as a share of ``np.copyto`` of the same bytes."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.harness import Row, at_least, paired, table
from lmcache_sdk.kernels import Kernels, kernels_for
from lmcache_sdk.layout import KVLayout, Plane

LAYERS, HEADS, DIM, PAGE_TOKENS, TOKENS = 32, 8, 128, 16, 4096
PAGES = TOKENS // PAGE_TOKENS
AXES = ("page", "token", "head", "dim")

Array = npt.NDArray[Any]


def _filled(rng: np.random.Generator, shape: tuple[int, ...]) -> Array:
    """uint16, standing for bf16."""
    return rng.integers(0, 2**62, int(np.prod(shape)) // 4).view(np.uint16).reshape(shape)


def _layout(arrays: list[list[Array]], axes: tuple[tuple[str, ...], tuple[str, ...]]) -> KVLayout:
    planes = (
        Plane.of(arrays[layer][role], axes[role], group="full", layer=layer, role="kv"[role], dtype="bfloat16")
        for layer in range(LAYERS)
        for role in range(2)
    )
    return KVLayout(tuple(planes))


def _nhd(rng: np.random.Generator) -> KVLayout:
    """Each layer and role an array of its own: [pages, page, heads, dim]."""
    shape = (PAGES, PAGE_TOKENS, HEADS, DIM)
    return _layout([[_filled(rng, shape), _filled(rng, shape)] for _ in range(LAYERS)], (AXES, AXES))


def _hnd(rng: np.random.Generator) -> KVLayout:
    """Each layer one array: [2, pages, heads, page, dim]."""
    axes = ("page", "head", "token", "dim")
    return _layout([list(_filled(rng, (2, PAGES, HEADS, PAGE_TOKENS, DIM))) for _ in range(LAYERS)], (axes, axes))


def _vllm_cpu(rng: np.random.Generator) -> KVLayout:
    """vLLM's CPU blocks: in each block and head K as [dim, token], then V as [token, dim]."""
    layers = []
    for _ in range(LAYERS):
        blocks = _filled(rng, (PAGES, HEADS, 2, PAGE_TOKENS * DIM))
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


def rows(repeats: int = 9) -> Iterator[Row]:
    """Gather and scatter of 4,096 tokens, 32 layers, 8 heads of 128, bf16, pages of 16 tokens: 512 MiB each
    run.

    The reference is one ``np.copyto`` of the same 512 MiB. One thread.
    """
    rng = np.random.default_rng(0)
    kernels = kernels_for("cpu")
    permuted = np.add.outer(rng.permutation(PAGES) * PAGE_TOKENS, np.arange(PAGE_TOKENS)).reshape(-1)
    adjacent = np.arange(TOKENS)
    nbytes = LAYERS * 2 * TOKENS * HEADS * DIM * 2
    source = _filled(rng, (nbytes // 2,)).view(np.uint8)
    target = np.zeros_like(source)
    layouts: list[tuple[str, Callable[[np.random.Generator], KVLayout], list[tuple[str, Array, float]]]] = [
        ("NHD", _nhd, [("permuted pages", permuted, 0.6), ("merged runs", adjacent, 0.8)]),
        ("HND", _hnd, [("permuted pages", permuted, 0.0)]),
        ("vLLM CPU blocks", _vllm_cpu, [("permuted pages", permuted, 0.0)]),
    ]
    for form, make, patterns in layouts:
        layout = make(rng)
        for pattern, slots, bar in patterns:
            for chunk_tokens, verb in itertools.product((64, 256), ("gather", "scatter")):
                result = paired(
                    _copy(
                        kernels,
                        verb,
                        layout,
                        slots.reshape(-1, chunk_tokens),
                        target.reshape(-1, chunk_tokens * nbytes // TOKENS),
                    ),
                    lambda: np.copyto(target, source),
                    nbytes,
                    repeats if bar else 3,
                )
                name = f"cpu {verb}, {form}, {pattern}, chunks of {chunk_tokens} / plain copy"
                yield at_least(name, result, bar)
        del layout  # 512 MiB; one at a time


if __name__ == "__main__":
    for row in rows():
        print(f"{table([row])}  {row.raw['gbps']:.1f} of {row.raw['reference_gbps']:.1f} GB/s", flush=True)
