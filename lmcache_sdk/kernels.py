"""Bytes between engine memory and canonical chunks: the kernel interface, the choice of a package, the CPU's
own.

A *gather* copies chosen slots of engine memory into a chunk, a *scatter* the reverse. A chunk is uint8, C
order ``[plane, token, head, dim]``, planes in canonical order (layer by layer, in each ``k`` then ``v``).
Kernels see addresses and strides, never a key.

A kernel package announces itself as an entry point of the group ``lmcache_sdk.kernels``, named after the
device type that it serves. Announcements are read from package metadata; a package is imported when memory of
its device type is first registered.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from importlib.metadata import EntryPoint, entry_points
from itertools import pairwise
from math import gcd
from typing import Any, ClassVar, Protocol

import numpy as np
import numpy.typing as npt

from lmcache_sdk.errors import LayoutError
from lmcache_sdk.layout import Geometry, KVLayout, Plane, Planes, memory

ENTRY_POINTS = "lmcache_sdk.kernels"

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
        tables: what a kernel package derives from the slots.
    """

    slots: Offsets
    tables: dict[Any, Any] = field(default_factory=dict, compare=False, repr=False)

    @property
    def tokens(self) -> int:
        """Tokens of the chunk."""
        return self.slots.size

    @cached_property
    def highest(self) -> int:
        """The highest slot."""
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
        """Copy the plan's slots into ``chunk``, which is overwritten as a whole.

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
        """Copy ``chunk`` into the plan's slots; nothing else is written. Arguments as in ``gather``.

        Raises:
            LayoutError: as in ``gather``, and for a slot that is given twice.
        """
        ...

    def pin(self, buffer: Bytes) -> Pinned:
        """Register host memory for direct copies. A refusal is an answer, never a silent slow path."""
        ...

    def unpin(self, buffer: Bytes) -> None:
        """Undo ``pin``; nothing happens for a buffer that is not pinned."""
        ...


# Units below this cost more to address than to copy.
_TINY_UNIT = 32
# Down to a cache line, small units cost nothing: planes that are aligned to it have one size in common.
_LINE = 64
# memcpy of 0.5 to 4 KiB runs at half the speed of smaller and larger ones (glibc, x86): such units are cut.
_CUT_UNIT = 256
_PAGE_UNIT = 4096
# Of a plane. Working out this many unit numbers takes as long as calling numpy once more.
_MANY_UNITS = 1024


@dataclass(frozen=True, slots=True)
class _Table:
    """A chunk's place in planes of one geometry: equal blocks, contiguous both in memory and in the chunk.

    Attributes:
        low: bytes from a plane's base to its first block.
        offsets: int64 [blocks], bytes from there to each block, in the chunk's order.
        block: bytes of a block.
        unit: bytes; the largest that divides the block and all offsets.
        reach: bytes from the start of the first block to the end of the last, in memory.
        numbers: what ``ids`` has worked out.
    """

    low: int
    offsets: Offsets
    block: int
    unit: int
    reach: int
    numbers: dict[int, Offsets] = field(default_factory=dict)

    def ids(self, unit: int) -> Offsets:
        """The blocks as numbers of units from the first, in the chunk's order."""
        ids = self.numbers.get(unit)
        if ids is None:
            parts = np.arange(self.block // unit)
            ids = self.numbers[unit] = np.add.outer(self.offsets // unit, parts).reshape(-1)
        return ids


def _table(geometry: Geometry, heads: tuple[int, int], slots: Offsets) -> _Table | None:
    """Grow blocks from the element outwards while memory follows the chunk's order; None = they stay tiny."""
    count, strides = heads[1] - heads[0], geometry.strides
    if geometry.dim > 1 and strides.dim != geometry.itemsize:
        return None
    block = geometry.itemsize * geometry.dim
    pages, tokens = np.divmod(slots, geometry.page_tokens)
    offsets = pages * strides.page + tokens * strides.token
    if count == 1 or strides.head == block:
        # Rows are whole. Slots that follow each other in memory, within a page or across pages, merge.
        block *= count
        breaks = np.flatnonzero(offsets[1:] - offsets[:-1] != block) + 1
        merged = int(np.gcd.reduce(breaks, initial=slots.size))
        offsets, block = offsets[::merged], block * merged
    else:
        offsets = np.add.outer(offsets, np.arange(count) * strides.head).reshape(-1)
    low = int(offsets.min())
    offsets = offsets - low
    unit = int(np.gcd.reduce(offsets, initial=block))
    if unit < _TINY_UNIT:
        return None
    return _Table(low + heads[0] * strides.head, offsets, block, unit, int(offsets.max()) + block)


def _runs(page_tokens: int, slots: Offsets) -> list[tuple[int, slice, slice]]:
    """Neighbours within a page: (page, its tokens, the chunk's tokens)."""
    cuts = np.flatnonzero((slots[1:] != slots[:-1] + 1) | (slots[1:] % page_tokens == 0)) + 1
    edges = [0, *cuts.tolist(), slots.size]
    runs = []
    for first, end in pairwise(edges):
        page, token = divmod(int(slots[first]), page_tokens)
        runs.append((page, slice(token, token + end - first), slice(first, end)))
    return runs


class CPUKernels:
    """Memory of the host: the production path for CPU tensors, the reference for all others. One thread a
    copy.

    All planes are seen as one array of *units*, and a copy is one ``take`` or ``put`` of unit numbers: numpy
    runs it at the speed of memcpy, without the interpreter's lock. A unit is the largest size that divides
    whatever is to be copied, so that whole pages, merged runs, ragged ends and strided heads are one case.
    Only where memory does not keep an element's neighbours together (transposed blocks) are strided views
    copied instead, run by run, all layers at once.
    """

    name: ClassVar[str] = "cpu"
    device_types: ClassVar[tuple[str, ...]] = ("cpu",)

    def plan(self, layout: KVLayout, slots: npt.ArrayLike) -> Plan:
        """See :class:`Kernels`."""
        if layout.device.partition(":")[0] not in self.device_types:
            raise LayoutError(f"memory on {layout.device!r} cannot be reached by the {self.name} kernels")
        given = np.asarray(slots)
        if given.ndim != 1 or given.size == 0 or given.dtype.kind not in "iu":
            raise LayoutError(f"slots must be integers [tokens], got {given.dtype} {list(given.shape)}")
        low, high = int(given.min()), int(given.max())
        if low < 0 or high >= layout.slots:
            raise LayoutError(f"slot {low if low < 0 else high} is outside of 0 .. {layout.slots - 1}")
        return Plan(given.astype(np.int64))

    def gather(self, planes: Sequence[Plane], heads: tuple[int, int], plan: Plan, chunk: Bytes) -> None:
        """See :class:`Kernels`."""
        chosen = _checked(planes, heads, plan, chunk)
        if not chunk.flags.writeable:
            raise LayoutError("the chunk is read-only")
        for mem, ids, part in _copies(chosen, heads, plan, chunk):
            if ids is None:
                np.copyto(part, mem)
            else:
                mem.take(ids, out=part, mode="clip")  # clip: otherwise numpy buffers the output

    def scatter(self, planes: Sequence[Plane], heads: tuple[int, int], plan: Plan, chunk: Bytes) -> None:
        """See :class:`Kernels`."""
        chosen = _checked(planes, heads, plan, chunk)
        if not plan.distinct:
            raise LayoutError("a slot is given twice: what lands there would be undefined")
        for mem, ids, part in _copies(chosen, heads, plan, chunk):
            if ids is None:
                np.copyto(mem, part)
            elif _outside(mem, ids) and _outside(mem, part):
                mem.put(ids, part, mode="clip")
            else:
                mem[ids] = part  # see _outside

    def pin(self, buffer: Bytes) -> Pinned:
        """Never pinned, and never needed."""
        return Pinned(False, "the CPU copies straight from any memory")

    def unpin(self, buffer: Bytes) -> None:
        """Nothing to undo."""


def _checked(planes: Sequence[Plane], heads: tuple[int, int], plan: Plan, chunk: object) -> Planes:
    if not planes:
        raise LayoutError("no planes")
    chosen = planes if isinstance(planes, Planes) else Planes(planes)
    first, end = heads
    dim, itemsize = chosen[0].dim, chosen[0].itemsize
    for alike in chosen.alike:
        geometry, plane = alike.geometry, chosen[alike.first]
        if (geometry.dim, geometry.itemsize) != (dim, itemsize):
            raise LayoutError(f"planes of different rows in one copy: {chosen[0].name} and {plane.name}")
        if not 0 <= first < end <= geometry.heads:
            raise LayoutError(f"heads {first} .. {end - 1} are not in {plane.name}")
        if plan.highest >= geometry.slots:
            raise LayoutError(f"slot {plan.highest} is not in {plane.name}")
    if not isinstance(chunk, np.ndarray) or chunk.dtype != np.uint8 or not chunk.flags.c_contiguous:
        raise LayoutError(f"a chunk is a C-contiguous numpy array of uint8, not {_what(chunk)}")
    nbytes = len(chosen) * plan.tokens * (end - first) * dim * itemsize
    if chunk.nbytes != nbytes:
        raise LayoutError(f"the chunk has {chunk.nbytes} bytes, these planes, slots and heads need {nbytes}")
    return chosen


def _what(chunk: object) -> str:
    if isinstance(chunk, np.ndarray):
        return f"{chunk.dtype} {list(chunk.shape)} with strides {chunk.strides}"
    return type(chunk).__name__


def _copies(
    planes: Planes, heads: tuple[int, int], plan: Plan, chunk: Bytes
) -> list[tuple[npt.NDArray[Any], Offsets | None, npt.NDArray[Any]]]:
    """The copies that make up a gather or scatter, with nothing left that could fail.

    Each is (memory, unit numbers, part of the chunk), both sides as arrays of units; or, without unit
    numbers, two views of one shape.
    """
    rows = chunk.reshape(len(planes), -1)
    copies: list[tuple[npt.NDArray[Any], Offsets | None, npt.NDArray[Any]]] = []
    for geometry, first, end, low, offsets, reach, step in planes.alike:
        key = (geometry, heads)
        if key not in plan.tables:
            plan.tables[key] = _table(geometry, heads, plan.slots)
        table: _Table | None = plan.tables[key]
        if table is None:
            continue
        # From the lowest plane to the highest; what lies between them is never touched.
        span = memory(low + table.low, (reach + table.reach,), "|u1")
        unit = _best(gcd(table.unit, step))
        if unit >= min(table.unit, _LINE) and rows.shape[1] <= unit * _MANY_UNITS:
            kind = _units(unit)
            ids = np.add.outer(offsets // unit, table.ids(unit)).reshape(-1)
            copies.append((span.view(kind), ids, rows[first:end].reshape(-1).view(kind)))
        else:
            unit = _best(table.unit)
            kind, ids = _units(unit), table.ids(unit)
            for at, part in zip(offsets.tolist(), rows[first:end].view(kind), strict=True):
                copies.append((span[at : at + table.reach].view(kind), ids, part))
    for stack in planes.stacks:
        if plan.tables[stack.geometry, heads] is None:
            pages, page_tokens, _, dim, itemsize, strides = stack.geometry
            shape = (stack.size, pages, page_tokens, heads[1] - heads[0], dim)
            base = stack.base + heads[0] * strides.head
            mem = memory(base, shape, f"<u{itemsize}", strides=(stack.distance, *strides))
            mine = rows[stack.first : stack.first + stack.step * stack.size : stack.step]
            part = mine.view(mem.dtype).reshape(stack.size, plan.tokens, *shape[3:])
            runs = _runs(page_tokens, plan.slots)
            copies += [(mem[:, page, tokens], None, part[:, into]) for page, tokens, into in runs]
    return copies


def _outside(mem: npt.NDArray[Any], other: npt.NDArray[Any]) -> bool:
    """Whether an array lies outside of the range from a span's first byte to its last.

    A span may begin in one allocation and end in another, with anything between them, this process's own objects
    included. ``put`` with operands in that range would copy the whole span, and write all of it back at the end: old
    bytes over whatever others have written meanwhile. Assignment by index never does; it is slower for small units.
    """
    return not np.may_share_memory(mem, other)  # compares ranges, no more


def _best(unit: int) -> int:
    """The unit, or a divisor of it that is copied faster."""
    cut = gcd(unit, _CUT_UNIT)
    return cut if _CUT_UNIT < unit < _PAGE_UNIT and cut >= _LINE else unit


@cache
def _units(nbytes: int) -> np.dtype[np.void]:
    return np.dtype((np.void, nbytes))


_BUILT_IN = EntryPoint("cpu", "lmcache_sdk.kernels:CPUKernels", ENTRY_POINTS)
_PACKAGES = {"cuda": "lmcache-kernels-cuda", "npu": "lmcache-kernels-ascend"}


def _announced() -> dict[str, EntryPoint]:
    """By device type. The CPU's own are there without any metadata, so a source tree works uninstalled."""
    return {"cpu": _BUILT_IN, **{entry.name: entry for entry in entry_points(group=ENTRY_POINTS)}}


@cache
def _load(entry: EntryPoint) -> Kernels:
    try:
        kernels: Kernels = entry.load()()
    except (ImportError, AttributeError) as error:
        raise LayoutError(f"the kernels {entry.value!r} for {entry.name} do not load: {error}") from error
    return kernels


def kernels_for(device: str) -> Kernels:
    """The kernels for memory on a device, imported at the first call; no other package is imported.

    Args:
        device: ``cpu``, ``cuda:0``, ``npu:0`` …

    Raises:
        LayoutError: no package serves it, and the message names the one to install; or it does not load.
    """
    kind = device.partition(":")[0]
    entry = _announced().get(kind)
    if entry is None:
        package = _PACKAGES.get(kind, f"a kernel package that announces {kind!r} in {ENTRY_POINTS}")
        raise LayoutError(f"no kernels for memory on {device!r}; install {package}")
    return _load(entry)


def describe_kernels() -> dict[str, str]:
    """What is announced, by device type: ``module:name (distribution version)``. Imports nothing."""
    answer = {}
    for kind, entry in sorted(_announced().items()):
        source = f"{entry.dist.name} {entry.dist.version}" if entry.dist else "built in"
        answer[kind] = f"{entry.value} ({source})"
    return answer
