"""What queues of copies have in common, whoever makes the device: how a gather or scatter is made of transfers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import numpy as np

from lmcache_sdk.errors import DeviceError
from lmcache_sdk.kernels.checks import check_gather, check_scatter
from lmcache_sdk.kernels.interface import Bytes, Event, Offsets, Plan
from lmcache_sdk.kernels.tables import Piece, Runs, Table, pieces_of, runs_of, table_of
from lmcache_sdk.layout import Alike, Plane, Planes

CheckQueued = Callable[[Plan, Bytes, str], int]


def number_of(device: str) -> int:
    """The number in ``cuda:0`` and the like.

    Raises:
        DeviceError: there is none: which device that is goes by the thread that asks.
    """
    kind, _, number = device.partition(":")
    if not number.isdecimal():
        raise DeviceError(f"{device!r} does not say which device; {kind}:0 and the like do")
    return int(number)


class Small(NamedTuple):
    """Runs that are too small to be transferred one by one: blocks of planes of one geometry.

    Attributes:
        planes: these planes.
        alike: what they have in common.
        heads: which of them.
        table: where the blocks are, a row or one head of it each.
        plan: whose ``tables`` may keep what is derived from it.
    """

    planes: Planes
    alike: Alike
    heads: tuple[int, int]
    table: Table
    plan: Plan


class StagedQueue(ABC):
    """Large runs are transferred one by one, small ones are packed into a staging buffer of the device, which is
    transferred as a whole. A :class:`~lmcache_sdk.kernels.CopyStream`; a package fills in what is vendor-specific.

    Args:
        device: ``cuda:0`` and the like.
        check_queued: see :meth:`lmcache_sdk.kernels.QueuedKernels.check_queued`.
    """

    def __init__(self, device: str, check_queued: CheckQueued) -> None:
        self.device = device
        self._check_queued = check_queued

    # For a package

    @abstractmethod
    def queueing(self) -> AbstractContextManager[Any]:
        """Around every use of the queue: what the vendor's libraries need to know of the calling thread."""

    @abstractmethod
    def staging(self) -> tuple[int, int]:
        """Address and bytes of the staging buffer."""

    @abstractmethod
    def is_large(self, runs: Runs, planes: int, *, to_host: bool) -> bool:
        """Whether runs are transferred one by one; there are as many in each of the planes."""

    @abstractmethod
    def transfer(self, targets: Offsets, sources: Offsets, sizes: Offsets, *, to_host: bool) -> None:
        """Queue transfers between host and device, of which none overlap; addresses and bytes, int64 each."""

    @abstractmethod
    def pack(self, small: Small, piece: Piece) -> None:
        """Queue: blocks from engine memory into the front of the staging buffer, [planes, blocks, bytes]."""

    @abstractmethod
    def unpack(self, small: Small, piece: Piece) -> None:
        """Queue the reverse of ``pack``."""

    @abstractmethod
    def wait(self, event: Any) -> None:
        """See :class:`~lmcache_sdk.kernels.CopyStream`."""

    @abstractmethod
    def record(self) -> Event:
        """See :class:`~lmcache_sdk.kernels.CopyStream`."""

    # What the interface asks for

    def gather(self, planes: Sequence[Plane], heads: tuple[int, int], plan: Plan, chunk: Bytes) -> None:
        """See :class:`~lmcache_sdk.kernels.CopyStream`."""
        self._copy(check_gather(planes, heads, plan, chunk), heads, plan, chunk, to_host=True)

    def scatter(self, planes: Sequence[Plane], heads: tuple[int, int], plan: Plan, chunk: Bytes) -> None:
        """See :class:`~lmcache_sdk.kernels.CopyStream`."""
        self._copy(check_scatter(planes, heads, plan, chunk), heads, plan, chunk, to_host=False)

    def _copy(self, planes: Planes, heads: tuple[int, int], plan: Plan, chunk: Bytes, *, to_host: bool) -> None:
        start = self._check_queued(plan, chunk, self.device)
        width = chunk.nbytes // len(planes)
        with self.queueing():
            for alike in planes.alike:
                host = start + alike.first * width
                runs = runs_of(plan, alike.geometry, heads)
                table = table_of(plan, alike.geometry, heads, merge=False)
                fits = table.block <= self.staging()[1]
                if not fits or self.is_large(runs, alike.offsets.size, to_host=to_host):
                    self._one_by_one(alike, runs, host, width, to_host)
                else:
                    chosen = Planes(planes[alike.first : alike.end])
                    self._through_staging(Small(chosen, alike, heads, table, plan), host, to_host)

    def _one_by_one(self, alike: Alike, runs: Runs, host: int, width: int, to_host: bool) -> None:
        count = alike.offsets.size
        memory = np.add.outer(alike.low + alike.offsets, runs.offsets).reshape(-1)
        places = np.add.outer(host + np.arange(count) * width, runs.places).reshape(-1)
        targets, sources = (places, memory) if to_host else (memory, places)
        self.transfer(targets, sources, np.tile(runs.sizes, count), to_host=to_host)

    def _through_staging(self, small: Small, host: int, to_host: bool) -> None:
        table = small.table
        address, limit = self.staging()
        staging = np.array([address])
        for piece in pieces_of(len(small.planes), len(table.offsets), table.block, limit):
            place, size = np.array([host + piece.start]), np.array([piece.size])
            if to_host:
                self.pack(small, piece)
                self.transfer(place, staging, size, to_host=True)
            else:
                self.transfer(staging, place, size, to_host=False)
                self.unpack(small, piece)
