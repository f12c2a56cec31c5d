"""What a kernel package provides: copies for host memory, and queues of copies for a device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar, NamedTuple, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from lmcache_sdk.layout import KVLayout, Plane

Bytes = npt.NDArray[np.uint8]
Offsets = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Pinned:
    """Whether a buffer is registered for direct copies by a device. True or false as a whole.

    Attributes:
        pinned: copies may go straight to and from the buffer.
        why: where it is not, the reason.
    """

    pinned: bool
    why: str = ""

    def __bool__(self) -> bool:
        return self.pinned


@dataclass(frozen=True)
class Plan:
    """The slots of one chunk, checked once, for all layers and both directions.

    Planes of other page geometry need other offsets for the same slots; each is worked out at first use and
    kept in ``tables`` by whoever made the plan.

    Attributes:
        slots: int64 [tokens], a copy.
        device: where the memory is.
        tables: what a kernel package derives from the slots.
    """

    slots: Offsets
    device: str = "cpu"
    tables: dict[Any, Any] = field(default_factory=dict, compare=False, repr=False)

    @property
    def tokens(self) -> int:
        """Tokens of the chunk."""
        return self.slots.size

    def cut(self, tokens: int) -> list[Plan]:
        """Those of consecutive chunks, where this one's slots are those of several. What holds for all is not checked
        again.
        """
        known = {"highest": self.highest, **({"distinct": True} if self.distinct else {})}
        plans = [Plan(self.slots[at : at + tokens], self.device) for at in range(0, self.tokens, tokens)]
        for plan in plans:
            vars(plan).update(known)
        return plans

    @cached_property
    def highest(self) -> int:
        """No slot lies above."""
        return int(self.slots.max())

    @cached_property
    def distinct(self) -> bool:
        """No slot twice. Ascending slots, the usual case, need no sort."""
        return bool((self.slots[1:] > self.slots[:-1]).all()) or np.unique(self.slots).size == self.slots.size


class Kernels(Protocol):
    """What a kernel package provides for its device types. Thread-safe.

    Bad input raises :class:`~lmcache_sdk.errors.LayoutError` before anything is written. Further abilities
    are protocols of their own.
    """

    name: ClassVar[str]
    device_types: ClassVar[tuple[str, ...]]

    def plan(self, layout: KVLayout, slots: npt.ArrayLike) -> Plan:
        """Check the slots of a chunk and prepare its copies.

        Args:
            slots: int64 [tokens], ``page * page_tokens + token`` each.

        Raises:
            LayoutError: no slots, not integers of one dimension, or outside ``0 .. layout.slots - 1``; a
                layout on a device of another type.
        """
        ...

    def gather(self, planes: Sequence[Plane], heads: tuple[int, int], plan: Plan, chunk: Bytes) -> None:
        """Copy the plan's slots into ``chunk``, which is overwritten as a whole. Done on return.

        Args:
            planes: in canonical order, of equal dim and element size. Strides and page geometry may differ.
            heads: ``first, end`` of the heads to copy, counted within the planes.
            chunk: C-contiguous uint8 of exactly ``planes * tokens * (end - first) * dim * itemsize`` bytes.

        Raises:
            LayoutError: a chunk of another size, type or order; heads or slots outside a plane; planes of
                different dim or element size.
        """
        ...

    def scatter(self, planes: Sequence[Plane], heads: tuple[int, int], plan: Plan, chunk: Bytes) -> None:
        """Copy ``chunk`` into the plan's slots; nothing else is written. Done on return. Arguments as in ``gather``.

        Raises:
            LayoutError: as in ``gather``, and for a slot that is given twice.
        """
        ...

    def pin(self, buffer: Bytes) -> Pinned:
        """Register host memory for direct copies. A refusal is an answer, never a silent slow path.

        The caller keeps the memory mapped until ``unpin``.
        """
        ...

    def unpin(self, buffer: Bytes) -> None:
        """Undo ``pin``; nothing happens for a buffer that is not pinned."""
        ...


class Event(Protocol):
    """A point in a queue of copies."""

    def done(self) -> bool:
        """Whether everything before it has ended. Never blocks.

        Raises:
            DeviceError: the device failed; what had been queued may have happened, or not.
        """
        ...

    def wait(self) -> None:
        """Block until it is done. Raises as ``done``."""
        ...

    def hold(self, stream: Any) -> None:
        """Have a stream of the engine's wait for it, on the device: what is queued there from now on runs later."""
        ...


class CopyStream(Protocol):
    """A queue of copies on one device: they run in order, later than the calls that queue them. For one thread.

    Until a copy has ended, its planes and its chunk belong to the device; the plan may be dropped at once.
    """

    def wait(self, event: Any) -> None:
        """What is queued from now on runs after an event: the engine's (of its own library), or one of ``record``."""
        ...

    def gather(self, planes: Sequence[Plane], heads: tuple[int, int], plan: Plan, chunk: Bytes) -> None:
        """As :meth:`Kernels.gather`, queued.

        Raises:
            LayoutError: as there, and for a chunk that does not lie in one pinned buffer.
        """
        ...

    def scatter(self, planes: Sequence[Plane], heads: tuple[int, int], plan: Plan, chunk: Bytes) -> None:
        """As :meth:`Kernels.scatter`, queued. Raises as ``gather``."""
        ...

    def record(self) -> Event:
        """The end of what has been queued so far."""
        ...


class Room(NamedTuple):
    """Memory of a device.

    Attributes:
        base: its address.
        owner: keeps it alive; the ``owner`` of planes in it.
    """

    base: int
    owner: Any


@runtime_checkable
class DeviceKernels(Kernels, Protocol):
    """Kernels whose copies can be queued on a device.

    Attributes:
        prefers_staging: why the pool's memory is by default not registered; empty = it is.
    """

    prefers_staging: str

    def stream(self, device: str) -> CopyStream:
        """A new queue of copies on a device, ``cuda:0`` and the like.

        Raises:
            DeviceError: there is no such device.
        """
        ...

    def allocate(self, device: str, nbytes: int) -> Room:
        """Memory of a device, to measure and test with, at a multiple of 256. Raises as ``stream``."""
        ...
