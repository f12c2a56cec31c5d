"""What kernels for a device have in common, whoever makes it: pinned memory, and copies that are done on return."""

from __future__ import annotations

import mmap
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from lmcache_sdk.errors import DeviceError, LayoutError
from lmcache_sdk.kernels.checks import check_gather, check_scatter, plan_of
from lmcache_sdk.kernels.interface import Bytes, CopyStream, Pinned, Plan, Room
from lmcache_sdk.layout import KVLayout, Plane, Planes

_BOUNCE_BYTES = 16 << 20


def host_buffer(nbytes: int) -> Bytes:
    """New memory of whole pages, as drivers want it for registration."""
    return np.frombuffer(mmap.mmap(-1, nbytes), dtype=np.uint8)


class QueuedKernels(ABC):
    """Kernels for a device, made of queues of copies. A package subclasses it and says how to queue and to register.

    ``gather`` and ``scatter`` serve any host memory, through a small pinned buffer; queued copies only what is pinned.
    """

    name: ClassVar[str]
    device_types: ClassVar[tuple[str, ...]]
    prefers_staging: str = ""

    def __init__(self) -> None:
        self._registering = threading.Lock()  # held for seconds
        self._pinning = threading.Lock()  # never
        # Address and bytes -> the buffer, as often as it is pinned. Were it not kept, other memory could come to lie
        # where a buffer is registered that nobody has unpinned.
        self._pins: dict[tuple[int, int], list[Bytes]] = {}
        self._bouncing = threading.Lock()
        self._bounces: dict[str, _Bounce] = {}  # by device

    # For a package

    @abstractmethod
    def stream(self, device: str) -> CopyStream:
        """See :class:`DeviceKernels`."""

    @abstractmethod
    def allocate(self, device: str, nbytes: int) -> Room:
        """See :class:`DeviceKernels`."""

    @abstractmethod
    def _register(self, address: int, nbytes: int) -> str:
        """Pin host memory; the answer is what went wrong, or nothing."""

    @abstractmethod
    def _unregister(self, address: int) -> None:
        """Undo ``_register``."""

    def check_queued(self, plan: Plan, chunk: Bytes, device: str) -> int:
        """The address of a chunk that may be copied by a queue.

        Raises:
            LayoutError: the plan is for another device, or the chunk does not lie in one pinned buffer: its copy would
                fail half way, or be slow in silence.
        """
        if plan.device != device:
            raise LayoutError(f"a plan for memory on {plan.device!r} in a queue of {device!r}")
        start = _address(chunk)
        with self._pinning:
            if any(low <= start and start + chunk.nbytes <= low + nbytes for low, nbytes in self._pins):
                return start
        raise LayoutError("the chunk does not lie in one pinned buffer, so its copy cannot be queued")

    # What the interface asks for

    def plan(self, layout: KVLayout, slots: npt.ArrayLike) -> Plan:
        """See :class:`Kernels`."""
        return plan_of(layout, slots, self.name, self.device_types)

    def gather(self, planes: Sequence[Plane], heads: tuple[int, int], plan: Plan, chunk: Bytes) -> None:
        """See :class:`Kernels`."""
        chosen = check_gather(planes, heads, plan, chunk)
        bounce = self._bounce(plan.device)
        with bounce.lock:
            for some, tokens, part in _pieces(chosen, plan, chunk, bounce.buffer.size):
                bounce.stream.gather(some, heads, tokens, bounce.buffer[: part.size])
                bounce.stream.record().wait()
                part[:] = bounce.buffer[: part.size]

    def scatter(self, planes: Sequence[Plane], heads: tuple[int, int], plan: Plan, chunk: Bytes) -> None:
        """See :class:`Kernels`."""
        chosen = check_scatter(planes, heads, plan, chunk)
        bounce = self._bounce(plan.device)
        with bounce.lock:
            for some, tokens, part in _pieces(chosen, plan, chunk, bounce.buffer.size):
                bounce.buffer[: part.size] = part
                bounce.stream.scatter(some, heads, tokens, bounce.buffer[: part.size])
                bounce.stream.record().wait()

    def pin(self, buffer: Bytes) -> Pinned:
        """See :class:`Kernels`. Counted: what is pinned twice is unpinned by the second ``unpin``."""
        if not buffer.flags.c_contiguous:
            return Pinned(False, "the buffer is not contiguous")
        place = _address(buffer), buffer.nbytes
        with self._registering:
            try:
                error = "" if place in self._pins else self._register(*place)
            except DeviceError as failed:
                error = str(failed)
            if error:
                return Pinned(False, error)
            with self._pinning:
                self._pins.setdefault(place, []).append(buffer)
        return Pinned(True)

    def unpin(self, buffer: Bytes) -> None:
        """See :class:`Kernels`."""
        place = _address(buffer), buffer.nbytes
        with self._registering:
            with self._pinning:
                pinned = self._pins.pop(place, [])
                if len(pinned) > 1:
                    self._pins[place] = pinned[1:]
            if len(pinned) == 1:
                self._unregister(place[0])

    def _bounce(self, device: str) -> _Bounce:
        with self._bouncing:
            bounce = self._bounces.get(device)
            if bounce is None:
                bounce = _Bounce(self.stream(device), host_buffer(_BOUNCE_BYTES))
                if not (pinned := self.pin(bounce.buffer)):
                    raise DeviceError(f"{_BOUNCE_BYTES} bytes of host memory cannot be pinned: {pinned.why}")
                self._bounces[device] = bounce
        return bounce


class _Bounce:
    """For one copy at a time."""

    def __init__(self, stream: CopyStream, buffer: Bytes) -> None:
        self.stream = stream
        self.buffer = buffer
        self.lock = threading.Lock()


def _address(buffer: Bytes) -> int:
    return int(buffer.__array_interface__["data"][0])


def _pieces(planes: Planes, plan: Plan, chunk: Bytes, limit: int) -> Iterator[tuple[Sequence[Plane], Plan, Bytes]]:
    """Cut a copy into copies of at most ``limit`` bytes, or of one token: planes, slots, their part of the chunk."""
    rows = chunk.reshape(len(planes), -1)
    width = rows.shape[1]
    if width <= limit:
        step = limit // width
        for first in range(0, len(planes), step):
            some = planes if step >= len(planes) else planes[first : first + step]
            yield some, plan, rows[first : first + step].reshape(-1)
        return
    token = width // plan.tokens
    step = max(1, limit // token)
    for number, plane in enumerate(planes):
        for first in range(0, plan.tokens, step):
            tokens = Plan(plan.slots[first : first + step], plan.device)
            yield (plane,), tokens, rows[number, first * token : (first + step) * token]
