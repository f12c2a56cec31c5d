"""Copy engine or staging buffer: a pure decision, from measurements."""

from __future__ import annotations

import numpy as np
import pytest

from lmcache_kernels_cuda.routes import SIZES, Routes, Sample, calibrate, crossover
from lmcache_sdk.kernels.tables import Runs


def runs(*sizes: int) -> Runs:
    return Runs(np.arange(len(sizes)), np.arange(len(sizes)), np.array(sizes))


@pytest.mark.parametrize(
    ("direct", "expected"),
    [
        ([1, 1, 1, 1], SIZES[0]),  # never slower
        ([5, 1, 1, 1], SIZES[1]),
        ([5, 5, 5, 1], SIZES[3]),
        ([5, 5, 5, 5], 2 * SIZES[3]),  # always slower, as far as it was tried
        ([1, 5, 1, 1], SIZES[2]),  # an outlier below does not count
        ([2, 2, 2, 2], SIZES[0]),  # a tie needs no kernel
        ([2.09, 2.09, 2.09, 2.09], SIZES[0]),  # nor do a few percent
        ([2.09, 2.09, 2.2, 2.09], SIZES[3]),
    ],
)
def test_the_threshold_is_where_direct_copies_stop_being_slower(direct: list[float], expected: int) -> None:
    samples = [Sample(size, seconds, 2) for size, seconds in zip(SIZES, direct, strict=True)]
    assert crossover(samples) == crossover(samples[::-1]) == expected


def test_each_direction_has_a_threshold_of_its_own() -> None:
    def seconds(size: int, to_host: bool, direct: bool) -> float:
        return (0.0 if to_host else float(size < SIZES[2])) if direct else 0.5

    assert calibrate(seconds) == Routes(gather=SIZES[0], scatter=SIZES[2])


def test_the_mean_run_decides() -> None:
    routes = Routes(gather=1000, scatter=4000)
    assert routes.direct(runs(500, 1500), 1, to_host=True)
    assert not routes.direct(runs(500, 1499), 1, to_host=True)
    assert not routes.direct(runs(3999, 3999), 1, to_host=False)
    assert routes.direct(runs(4000, 4000), 1, to_host=False)


def test_a_single_run_of_a_single_plane_needs_no_packing() -> None:
    routes = Routes(gather=1000, scatter=1000)
    assert routes.direct(runs(1), 1, to_host=True)
    assert not routes.direct(runs(1), 2, to_host=True)
