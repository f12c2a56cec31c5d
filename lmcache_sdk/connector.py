"""Between a request's chunks in the pool and an engine's own KV memory.

One connector per engine memory and rank, in the process that owns the memory. Copies run on the connector's threads:
on one for host memory; on a device, where they are queued, on one for loads and one for stores, so that both directions
are used. What touches the same slots happens in the order in which it was asked for. Loads go layer by layer, so that a
forward pass may follow. Constructing it is the only thing that raises; later trouble makes a failed Transfer.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from lmcache_sdk.api import Bytes, Cache, Ticket
from lmcache_sdk.config import load_config
from lmcache_sdk.errors import DeviceError, LayoutError
from lmcache_sdk.kernels import DeviceKernels, Event, Kernels, Plan, kernels_for
from lmcache_sdk.kernels.host import PAST, HostStream, PooledStream, Segments
from lmcache_sdk.keys import Chain
from lmcache_sdk.layout import KVLayout
from lmcache_sdk.observe.logs import logger
from lmcache_sdk.proof import WriteOp, prove
from lmcache_sdk.spec import WHOLE, Part

__all__ = ["CopyTransfer", "GPUConnector", "Taken", "WriteOp"]

_log = logger("connector")

Slots = npt.NDArray[np.int64]

# A copy of fewer bytes costs more in calls than it gains in overlap with the forward pass.
STEP_BYTES = 2 << 20
# Pinned host memory of a connector to a device, for what cannot be copied directly.
STAGING_BYTES = 64 << 20
_POLL_S = 0.0002


class CopyTransfer:
    """A Transfer (see ``api.py``) whose copies are made, or queued on a device, by a thread of the connector's."""

    def __init__(self, chunks: Sequence[int], layers: int) -> None:
        self.rid = ""
        self._chunks = list(chunks)
        self._layers = layers
        self._marks: list[tuple[int, Event]] = []  # layers below the number are in place at the event
        self._queued: Event | None = None  # the end of all its copies, once the last one is queued
        self._failed: set[int] = set()
        self._done = False
        self._cancelled = False
        self._changed = threading.Condition()

    def done(self) -> bool:
        return self._done

    def wait(self, timeout_s: float | None) -> bool:
        with self._changed:
            return self._changed.wait_for(lambda: self._done, timeout_s)

    def failed_chunks(self) -> Sequence[int]:
        return sorted(self._failed)

    def ready_on(self, layer: int, stream: Any) -> None:
        """The host waits until the copy is queued; on the CPU, which has no streams, until it is done. Raises nothing:
        should the device fail, the transfer has.
        """
        event = self._at(layer, None)
        try:
            if event is not None:
                event.hold(stream)
        except DeviceError as error:
            _log.error("layer %d was not loaded: %s", layer, error)
            self.fail_all()

    def wait_layer(self, layer: int, timeout_s: float) -> bool:
        deadline = time.monotonic() + timeout_s
        event = self._at(layer, timeout_s)
        try:
            while event is not None and not event.done():
                if time.monotonic() >= deadline:
                    return False
                time.sleep(_POLL_S)
        except DeviceError as error:
            _log.error("layer %d was not loaded: %s", layer, error)
            return False
        return event is not None and not self._failed

    def cancel(self) -> None:
        self._cancelled = True

    # For the connector

    @property
    def cancelled(self) -> bool:
        return self._cancelled

    def fail(self, chunks: Sequence[int]) -> None:
        self._failed.update(chunks)

    def fail_all(self) -> None:
        self._failed.update(self._chunks)

    def layers_queued(self, count: int, event: Event) -> None:
        with self._changed:
            self._marks.append((count, event))
            self._changed.notify_all()

    def all_queued(self, event: Event) -> None:
        with self._changed:
            self._queued = event
            self._changed.notify_all()

    def fence(self, stream: Any) -> None:
        """Have a stream wait for all copies; the host instead, if there is none. Raises DeviceError."""
        with self._changed:
            self._changed.wait_for(lambda: self._done or self._queued is not None)
            event = PAST if self._done or self._queued is None else self._queued
        if stream is None:
            event.wait()
        else:
            event.hold(stream)

    def finish(self) -> None:
        with self._changed:
            self._done = True
            if not self._failed:
                self._marks.append((self._layers, PAST))
            self._changed.notify_all()

    def _at(self, layer: int, timeout_s: float | None) -> Event | None:
        """When a layer is in place; None if that will not be, or is not known by then."""

        def event() -> Event | None:
            return next((event for count, event in self._marks if count > layer), None)

        with self._changed:
            self._changed.wait_for(lambda: self._done or event() is not None, timeout_s)
            return event()


class Taken(NamedTuple):
    """Chunks that a process may copy whenever it likes, whatever becomes of the cache meanwhile."""

    ticket: Ticket
    segments: Sequence[Bytes]


_Stream = HostStream | PooledStream


class _Lane:
    """A thread that makes or queues copies, one transfer after another, each to its end."""

    def __init__(self, stream: _Stream) -> None:
        self.stream = stream
        self._tasks: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="lmcache-copy", daemon=True)
        self._thread.start()

    def run(self, task: Callable[[], None]) -> None:
        self._tasks.put(task)

    def end(self) -> None:
        self._tasks.put(None)

    def ended(self, timeout_s: float) -> bool:
        self._thread.join(max(0.0, timeout_s))
        return not self._thread.is_alive()

    def _work(self) -> None:
        while (task := self._tasks.get()) is not None:
            task()
        self.stream.close()


@dataclass(eq=False, frozen=True)
class _Asked:
    """A transfer that has not ended.

    Attributes:
        after: an event of the engine's to wait for, or None.
    """

    lane: _Lane
    transfer: CopyTransfer
    slots: Slots
    after: Any
    is_store: bool = False

    def begin(self, earlier: Sequence[_Asked]) -> None:
        """Before its first copy: wait for what was asked for earlier, on another lane, and touches the same slots."""
        for other in earlier:
            if not other.transfer.done() and np.isin(self.slots, other.slots[other.slots >= 0]).any():
                other.transfer.wait(None)
        if self.after is not None:
            self.lane.stream.wait(self.after)


class _Step(NamedTuple):
    """Some layers of one cell: what one kernel call copies of a chunk."""

    cell: int  # index into KVSpec.cells
    group: str
    layers: tuple[int, ...]
    heads: tuple[int, int]  # within this rank's memory
    start: int  # bytes within the cell
    end: int


class GPUConnector:
    """See the module's docstring. For a CPU engine it is the same class.

    Args:
        cache: where the chunks are.
        layout: the engine's memory, of this rank.
        part: what of the model this rank holds.
        write_op: the engine's own operation that writes rows, for the proof at registration; see
            :func:`lmcache_sdk.proof.prove`. The memory's content at a few slots is overwritten.
        kernels: default: those of the memory's device.
        rank: the number of this rank's part of a ticket.
        staging_bytes: of a device: pinned host memory for copies of pool memory that is not registered (yet), each way.
        pinning: of a device: whether the pool's memory is registered, ``auto``, ``direct`` or ``staged``; default: the
            setting of that name.

    Raises:
        LayoutError: the memory is not what the namespace says, or the proof fails.
        ConfigError: the part cuts a cell in two.
        DeviceError: the device cannot be used.
    """

    def __init__(
        self,
        cache: Cache,
        layout: KVLayout,
        part: Part = WHOLE,
        *,
        write_op: WriteOp,
        kernels: Kernels | None = None,
        rank: int = 0,
        staging_bytes: int = STAGING_BYTES,
        pinning: str | None = None,
    ) -> None:
        self._cache = cache
        self._layout = layout
        self._part = part
        self._rank = rank
        self._spec = cache.namespace.spec
        self._kernels = kernels or kernels_for(layout.device)
        if self._kernels.plan(layout, [0]).tokens != 1:  # refuses memory of another device
            raise LayoutError(f"the {self._kernels.name} kernels do not serve {layout.device}")
        layout.validate(self._spec, part)
        self._cells = self._spec.cells_of(part)
        if not self._cells:
            raise LayoutError(f"{part} holds no cell of the namespace")
        self._steps = self._cut_steps(STEP_BYTES)
        self._whole_cells = self._cut_steps()  # nobody waits for a layer of a store
        prove(layout, self._spec, self._kernels, write_op)
        self._lock = threading.Condition()
        self._open: list[_Asked] = []  # in order
        self._completed: list[CopyTransfer] = []
        self._closed = False
        self._segments: Segments | None = None
        if isinstance(self._kernels, DeviceKernels):
            self._whole_cells = self._cut_steps(staging_bytes // 4)
            self._segments = _segments(self._kernels, pinning)
            first = self._pooled(self._kernels, staging_bytes)
            try:
                second = self._pooled(self._kernels, staging_bytes)
            except BaseException:
                first.close()
                raise
            self._loads, self._stores = _Lane(first), _Lane(second)
        else:
            self._loads = self._stores = _Lane(HostStream(self._kernels))

    def take(self, ticket: Ticket) -> Taken | None:
        """For an engine that must know before it asks for the copy that nothing can come in between: the chunks are
        this rank's to copy from here on, and stay where they are though the cache be gone by then. None: they are not.

        The ticket is released by ``load``; without one by the caller.
        """
        if not self._cache.take(ticket, self._rank):
            return None
        segments: Sequence[Bytes] = ()
        try:
            segments = self._cache.segments(ticket.boot)
        finally:
            if not segments:
                self._cache.release(ticket, self._rank)
        return Taken(ticket, segments) if segments else None

    def load(self, ticket: Ticket | Taken, slots: Slots, *, after: Any = None) -> CopyTransfer:
        """Copy the ticket's chunks into the engine's memory. Enqueues only; the ticket is released when it has ended.

        Args:
            ticket: or what ``take`` has made of it.
            slots: int64 ``[(boundary - first) * chunk_tokens]``, the place of every token; below 0 = not to be loaded,
                for an engine whose pages do not begin and end where chunks do.
            after: an event of the device to wait for first. The CPU has none.
        """
        taken, given = (ticket, ticket.ticket) if isinstance(ticket, Taken) else (None, ticket)
        transfer = CopyTransfer(range(given.first, given.boundary), len(self._layers()))

        asked = _Asked(self._loads, transfer, slots, after)
        if not self._submit(asked, lambda earlier: self._load(asked, given, taken, earlier)):
            self._cache.release(given, self._rank)
        return transfer

    def store(self, rid: str, chain: Chain, first: int, slots: Slots, *, after: Any = None) -> CopyTransfer:
        """Copy chunks ``first …`` of a request from the engine's memory into the cache. Enqueues only.

        What the cache has already, or has no room for, is not copied; neither counts as failed.

        Args:
            slots: int64 ``[n * chunk_tokens]``; they may be overwritten only after ``fence``.
            after: an event of the device to wait for first: the end of the forward pass that writes the slots.
        """
        count = len(slots) // self._spec.chunk_tokens
        transfer = CopyTransfer(range(first, first + count), len(self._layers()))
        asked = _Asked(self._stores, transfer, slots, after, is_store=True)
        self._submit(asked, lambda earlier: self._store(asked, rid, chain, first, earlier))
        return transfer

    def fence(self, stream: Any = None) -> None:
        """What is queued on a device's stream from now on runs after all gathers that were asked for before have read
        engine memory. Without a stream, return when they have.
        """
        with self._lock:
            stores = [asked.transfer for asked in self._open if asked.is_store]
        for transfer in stores:
            try:
                transfer.fence(stream)
            except DeviceError as error:
                _log.error("a gather failed: %s", error)

    def completed(self) -> list[CopyTransfer]:
        """The transfers that have ended since the last call."""
        with self._lock:
            ended, self._completed = self._completed, []
        return ended

    def drain(self, timeout_s: float) -> bool:
        """Wait until all transfers have ended; False if they have not by then."""
        with self._lock:
            return self._lock.wait_for(lambda: not self._open, timeout_s)

    def close(self, timeout_s: float = 10.0) -> bool:
        """End the threads after what was asked for; False if one is still busy by then. Idempotent."""
        deadline = time.monotonic() + timeout_s
        lanes = {self._loads, self._stores}
        with self._lock:
            if not self._closed:
                self._closed = True
                for lane in lanes:
                    lane.end()
        busy = [lane for lane in lanes if not lane.ended(deadline - time.monotonic())]
        if busy or self._segments is None or self._broken():
            return not busy
        return self._segments.close(deadline - time.monotonic())

    # On the copy threads

    def _submit(self, asked: _Asked, task: Callable[[Sequence[_Asked]], None]) -> bool:
        transfer = asked.transfer

        def run() -> None:
            try:
                task(earlier)
            except Exception:  # noqa: BLE001 - a copy that fails is a shorter hit, not the end of the engine
                _log.exception("a %s failed", "store" if asked.is_store else "load")
                transfer.fail_all()
            transfer.finish()
            with self._lock:
                self._open.remove(asked)
                self._completed.append(transfer)
                self._lock.notify_all()

        with self._lock:  # with close: nothing may be queued behind the end
            if not self._closed:
                earlier = [other for other in self._open if other.lane is not asked.lane]
                self._open.append(asked)
                asked.lane.run(run)
                return True
        transfer.fail_all()
        transfer.finish()
        return False

    def _load(self, asked: _Asked, ticket: Ticket, taken: Taken | None, earlier: Sequence[_Asked]) -> None:
        transfer, slots, stream = asked.transfer, asked.slots, asked.lane.stream
        try:
            asked.begin(earlier)
            taken = taken or self.take(ticket)
            if taken is None:
                raise LayoutError(f"part {self._rank} of the ticket is not (or no longer) this process's to copy")
            width = self._spec.chunk_tokens
            places, segments = ticket.places(), self._registered(ticket.boot, taken.segments)
            if len(slots) != len(places) * width:
                raise LayoutError(f"{len(slots)} slots for {len(places)} chunks of {width} tokens")
            tokens, plans = self._plans_to_load(slots)
            column = {cell: at for at, cell in enumerate(ticket.cells)}
            failed: set[int] = set()
            for number, step in enumerate(self._steps):
                planes = self._layout.planes_of(step.group, step.layers)
                for chunk, plan in enumerate(plans):
                    if chunk in failed or plan is None:
                        continue
                    if transfer.cancelled:
                        transfer.fail_all()
                        return
                    try:
                        payload = _payload(segments, places[chunk, column[step.cell]], step)
                        if plan.tokens < width:
                            payload = payload.reshape(len(planes), width, -1)[:, tokens[chunk]].reshape(-1)
                        stream.scatter(planes, step.heads, plan, payload)
                    except LayoutError as error:
                        _log.warning("chunk %d was not loaded: %s", ticket.first + chunk, error)
                        failed.add(chunk)
                        transfer.fail([ticket.first + chunk])
                following = self._steps[number + 1 :]
                ready = min((s.layers[0] for s in following), default=len(self._layers()))
                transfer.layers_queued(ready, stream.record())
        finally:
            stream.settle()  # where it raises, copies may still be under way, and the lease stays
            self._cache.release(ticket, self._rank)

    def _plans_to_load(self, slots: Slots) -> tuple[list[Slots | slice], list[Plan | None]]:
        """For each chunk which of its tokens have a place, and where; None if none has. Raises LayoutError."""
        width = self._spec.chunk_tokens
        placed = slots >= 0
        if placed.any():
            whole = self._kernels.plan(self._layout, slots[placed])
            if not whole.distinct:  # also of two chunks, which are copied one after the other
                raise LayoutError("two tokens of a load have one slot")
            if placed.all():
                plans = whole.cut(width)
                return [slice(None)] * len(plans), list(plans)
        wanted = [slots[at : at + width] for at in range(0, len(slots), width)]
        tokens = [np.flatnonzero(chosen >= 0) for chosen in wanted]
        return list(tokens), [
            self._kernels.plan(self._layout, chosen[at]) if at.size else None
            for chosen, at in zip(wanted, tokens, strict=True)
        ]

    def _plans(self, slots: Slots) -> list[Plan] | None:
        """Those of all chunks, checked together; None if some slots are none, which is then found chunk by chunk."""
        try:
            return self._kernels.plan(self._layout, slots).cut(self._spec.chunk_tokens)
        except LayoutError:
            return None

    def _layers(self) -> range:
        return range(max(step.layers[-1] for step in self._steps) + 1)

    def _store(self, asked: _Asked, rid: str, chain: Chain, first: int, earlier: Sequence[_Asked]) -> None:
        transfer, slots, stream = asked.transfer, asked.slots, asked.lane.stream
        asked.begin(earlier)
        width = self._spec.chunk_tokens
        reservation = self._cache.reserve(rid, chain, first, len(slots) // width, self._part)
        if reservation is None:
            return
        written: list[int] = []
        try:
            places, segments = reservation.places(), self._memory(reservation.boot)
            plans = self._plans(slots)
            for row, chunk in enumerate(reservation.chunks):
                if transfer.cancelled:
                    break
                at = (chunk - first) * width
                try:
                    plan = plans[chunk - first] if plans else self._kernels.plan(self._layout, slots[at : at + width])
                    self._gather(stream, segments, reservation.cells, places[row], plan)
                    written.append(chunk)
                except LayoutError as error:
                    _log.warning("chunk %d was not stored: %s", chunk, error)
            transfer.all_queued(stream.record())
        finally:
            stream.settle()  # where it raises, copies may still be under way, and the room is not given back
            transfer.fail(sorted(set(reservation.chunks) - set(written)))
            self._cache.publish(reservation, written)

    def _gather(
        self, stream: _Stream, segments: Sequence[Bytes], cells: tuple[int, ...], places: Slots, plan: Plan
    ) -> None:
        column = {cell: at for at, cell in enumerate(cells)}
        for step in self._whole_cells:
            place = places[column[step.cell]]
            if place[0] >= 0:  # else another rank writes this cell
                planes = self._layout.planes_of(step.group, step.layers)
                stream.gather(planes, step.heads, plan, _payload(segments, place, step))

    def _memory(self, boot: str) -> Sequence[Bytes]:
        segments = self._cache.segments(boot)
        if not segments:
            raise LayoutError(f"the cache's memory of boot {boot} is gone")
        return self._registered(boot, segments)

    def _registered(self, boot: str, segments: Sequence[Bytes]) -> Sequence[Bytes]:
        """The segments, of which a device hears; of those of an earlier life that is over it is told, too."""
        if self._segments is not None:
            self._segments.add(boot, segments)
            earlier = [life for life in self._segments.boots() if life != boot]
            over = [life for life in earlier if not self._cache.segments(life)]
            with self._lock:  # a transfer that was asked for meanwhile may copy from and to them
                for life in over if len(self._open) == 1 and not self._broken() else ():
                    self._segments.remove(life)
        return segments

    def _broken(self) -> bool:
        """Whether copies may be under way for ever."""
        return self._loads.stream.broken or self._stores.stream.broken

    def _pooled(self, kernels: DeviceKernels, staging_bytes: int) -> PooledStream:
        largest = max(step.end - step.start for step in (*self._steps, *self._whole_cells))
        return PooledStream(kernels, kernels.stream(self._layout.device), self._segments, staging_bytes, largest)

    def _cut_steps(self, step_bytes: int = 0) -> list[_Step]:
        """All that is to be copied of a chunk, in pieces of at most ``step_bytes``, or cell by cell."""
        steps = []
        for index in self._cells:
            cell = self._spec.cells[index]
            layer_bytes = cell.nbytes // len(cell.layers)
            size = max(1, step_bytes // layer_bytes) if step_bytes else len(cell.layers)
            heads = (cell.heads[0] - self._part.heads[0], cell.heads[1] - self._part.heads[0])
            for at in range(0, len(cell.layers), size):
                layers = cell.layers[at : at + size]
                start = at * layer_bytes
                steps.append(_Step(index, cell.group, layers, heads, start, start + len(layers) * layer_bytes))
        # By layer first: the forward pass needs the low layers of all cells before the high ones of any.
        return sorted(steps, key=lambda step: step.layers[0])


def _payload(segments: Sequence[Bytes], place: Slots, step: _Step) -> Bytes:
    segment, offset = int(place[0]), int(place[1])
    return segments[segment][offset + step.start : offset + step.end]


def _segments(kernels: DeviceKernels, pinning: str | None) -> Segments | None:
    """Those of a device that may be copied from and to directly; None if all copies are to be staged."""
    pinning = pinning or load_config().pinning
    if pinning == "auto" and kernels.prefers_staging:
        _log.info("pool memory is not registered with the device: %s", kernels.prefers_staging)
        return None
    return None if pinning == "staged" else Segments(kernels)
