"""Two real processes: the first is killed in mid-store, the second reads what it left."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from lmcache_sdk import open_cache
from tests.core.engine import CHUNK, PRODUCER, PagedEngine, load, namespace, slots_of, tokens_of

SEED = int(os.environ.get("LMCACHE_SDK_SEED", "20261124"))


@pytest.mark.timeout(120)
def test_what_a_killed_process_left_is_exact_or_a_miss(tmp_path: Path) -> None:
    print(f"seed {SEED}")
    rng = random.Random(SEED)
    url = f"lmdb://{tmp_path}/store?size=256MiB"
    acknowledged: set[int] = set()
    started: set[int] = set()
    for cycle in range(4):
        first = cycle * 1000
        process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("crash_writer.py")), url, str(first)],
            stdout=subprocess.PIPE,
            text=True,
        )
        assert process.stdout is not None
        for _ in range(rng.randint(1, 12)):
            line = process.stdout.readline()
            assert line, f"the writer ended by itself: {process.wait(10)}"
            acknowledged.add(int(line))
        killer = threading.Timer(rng.random() * 0.02, process.kill)  # at any point of the stores that follow
        killer.start()
        acknowledged.update(int(line) for line in process.stdout)
        assert process.wait(10) == -9
        process.stdout.close()
        started.update(range(first, max(acknowledged) + 8))
        check(url, acknowledged, started)
        assert process.returncode == -9


def check(url: str, acknowledged: set[int], started: set[int]) -> None:
    cache = open_cache(url, namespace=namespace(), producer=PRODUCER, pool_bytes=1 << 20)
    engine, expected = PagedEngine(), PagedEngine()
    connector = engine.connect(cache)
    slots = slots_of(5, 3 * CHUNK)
    for seed in sorted(started):
        tokens = tokens_of(seed, 3 * CHUNK)
        chunks, transfer = load(cache, connector, tokens, slots, rid=str(seed))
        assert transfer is None or not transfer.failed_chunks()
        if seed in acknowledged:
            assert chunks == 3, f"prompt {seed} had reached the disk"
        expected.compute(tokens, slots)
        have = slots[: chunks * CHUNK]
        assert np.array_equal(engine.rows(have), expected.rows(have)), f"prompt {seed}: other bytes"
    assert not [name for name in cache.stats().counters if name.startswith("lmcache_record_failures_total")]
    connector.close()
    cache.close()
