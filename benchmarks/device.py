"""Speed of copies between a device and pinned host memory, as a share of one transfer of the same bytes.

Of every device whose kernels are installed and can be used; elsewhere it is said why not, and there are no rows.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np

from benchmarks.harness import Row, at_least, paired
from benchmarks.memory import DIM, HEADS, LAYERS, NBYTES, ROW_BYTES, TOKENS
from lmcache_sdk.errors import LMCacheSDKError
from lmcache_sdk.kernels import CopyStream, DeviceKernels, Room, describe_kernels, host_buffer, kernels_for
from lmcache_sdk.layout import KVLayout, Plane, Strides

CHUNK_TOKENS = 256
# Tokens of a page, for runs of 2 KiB to 512 KiB, and what is asked for from 32 KiB on.
PAGES = ((1, 0.0), (4, 0.0), (16, 0.9), (64, 0.9), (256, 0.9))
BOTH_WAYS = 0.8


def _layout(room: Room, page: int, device: str) -> KVLayout:
    strides = Strides(page * ROW_BYTES, ROW_BYTES, DIM * 2, 2)
    planes = (
        Plane(
            "full", layer, role, room.base + at * TOKENS * ROW_BYTES, TOKENS // page, page, HEADS, DIM, "bfloat16",
            strides, room.owner,
        )
        for at, (layer, role) in enumerate(itertools.product(range(LAYERS), "kv"))
    )  # fmt: skip
    return KVLayout(tuple(planes), device)


def _paged(kernels: DeviceKernels, layout: KVLayout, page: int, chunks: Any) -> Callable[[Callable[..., None]], None]:
    """Queue all slots, in permuted pages, chunk by chunk."""
    pages = np.random.default_rng(0).permutation(TOKENS // page)
    slots = np.add.outer(pages * page, np.arange(page)).reshape(-1, CHUNK_TOKENS)
    planes = layout.planes_of("full", range(LAYERS))

    def run(copy: Callable[..., None]) -> None:
        for part, chunk in zip(slots, chunks, strict=True):
            copy(planes, (0, HEADS), kernels.plan(layout, part), chunk)

    return run


def _at_once(kernels: DeviceKernels, room: Room, device: str, chunk: Any) -> Callable[[Callable[..., None]], None]:
    whole = Plane("whole", 0, "latent", room.base, 1, 1, 1, NBYTES, "uint8", Strides(0, 0, 0, 1), room.owner)
    plan = kernels.plan(KVLayout((whole,), device), [0])
    return lambda copy: copy((whole,), (0, 1), plan, chunk)


def _ended(queues: list[CopyStream], *queueing: Callable[[], None]) -> None:
    for queue in queueing:
        queue()
    for event in [queue.record() for queue in queues]:
        event.wait()


def _rows_of(kernels: DeviceKernels, device: str, repeats: int) -> Iterator[Row]:
    rooms = [kernels.allocate(device, NBYTES) for _ in range(2)]
    pinned = [host_buffer(NBYTES) for _ in range(2)]
    assert all(kernels.pin(buffer) for buffer in pinned)
    up, down = kernels.stream(device), kernels.stream(device)
    here, there = (_at_once(kernels, *pair) for pair in zip(rooms, [device] * 2, pinned, strict=True))
    for page, bar in PAGES:
        run = f"runs of {page * ROW_BYTES >> 10} KiB"
        out, back = (
            _paged(kernels, _layout(room, page, device), page, buffer.reshape(TOKENS // CHUNK_TOKENS, -1))
            for room, buffer in zip(rooms, pinned, strict=True)
        )
        for name, mine, plain, queue, verb in (
            ("gather", out, here, down, down.gather),
            ("scatter", back, there, up, up.scatter),
        ):
            result = paired(
                partial(_ended, [queue], partial(mine, verb)), partial(_ended, [queue], partial(plain, verb)), NBYTES,
                repeats,
            )  # fmt: skip
            yield at_least(f"{device} {name}, {run} / one transfer", result, bar)
        result = paired(
            partial(_ended, [down, up], partial(out, down.gather), partial(back, up.scatter)),
            partial(_ended, [down, up], partial(here, down.gather), partial(there, up.scatter)),
            2 * NBYTES,
            repeats,
        )
        yield at_least(f"{device} both ways at once, {run} / two transfers", result, BOTH_WAYS if bar else 0.0)
    for buffer in pinned:
        kernels.unpin(buffer)


def rows(repeats: int = 9) -> Iterator[Row]:
    """Gather and scatter of 4,096 tokens, 32 layers, 8 heads of 128, bf16, NHD, chunks of 256: 512 MiB each run."""
    for kind in describe_kernels():
        try:
            kernels = kernels_for(kind)
            if isinstance(kernels, DeviceKernels):
                yield from _rows_of(kernels, f"{kind}:0", repeats)
        except LMCacheSDKError as error:
            print(f"no rows for {kind}: {error}", file=sys.stderr)
