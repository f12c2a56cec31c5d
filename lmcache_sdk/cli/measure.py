"""How fast this machine moves KV, each beside what limits it. Seconds in all; no engine, torch only for a device."""

from __future__ import annotations

import hashlib
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise, product
from pathlib import Path
from urllib.parse import quote

import msgspec
import numpy as np
import numpy.typing as npt

from lmcache_sdk.backend import Backend, Item, open_backend
from lmcache_sdk.errors import DeviceError
from lmcache_sdk.kernels import DeviceKernels, host_buffer, kernels_for
from lmcache_sdk.keys import Chain
from lmcache_sdk.layout import KVLayout, Plane, Strides
from lmcache_sdk.records import checksum

# Of the usual small model: 8 layers of 8 heads of 128, bf16; chunks of 64 tokens, pages of 16.
_LAYERS, _HEADS, _DIM, _PAGE, _CHUNK, _CHUNKS = 8, 8, 128, 16, 64, 32
_TOKENS = _CHUNK * _CHUNKS
_CHUNK_BYTES = _LAYERS * 2 * _CHUNK * _HEADS * _DIM * 2
_BYTES = _CHUNKS * _CHUNK_BYTES  # 64 MiB: more than a processor's cache
_HASHED_TOKENS = 1 << 16
_SECONDS = 0.4  # for each pair
_GB = 1e9


class Speed(msgspec.Struct):
    """A rate beside its ceiling, in the same unit.

    Attributes:
        share: median of the ratios, measured to ceiling. Both run in turn, so a busy machine slows both.
        expected: a share below it is worth a warning; far below what a healthy machine shows.
    """

    name: str
    measured: float
    ceiling: float
    unit: str
    ceiling_name: str
    share: float
    expected: float


def _pair(
    name: str,
    function: Callable[[], object],
    ceiling_name: str,
    ceiling: Callable[[], object],
    amount: float,
    *,
    unit: str = "GB/s",
    expected: float = 0.0,
) -> Speed:
    """Run both in turn for a while; the first run of each, which touches new memory, does not count."""
    function()
    ceiling()
    pairs: list[tuple[float, float]] = []
    end = time.perf_counter() + _SECONDS
    while len(pairs) < 3 or time.perf_counter() < end:
        pairs.append((_seconds(function), _seconds(ceiling)))
    mine, its = (statistics.median(seconds) for seconds in zip(*pairs, strict=True))
    share = statistics.median(limit / took for took, limit in pairs)
    return Speed(name, amount / mine, amount / its, unit, ceiling_name, share, expected)


def _seconds(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def _random(rng: np.random.Generator, nbytes: int) -> npt.NDArray[np.uint8]:
    return rng.integers(0, 1 << 62, nbytes // 8).view(np.uint8)


def memory_speeds() -> Iterator[Speed]:
    """Kernels and checksum against a plain copy of the same bytes, keys against a bare hashing loop."""
    rng = np.random.default_rng(0)
    source, target = _random(rng, _BYTES), np.zeros(_BYTES, np.uint8)

    def copy() -> None:
        np.copyto(target, source)

    layout = _paged(source.__array_interface__["data"][0], source, "cpu")
    slots, planes = _slots(rng), layout.planes_of("full", range(_LAYERS))
    kernels = kernels_for("cpu")

    def run(kernel: Callable[..., None]) -> None:
        for part, chunk in zip(slots, target.reshape(_CHUNKS, -1), strict=True):
            kernel(planes, (0, _HEADS), kernels.plan(layout, part), chunk)

    plain = "memory copy"
    yield _pair("gather from pages", lambda: run(kernels.gather), plain, copy, _BYTES / _GB, expected=0.3)
    yield _pair("scatter to pages", lambda: run(kernels.scatter), plain, copy, _BYTES / _GB, expected=0.3)
    yield _pair("checksum (xxh3)", lambda: checksum(source.data), plain, copy, _BYTES / _GB, expected=0.3)
    yield _keys(rng)


def device_speeds(kernels: DeviceKernels, device: str) -> Iterator[Speed]:
    """Copies between a device and pinned memory of the host, beside one transfer of the same bytes.

    Raises:
        DeviceError: there is no such device, or it cannot be used.
    """
    memory, pinned, queue = kernels.allocate(device, _BYTES), host_buffer(_BYTES), kernels.stream(device)
    if not (answer := kernels.pin(pinned)):
        raise DeviceError(f"{_BYTES} bytes of host memory cannot be pinned for {device}: {answer.why}")
    layout = _paged(memory.base, memory.owner, device)
    slots, planes = _slots(np.random.default_rng(0)), layout.planes_of("full", range(_LAYERS))
    whole = Plane("whole", 0, "latent", memory.base, 1, 1, 1, _BYTES, "uint8", Strides(0, 0, 0, 1), memory.owner)
    first = kernels.plan(KVLayout((whole,), device), [0])

    def run(copy: Callable[..., None]) -> None:
        for part, chunk in zip(slots, pinned.reshape(_CHUNKS, -1), strict=True):
            copy(planes, (0, _HEADS), kernels.plan(layout, part), chunk)
        queue.record().wait()

    def at_once(copy: Callable[..., None]) -> None:
        copy((whole,), (0, 1), first, pinned)
        queue.record().wait()

    try:
        for name, copy in ((f"gather from {device}", queue.gather), (f"scatter to {device}", queue.scatter)):
            yield _pair(name, partial(run, copy), "one transfer", partial(at_once, copy), _BYTES / _GB, expected=0.5)
    finally:
        kernels.unpin(pinned)


def _paged(base: int, owner: object, device: str) -> KVLayout:
    """``_BYTES`` of memory as the pages of the usual model: each layer's K, then its V."""
    row, pages = _HEADS * _DIM * 2, _TOKENS // _PAGE
    strides = Strides(_PAGE * row, row, _DIM * 2, 2)
    planes = (
        Plane("full", layer, role, base + at * _TOKENS * row, pages, _PAGE, _HEADS, _DIM, "bfloat16", strides, owner)
        for at, (layer, role) in enumerate(product(range(_LAYERS), "kv"))
    )
    return KVLayout(tuple(planes), device)


def _slots(rng: np.random.Generator) -> npt.NDArray[np.int64]:
    """Of permuted pages, [chunks, tokens]."""
    pages = rng.permutation(_TOKENS // _PAGE)
    return (pages[:, None] * _PAGE + np.arange(_PAGE)).reshape(_CHUNKS, _CHUNK)


def _keys(rng: np.random.Generator) -> Speed:
    tokens = rng.integers(0, 1 << 17, _HASHED_TOKENS).astype("<u4")
    data = tokens.data.cast("B")

    def bare() -> None:
        last = b""
        for start, end in pairwise(range(0, len(data) + 1, 4 * _CHUNK)):
            last = hashlib.sha256(last + data[start:end]).digest()

    return _pair(
        "keys of chunks",
        lambda: Chain(tokens, _CHUNK).digests(),
        "bare SHA-256 loop",
        bare,
        _HASHED_TOKENS / 1e6,
        unit="M tokens/s",
        expected=0.5,
    )


def store_speeds(scheme: str, query: str, beside: Path) -> Iterator[Speed]:
    """Records of 2 MiB into and out of a scratch store, which is removed.

    Args:
        scheme, query: of the store's URL; the scratch store is opened with the same parameters.
        beside: the directory in which it is made.

    Raises:
        BackendError: the scratch store cannot be used.
        OSError: nor the directory.
    """
    with tempfile.TemporaryDirectory(prefix=".lmcache-sdk-doctor-", dir=beside) as folder:
        scratch = open_backend(f"{scheme}://{quote(folder)}/store{'?' if query else ''}{query}")
        try:
            yield from _store_speeds(scratch, Path(folder))
        finally:
            scratch.close(10.0)


def _store_speeds(scratch: Backend, folder: Path) -> Iterator[Speed]:
    source = _random(np.random.default_rng(0), _BYTES).reshape(_CHUNKS, -1)
    target = np.zeros_like(source)
    keys = [f"doctor/{number}" for number in range(_CHUNKS)]
    items = [Item(key, record.data) for key, record in zip(keys, source, strict=True)]
    buffers = [record.data for record in target]
    file = os.open(folder / "plain", os.O_RDWR | os.O_CREAT, 0o600)
    try:

        def write() -> None:
            for number, record in enumerate(source):
                os.pwrite(file, record.data, number * _CHUNK_BYTES)

        def write_through() -> None:
            write()
            os.fsync(file)

        def put() -> None:
            scratch.put(items, if_absent=False)

        plain = "plain file write"
        yield _pair("put into the store", put, plain, write, _BYTES / _GB, expected=0.2)
        yield _pair(
            "get from the store",
            lambda: scratch.get(keys, buffers),
            "memory copy",
            lambda: np.copyto(target, source),
            _BYTES / _GB,
            expected=0.2,
        )
        # Once is enough: it says how long the disk takes, which on a slow one is seconds.
        seconds, cached = _seconds(write_through), _seconds(write)
        yield Speed(
            "written to the disk", _BYTES / _GB / seconds, _BYTES / _GB / cached, "GB/s", plain, cached / seconds, 0.0
        )
    finally:
        os.close(file)
