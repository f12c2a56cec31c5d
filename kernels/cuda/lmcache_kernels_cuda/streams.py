"""A queue of copies on one device."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import gcd
from typing import Any, NamedTuple

import numpy as np
import torch

from lmcache_kernels_cuda import blocks
from lmcache_kernels_cuda.driver import Driver
from lmcache_kernels_cuda.routes import Routes
from lmcache_sdk.errors import DeviceError, LayoutError, LMCacheSDKError
from lmcache_sdk.kernels import Offsets
from lmcache_sdk.kernels.queues import CheckQueued, Small, StagedQueue, number_of
from lmcache_sdk.kernels.tables import Piece, Runs

_MANY_TABLES = 256


@contextmanager
def using(device: str) -> Iterator[None]:
    """Errors of torch's and Triton's as ours: no such device, out of memory, no compiler, a torch without CUDA."""
    try:
        yield
    except LMCacheSDKError:
        raise
    except Exception as error:
        raise DeviceError(f"{device!r} cannot be used: {error}") from error


class Device:
    """What torch is needed for: memory, and kernels on a stream."""

    tile_words = blocks.TILE_WORDS
    programs = blocks.PROGRAMS

    def __init__(self, name: str) -> None:
        self.name = name
        self.index = number_of(name)
        self.torch = torch.device(name)

    @contextmanager
    def on(self, stream: int) -> Iterator[None]:
        """Kernels and memory of this thread belong to the stream meanwhile."""
        # A stream is left by a call that makes the former device current, whatever it was, and with it a context on
        # it: in a new thread the first device, which may be another process's. A device is left without one.
        with torch.cuda.device(self.torch), torch.cuda.stream(torch.cuda.ExternalStream(stream, self.torch)):
            yield

    def empty(self, nbytes: int) -> torch.Tensor:
        """uint8 [nbytes], for any stream: what the current one was given to do with that memory has ended."""
        memory = torch.empty(nbytes, dtype=torch.uint8, device=self.torch)
        torch.cuda.current_stream(self.torch).synchronize()
        return memory

    def upload(self, numbers: Offsets) -> torch.Tensor:
        """A small int64 table, in the order of the current stream."""
        return torch.from_numpy(np.ascontiguousarray(numbers)).to(self.torch, non_blocking=True)


class Spare(NamedTuple):
    """Streams and events of a device that nobody has any more. They are not given back but used again: torch keeps the
    memory that was a stream's for the next one of that handle.
    """

    streams: list[int]
    events: list[int]


def _kept_for(owner: object, spare: list[int], make: Callable[[], int]) -> int:
    """A handle of the driver's that is spare when its owner is gone."""
    try:
        handle = spare.pop()
    except IndexError:
        handle = make()
    weakref.finalize(owner, spare.append, handle).atexit = False
    return handle


class CUDAEvent:
    """See :class:`lmcache_sdk.kernels.Event`. For any thread."""

    def __init__(self, driver: Driver, device: int, spare: Spare) -> None:
        self.handle = _kept_for(self, spare.events, driver.new_event)
        self._driver = driver
        self._device = device

    def done(self) -> bool:
        """See :class:`lmcache_sdk.kernels.Event`."""
        with self._driver.on(self._device):
            return self._driver.done(self.handle)

    def wait(self) -> None:
        """See :class:`lmcache_sdk.kernels.Event`."""
        with self._driver.on(self._device):
            self._driver.wait(self.handle)

    def hold(self, stream: Any) -> None:
        """``stream``: a ``torch.cuda.Stream``."""
        with self._driver.on(self._device):
            self._driver.hold(int(stream.cuda_stream), self.handle)


class CUDAStream(StagedQueue):
    """See :class:`lmcache_sdk.kernels.CopyStream`.

    Args:
        routes: which runs go by copy engine.
        staging_bytes: memory of the device.
        spare: of the device.
    """

    def __init__(
        self,
        device: Device,
        driver: Driver,
        check_queued: CheckQueued,
        routes: Routes,
        staging_bytes: int,
        spare: Spare,
    ) -> None:
        super().__init__(device.name, check_queued)
        self.routes = routes
        self._device = device
        self._driver = driver
        self._handle = 0  # the default stream, for want of another yet
        with self.queueing():
            self._handle = _kept_for(self, spare.streams, driver.new_stream)
        with self.queueing():
            self._staging = device.empty(staging_bytes)
        self._bases: dict[bytes, torch.Tensor] = {}
        self._spare = spare

    @contextmanager
    def queueing(self) -> Iterator[None]:
        """See :class:`StagedQueue`."""
        with using(self.device), self._device.on(self._handle), self._driver.on(self._device.index):
            yield

    def staging(self) -> tuple[int, int]:
        return self._staging.data_ptr(), self._staging.numel()

    def is_large(self, runs: Runs, planes: int, *, to_host: bool) -> bool:
        return self.routes.direct(runs, planes, to_host=to_host)

    def transfer(self, targets: Offsets, sources: Offsets, sizes: Offsets, *, to_host: bool) -> None:
        self._driver.copy(targets, sources, sizes, self._handle)

    def pack(self, small: Small, piece: Piece) -> None:
        self._launch(small, piece, to_staging=True)

    def unpack(self, small: Small, piece: Piece) -> None:
        self._launch(small, piece, to_staging=False)

    def wait(self, event: Any) -> None:
        """``event``: a ``torch.cuda.Event``, or one of ours."""
        if not isinstance(event, CUDAEvent | torch.cuda.Event):
            raise LayoutError(
                f"copies wait for a torch.cuda.Event, not for {type(event).__module__}.{type(event).__name__}"
            )
        handle = event.handle if isinstance(event, CUDAEvent) else int(event.cuda_event)
        with self.queueing():
            self._driver.hold(self._handle, handle)

    def record(self) -> CUDAEvent:
        with self.queueing():
            event = CUDAEvent(self._driver, self._device.index, self._spare)
            self._driver.record(event.handle, self._handle)
        return event

    def _launch(self, small: Small, piece: Piece, *, to_staging: bool) -> None:
        """The tables of a plan are made at its first use by this queue; addresses are kept for the next plan, too."""
        table = small.table
        addresses = small.alike.low + table.low + small.alike.offsets
        alignment = int(np.gcd.reduce(addresses, initial=gcd(table.unit, blocks.WIDE_BYTES)))
        word = blocks.word_bytes(alignment)
        key = (self, small.alike.geometry, small.heads, word)
        if key not in small.plan.tables:
            small.plan.tables[key] = self._device.upload(table.offsets // word)
        known = addresses.tobytes()
        if known not in self._bases:
            if len(self._bases) == _MANY_TABLES:
                self._bases.clear()
            self._bases[known] = self._device.upload(addresses)
        blocks.launch(
            self._bases[known][piece.planes],
            small.plan.tables[key][piece.blocks],
            self._staging[: piece.size],
            table.block,
            alignment,
            to_staging=to_staging,
            tile_words=self._device.tile_words,
            programs=self._device.programs,
        )
