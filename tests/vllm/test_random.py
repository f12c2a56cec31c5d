"""Requests, aborts, resets, lost chunks and a dying daemon, in any order; every row is compared before it is used."""

from __future__ import annotations

import contextlib
import os
import random
import signal
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from vllm.v1.request import RequestStatus

from tests.core.served import Served
from tests.vllm.pretend import PretendEngine, until

SEED = int(os.environ.get("LMCACHE_SDK_TEST_SEED", "0"))
OPTIONS: list[dict[str, Any]] = [
    {"block_tokens": 32, "chunk_tokens": 64, "asynchronous": False, "budget": 200},
    {"block_tokens": 64, "chunk_tokens": 48, "asynchronous": True, "budget": 512},
    {"block_tokens": 32, "chunk_tokens": 96, "asynchronous": True, "ranks": 2, "heads_per_cell": 1},
]


@pytest.mark.parametrize("options", OPTIONS, ids=["chunked prefill", "ragged", "two ranks"])
@pytest.mark.timeout(120)
def test_any_order(tiny_directory: Path, served: Served, options: dict[str, Any], capsys: Any) -> None:
    seed = SEED or random.SystemRandom().randrange(1 << 30)
    print(f"LMCACHE_SDK_TEST_SEED={seed}")
    chance = random.Random(seed)
    engine = PretendEngine(tiny_directory, served.url, blocks=1800 // options["block_tokens"], **options)
    losses = _lose_chunks(engine, chance)
    stems = [[chance.randrange(10, 1000) for _ in range(700)] for _ in range(3)]
    number = hits = 0
    try:
        for _ in range(35):
            for _ in range(chance.randrange(4)):
                stem = chance.choice(stems)[: chance.randrange(1, 700)]
                ids = stem + [chance.randrange(10, 1000) for _ in range(chance.randrange(1, 60))]
                params = chance.choice([None, None, None, {"no_load": True}, {"no_store": True}, {"pin": 1}])
                engine.add(f"r{number}", ids, max_tokens=chance.randrange(1, 80), params=params)
                number += 1
            for _ in range(chance.randrange(30)):
                engine.step()
            match chance.randrange(12):
                case 0 | 1 if engine.scheduler.requests:
                    rid = chance.choice(sorted(engine.scheduler.requests))
                    abort = partial(engine.scheduler.finish_requests, rid, RequestStatus.FINISHED_ABORTED)
                    chance.choice([abort, partial(engine.step, abort)])()
                case 2:
                    engine.scheduler.reset_prefix_cache()
                case 3:
                    with contextlib.suppress(RuntimeError):  # vLLM cannot while blocks are kept for a load or a store
                        engine.scheduler.reset_prefix_cache(reset_running_requests=True)
                case 4:
                    losses.extend([True] * 3)
                case 5:
                    served.stop(signal.SIGKILL)
                    for _ in range(20):
                        engine.step()
                    served.start()
                    caches = [engine.connector._scheduler._cache, *(r.connector._worker_cache for r in engine.ranks)]
                    until(lambda caches=caches: all(cache.connected for cache in caches))
        engine.settle()
        hits = sum(engine.loaded.values())
        assert not engine.scheduler.requests
        assert all(str(reason) in ("length", "abort") for reason in engine.finished.values())
        assert not engine.connector._scheduler._states and not engine.connector._scheduler._held
        assert not engine.connector._scheduler._tickets
        assert hits > 0
        engine.flush()
        until(lambda: served.status()["stats"]["leases"] == 0)
    finally:
        engine.close()


def _lose_chunks(engine: PretendEngine, chance: random.Random) -> list[bool]:
    """Loads of which a chunk does not come: one for each entry of the answer."""
    losses: list[bool] = []
    copies = engine.ranks[-1].connector._worker._connector
    load = copies.load

    def lose(ticket: Any, slots: Any, **fields: Any) -> Any:
        transfer = load(ticket, slots, **fields)
        if losses:
            losses.pop()
            transfer.wait(10)
            transfer.fail([chance.randrange(ticket.first, ticket.boundary)])
        return transfer

    copies.load = lose
    return losses
