"""The core under the simulator, from seed to seed: what the first schedules in ``tests/core`` did not meet."""

from __future__ import annotations

import pytest

from tests.core.simulator import play_all


@pytest.mark.parametrize("block", range(1, 10))
def test_simulated_schedules(block: int) -> None:
    play_all(range(200 * block, 200 * block + 200))


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_many_simulated_schedules() -> None:
    play_all(range(100_000, 120_000), steps=120)
