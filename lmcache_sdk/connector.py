"""Between a request's chunks in the pool and an engine's own KV memory.

One connector per engine memory and rank, in the process that owns the memory. Copies run on one thread of the
connector's, in the order in which they were asked for; loads go layer by layer, so that a forward pass may follow.
Constructing it is the only thing that raises; later trouble makes a failed Transfer.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from lmcache_sdk.api import Bytes, Cache, Ticket
from lmcache_sdk.errors import LayoutError
from lmcache_sdk.kernels import Kernels, Plan, kernels_for
from lmcache_sdk.keys import Chain
from lmcache_sdk.layout import KVLayout
from lmcache_sdk.observe.logs import logger
from lmcache_sdk.proof import WriteOp, prove
from lmcache_sdk.spec import WHOLE, Part

__all__ = ["CopyTransfer", "GPUConnector", "WriteOp"]

_log = logger("connector")

Slots = npt.NDArray[np.int64]

# A copy of fewer bytes costs more in calls than it gains in overlap with the forward pass.
STEP_BYTES = 2 << 20


class CopyTransfer:
    """A Transfer (see ``api.py``) whose copies run on the connector's thread."""

    def __init__(self, chunks: Sequence[int], layers: int) -> None:
        self.rid = ""
        self._chunks = list(chunks)
        self._layers = layers
        self._ready = 0  # layers below this are in place
        self._failed: set[int] = set()
        self._done = False
        self._cancelled = False
        self._changed = threading.Condition()

    def done(self) -> bool:
        return self._done

    def wait(self, timeout_s: float) -> bool:
        with self._changed:
            return self._changed.wait_for(lambda: self._done, timeout_s)

    def failed_chunks(self) -> Sequence[int]:
        return sorted(self._failed)

    def ready_on(self, layer: int, stream: Any) -> None:
        """The CPU has no streams: the host waits, for as long as the copy takes."""
        del stream
        with self._changed:
            self._changed.wait_for(lambda: self._done or self._ready > layer)

    def wait_layer(self, layer: int, timeout_s: float) -> bool:
        with self._changed:
            self._changed.wait_for(lambda: self._done or self._ready > layer, timeout_s)
            return self._ready > layer and not self._failed

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

    def layers_ready(self, count: int) -> None:
        with self._changed:
            self._ready = max(self._ready, count)
            self._changed.notify_all()

    def finish(self) -> None:
        with self._changed:
            self._done = True
            if not self._failed:
                self._ready = self._layers
            self._changed.notify_all()


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

    Raises:
        LayoutError: the memory is not what the namespace says, or the proof fails.
        ConfigError: the part cuts a cell in two.
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
        self._tasks: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._lock = threading.Condition()
        self._stores = 0  # gathers that may still read engine memory
        self._running = 0
        self._completed: list[CopyTransfer] = []
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="lmcache-copy", daemon=True)
        self._thread.start()

    def load(self, ticket: Ticket, slots: Slots, *, after: Any = None) -> CopyTransfer:
        """Copy the ticket's chunks into the engine's memory. Enqueues only; the ticket is released when it has ended.

        Args:
            slots: int64 ``[(boundary - first) * chunk_tokens]``, the place of every token; below 0 = not to be loaded,
                for an engine whose pages do not begin and end where chunks do.
            after: an event of the device to wait for first. The CPU has none.
        """
        del after
        transfer = CopyTransfer(range(ticket.first, ticket.boundary), len(self._steps))
        if not self._submit(transfer, lambda: self._load(transfer, ticket, slots), store=False):
            self._cache.release(ticket, self._rank)
        return transfer

    def store(self, rid: str, chain: Chain, first: int, slots: Slots, *, after: Any = None) -> CopyTransfer:
        """Copy chunks ``first …`` of a request from the engine's memory into the cache. Enqueues only.

        What the cache has already, or has no room for, is not copied; neither counts as failed.

        Args:
            slots: int64 ``[n * chunk_tokens]``; they may be overwritten only after ``fence``.
        """
        del after
        count = len(slots) // self._spec.chunk_tokens
        transfer = CopyTransfer(range(first, first + count), len(self._steps))
        self._submit(transfer, lambda: self._store(transfer, rid, chain, first, slots), store=True)
        return transfer

    def fence(self, stream: Any = None) -> None:
        """Return when no gather that was asked for before reads engine memory any more."""
        del stream
        with self._lock:
            self._lock.wait_for(lambda: self._stores == 0)

    def completed(self) -> list[CopyTransfer]:
        """The transfers that have ended since the last call."""
        with self._lock:
            ended, self._completed = self._completed, []
        return ended

    def drain(self, timeout_s: float) -> bool:
        """Wait until all transfers have ended; False if they have not by then."""
        with self._lock:
            return self._lock.wait_for(lambda: self._running == 0, timeout_s)

    def close(self, timeout_s: float = 10.0) -> bool:
        """End the copy thread after what was asked for; False if it is still busy. Idempotent."""
        with self._lock:
            if not self._closed:
                self._closed = True
                self._tasks.put(None)
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    # On the copy thread

    def _submit(self, transfer: CopyTransfer, task: Callable[[], None], *, store: bool) -> bool:
        def run() -> None:
            try:
                task()
            except Exception:  # noqa: BLE001 - a copy that fails is a shorter hit, not the end of the engine
                _log.exception("a %s failed", "store" if store else "load")
                transfer.fail_all()
            transfer.finish()
            with self._lock:
                self._running -= 1
                self._stores -= store
                self._completed.append(transfer)
                self._lock.notify_all()

        with self._lock:  # with close: nothing may be queued behind the end
            if not self._closed:
                self._running += 1
                self._stores += store
                self._tasks.put(run)
                return True
        transfer.fail_all()
        transfer.finish()
        return False

    def _work(self) -> None:
        while (task := self._tasks.get()) is not None:
            task()

    def _load(self, transfer: CopyTransfer, ticket: Ticket, slots: Slots) -> None:
        try:
            if not self._cache.take(ticket, self._rank):
                raise LayoutError(f"part {self._rank} of the ticket is not (or no longer) this process's to copy")
            width = self._spec.chunk_tokens
            places, segments = ticket.places(), self._memory(ticket.boot)
            if len(slots) != len(places) * width:
                raise LayoutError(f"{len(slots)} slots for {len(places)} chunks of {width} tokens")
            wanted = [slots[at : at + width] for at in range(0, len(slots), width)]
            tokens = [np.flatnonzero(chosen >= 0) for chosen in wanted]
            plans = [
                self._kernels.plan(self._layout, chosen[at]) if at.size else None
                for chosen, at in zip(wanted, tokens, strict=True)
            ]
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
                        self._kernels.scatter(planes, step.heads, plan, payload)
                    except LayoutError as error:
                        _log.warning("chunk %d was not loaded: %s", ticket.first + chunk, error)
                        failed.add(chunk)
                        transfer.fail([ticket.first + chunk])
                following = self._steps[number + 1 :]
                transfer.layers_ready(min((s.layers[0] for s in following), default=len(self._layers())))
        finally:
            self._cache.release(ticket, self._rank)

    def _layers(self) -> range:
        return range(max(step.layers[-1] for step in self._steps) + 1)

    def _store(self, transfer: CopyTransfer, rid: str, chain: Chain, first: int, slots: Slots) -> None:
        width = self._spec.chunk_tokens
        reservation = self._cache.reserve(rid, chain, first, len(slots) // width, self._part)
        if reservation is None:
            return
        written: list[int] = []
        try:
            places, segments = reservation.places(), self._memory(reservation.boot)
            for row, chunk in enumerate(reservation.chunks):
                if transfer.cancelled:
                    break
                at = (chunk - first) * width
                try:
                    plan = self._kernels.plan(self._layout, slots[at : at + width])
                    self._gather(segments, reservation.cells, places[row], plan)
                    written.append(chunk)
                except LayoutError as error:
                    _log.warning("chunk %d was not stored: %s", chunk, error)
        finally:
            transfer.fail(sorted(set(reservation.chunks) - set(written)))
            self._cache.publish(reservation, written)

    def _gather(self, segments: Sequence[Bytes], cells: tuple[int, ...], places: Slots, plan: Plan) -> None:
        column = {cell: at for at, cell in enumerate(cells)}
        for step in self._whole_cells:
            place = places[column[step.cell]]
            if place[0] >= 0:  # else another rank writes this cell
                planes = self._layout.planes_of(step.group, step.layers)
                self._kernels.gather(planes, step.heads, plan, _payload(segments, place, step))

    def _memory(self, boot: str) -> Sequence[Bytes]:
        segments = self._cache.segments(boot)
        if not segments:
            raise LayoutError(f"the cache's memory of boot {boot} is gone")
        return segments

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
