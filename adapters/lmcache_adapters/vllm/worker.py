"""The worker's half: copies between this rank's KV memory and the cache, as the scheduler's half says.

Copies run on the connector's thread. A load is reported when it has ended; blocks that did not come are named, and
vLLM computes them. A store reads its blocks after the forward pass that filled them, while vLLM goes on.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from lmcache_adapters.vllm.messages import Load, StepMeta, StepReport, Store
from lmcache_sdk.api import Transfer
from lmcache_sdk.connector import GPUConnector
from lmcache_sdk.keys import DIGEST_BYTES, Chain

# Where nothing is computed, waiting for a load is cheaper than to be asked again and again.
_IDLE_WAIT_S = 0.005


@dataclass(frozen=True, slots=True)
class _Loading:
    load: Load
    transfer: Transfer | None  # None: it could not be begun
    since: float


class Worker:
    """One rank's half.

    Args:
        connector: None = this rank's memory cannot be served: loads fail, stores are dropped.
        chunk_tokens: of the namespace.
        block_tokens: of a block as the scheduler counts them.
        now: an event of the device's, behind all that vLLM has queued so far; None where it has no streams.
        trouble: why there is no connector; told to the scheduler's half once.
    """

    def __init__(
        self,
        connector: GPUConnector | None,
        chunk_tokens: int,
        block_tokens: int,
        now: Callable[[], Any] = lambda: None,
        trouble: str = "",
    ) -> None:
        self._connector = connector
        self._now = now
        self._chunk_tokens = chunk_tokens
        self._block_tokens = block_tokens
        self._loading: dict[str, _Loading] = {}
        self._storing: list[tuple[str, Transfer]] = []
        self._held: set[str] = set()
        self._lost_blocks: set[int] = set()
        self._report = StepReport(trouble=trouble)
        self._has_reported = False
        self.figures: dict[str, float] = {}

    def before_forward(self, meta: StepMeta) -> None:
        """Blocks of preempted requests may be given to others in this step: let the stores that read them end."""
        for rid, transfer in self._storing:
            if meta.preempted is None or rid in meta.preempted:
                while not transfer.wait(1.0):  # it ends by itself: it copies memory, and asks the cache with a deadline
                    pass

    def start_loads(self, meta: StepMeta) -> None:
        """Begin the step's loads."""
        for load in meta.loads:
            transfer = None
            if self._connector is not None and load.ticket is not None:
                # A step that is still being computed may read the blocks, for the request that had them.
                transfer = self._connector.load(load.ticket, self._slots_of_load(load), after=self._now())
            self._loading[load.rid] = _Loading(load, transfer, time.perf_counter())
        if meta.idle and self._loading:
            _wait_for_any([loading.transfer for loading in self._loading.values()])

    def start_stores(self, meta: StepMeta) -> None:
        """Begin the step's stores. Its forward pass has filled the blocks."""
        self._report.step = meta.step
        for store in meta.stores:
            if self._connector is None:
                self._count_stored(store.rid)
                continue
            chain = self._chain(store)
            slots = self._slots(store.blocks, store.first * self._chunk_tokens, len(chain) * self._chunk_tokens)
            transfer = self._connector.store(store.rid, chain, store.first, slots, after=self._now())
            self._storing.append((store.rid, transfer))
            self._count("store_requests")
        self._held |= meta.held

    def finished(self) -> tuple[set[str], set[str]]:
        """Requests whose blocks are not read any more, of those that are held; and those whose loads have ended."""
        received = {rid for rid, one in self._loading.items() if one.transfer is None or one.transfer.done()}
        for rid in received:
            self._end(self._loading.pop(rid))
        under_way = []
        for rid, transfer in self._storing:
            if transfer.done():
                self._count_stored(rid)
            else:
                under_way.append((rid, transfer))
        self._storing = under_way
        sent = self._held - {rid for rid, _ in under_way}
        self._held -= sent
        if self._connector is not None:
            self._connector.completed()  # which would otherwise keep all that have ended
        return sent, received

    def lost_blocks(self) -> set[int]:
        """Blocks that did not come, since the last call."""
        lost, self._lost_blocks = self._lost_blocks, set()
        return lost

    def report(self) -> StepReport | None:
        """What the scheduler's half does not see otherwise, since the last call; the first time in any case."""
        report, self._report = self._report, StepReport()
        first, self._has_reported = not self._has_reported, True
        return report if first or report != StepReport() else None

    def take_figures(self) -> dict[str, float]:
        """What has been counted since the last call."""
        figures, self.figures = self.figures, {}
        return figures

    def drain(self, timeout_s: float) -> bool:
        """Wait until all copies have ended; False if they have not by then."""
        return self._connector is None or self._connector.drain(timeout_s)

    def close(self, timeout_s: float = 10.0) -> None:
        """Let what is under way end."""
        if self._connector is not None:
            self._connector.close(timeout_s)

    def _end(self, loading: _Loading) -> None:
        load = loading.load
        chunks = [load.start // self._chunk_tokens]  # nothing has come
        if loading.transfer is not None:
            chunks = list(loading.transfer.failed_chunks())
        good = min(load.end, max(load.start, chunks[0] * self._chunk_tokens)) if chunks else load.end
        if good < load.end:
            # All behind a hole is of no use: vLLM computes from the first block that is named.
            first, end = good // self._block_tokens, load.end // self._block_tokens
            self._lost_blocks.update(load.blocks[first:end])
            self._report.failed.add(load.rid)
            self._count("load_failures")
        self._count("load_requests")
        self._count("loaded_tokens", good - load.start)
        self._count("load_seconds", time.perf_counter() - loading.since)

    def _count_stored(self, rid: str) -> None:
        self._report.stored[rid] = self._report.stored.get(rid, 0) + 1

    def _count(self, name: str, number: float = 1) -> None:
        self.figures[name] = self.figures.get(name, 0) + number

    def _chain(self, store: Store) -> Chain:
        digests = [store.digests[at : at + DIGEST_BYTES] for at in range(0, len(store.digests), DIGEST_BYTES)]
        chain = Chain.from_digests(digests, self._chunk_tokens, tenant=store.tenant, positions_known=True)
        chain.salted = store.salted
        return chain

    def _slots_of_load(self, load: Load) -> npt.NDArray[np.int64]:
        """Of all tokens of the ticket's chunks; -1 for those that vLLM has, or has no block for."""
        ticket = load.ticket
        assert ticket is not None
        first, end = ticket.first * self._chunk_tokens, ticket.boundary * self._chunk_tokens
        slots = np.full(end - first, -1, np.int64)
        slots[load.start - first : load.end - first] = self._slots(load.blocks, load.start, load.end)
        return slots

    def _slots(self, blocks: list[int], start: int, end: int) -> npt.NDArray[np.int64]:
        positions = np.arange(start, end)
        width = self._block_tokens
        return np.asarray(blocks, np.int64)[positions // width] * width + positions % width


def _wait_for_any(transfers: list[Transfer | None]) -> None:
    first = next((transfer for transfer in transfers if transfer is not None), None)
    if first is not None and all(transfer is not None and not transfer.done() for transfer in transfers):
        first.wait(_IDLE_WAIT_S)  # they end in the order in which they were begun
