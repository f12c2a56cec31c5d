"""Proof at registration: the stride table reads what the engine's own operation wrote, and the reverse.

A gather followed by our own scatter proves nothing: it is the identity through any wrong table.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from lmcache_sdk.errors import LayoutError
from lmcache_sdk.kernels import Kernels, Plan
from lmcache_sdk.layout import KVLayout, Plane, Strides
from lmcache_sdk.spec import DTYPE_BYTES, Group, KVSpec

Bytes = npt.NDArray[np.uint8]
Slots = npt.NDArray[np.int64]

_WINDOW_TOKENS = 5


class WriteOp(Protocol):
    """The engine's own operation that writes rows into its KV memory."""

    def __call__(self, layer: int, slots: Slots, k: Bytes, v: Bytes | None) -> None:
        """Write one row per slot; on a device, too, they are there on return.

        Args:
            layer: global layer number.
            slots: int64 [n], distinct, in no order.
            k: uint8 ``[n, heads, dim * itemsize]``, the bytes of finite numbers; a latent row where the layer has one.
            v: the same; None where K is a latent row.
        """
        ...


def prove(layout: KVLayout, spec: KVSpec, kernels: Kernels, write_op: WriteOp) -> None:
    """Check every layer of the memory against the engine's own writes. Overwrites a few slots of it.

    Raises:
        LayoutError: a layer whose bytes are elsewhere than the table says, by name.
    """
    random = np.random.default_rng(0)
    slots = _slots(layout, random)
    plan = kernels.plan(layout, slots)
    for group in spec.groups:
        for layer in sorted({plane.layer for plane in layout.planes if plane.group == group.name}):
            _prove_layer(layout, group, layer, kernels, plan, write_op, random)


def _prove_layer(
    layout: KVLayout,
    group: Group,
    layer: int,
    kernels: Kernels,
    plan: Plan,
    write_op: WriteOp,
    random: np.random.Generator,
) -> None:
    planes = layout.planes_of(group.name, (layer,))
    heads = planes[0].heads
    count = len(plan.slots)
    rows = [_numbers(random, (count, heads, plane.dim), plane.dtype) for plane in planes]
    write_op(layer, plan.slots, rows[0], rows[1] if len(rows) > 1 else None)

    wanted = np.concatenate([row.reshape(-1) for row in rows])
    found = np.empty_like(wanted)
    kernels.gather(planes, (0, heads), plan, found)
    if not np.array_equal(found, wanted):
        wrong = int(np.count_nonzero(found != wanted))
        raise LayoutError(
            f"layer {layer} of group {group.name!r}: the declared layout does not read what the engine wrote "
            f"({wrong} of {wanted.size} bytes differ); planes: " + "; ".join(plane.name for plane in planes)
        )
    written = _raw(planes, plan, kernels)
    kernels.scatter(planes, (0, heads), plan, np.zeros_like(wanted))
    if written and all(np.array_equal(a, b) for a, b in zip(written, _raw(planes, plan, kernels), strict=True)):
        raise LayoutError(f"layer {layer} of group {group.name!r}: writing does not reach the engine's memory")
    kernels.scatter(planes, (0, heads), plan, wanted)
    for plane, before, after in zip(planes, written, _raw(planes, plan, kernels), strict=True):
        if not np.array_equal(before, after):
            raise LayoutError(f"{plane.name}: our write differs from the engine's own")


def _slots(layout: KVLayout, random: np.random.Generator) -> Slots:
    """A few tokens at the front of the first page, in the middle of a middle one, at the end of the last; shuffled."""
    first = layout.planes[0]
    tokens, pages = first.page_tokens, layout.slots // first.page_tokens
    width = min(_WINDOW_TOKENS, tokens)
    starts = [0, (pages // 2) * tokens + (tokens - width) // 2, pages * tokens - width]
    slots = np.unique(np.concatenate([np.arange(start, start + width) for start in starts]))
    return random.permutation(slots).astype(np.int64)


def _numbers(random: np.random.Generator, shape: tuple[int, int, int], dtype: str) -> Bytes:
    """Bytes of finite numbers, uint8 ``[n, heads, dim * itemsize]``: an engine's copy need not keep a NaN's bits."""
    size = DTYPE_BYTES[dtype]
    if size == 1:
        raw = random.integers(0, 256, shape, dtype=np.uint8) & np.uint8(0x77)
    else:
        numbers = random.standard_normal(shape, dtype=np.float32)
        if dtype == "bfloat16":
            raw = (numbers.view(np.uint32) >> np.uint32(16)).astype(np.uint16).view(np.uint8)
        else:
            raw = numbers.astype(dtype).view(np.uint8)
    return np.ascontiguousarray(raw).reshape(shape[0], shape[1], -1)


def _raw(planes: Sequence[Plane], plan: Plan, kernels: Kernels) -> list[Bytes]:
    """All bytes from the first to the last element of each page's chosen slots, whatever lies between them."""
    found, slots = [], plan.slots
    for plane in planes:
        spans = []
        for page in np.unique(slots // plane.page_tokens):
            tokens = slots[slots // plane.page_tokens == page] % plane.page_tokens
            step = plane.strides
            start = plane.base + int(page) * step.page + int(tokens.min()) * step.token
            nbytes = (
                int(tokens.max() - tokens.min()) * step.token
                + (plane.heads - 1) * step.head
                + (plane.dim - 1) * step.dim
                + plane.itemsize
            )
            span = Plane("raw", 0, "k", start, 1, 1, 1, nbytes, "uint8", Strides(0, 0, 0, 1), plane.owner)
            layout = KVLayout((span,), plan.device)
            into = np.empty(nbytes, dtype=np.uint8)
            kernels.gather((span,), (0, 1), kernels.plan(layout, [0]), into)
            spans.append(into)
        found.append(np.concatenate(spans))
    return found
