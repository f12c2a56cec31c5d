"""A pretend device: its memory is the host's, but copies are queued, and happen late, in parts, in any order.

Every stream is a queue. One thread takes from the head of any stream that may go on, at random but from a seed, so that
only events order what is on two streams. What the engine does on the device is queued on streams of its own.
"""

from __future__ import annotations

import random
import threading
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from lmcache_sdk.errors import DeviceError
from lmcache_sdk.kernels import Bytes, CPUKernels, Plan, QueuedKernels, Room
from lmcache_sdk.kernels.checks import check_gather, check_scatter
from lmcache_sdk.layout import Plane

DEVICE = "late:0"


class LateEvent(NamedTuple):
    stream: LateStream
    count: int  # of the stream's operations that must have ended

    def done(self) -> bool:
        with self.stream.device.changed:
            return self._reached()

    def wait(self) -> None:
        with self.stream.device.changed:
            self.stream.device.changed.wait_for(self._reached)

    def hold(self, stream: LateStream) -> None:
        self.done()  # a device that failed takes nothing
        stream.wait(self)

    def _reached(self) -> bool:
        if self.stream.device.error is not None:
            raise self.stream.device.error
        return self.stream.ended >= self.count


class LateStream:
    def __init__(self, device: LateDevice, kernels: LateKernels) -> None:
        self.device = device
        self.ended = 0
        self._kernels = kernels
        self._cpu = CPUKernels()
        self._queued = 0
        self.operations: deque[tuple[LateEvent | None, Callable[[], None]]] = deque()
        with device.changed:
            device.streams.append(self)

    def run(self, operation: Callable[[], None]) -> None:
        """Queue what the engine does."""
        self._queue(None, operation)

    def wait(self, event: LateEvent) -> None:
        self._queue(event, lambda: None)

    def record(self) -> LateEvent:
        return LateEvent(self, self._queued)

    def gather(self, planes: Sequence[Plane], heads: tuple[int, int], plan: Plan, chunk: Bytes) -> None:
        self._copy(self._cpu.gather, check_gather(planes, heads, plan, chunk), heads, plan, chunk)

    def scatter(self, planes: Sequence[Plane], heads: tuple[int, int], plan: Plan, chunk: Bytes) -> None:
        self._copy(self._cpu.scatter, check_scatter(planes, heads, plan, chunk), heads, plan, chunk)

    def _copy(self, copy: Any, planes: Sequence[Plane], heads: tuple[int, int], plan: Plan, chunk: Bytes) -> None:
        """Plane by plane: a copy that is under way is half done."""
        self._kernels.check_queued(plan, chunk, DEVICE)
        for plane, row in zip(planes, chunk.reshape(len(planes), -1), strict=True):
            self._queue(None, partial(copy, (plane,), heads, plan, row))

    def _queue(self, after: LateEvent | None, operation: Callable[[], None]) -> None:
        with self.device.changed:
            self._queued += 1
            self.operations.append((after, operation))
            self.device.changed.notify_all()


class LateDevice:
    """Begins at rest: nothing happens before ``go``.

    Attributes:
        prefer: a stream that goes first whenever it can.
    """

    prefer: LateStream | None = None

    def __init__(self, seed: int = 0) -> None:
        self.changed = threading.Condition(threading.RLock())
        self.streams: list[LateStream] = []
        self.error: Exception | None = None
        self._random = random.Random(seed)
        self._going = False
        self._ended = False
        self._thread = threading.Thread(target=self._work, name="late-device", daemon=True)
        self._thread.start()

    def go(self) -> None:
        self._set(_going=True)

    def rest(self) -> None:
        """Nothing happens from now on."""
        self._set(_going=False)

    def fail(self, error: Exception | None = None) -> None:
        """From now on, all events are errors, and nothing happens."""
        self._set(_going=False, error=error or DeviceError("the pretend device failed"))

    def close(self) -> None:
        self._set(_ended=True)
        self._thread.join()

    def _set(self, **state: Any) -> None:
        with self.changed:
            self.__dict__.update(state)
            self.changed.notify_all()

    def _work(self) -> None:
        with self.changed:
            while True:
                self.changed.wait_for(lambda: self._ended or (self._going and self._ready()))
                if self._ended:
                    return
                ready = self._ready()
                stream = self.prefer if self.prefer in ready else self._random.choice(ready)
                stream.operations.popleft()[1]()
                stream.ended += 1
                self.changed.notify_all()

    def _ready(self) -> list[LateStream]:
        return [
            stream
            for stream in self.streams
            if stream.operations and ((after := stream.operations[0][0]) is None or after.stream.ended >= after.count)
        ]


class LateKernels(QueuedKernels):
    """Attributes:
    refuses: bytes of memory that is not registered, with the reason.
    registered: bytes of what was to be, in order.
    """

    name = "late"
    device_types = ("late",)

    def __init__(self, device: LateDevice) -> None:
        super().__init__()
        self.device = device
        self.refuses: dict[int, str] = {}
        self.registered: list[int] = []
        self.pinned: set[int] = set()
        self._one_at_a_time = threading.Lock()

    def stream(self, device: str) -> LateStream:
        return LateStream(self.device, self)

    def allocate(self, device: str, nbytes: int) -> Room:
        memory = np.zeros(nbytes, np.uint8)
        return Room(memory.ctypes.data, memory)

    def _register(self, address: int, nbytes: int) -> str:
        assert self._one_at_a_time.acquire(blocking=False), "two registrations at once"
        try:
            self.registered.append(nbytes)
            if nbytes in self.refuses:
                return self.refuses[nbytes]
            self.pinned.add(address)
            return ""
        finally:
            self._one_at_a_time.release()

    def _unregister(self, address: int) -> None:
        self.pinned.remove(address)
