"""Ratios to a reference that is measured in the same run.

A shared machine's speed changes from second to second. So what is measured and its reference run in turn,
every pair gives one ratio, and a row reports the median of these ratios with all raw samples.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import msgspec


class Row(msgspec.Struct):
    """One line of ``bench.json``.

    Attributes:
        ratio: measured to reference; what it means is in the name.
        bar: what the ratio has to reach, or for a cost not to exceed; 0 = reported only.
        holds: whether it does.
        raw: samples and facts behind the ratio.
    """

    name: str
    ratio: float
    bar: float
    holds: bool
    raw: dict[str, Any]


class Paired(msgspec.Struct):
    """Speed of a function relative to its reference.

    Attributes:
        ratio: median over the pairs of reference time / measured time; above 1 = faster than the reference.
        seconds, reference_seconds: wall time of each run, in order.
        nbytes: moved by each run.
    """

    ratio: float
    seconds: list[float]
    reference_seconds: list[float]
    nbytes: int

    def raw(self) -> dict[str, Any]:
        """For ``Row.raw``: samples in seconds, and median speeds in GB/s."""
        return {
            "seconds": self.seconds,
            "reference_seconds": self.reference_seconds,
            "gbps": self.nbytes / statistics.median(self.seconds) / 1e9,
            "reference_gbps": self.nbytes / statistics.median(self.reference_seconds) / 1e9,
        }


def timed(function: Callable[[], object]) -> float:
    """Wall time of one call, in seconds."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def paired(
    function: Callable[[], object],
    reference: Callable[[], object],
    nbytes: int,
    repeats: int = 9,
    settle: Callable[[], object] = lambda: None,
) -> Paired:
    """Run both in turn, after one unmeasured run of each; which of the two goes first alternates.

    Args:
        nbytes: that each of both moves.
        repeats: pairs.
        settle: called, unmeasured, after each run of the function.
    """

    def once() -> float:
        taken = timed(function)
        settle()
        return taken

    once()
    reference()
    seconds, reference_seconds = [], []
    for index in range(repeats):
        if index % 2:
            seconds.append(once())
            reference_seconds.append(timed(reference))
        else:
            reference_seconds.append(timed(reference))
            seconds.append(once())
    ratio = statistics.median(r / s for r, s in zip(reference_seconds, seconds, strict=True))
    return Paired(ratio, seconds, reference_seconds, nbytes)


def at_least(name: str, result: Paired, bar: float = 0.0, **facts: Any) -> Row:
    """A row that holds where the ratio reaches the bar. ``facts`` are added to ``raw``."""
    return Row(name, result.ratio, bar, result.ratio >= bar, {**result.raw(), **facts})


def at_most(name: str, result: Paired, bar: float, **facts: Any) -> Row:
    """A row for a cost: time measured / reference time, which holds where it does not exceed the bar."""
    cost = 1 / result.ratio
    return Row(name, cost, bar, not bar or cost <= bar, {**result.raw(), **facts})


def measure(name: str, value: float, bar: float, **facts: Any) -> Row:
    """A row for a figure as such, which holds where it does not exceed the bar; the name has its unit."""
    return Row(name, value, bar, not bar or value <= bar, facts)


def table(rows: list[Row]) -> str:
    """The rows as text, one a line."""
    width = max((len(row.name) for row in rows), default=0)
    return "\n".join(
        f"{row.name:{width}}  {row.ratio:7.2f}  "
        + (f"bar {row.bar:5.2f}  {'holds' if row.holds else 'MISSED'}" if row.bar else "reported")
        for row in rows
    )
