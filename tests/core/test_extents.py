"""The allocator against a map of 64-byte units."""

from __future__ import annotations

import random

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from lmcache_sdk.core.extents import ALIGNMENT, SEGMENT_SHIFT, Extents, offset_of, round_up, segment_of

FREE = "."


class Map:
    """A letter for each 64-byte unit of each segment: free, or the number of the extent that has it."""

    def __init__(self, segments: list[int]) -> None:
        self.units: list[list[int | str]] = [[FREE] * (size // ALIGNMENT) for size in segments]
        self.sizes: dict[int, int] = {}
        self.quarantined: set[int] = set()

    def holes(self) -> list[int]:
        """Sizes of all runs of free units, in bytes."""
        found = []
        for units in self.units:
            run = 0
            for unit in [*units, "end"]:
                if unit == FREE:
                    run += 1
                elif run:
                    found.append(run * ALIGNMENT)
                    run = 0
        return found

    def take(self, address: int, nbytes: int) -> None:
        offset = offset_of(address)
        assert offset % ALIGNMENT == 0
        units = self.units[segment_of(address)]
        first, end = offset // ALIGNMENT, (offset + nbytes) // ALIGNMENT
        assert end <= len(units), "beyond its segment"
        assert units[first:end] == [FREE] * (end - first), "somebody has it already"
        units[first:end] = [address] * (end - first)
        self.sizes[address] = nbytes

    def give(self, address: int) -> None:
        units = self.units[segment_of(address)]
        first = offset_of(address) // ALIGNMENT
        end = first + self.sizes.pop(address) // ALIGNMENT
        units[first:end] = [FREE] * (end - first)
        self.quarantined.discard(address)


class ExtentsMachine(RuleBasedStateMachine):
    @initialize(segments=st.lists(st.integers(0, 40 * ALIGNMENT), min_size=1, max_size=4))
    def start(self, segments: list[int]) -> None:
        self.extents = Extents(segments)
        self.map = Map(segments)

    @rule(nbytes=st.integers(1, 12 * ALIGNMENT))
    def allocate(self, nbytes: int) -> None:
        fitting = [size for size in self.map.holes() if size >= nbytes]
        address = self.extents.allocate(nbytes)
        if address is None:
            assert not fitting, "there was room"
            return
        segment, first = self.map.units[segment_of(address)], offset_of(address) // ALIGNMENT
        run = next((at for at, unit in enumerate(segment[first:]) if unit != FREE), len(segment) - first)
        assert run * ALIGNMENT == min(fitting), "the smallest hole that fits, from its front"
        self.map.take(address, round_up(nbytes))
        assert self.extents.size_of(address) == round_up(nbytes)

    @rule(
        segment=st.integers(0, 4), unit=st.integers(0, 45), off=st.sampled_from([0, 0, 0, 32]), units=st.integers(1, 9)
    )
    def take(self, segment: int, unit: int, off: int, units: int) -> None:
        """A place of one's own choice, as an earlier life of the pool used it."""
        address, nbytes = (segment << SEGMENT_SHIFT) + unit * ALIGNMENT + off, units * ALIGNMENT
        here = self.map.units[segment][unit : unit + units] if segment < len(self.map.units) else []
        taken = self.extents.take(address, nbytes)
        assert taken == (off == 0 and here == [FREE] * units)
        if taken:
            self.map.take(address, nbytes)

    @precondition(lambda self: self.map.sizes)
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        address = data.draw(st.sampled_from(sorted(self.map.sizes)))
        self.extents.free(address)
        self.map.give(address)
        with pytest.raises(KeyError):
            self.extents.free(address)

    @precondition(lambda self: self.map.sizes)
    @rule(data=st.data())
    def quarantine(self, data: st.DataObject) -> None:
        address = data.draw(st.sampled_from(sorted(self.map.sizes)))
        self.extents.quarantine(address)
        self.extents.quarantine(address)
        self.map.quarantined.add(address)

    @rule(address=st.integers(0, 3 << SEGMENT_SHIFT))
    def what_was_not_given_cannot_come_back(self, address: int) -> None:
        if address not in self.map.sizes:
            for call in (self.extents.free, self.extents.quarantine, self.extents.size_of):
                with pytest.raises(KeyError):
                    call(address)

    @invariant()
    def agrees(self) -> None:
        extents, holes = self.extents, self.map.holes()
        extents.check_integrity()
        quarantined = sum(self.map.sizes[address] for address in self.map.quarantined)
        assert extents.total_bytes == ALIGNMENT * sum(len(units) for units in self.map.units)
        assert extents.free_bytes == sum(holes)
        assert extents.quarantined_bytes == quarantined
        assert extents.used_bytes == sum(self.map.sizes.values()) - quarantined
        assert extents.largest_free_bytes == max(holes, default=0)
        assert extents.allocated == len(self.map.sizes)


ExtentsMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40)
TestExtents = ExtentsMachine.TestCase


@pytest.mark.parametrize("seed", range(5))
def test_a_long_life(seed: int) -> None:
    """Thousands of calls in a pool that is nearly full all the time; at the end it is whole again."""
    source = random.Random(seed)
    segments = [source.randrange(64, 200 * ALIGNMENT) for _ in range(3)]
    extents, units = Extents(segments), Map(segments)
    for _ in range(3000):
        address = extents.allocate(nbytes := source.choice([1, 64, 65, 320, 1000]))
        if address is not None:
            units.take(address, round_up(nbytes))
        else:
            assert all(hole < nbytes for hole in units.holes())
            for gone in source.sample(sorted(units.sizes), max(1, len(units.sizes) // 8)):
                if source.random() < 0.3:
                    extents.quarantine(gone)
                extents.free(gone)
                units.give(gone)
        assert extents.free_bytes == sum(units.holes())
    extents.check_integrity()
    for address in sorted(units.sizes, key=lambda _: source.random()):
        extents.free(address)
    extents.check_integrity()
    assert extents.free_bytes == extents.total_bytes
    assert extents.largest_free_bytes == max(size - size % ALIGNMENT for size in segments)


def test_an_extent_never_straddles_two_segments() -> None:
    extents = Extents([640, 640])
    assert extents.free_bytes == 1280
    assert extents.allocate(704) is None
    assert {extents.allocate(640), extents.allocate(640)} == {0, 1 << SEGMENT_SHIFT}
    for address in (0, 1 << SEGMENT_SHIFT):
        extents.free(address)
    assert extents.allocate(704) is None, "nor after they were free side by side"


@pytest.mark.parametrize("sizes", [[], [0], [63]])
def test_a_pool_of_nothing_gives_nothing(sizes: list[int]) -> None:
    extents = Extents(sizes)
    assert extents.total_bytes == extents.largest_free_bytes == 0
    assert extents.allocate(1) is None
    extents.check_integrity()


@pytest.mark.parametrize("nbytes", [0, -1])
def test_an_empty_extent_is_refused(nbytes: int) -> None:
    with pytest.raises(AssertionError):
        Extents([640]).allocate(nbytes)


def test_a_segment_of_an_address_space_is_refused() -> None:
    with pytest.raises(AssertionError):
        Extents([1 << SEGMENT_SHIFT])


def test_quarantined_bytes_are_given_to_nobody() -> None:
    extents = Extents([640])
    address = extents.allocate(640)
    assert address is not None
    extents.quarantine(address)
    assert (extents.used_bytes, extents.quarantined_bytes, extents.free_bytes) == (0, 640, 0)
    assert extents.allocate(64) is None
    extents.free(address)
    assert extents.allocate(640) == address and extents.quarantined_bytes == 0


def test_check_integrity_sees_what_is_wrong() -> None:
    def broken(change: object) -> None:
        extents = Extents([640])
        extents.allocate(64)
        extents.allocate(64)
        assert callable(change)
        change(extents)
        with pytest.raises(AssertionError):
            extents.check_integrity()

    broken(lambda extents: extents._allocated.update({64: 128}))
    broken(lambda extents: extents._allocated.pop(0))
    broken(lambda extents: extents._quarantined.add(0))
    broken(lambda extents: setattr(extents, "free_bytes", 0))
    broken(lambda extents: extents._sizes.append(64))
    broken(lambda extents: (extents._drop_hole(128, 512), extents._add_hole(128, 64), extents._add_hole(192, 448)))
