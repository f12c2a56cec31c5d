"""Host memory as copies see it: pool segments that are registered with a device, a pinned ring for all other memory.

A connector speaks to its device through :class:`PooledStream`, and to host memory through :class:`HostStream`, which
has the same methods and nothing to wait for.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from lmcache_sdk.errors import DeviceError
from lmcache_sdk.kernels.device import host_buffer
from lmcache_sdk.kernels.interface import Bytes, CopyStream, DeviceKernels, Event, Kernels, Plan
from lmcache_sdk.layout import Plane
from lmcache_sdk.observe.logs import logger

_log = logger("kernels")


class _Past:
    """An event that has happened."""

    def done(self) -> bool:
        return True

    def wait(self) -> None:
        pass

    def hold(self, stream: Any) -> None:
        pass


PAST: Event = _Past()


class HostStream:
    """Copies of host memory: done when the call returns."""

    broken = False

    def __init__(self, kernels: Kernels) -> None:
        self.gather = kernels.gather
        self.scatter = kernels.scatter

    def wait(self, event: Any) -> None:
        """The host has no events."""

    def record(self) -> Event:
        """The past."""
        return PAST

    def settle(self) -> None:
        """Nothing is under way."""

    def close(self) -> None:
        """Nothing is held."""


class Segments:
    """Which of a pool's segments a device may copy from and to directly.

    They are registered one at a time, in the background: a registration takes 0.1 s a GiB and more, and fails where two
    run at once. Until then, and where it fails, copies are staged.
    """

    def __init__(self, kernels: Kernels) -> None:
        self._kernels = kernels
        self._lock = threading.Lock()
        self._known: dict[str, Sequence[Bytes]] = {}
        self._pinned: dict[str, list[Bytes]] = {}  # keeps the memory mapped
        self._tasks: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="lmcache-register", daemon=True)

    def add(self, boot: str, segments: Sequence[Bytes]) -> None:
        """Register what is new. Returns at once."""
        with self._lock:
            if boot in self._known:
                return
            self._known[boot] = segments
            if not self._thread.ident:
                self._thread.start()
        for segment in segments:
            self._tasks.put(partial(self._register, boot, segment))

    def remove(self, boot: str) -> None:
        """Unregister the segments of a life of the pool, on which no copy is under way any more. Returns at once: no
        copy that begins from now on is a direct one.
        """
        with self._lock:
            self._known.pop(boot, None)
            for segment in self._pinned.pop(boot, []):
                self._tasks.put(partial(self._kernels.unpin, segment))

    def boots(self) -> list[str]:
        """The lives of the pool that were added and not removed."""
        with self._lock:
            return list(self._known)

    def are_direct(self, chunk: Bytes) -> bool:
        """Whether a chunk lies in a registered segment."""
        start = _address(chunk)
        with self._lock:
            pinned = [segment for segments in self._pinned.values() for segment in segments]
        return any(
            _address(segment) <= start and start + chunk.nbytes <= _address(segment) + segment.nbytes
            for segment in pinned
        )

    def close(self, timeout_s: float) -> bool:
        """Unregister everything. False if that has not ended by then, as a registration takes seconds; it will."""
        for boot in self.boots():
            self.remove(boot)
        self._tasks.put(None)
        if self._thread.ident:
            self._thread.join(max(0.0, timeout_s))
        return not self._thread.is_alive()

    def _work(self) -> None:
        while (task := self._tasks.get()) is not None:
            try:
                task()
            except Exception:  # noqa: BLE001 - without this thread nothing would be registered any more
                _log.exception("a segment could not be registered or unregistered; its copies are staged")

    def _register(self, boot: str, segment: Bytes) -> None:
        with self._lock:
            if boot not in self._known:
                return
        answer = self._kernels.pin(segment)
        if not answer:
            _log.warning("a segment of %d bytes is not registered, copies are staged: %s", segment.nbytes, answer.why)
            return
        with self._lock:
            kept = boot in self._known
            if kept:
                self._pinned.setdefault(boot, []).append(segment)
        if not kept:
            self._kernels.unpin(segment)


class _Slot:
    """A part of the ring: free once the event is done, and what was to happen then has happened."""

    def __init__(self, memory: Bytes) -> None:
        self.memory = memory
        self.event: Event = PAST
        self.then: Callable[[], None] | None = None

    def settle(self) -> None:
        self.event.wait()
        then, self.then = self.then, None
        if then is not None:
            then()


class PooledStream:
    """A queue of copies whose chunks may lie anywhere in the pool. For one thread.

    What cannot be copied directly goes through a ring of pinned memory: a scatter's chunk is copied there before it is
    queued, a gather's from there by ``settle``, or when its place in the ring is needed again.

    Args:
        stream: of the device; for no other user.
        segments: None = all copies are staged.
        ring_bytes: of host memory; at least two chunks go in.
        chunk_bytes: the largest chunk.

    Attributes:
        broken: the device has failed, and copies may be under way for ever.

    Raises:
        DeviceError: the ring cannot be pinned.
    """

    broken = False

    def __init__(
        self, kernels: DeviceKernels, stream: CopyStream, segments: Segments | None, ring_bytes: int, chunk_bytes: int
    ) -> None:
        self._kernels = kernels
        self._stream = stream
        self._segments = segments
        count = max(2, ring_bytes // chunk_bytes)
        self._ring = host_buffer(count * chunk_bytes)
        if not (pinned := kernels.pin(self._ring)):
            raise DeviceError(f"{self._ring.nbytes} bytes of host memory cannot be pinned: {pinned.why}")
        self._slots = [_Slot(self._ring[at * chunk_bytes : (at + 1) * chunk_bytes]) for at in range(count)]
        self._next = 0

    def wait(self, event: Any) -> None:
        """See :class:`CopyStream`."""
        self._stream.wait(event)

    def record(self) -> Event:
        """See :class:`CopyStream`. Done, a staged gather is in the ring, not yet in its chunk."""
        return self._stream.record()

    def scatter(self, planes: Sequence[Plane], heads: tuple[int, int], plan: Plan, chunk: Bytes) -> None:
        """See :class:`CopyStream`."""
        if self._is_direct(chunk):
            self._stream.scatter(planes, heads, plan, chunk)
            return
        slot = self._slot()
        slot.memory[: chunk.nbytes] = chunk
        self._stream.scatter(planes, heads, plan, slot.memory[: chunk.nbytes])
        slot.event = self._stream.record()

    def gather(self, planes: Sequence[Plane], heads: tuple[int, int], plan: Plan, chunk: Bytes) -> None:
        """See :class:`CopyStream`."""
        if self._is_direct(chunk):
            self._stream.gather(planes, heads, plan, chunk)
            return
        slot = self._slot()
        staged = slot.memory[: chunk.nbytes]
        self._stream.gather(planes, heads, plan, staged)
        slot.event = self._stream.record()
        slot.then = lambda: chunk.__setitem__(slice(None), staged)

    def settle(self) -> None:
        """Return when nothing is under way any more and every chunk has its bytes.

        Raises:
            DeviceError: the device failed; copies may still be under way.
        """
        try:
            for slot in self._slots[self._next :] + self._slots[: self._next]:
                slot.settle()
            self._stream.record().wait()
        except BaseException:  # of whatever kind: it is not known what has ended
            self.broken = True
            raise

    def close(self) -> None:
        """Give the ring back, unless copies may still be under way."""
        if not self.broken:
            self._kernels.unpin(self._ring)

    def _is_direct(self, chunk: Bytes) -> bool:
        return self._segments is not None and self._segments.are_direct(chunk)

    def _slot(self) -> _Slot:
        slot = self._slots[self._next]
        slot.settle()
        self._next = (self._next + 1) % len(self._slots)
        return slot


def _address(buffer: Bytes) -> int:
    return int(buffer.__array_interface__["data"][0])
