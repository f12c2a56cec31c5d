"""Which bytes of the pool are free: a best-fit allocator that merges neighbours. Pure bookkeeping, no memory.

An address is ``segment << 40 | offset``; an extent never straddles two segments. Sizes are multiples of 64 bytes.
Allocating and freeing cost O(log of the number of distinct hole sizes), whatever the number of extents.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from enum import IntEnum
from itertools import pairwise

from lmcache_sdk.core.parted import ByAddress

SEGMENT_SHIFT = 40
ALIGNMENT = 64


def round_up(nbytes: int) -> int:
    """To the alignment."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def segment_of(address: int) -> int:
    """The number of the segment."""
    return address >> SEGMENT_SHIFT


def offset_of(address: int) -> int:
    """Bytes from the start of the segment."""
    return address & ((1 << SEGMENT_SHIFT) - 1)


class Note(IntEnum):
    """What has become of an extent, for a journal that outlives the process. A positive number: allocated, of so many
    bytes.
    """

    FREED = 0
    QUARANTINED = -1
    LEASED = -2
    RELEASED = -3
    SEALED = -4


class Extents:
    """Free, used and quarantined bytes of a pool.

    Args:
        segments: size of each segment in bytes; rounded down to the alignment.

    Attributes:
        log: None, or a list to which (address, :class:`Note` or bytes) is appended at every change.
        most: how many extents there may be; None = any number.

    ``free_bytes + used_bytes + quarantined_bytes == total_bytes`` at all times. A quarantined extent is out of use
    but somebody may still write to it; it comes back by :meth:`free` when that has ended.
    """

    def __init__(self, segments: Sequence[int]) -> None:
        self.log: list[tuple[int, int]] | None = None
        self.most: int | None = None
        self.total_bytes = 0
        self.quarantined_bytes = 0
        self._allocated: ByAddress[int] = ByAddress()
        self._quarantined: set[int] = set()
        self._hole_at: ByAddress[int] = ByAddress()  # start -> size
        self._hole_ending_at: ByAddress[int] = ByAddress()  # end -> start
        self._holes_of: dict[int, list[int]] = {}  # size -> starts
        self._place_of: ByAddress[int] = ByAddress()  # start -> its place in that list
        self._sizes: list[int] = []  # distinct hole sizes, ascending
        self.free_bytes = 0
        self._ends: list[int] = []
        self._last_hole: dict[int, int] = {}  # segment -> start of the hole at its end
        for number, size in enumerate(segments):
            assert size < 1 << SEGMENT_SHIFT, "else extents of two segments would be neighbours"
            size -= size % ALIGNMENT
            self._ends.append((number << SEGMENT_SHIFT) + size)
            self.total_bytes += size
            if size:
                self._add_hole(number << SEGMENT_SHIFT, size)

    @property
    def used_bytes(self) -> int:
        return self.total_bytes - self.free_bytes - self.quarantined_bytes

    @property
    def largest_free_bytes(self) -> int:
        return self._sizes[-1] if self._sizes else 0

    @property
    def allocated(self) -> int:
        """How many extents are used or quarantined."""
        return len(self._allocated)

    def allocations(self) -> list[tuple[int, int]]:
        """(address, bytes) of all used and quarantined extents."""
        return list(self._allocated.items())

    def size_of(self, address: int) -> int:
        return self._allocated[address]

    def allocate(self, nbytes: int) -> int | None:
        """The address of ``nbytes`` (rounded up), or None if no hole is large enough."""
        assert nbytes > 0, "an empty extent would share its address with another"
        want = round_up(nbytes)
        at = bisect_left(self._sizes, want)
        if at == len(self._sizes) or (self.most is not None and len(self._allocated) >= self.most):
            return None
        size = self._sizes[at]
        start = self._holes_of[size][-1]
        self._drop_hole(start, size)
        if size > want:
            self._add_hole(start + want, size - want)
        self._allocated[start] = want
        self.note(start, want)
        return start

    def take(self, address: int, nbytes: int) -> bool:
        """Allocate a place that an earlier life used; False if it is not free as a whole.

        Quick if called with ascending addresses.
        """
        want = round_up(nbytes)
        start = self._last_hole.get(segment_of(address))
        if start is None or start > address:
            start = max((at for at in self._hole_at if at <= address), default=None)
        if start is None or address % ALIGNMENT or address + want > start + self._hole_at[start]:
            return False
        size = self._hole_at[start]
        self._drop_hole(start, size)
        if address > start:
            self._add_hole(start, address - start)
        if address + want < start + size:
            self._add_hole(address + want, start + size - address - want)
        self._allocated[address] = want
        self.note(address, want)
        return True

    def note(self, address: int, what: int) -> None:
        """Append to the log, if there is one."""
        if self.log is not None:
            self.log.append((address, what))

    def free(self, address: int) -> None:
        """Give an extent back (also one that was quarantined). Raises KeyError if it is not allocated."""
        size = self._allocated.pop(address)
        self.note(address, Note.FREED)
        if address in self._quarantined:
            self._quarantined.remove(address)
            self.quarantined_bytes -= size
        before = self._hole_ending_at.find(address)
        if before is not None:
            size += self._hole_at[before]
            self._drop_hole(before, self._hole_at[before])
            address = before
        after = self._hole_at.find(address + size)
        if after is not None:
            self._drop_hole(address + size, after)
            size += after
        self._add_hole(address, size)

    def quarantine(self, address: int) -> None:
        """Take an extent out of use without giving its bytes to anyone else. Idempotent; KeyError as in free."""
        size = self._allocated[address]
        if address not in self._quarantined:
            self._quarantined.add(address)
            self.quarantined_bytes += size
            self.note(address, Note.QUARANTINED)

    def _add_hole(self, start: int, size: int) -> None:
        self._hole_at[start] = size
        self._hole_ending_at[start + size] = start
        if size not in self._holes_of:
            self._holes_of[size] = []
            insort(self._sizes, size)
        self._place_of[start] = len(self._holes_of[size])
        self._holes_of[size].append(start)
        self.free_bytes += size
        if start + size == self._ends[segment_of(start)]:
            self._last_hole[segment_of(start)] = start

    def _drop_hole(self, start: int, size: int) -> None:
        del self._hole_at[start]
        del self._hole_ending_at[start + size]
        if self._last_hole.get(segment_of(start)) == start:
            del self._last_hole[segment_of(start)]
        starts, place = self._holes_of[size], self._place_of.pop(start)
        last = starts.pop()
        if last != start:
            starts[place], self._place_of[last] = last, place
        if not starts:
            del self._holes_of[size]
            del self._sizes[bisect_left(self._sizes, size)]
        self.free_bytes -= size

    def check_integrity(self) -> None:
        """Raise AssertionError if extents and holes overlap, touch unmerged, or do not add up."""
        holes = [(start, size, True) for start, size in self._hole_at.items()]
        spans = sorted(holes + [(start, size, False) for start, size in self._allocated.items()])
        for (start, size, hole), (following, _, next_hole) in pairwise(spans):
            assert start + size <= following, f"{start:#x}+{size} overlaps {following:#x}"
            assert not (hole and next_hole and start + size == following), f"unmerged holes at {following:#x}"
        assert sum(size for _, size, _ in holes) == self.free_bytes
        assert sum(size for _, size, hole in spans if not hole) == self.total_bytes - self.free_bytes
        assert self.quarantined_bytes == sum(self._allocated[a] for a in self._quarantined)
        assert self._sizes == sorted(self._holes_of)
        places = {at: (size, place) for size, starts in self._holes_of.items() for place, at in enumerate(starts)}
        assert places == {at: (size, self._place_of[at]) for at, size in self._hole_at.items()}
        assert {start + size: start for start, size in self._hole_at.items()} == dict(self._hole_ending_at)
