"""What passes from one life of a shared pool to the next: the journal is kept, and read at the start."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from itertools import groupby
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import msgspec

from lmcache_sdk.core import Core, Space
from lmcache_sdk.core.extents import Note
from lmcache_sdk.errors import RecordError
from lmcache_sdk.keys import EXACT, Origin
from lmcache_sdk.pool import Pool, extent_bytes
from lmcache_sdk.records import HEADER_BYTES, read_header
from lmcache_sdk.spec import Namespace, Producer

if TYPE_CHECKING:
    from lmcache_sdk.pool.journal import Journal, Recovered


_T = TypeVar("_T")


class Described(msgspec.Struct, frozen=True, array_like=True):
    """A space, as the journal keeps it: without it nobody knows the cells of its chunks."""

    namespace: Namespace
    producer: Producer
    fidelity: str = EXACT


class Verdict(msgspec.Struct, frozen=True, array_like=True):
    """On two producers of a namespace, by their ids in order. Of several the last one with the highest turn holds.

    Attributes:
        turn: how often they were closed and reopened; while it is odd they must not read each other's chunks.
        depth, compared, worst: of what agreed since, see :class:`~lmcache_sdk.api.PairStats`.
    """

    namespace: str
    producers: tuple[str, str]
    turn: int = 1
    depth: int = 0
    compared: int = 0
    worst: dict[str, float] = {}


class Room(NamedTuple):
    """A space that is open again: where its chunks go, and the number and extent size of each cell by name."""

    space: Space
    cells: Mapping[tuple[str, str], tuple[int, int]]


def remembered(blobs: Iterable[bytes], kind: type[_T]) -> list[_T]:
    """What an earlier life has written down of this kind; what cannot be read is left out, and its chunks with it."""
    found = []
    for blob in blobs:
        with suppress(msgspec.MsgspecError):
            found.append(msgspec.json.decode(blob, type=kind))
    return found


def room_of(space: Space, namespace: Namespace) -> Room:
    """For :func:`adopt`."""
    cells = namespace.spec.cells
    return Room(space, {(cell.group, cell.name): (i, extent_bytes(cell.nbytes)) for i, cell in enumerate(cells)})


def write_journal(journal: Journal, log: list[tuple[int, int]]) -> None:
    """Write down what has happened to extents, in order: so that what is freed is free before it is given again."""
    for what, changes in groupby(log, key=lambda change: min(change[1], 1)):
        addresses = (address for address, _ in changes)
        if what == Note.FREED:
            for address in addresses:
                journal.freed(address)
        elif what == Note.QUARANTINED:
            journal.busy(addresses)
        elif what == Note.SEALED:
            journal.sealed(addresses)
        elif what == Note.LEASED:
            journal.leased(addresses)
        elif what == Note.RELEASED:
            journal.leased(addresses, -1)
        else:
            for address, nbytes in changes:
                assert journal.allocated(address, nbytes), "Extents.most bounds them"
    log.clear()


def adopt(core: Core, pool: Pool, recovered: Sequence[Recovered], rooms: Mapping[Origin, Room]) -> int:
    """Take over what an earlier life left, before anything else is in the pool; the answer is how many chunks.

    Sealed chunks are adopted, to be verified at their first use; what a client of that life may still write to is
    quarantined; the rest is free.
    """
    from lmcache_sdk.pool.journal import ExtentState

    journal, extents = pool.journal, core.extents
    assert journal is not None
    chunks: dict[tuple[Space, bytes], dict[int, Recovered]] = {}
    positions: dict[tuple[Space, bytes], int] = {}
    for extent in recovered:
        if not extents.take(extent.address, extent.nbytes):
            raise AssertionError(f"the journal has an extent at {extent.address:#x} where none can be")
        if extent.state is ExtentState.SEALED:
            place = _place(pool, extent, rooms)
            if place is not None:
                space, digest, cell, position = place
                if cell not in chunks.setdefault((space, digest), {}):
                    chunks[space, digest][cell] = extent
                    positions[space, digest] = position
                    continue
        _let_go(core, journal, extent, busy=extent.state is ExtentState.BUSY)
    whole = {key: cells for key, cells in chunks.items() if len(cells) == len(key[0].cell_bytes)}
    for key in chunks.keys() - whole.keys():
        for extent in chunks[key].values():
            _let_go(core, journal, extent, busy=False)
    for key in sorted(whole, key=positions.__getitem__, reverse=True):
        space, digest = key
        cells = whole[key]
        addresses = [cells[cell].address for cell in range(len(space.cell_bytes))]
        leased = any(extent.leases for extent in cells.values())
        core.earlier.adopt(space, digest, addresses, positions[key], leased=leased)
    return len(whole)


def end_earlier_life(core: Core, journal: Journal, recovered: Sequence[Recovered]) -> None:
    """No client of the earlier life touches the pool any more."""
    for extent in recovered:
        if extent.leases:
            journal.leased([extent.address], -extent.leases)
    core.earlier.end()


def _place(pool: Pool, extent: Recovered, rooms: Mapping[Origin, Room]) -> tuple[Space, bytes, int, int] | None:
    """(space, digest, cell, first position) of a sealed extent; None if its header does not say so."""
    try:
        header = read_header(pool.record(extent.address, HEADER_BYTES))
    except RecordError:
        return None
    room = rooms.get(header.key.origin)
    if room is None:
        return None
    cell, nbytes = room.cells.get((header.key.group, header.key.cell), (-1, 0))
    if cell < 0 or not nbytes <= extent.nbytes < nbytes + 64:
        return None
    return room.space, header.key.digest, cell, header.first_position


def _let_go(core: Core, journal: Journal, extent: Recovered, *, busy: bool) -> None:
    if busy or extent.leases:
        core.earlier.quarantine(extent.address)
    else:
        core.extents.free(extent.address)
        journal.freed(extent.address)
