"""Loads that a forward pass follows layer by layer: what SGLang calls a ``layer_done_counter``.

SGLang numbers the batches that load, tells which one the next forward pass belongs to, and asks before each layer's
attention. It waits for as long as it is made to; so the bounds are here.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import NamedTuple

from lmcache_sdk.connector import CopyTransfer
from lmcache_sdk.observe.logs import logger

_log = logger("sglang")


class _Batch(NamedTuple):
    transfers: Sequence[CopyTransfer]
    deadline: float


class LayerLoads:
    """The loads of the batches that have been started and not finished.

    Args:
        layers: of the model.
        timeout_s: for all layers of a batch together. Copies of memory that is there take milliseconds.

    Attributes:
        num_layers, consumer_index: as SGLang reads them.
    """

    def __init__(self, layers: int, timeout_s: float) -> None:
        self.num_layers = layers
        self._timeout_s = timeout_s
        self._batches: dict[int, _Batch] = {}
        self._started = 0
        self.consumer_index = -1

    def start(self, transfers: Sequence[CopyTransfer]) -> int:
        """The number of a batch with these loads."""
        number = self._started
        self._started += 1
        self._batches[number] = _Batch(transfers, time.monotonic() + self._timeout_s)
        return number

    def set_consumer(self, index: int) -> None:
        """Of the forward pass that comes next: its batch, or -1."""
        self.consumer_index = index

    def wait_until(self, threshold: int) -> None:
        """Block until a layer of that batch is in place, or too late; :meth:`finish` tells which."""
        batch = self._batches.get(self.consumer_index)
        if batch is not None:
            _wait(batch, threshold)

    def finish(self, index: int) -> bool:
        """Block until nothing of a batch is written any more; False: not all of it is in place."""
        batch = self._batches.get(index)
        if batch is None:
            return True
        landed = _wait(batch, self.num_layers - 1)
        if not landed:
            failed = sum(len(transfer.failed_chunks()) for transfer in batch.transfers)
            _log.error("%d loads of a batch are not in place: %d chunks failed", len(batch.transfers), failed)
            _end(batch)
        self._batches.pop(index, None)
        return landed

    def end(self) -> None:
        """Return when nothing of any batch is written any more."""
        for index in list(self._batches):
            _end(self._batches.pop(index))
        self.consumer_index = -1


def _wait(batch: _Batch, layer: int) -> bool:
    return all(transfer.wait_layer(layer, max(0.0, batch.deadline - time.monotonic())) for transfer in batch.transfers)


def _end(batch: _Batch) -> None:
    """After the chunk that is being copied nothing more is. Until that has ended its place is not SGLang's to give
    away, so this waits for it, which is a copy of memory.
    """
    for transfer in batch.transfers:
        transfer.cancel()
    for transfer in batch.transfers:
        while not transfer.wait(1.0):
            pass
