"""Time to first token with a tier of 20 MB/s, slower than computing or faster: waiting never costs much."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.hf.slow_tier import CACHED, measure, model_of, stored

ATTEMPTS = 3  # on a machine that others use as well, the best counts


@pytest.mark.timeout(180)
@pytest.mark.parametrize(("kv_heads", "faster"), [(8, False), (1, True)], ids=["slower", "faster"])
def test_ttft_with_a_slow_tier(tmp_path: Path, kv_heads: int, faster: bool) -> None:
    model = model_of(tmp_path / "model", kv_heads)
    records = stored(model)
    measured = []
    for _ in range(ATTEMPTS):
        measured.append(measure(model, records))
        unknown, known, cached = measured[-1]
        if max(unknown, known) <= 1.1 and (not faster or (known < 0.9 and cached == CACHED)):
            return
    pytest.fail(f"TTFT to recompute (tier unknown, known), tokens from the tier: {measured}")
