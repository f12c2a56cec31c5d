"""By copy engine or through the staging buffer: measured on each device, decided by run size."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from lmcache_sdk.kernels.tables import Runs

# Runs of this size are tried. Larger ones need no staging on any machine, smaller ones always do.
SIZES = (8 << 10, 32 << 10, 128 << 10, 512 << 10)


# Measurements differ by as much from one time to the next.
TOLERANCE = 1.05


class Sample(NamedTuple):
    """Seconds for the same bytes in runs of one size."""

    run_bytes: int
    direct_s: float
    staged_s: float


class Routes(NamedTuple):
    """From which mean run size, in bytes, the copy engines take the runs one by one."""

    gather: int
    scatter: int

    def direct(self, runs: Runs, planes: int, *, to_host: bool) -> bool:
        """Whether runs, in each of so many planes, need no staging. One alone has nothing to be packed with."""
        return runs.sizes.size * planes == 1 or int(runs.sizes.sum()) >= runs.sizes.size * (
            self.gather if to_host else self.scatter
        )


def crossover(samples: Sequence[Sample]) -> int:
    """The smallest run size from which on direct copies were not slower; beyond what was tried they never are."""
    threshold = 2 * max(sample.run_bytes for sample in samples)
    for sample in sorted(samples, reverse=True):
        if sample.direct_s > TOLERANCE * sample.staged_s:
            break
        threshold = sample.run_bytes
    return threshold


def calibrate(seconds: Callable[[int, bool, bool], float]) -> Routes:
    """Measure both ways, in both directions.

    Args:
        seconds: (run bytes, to the host, direct) -> how long a fixed amount takes.
    """
    gather, scatter = (
        crossover([Sample(size, seconds(size, to_host, True), seconds(size, to_host, False)) for size in SIZES])
        for to_host in (True, False)
    )
    return Routes(gather, scatter)
