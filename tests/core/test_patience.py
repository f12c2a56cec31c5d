"""When waiting for a load is worth it, and how the estimates for that are made."""

from __future__ import annotations

import random

import pytest

from lmcache_sdk.patience import FIRST_WAIT_S, SLACK, Line, PrefillSpeed, ReadingSpeed, worth_waiting

MIB = 1 << 20


@pytest.mark.parametrize(
    ("waited", "saves", "eta", "promised", "worth"),
    [
        # Nothing is known: a bounded patience, however fast the tier seems.
        (0.0, None, None, None, True),
        (FIRST_WAIT_S, None, None, None, False),
        (0.0, None, 0.5, 0.5, True),
        (0.0, None, 2.0, 2.0, False),
        # The tier is unknown: a small part of what computing would take.
        (0.0, 10.0, None, None, True),
        (0.2, 10.0, None, None, True),
        (0.3, 10.0, None, None, False),
        (0.0, 0.0, None, None, False),
        # Both are known.
        (0.0, 10.0, 2.0, 2.0, True),
        (0.0, 10.0, 9.9, 9.9, True),
        (0.0, 10.0, 10.0, 10.0, False),
        (0.0, 10.0, 60.0, 60.0, False),
        # It comes as it was promised.
        (1.0, 10.0, 1.0, 2.0, True),
        (9.0, 10.0, 0.9, 9.9, True),
        # It recedes: first a little, then too much; or until computing is sooner done.
        (1.0, 10.0, 1.2, 2.0, True),
        (1.0, 10.0, 1.6, 2.0, False),
        (5.0, 10.0, 5.0, 9.9, False),
        # It is faster than it was promised.
        (0.1, 10.0, 0.1, 5.0, True),
    ],
)
def test_worth_waiting(
    waited: float, saves: float | None, eta: float | None, promised: float | None, worth: bool
) -> None:
    assert worth_waiting(waited, saves_s=saves, eta_s=eta, promised_s=promised) is worth


@pytest.mark.parametrize("seed", range(200))
def test_waiting_never_costs_a_tenth_of_computing(seed: int) -> None:
    """Against tiers that are slow from the start, stall, or change their speed, and estimates that follow late."""
    r = random.Random(seed)
    compute_s, look_s = r.uniform(0.5, 20.0), 0.01
    speed = guess = r.uniform(0.05, 4.0) / compute_s  # parts of the load a second
    known = r.random() < 0.7
    changes = r.uniform(0.0, compute_s)
    waited, here, promised = 0.0, 0.0, None
    while here < 1.0:
        eta = (1.0 - here) / guess if known else None
        if promised is None and eta is not None:
            promised = waited + eta
        if not worth_waiting(waited, saves_s=compute_s, eta_s=eta, promised_s=promised):
            break
        waited += look_s
        here += speed * look_s
        known = known or waited > 0.3
        if waited > changes:
            speed = 0.0 if seed % 2 else speed * 0.9
    ttft_s = waited + compute_s * (1.0 - min(here, 1.0))
    assert ttft_s <= compute_s * (1.0 + 2 * SLACK) + 2 * look_s


def test_a_line_through_measurements() -> None:
    line = Line(proportional=False)
    assert line.at(1.0) is None
    line.add(10.0, 5.0)
    assert line.at(100.0) == 5.0, "one point has no slope"
    for x in (10.0, 20.0, 30.0, 40.0):
        line.add(x, 3.0 + 0.2 * x)
    assert line.at(100.0) == pytest.approx(23.0)


def test_a_line_through_zero() -> None:
    line = Line(proportional=True)
    line.add(10.0, 5.0)
    assert line.at(100.0) == 50.0


def test_a_line_is_never_below_zero() -> None:
    down, low = Line(proportional=False), Line(proportional=False)
    for x, y in ((1.0, 5.0), (2.0, 4.0), (3.0, 3.0)):
        down.add(x, y)
    for x, y in ((1.0, 0.1), (2.0, 2.0), (3.0, 4.0)):
        low.add(x, y)
    assert down.at(100.0) is not None and down.at(100.0) > 0  # type: ignore[operator]
    assert low.at(0.0) == 0.0


def test_old_measurements_fade() -> None:
    line = Line(proportional=True)
    for _ in range(50):
        line.add(1.0, 1.0)
    for _ in range(50):
        line.add(1.0, 9.0)
    assert line.at(1.0) == pytest.approx(9.0, rel=0.01)


def test_prefill_costs_more_behind_a_long_prefix() -> None:
    speed = PrefillSpeed()
    assert speed.seconds(0, 1000) is None
    speed.add(0, 20, 1.0)
    assert speed.seconds(0, 1000) is None, "too short to tell"

    def truth(first: int, tokens: int) -> float:
        return 0.001 * tokens + 1e-6 * tokens * (first + tokens / 2)

    for first, tokens in ((0, 500), (0, 4000), (2000, 300)):
        speed.add(first, tokens, truth(first, tokens))
    for first, tokens in ((0, 1000), (3000, 1000), (0, 8000)):
        assert speed.seconds(first, tokens) == pytest.approx(truth(first, tokens), rel=0.01)


class Wire:
    """A tier of 20 MB/s with two readers that share it, driven by hand."""

    def __init__(self, latency_s: float = 0.0) -> None:
        self.speed, self.now, self.latency_s = ReadingSpeed(), 0.0, latency_s

    def load(self, sizes: list[int]) -> None:
        for size in sizes:
            self.speed.start(size, self.now)
        self.now += self.latency_s
        for pair in (sizes[at : at + 2] for at in range(0, len(sizes), 2)):
            self.now += sum(pair) / 20e6
            for size in pair:
                self.speed.end(size, size, self.now)


def test_a_tier_is_as_fast_as_what_came_from_it() -> None:
    wire = Wire()
    wire.speed.start(MIB, 0.0)
    assert wire.speed.eta_s(MIB, 0.0) is None
    wire.speed.end(MIB, MIB, MIB / 20e6)
    wire.now = 10.0
    wire.load([MIB] * 20)
    wire.now = 20.0
    wire.speed.start(100 * MIB, wire.now)
    goal = wire.speed.asked
    assert wire.speed.eta_s(goal, wire.now) == pytest.approx(100 * MIB / 20e6, rel=0.05)
    assert wire.speed.eta_s(goal - 90 * MIB, wire.now) == pytest.approx(10 * MIB / 20e6, rel=0.05)
    assert wire.speed.eta_s(goal - 100 * MIB, wire.now) == 0.0


def test_a_tiers_latency_is_told_from_its_rate() -> None:
    wire = Wire(latency_s=0.1)
    for count in (1, 4, 2, 3):
        wire.now += 5.0
        wire.load([MIB] * count)
    wire.now += 5.0
    wire.speed.start(2 * MIB, wire.now)
    assert wire.speed.eta_s(wire.speed.asked, wire.now) == pytest.approx(0.1 + 2 * MIB / 20e6, rel=0.05)


def test_what_is_being_read_counts_but_not_for_ever() -> None:
    wire = Wire()
    wire.load([MIB] * 20)
    wire.speed.start(20 * MIB, wire.now)
    first = wire.speed.eta_s(wire.speed.asked, wire.now)
    soon, later = (wire.speed.eta_s(wire.speed.asked, wire.now + seconds) for seconds in (0.05, 30.0))
    assert first is not None and soon is not None and later is not None
    assert soon == pytest.approx(first - 0.05)
    assert later > first - 0.2, "it stalls"


def test_reads_are_cut_so_that_one_shows_how_far_things_are() -> None:
    wire = Wire()
    assert wire.speed.step_bytes(8 * MIB) == 8 * MIB
    wire.load([MIB] * 20)
    assert wire.speed.step_bytes(8 * MIB) == pytest.approx(1e6, rel=0.05)
    assert wire.speed.step_bytes(1000) == 1000


def test_reads_that_bring_nothing_say_nothing() -> None:
    speed = ReadingSpeed()
    speed.start(MIB, 0.0)
    speed.end(MIB, 0, 5.0)
    speed.start(MIB, 6.0)
    assert speed.eta_s(speed.asked, 6.0) is None
