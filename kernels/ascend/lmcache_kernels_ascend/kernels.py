"""The entry point, AscendKernels, and a queue of copies on one NPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch

from lmcache_kernels_ascend.acl import Acl
from lmcache_sdk.errors import DeviceError, LayoutError
from lmcache_sdk.kernels import Offsets, QueuedKernels, Room
from lmcache_sdk.kernels.queues import CheckQueued, Small, StagedQueue, number_of
from lmcache_sdk.kernels.tables import Piece, Runs
from lmcache_sdk.layout import Plane

_STAGING_BYTES = 32 << 20
# Of CANN's batched copy a run costs about as much as this many bytes: an estimate, until an NPU has been measured.
_LARGE_RUN_BYTES = 64 << 10
_WORDS = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.uint8}


class AscendEvent:
    """See :class:`lmcache_sdk.kernels.Event`."""

    def __init__(self, event: Any) -> None:
        self.event = event

    def done(self) -> bool:
        """See :class:`lmcache_sdk.kernels.Event`."""
        return bool(_raising(self.event.query))

    def wait(self) -> None:
        """See :class:`lmcache_sdk.kernels.Event`."""
        _raising(self.event.synchronize)

    def hold(self, stream: Any) -> None:
        """``stream``: a ``torch.npu.Stream``."""
        _raising(lambda: stream.wait_event(self.event))


class AscendStream(StagedQueue):
    """See :class:`lmcache_sdk.kernels.CopyStream`.

    Args:
        staging_bytes: memory of the device.
    """

    def __init__(self, device: str, acl: Acl, check_queued: CheckQueued, staging_bytes: int) -> None:
        super().__init__(device, check_queued)
        self._acl = acl
        self._npu: Any = torch.npu
        self.index = number_of(device)
        self._stream = self._npu.Stream(device=device)
        with self.queueing():
            self._staging = torch.empty(staging_bytes, dtype=torch.uint8, device=device)

    @contextmanager
    def queueing(self) -> Iterator[None]:
        """See :class:`StagedQueue`."""
        with self._npu.stream(self._stream), self._acl.on(self.index):
            yield

    def staging(self) -> tuple[int, int]:
        return self._staging.data_ptr(), self._staging.numel()

    def is_large(self, runs: Runs, planes: int, *, to_host: bool) -> bool:
        return int(runs.sizes.sum()) >= runs.sizes.size * _LARGE_RUN_BYTES

    def transfer(self, targets: Offsets, sources: Offsets, sizes: Offsets, *, to_host: bool) -> None:
        stream = self._stream.npu_stream
        self._acl.copy(targets, sources, sizes, stream, device=self.index, to_host=to_host)

    def pack(self, small: Small, piece: Piece) -> None:
        for memory, ids, staged in self._units(small, piece):
            torch.index_select(memory, 0, ids, out=staged)

    def unpack(self, small: Small, piece: Piece) -> None:
        for memory, ids, staged in self._units(small, piece):
            memory.index_copy_(0, ids, staged)

    def wait(self, event: Any) -> None:
        """``event``: a ``torch.npu.Event``, or one of ours."""
        theirs = event.event if isinstance(event, AscendEvent) else event
        if not isinstance(theirs, self._npu.Event):
            raise LayoutError(
                f"copies wait for a torch.npu.Event, not for {type(event).__module__}.{type(event).__name__}"
            )
        _raising(lambda: self._stream.wait_event(theirs))

    def record(self) -> AscendEvent:
        return AscendEvent(_raising(self._recorded))

    def _recorded(self) -> Any:
        event = self._npu.Event()
        event.record(self._stream)
        return event

    def _units(self, small: Small, piece: Piece) -> Iterator[tuple[Any, Any, Any]]:
        """Plane by plane: its memory as [units, words of a unit], unit numbers, their place in the staging buffer.

        Seen so, memory is contiguous whatever its layout is: an operation on a strided view would copy all of it first.
        """
        table, words = small.table, _WORDS[small.planes[0].itemsize]
        parts = table.block // table.unit
        key = (self, small.alike.geometry, small.heads)
        if key not in small.plan.tables:
            small.plan.tables[key] = torch.from_numpy(table.ids(table.unit)).to(self.device, non_blocking=True)
        ids = small.plan.tables[key][piece.blocks.start * parts : piece.blocks.stop * parts]
        each = self._staging[: piece.size].view(words).view(len(small.planes[piece.planes]), len(ids), -1)
        for plane, staged in zip(small.planes[piece.planes], each, strict=True):
            yield _span(plane, words, table.low, table.reach, table.unit), ids, staged


def _span(plane: Plane, words: torch.dtype, low: int, nbytes: int, unit: int) -> torch.Tensor:
    """Memory of a plane from ``low`` bytes behind its base, as [units, words]."""
    owner: torch.Tensor = plane.owner
    if owner.element_size() != plane.itemsize:
        owner = owner.view(words)
    size = plane.itemsize
    start = owner.storage_offset() + (plane.base + low - owner.data_ptr()) // size
    return owner.as_strided((nbytes // unit, unit // size), (unit // size, 1), start).view(words)


class AscendKernels(QueuedKernels):
    """See :class:`lmcache_sdk.kernels.DeviceKernels`.

    torch_npu is used where the engine has loaded it, and never imported: there is no memory on an NPU without it, and
    where it is installed without CANN it breaks torch.

    Args:
        acl: by default the library that is installed.
        staging_bytes: memory of the device for small runs, of each queue.

    Raises:
        DeviceError: torch_npu is not loaded, or CANN's runtime cannot be.
    """

    name: ClassVar[str] = "ascend"
    device_types: ClassVar[tuple[str, ...]] = ("npu",)

    def __init__(self, acl: Acl | None = None, *, staging_bytes: int = _STAGING_BYTES) -> None:
        super().__init__()
        if not hasattr(torch, "npu"):
            raise DeviceError("torch_npu is not loaded, so there is no NPU in this process; the engine imports it")
        self._acl = acl or Acl()
        self._staging_bytes = staging_bytes
        self._home = 0  # a device that this process uses

    def stream(self, device: str) -> AscendStream:
        """See :class:`DeviceKernels`."""
        made = _raising(lambda: AscendStream(device, self._acl, self.check_queued, self._staging_bytes))
        self._home = made.index
        return made

    def allocate(self, device: str, nbytes: int) -> Room:
        number_of(device)
        memory = _raising(lambda: torch.empty(nbytes, dtype=torch.uint8, device=device))
        return Room(memory.data_ptr(), memory)

    def _register(self, address: int, nbytes: int) -> str:
        with self._acl.on(self._home):
            return self._acl.register(address, nbytes)

    def _unregister(self, address: int) -> None:
        with self._acl.on(self._home):
            self._acl.unregister(address)


def _raising(call: Any) -> Any:
    """What a call of torch answers; its errors as ours."""
    try:
        return call()
    except RuntimeError as error:
        raise DeviceError(str(error)) from error
