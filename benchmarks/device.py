"""Speed of copies between a device and pinned host memory, as a share of one transfer of the same bytes (cudaMemcpy, or
what the vendor calls it), and how much of its speed a forward pass keeps meanwhile.

Of every device whose kernels are installed and can be used; elsewhere it is said why not, and there are no rows.
"""

from __future__ import annotations

import itertools
import statistics
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np

from benchmarks.harness import Row, at_least, paired, timed
from benchmarks.memory import DIM, HEADS, LAYERS, NBYTES, ROW_BYTES, TOKENS
from benchmarks.prompts import PRODUCER, namespace, tokens
from lmcache_sdk import open_cache
from lmcache_sdk.connector import GPUConnector
from lmcache_sdk.errors import LMCacheSDKError
from lmcache_sdk.kernels import CopyStream, DeviceKernels, Room, describe_kernels, host_buffer, kernels_for
from lmcache_sdk.keys import Chain
from lmcache_sdk.layout import KVLayout, Plane, Strides

CHUNK_TOKENS = 256
# Tokens of a page, for runs of 2 KiB to 512 KiB, and what is asked for from 32 KiB on.
PAGES = ((1, 0.0), (4, 0.0), (16, 0.9), (64, 0.9), (256, 0.9))
BOTH_WAYS = 0.8
# As an engine has them.
CONNECTOR_TOKENS, CONNECTOR_PAGE = 64, 16


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


def forward_pass(device: str, tokens: int = 2048, width: int = 4096, layers: int = 64) -> Callable[[], None]:
    """A prefill, as far as it keeps a device busy: large products, passes over memory between them. Done on return."""
    import torch

    module = torch.get_device_module(device)
    hidden, up, down = (
        torch.randn(shape, device=device).to(torch.bfloat16) / shape[0] ** 0.5
        for shape in ((tokens, width), (width, 4 * width), (4 * width, width))
    )

    def run() -> None:
        state = hidden
        for _ in range(layers):
            more = torch.nn.functional.silu(state @ up) @ down
            state = torch.nn.functional.rms_norm(state + more, (width,))
        done = module.Event()  # of this stream only: the copies have their own
        done.record()
        done.synchronize()

    run()
    return run


@contextmanager
def _meanwhile(copies: Sequence[Callable[[], None]]) -> Iterator[list[int]]:
    """Each again and again, in a thread of its own; the answer grows by a number for each that has ended."""
    stop, ended = threading.Event(), list[int]()

    def again(number: int) -> None:
        while not stop.is_set():
            copies[number]()
            ended.append(number)

    with ThreadPoolExecutor(len(copies)) as threads:
        running = [threads.submit(again, number) for number in range(len(copies))]
        try:
            while len(set(ended)) < len(copies) and not any(future.done() for future in running):
                stop.wait(0.001)
            yield ended
        finally:
            stop.set()
        for future in running:
            future.result()


def slowdown(name: str, forward: Callable[[], None], copies: Sequence[Callable[[], None]], repeats: int) -> Row:
    """How much of its speed a forward pass keeps beside copies of ``NBYTES`` each. Reported: it is the machine's."""
    alone, beside, gbps = [], [], []
    for _ in range(repeats):
        alone.append(timed(forward))
        with _meanwhile(copies) as ended:
            before = len(ended)
            beside.append(timed(forward))
            gbps.append((len(ended) - before) * NBYTES / beside[-1] / 1e9)
    ratio = statistics.median(one / other for one, other in zip(alone, beside, strict=True))
    return Row(name, ratio, 0.0, True, {"seconds": beside, "reference_seconds": alone, "copied_gbps": gbps})


def _forward(device: str) -> Callable[[], None] | None:
    try:
        return forward_pass(device)
    except (ImportError, RuntimeError) as error:
        print(f"no forward pass on {device}: {error}", file=sys.stderr)
        return None


def _rows_of(kernels: DeviceKernels, device: str, repeats: int) -> Iterator[Row]:
    forward = _forward(device)
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
        if forward:
            copies = (
                partial(_ended, [down], partial(out, down.gather)),
                partial(_ended, [up], partial(back, up.scatter)),
            )
            yield slowdown(f"{device} forward pass alone / beside loads and stores, {run}", forward, copies, repeats)
    for buffer in pinned:
        kernels.unpin(buffer)


def through_connector(kernels: DeviceKernels, device: str, repeats: int) -> Iterator[Row]:
    """Whole prompts as an engine asks for them, lookup and lease included: chunks of 64 tokens, a load layer by layer.

    Pool memory is registered, if the kernels do not prefer to stage; each store evicts an older prompt.
    """
    room, plain = kernels.allocate(device, NBYTES), host_buffer(NBYTES)
    layout, queue = _layout(room, CONNECTOR_PAGE, device), kernels.stream(device)
    at_once = _at_once(kernels, room, device, plain)

    def write(layer: int, slots: Any, k: Any, v: Any) -> None:
        kernels.scatter(layout.planes_of("full", (layer,)), (0, HEADS), kernels.plan(layout, slots), np.append(k, v))

    prompts = (Chain(tokens(seed, TOKENS), CONNECTOR_TOKENS) for seed in itertools.count())
    pages = np.random.default_rng(0).permutation(TOKENS // CONNECTOR_PAGE)
    slots = np.add.outer(pages * CONNECTOR_PAGE, np.arange(CONNECTOR_PAGE)).reshape(-1)
    space = namespace(CONNECTOR_TOKENS, LAYERS, HEADS, DIM)
    cache = open_cache("memory://", namespace=space, producer=PRODUCER, pool_bytes=5 * NBYTES // 2)
    connector = GPUConnector(cache, layout, write_op=write, kernels=kernels)
    last = next(prompts)

    def store() -> None:
        nonlocal last
        last = next(prompts)
        transfer = connector.store("store", last, 0, slots)
        assert transfer.wait(60) and not transfer.failed_chunks()

    def load() -> None:
        found = cache.lookup("load", last)
        ticket = cache.claim("load", found.chunks)
        assert ticket is not None and found.chunks == len(last), found
        transfer = connector.load(ticket, slots)
        assert transfer.wait(60) and not transfer.failed_chunks()
        cache.forget("load")

    store()
    ticket = cache.claim("boot", cache.lookup("boot", last).chunks)
    assert ticket is not None
    cache.forget("boot")
    # What the connector does in the background is then soon done.
    pinned = [plain, *(() if kernels.prefers_staging else cache.segments(ticket.boot))]
    assert all(kernels.pin(buffer) for buffer in pinned)
    connector.load(ticket, slots).wait(60)
    run = f"chunks of {CONNECTOR_TOKENS} tokens, pages of {CONNECTOR_PAGE}"
    for name, mine, verb in (("store", store, queue.gather), ("load", load, queue.scatter)):
        reference = partial(_ended, [queue], partial(at_once, verb))
        result = paired(mine, reference, NBYTES, repeats, lambda: cache.drain(10))
        yield at_least(f"{device} connector {name}, {run} / one transfer", result)
    connector.close()
    for buffer in pinned:
        kernels.unpin(buffer)
    cache.close()


def rows(repeats: int = 9) -> Iterator[Row]:
    """Gather and scatter of 4,096 tokens, 32 layers, 8 heads of 128, bf16, NHD, chunks of 256: 512 MiB each run."""
    for kind in describe_kernels():
        try:
            kernels = kernels_for(kind)
            if isinstance(kernels, DeviceKernels):
                yield from _rows_of(kernels, f"{kind}:0", repeats)
                yield from through_connector(kernels, f"{kind}:0", repeats)
        except LMCacheSDKError as error:
            print(f"no rows for {kind}: {error}", file=sys.stderr)
