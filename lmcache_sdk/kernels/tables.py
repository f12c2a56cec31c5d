"""Slots and strides -> the blocks that a copy consists of, for planes of one geometry."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from lmcache_sdk.kernels.interface import Offsets, Plan
from lmcache_sdk.layout import Geometry


@dataclass(frozen=True, slots=True)
class Table:
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
    numbers: dict[tuple[Any, ...], Offsets] = field(default_factory=dict, compare=False, repr=False)

    def ids(self, unit: int) -> Offsets:
        """The blocks as numbers of units from the first, in the chunk's order."""
        ids = self.numbers.get((unit,))
        if ids is None:
            parts = np.arange(self.block // unit)
            ids = self.numbers[unit,] = np.add.outer(self.offsets // unit, parts).reshape(-1)
        return ids

    def ids_in(self, planes: bytes, unit: int) -> Offsets:
        """The same in several planes; ``planes`` are bytes from the first one's base to each, int64."""
        ids = self.numbers.get((unit, planes))
        if ids is None:
            bases = np.frombuffer(planes, np.int64) // unit
            ids = self.numbers[unit, planes] = np.add.outer(bases, self.ids(unit)).reshape(-1)
        return ids

    def moved(self, nbytes: int) -> Table:
        """The same blocks elsewhere."""
        return Table(self.low + nbytes, self.offsets, self.block, self.unit, self.reach, self.numbers)


def make_table(geometry: Geometry, heads: tuple[int, int], slots: Offsets, *, merge: bool = True) -> Table:
    """Grow blocks from the element outwards while memory follows the chunk's order.

    Args:
        merge: join tokens that follow each other in memory, as far as all blocks stay equal. Without it a block is a
            row, whatever the slots are.
    """
    count, strides = heads[1] - heads[0], geometry.strides
    block = geometry.itemsize
    pages, tokens = np.divmod(slots, geometry.page_tokens)
    offsets = pages * strides.page + tokens * strides.token
    dense = geometry.dim == 1 or strides.dim == block
    if dense:
        block *= geometry.dim
    if dense and (count == 1 or strides.head == block):
        # Rows are whole. Slots that follow each other in memory, within a page or across pages, merge.
        block *= count
        if merge:
            breaks = np.flatnonzero(offsets[1:] - offsets[:-1] != block) + 1
            merged = int(np.gcd.reduce(breaks, initial=slots.size))
            offsets, block = offsets[::merged], block * merged
    else:
        offsets = np.add.outer(offsets, np.arange(count) * strides.head).reshape(-1)
        if not dense:
            offsets = np.add.outer(offsets, np.arange(geometry.dim) * strides.dim).reshape(-1)
    low = int(offsets.min())
    offsets = offsets - low
    unit = int(np.gcd.reduce(offsets, initial=block))
    return Table(low + heads[0] * strides.head, offsets, block, unit, int(offsets.max()) + block)


def table_of(plan: Plan, geometry: Geometry, heads: tuple[int, int], *, merge: bool = True) -> Table:
    """The plan's table for a geometry, made at first use."""
    key = (geometry, heads, merge)
    table: Table | None = plan.tables.get(key)
    if table is None:
        strides = geometry.strides
        if geometry.pages > 1:
            page = int(plan.slots[0]) // geometry.page_tokens
            first, low = page * geometry.page_tokens, page * strides.page
        else:
            first = int(plan.slots.min())
            low = first * strides.token
        table = _table_of_pattern(geometry, heads, merge, (plan.slots - first).tobytes()).moved(low)
        plan.tables[key] = table
    return table


@lru_cache(maxsize=64)  # chunks that are whole pages differ in nothing but the page
def _table_of_pattern(geometry: Geometry, heads: tuple[int, int], merge: bool, pattern: bytes) -> Table:
    return make_table(geometry, heads, np.frombuffer(pattern, np.int64), merge=merge)


class Runs(NamedTuple):
    """Blocks joined as far as they follow each other; they may differ in size. What a copy engine is given.

    Attributes:
        offsets: int64 [runs], bytes from a plane's base.
        places: int64 [runs], bytes from the start of the plane's part of the chunk.
        sizes: int64 [runs], bytes.
    """

    offsets: Offsets
    places: Offsets
    sizes: Offsets


def runs_of(plan: Plan, geometry: Geometry, heads: tuple[int, int]) -> Runs:
    """The plan's runs for a geometry, made at first use."""
    key = ("runs", geometry, heads)
    runs: Runs | None = plan.tables.get(key)
    if runs is None:
        table = table_of(plan, geometry, heads)
        steps = table.offsets[1:] - table.offsets[:-1]
        edges = np.concatenate(([0], np.flatnonzero(steps != table.block) + 1, [table.offsets.size]))
        starts, sizes = edges[:-1], (edges[1:] - edges[:-1]) * table.block
        runs = plan.tables[key] = Runs(table.low + table.offsets[starts], starts * table.block, sizes)
    return runs


class Piece(NamedTuple):
    """A part of a copy that a staging buffer holds: some planes with all their blocks, or one plane with some.

    Attributes:
        planes, blocks: which of them.
        start: bytes from the start of the first plane's part of the chunk.
        size: bytes.
    """

    planes: slice
    blocks: slice
    start: int
    size: int


def pieces_of(planes: int, blocks: int, block: int, limit: int) -> Iterator[Piece]:
    """Cut a copy of equal planes.

    Args:
        planes, blocks: how many planes, and blocks of each.
        block: bytes of a block.
        limit: bytes, of a block at least.
    """
    width = blocks * block
    if width <= limit:
        step = limit // width
        for first in range(0, planes, step):
            end = min(first + step, planes)
            yield Piece(slice(first, end), slice(0, blocks), first * width, (end - first) * width)
        return
    step = limit // block
    for plane in range(planes):
        for first in range(0, blocks, step):
            end = min(first + step, blocks)
            start = plane * width + first * block
            yield Piece(slice(plane, plane + 1), slice(first, end), start, (end - first) * block)
