"""The CPU's kernels: the production path for host memory, the reference for all other kernels."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from itertools import pairwise
from math import gcd
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from lmcache_sdk.kernels.checks import check_gather, check_scatter, plan_of
from lmcache_sdk.kernels.interface import Bytes, Offsets, Pinned, Plan
from lmcache_sdk.kernels.tables import Table, table_of
from lmcache_sdk.layout import Geometry, KVLayout, Plane, Planes, memory

# Units below this cost more to address than to copy.
_TINY_UNIT = 32
# Down to a cache line, small units cost nothing: planes that are aligned to it have one size in common.
_LINE = 64
# memcpy of 0.5 to 4 KiB runs at half the speed of smaller and larger ones (glibc, x86): such units are cut.
_CUT_UNIT = 256
_PAGE_UNIT = 4096
# Of a plane. Working out this many unit numbers takes as long as calling numpy once more.
_MANY_UNITS = 1024


def _table(plan: Plan, geometry: Geometry, heads: tuple[int, int]) -> Table | None:
    """None = elements lie apart, or in units so small that strided views are faster."""
    if geometry.dim > 1 and geometry.strides.dim != geometry.itemsize:
        return None
    table = table_of(plan, geometry, heads)
    return table if table.unit >= _TINY_UNIT else None


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
    """Memory of the host. One thread a copy.

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
        return plan_of(layout, slots, self.name, self.device_types)

    def gather(self, planes: Sequence[Plane], heads: tuple[int, int], plan: Plan, chunk: Bytes) -> None:
        """See :class:`Kernels`."""
        chosen = check_gather(planes, heads, plan, chunk)
        for mem, ids, part in _copies(chosen, heads, plan, chunk):
            if ids is None:
                _assign(part, mem)
            else:
                mem.take(ids, out=part, mode="clip")  # clip: otherwise numpy buffers the output

    def scatter(self, planes: Sequence[Plane], heads: tuple[int, int], plan: Plan, chunk: Bytes) -> None:
        """See :class:`Kernels`."""
        chosen = check_scatter(planes, heads, plan, chunk)
        for mem, ids, part in _copies(chosen, heads, plan, chunk):
            if ids is None:
                _assign(mem, part)
            elif _outside(mem, ids) and _outside(mem, part):
                mem.put(ids, part, mode="clip")
            else:
                mem[ids] = part  # see _outside

    def pin(self, buffer: Bytes) -> Pinned:
        """Never pinned, and never needed."""
        return Pinned(False, "the CPU copies straight from any memory")

    def unpin(self, buffer: Bytes) -> None:
        """Nothing to undo."""


def _copies(
    planes: Planes, heads: tuple[int, int], plan: Plan, chunk: Bytes
) -> list[tuple[npt.NDArray[Any], Offsets | None, npt.NDArray[Any]]]:
    """The copies that make up a gather or scatter, with nothing left that could fail.

    Each is (memory, unit numbers, part of the chunk), both sides as arrays of units; or, without unit
    numbers, two views of one shape.
    """
    rows = chunk.reshape(len(planes), -1)
    copies: list[tuple[npt.NDArray[Any], Offsets | None, npt.NDArray[Any]]] = []
    apart: set[Geometry] = set()
    for geometry, first, end, low, offsets, reach, step in planes.alike:
        table = _table(plan, geometry, heads)
        if table is None:
            apart.add(geometry)
            continue
        # From the lowest plane to the highest; what lies between them is never touched.
        span = memory(low + table.low, (reach + table.reach,), "|u1")
        unit = _best(gcd(table.unit, step))
        if unit >= min(table.unit, _LINE) and rows.shape[1] <= unit * _MANY_UNITS:
            kind = _units(unit)
            ids = table.ids_in(offsets.tobytes(), unit)
            copies.append((span.view(kind), ids, rows[first:end].reshape(-1).view(kind)))
        else:
            unit = _best(table.unit)
            kind, ids = _units(unit), table.ids(unit)
            for at, part in zip(offsets.tolist(), rows[first:end].view(kind), strict=True):
                copies.append((span[at : at + table.reach].view(kind), ids, part))
    for stack in planes.stacks if apart else ():
        if stack.geometry in apart:
            pages, page_tokens, _, dim, itemsize, strides = stack.geometry
            shape = (stack.size, pages, page_tokens, heads[1] - heads[0], dim)
            base = stack.base + heads[0] * strides.head
            mem = memory(base, shape, f"<u{itemsize}", strides=(stack.distance, *strides))
            mine = rows[stack.first : stack.first + stack.step * stack.size : stack.step]
            part = mine.view(mem.dtype).reshape(stack.size, plan.tokens, *shape[3:])
            runs = _runs(page_tokens, plan.slots)
            copies += [(mem[:, page, tokens], None, part[:, into]) for page, tokens, into in runs]
    return copies


def _assign(into: npt.NDArray[Any], given: npt.NDArray[Any]) -> None:
    """Copy views of some layers, all at once where that is safe.

    One array for several allocations has whatever lies between them in its range. numpy takes that for an overlap and
    copies by way of a temporary array; if that lies in the range too, by way of another one, until the stack ends.
    A single layer lies in one allocation.
    """
    if not np.may_share_memory(into, given):
        np.copyto(into, given)
        return
    for one, other in zip(into, given, strict=True):
        np.copyto(one, other)


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
