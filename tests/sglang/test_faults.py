"""A daemon that is killed, stopped, started again, or has a corrupted store: a miss, in time, and hits again later."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lmcache_adapters.sglang import weights
from lmcache_sdk.pool.shared import SharedPool
from tests.core.served import Served
from tests.daemon.daemon_process import until
from tests.sglang.pools import Rank, digests

PAGES = [1, 2, 3, 4]
OTHERS = [11, 12, 13, 14]
MOST_S = 2.0


@pytest.fixture
def tiered() -> Iterator[Served]:
    """With a store on disk."""
    served = Served()
    served.start("--tier", _tier(served), pool="32MiB")
    yield served
    served.close()


def _tier(served: Served) -> str:
    return f"lmdb://{served.folder}/store?size=64MiB"


def timed(call: Callable[[], Any]) -> Any:
    started = time.monotonic()
    answer = call()
    assert time.monotonic() - started < MOST_S
    return answer


def all_miss(rank: Rank, keys: list[str]) -> None:
    """Nothing is found, nothing is written anywhere, and nobody waits for long."""
    before = rank.fill(OTHERS, seed=99)
    assert timed(lambda: rank.backend.batch_exists(keys)) == 0
    assert timed(lambda: rank.get(keys, OTHERS)) == [False] * 4
    assert torch.equal(rank.content(OTHERS), before)


def stored(rank: Rank, number: int) -> tuple[list[str], torch.Tensor]:
    keys = digests(number, 4)
    content = rank.fill(PAGES, seed=number)
    assert rank.set(keys, PAGES, before=[]) == [True] * 4
    return keys, content


def hits(rank: Rank, keys: list[str], content: torch.Tensor) -> None:
    assert rank.backend.batch_exists(keys) == 4
    assert rank.get(keys, OTHERS) == [True] * 4
    assert torch.equal(rank.content(OTHERS), content)


def test_killed_and_back(tiny_directory: Path, tiered: Served, ranks: list[Rank]) -> None:
    rank = Rank(tiny_directory, tiered.url)
    ranks.append(rank)
    keys, content = stored(rank, 1)
    cache = rank.backend._cache
    assert cache is not None and cache.drain(10)
    tiered.stop(signal.SIGKILL)
    all_miss(rank, keys)
    assert timed(lambda: rank.set(keys, PAGES)) == [False] * 4
    tiered.start("--tier", _tier(tiered), pool="32MiB")
    until(lambda: cache.connected)
    hits(rank, keys, content)
    hits(rank, *stored(rank, 2))


def test_killed_between_the_query_and_the_read(tiny_directory: Path, served: Served, ranks: list[Rank]) -> None:
    rank = Rank(tiny_directory, served.url)
    ranks.append(rank)
    keys, _ = stored(rank, 3)
    assert rank.backend.batch_exists(keys) == 4
    served.stop(signal.SIGKILL)
    before = rank.fill(OTHERS, seed=99)
    assert timed(lambda: rank.get(keys, OTHERS)) == [False] * 4
    assert torch.equal(rank.content(OTHERS), before)


def test_stopped_and_going_on(tiny_directory: Path, served: Served, ranks: list[Rank]) -> None:
    rank = Rank(tiny_directory, served.url)
    ranks.append(rank)
    keys, content = stored(rank, 4)
    assert served.process is not None
    served.process.send_signal(signal.SIGSTOP)
    try:
        all_miss(rank, keys)
        assert timed(lambda: rank.set(keys, PAGES)) == [False] * 4
    finally:
        served.process.send_signal(signal.SIGCONT)
    until(lambda: rank.backend._cache.connected)
    hits(rank, keys, content)


def test_it_may_come_later(tiny_directory: Path, served: Served, ranks: list[Rank]) -> None:
    served.stop()
    rank = Rank(tiny_directory, served.url)
    ranks.append(rank)
    all_miss(rank, digests(5, 4))
    served.start(pool="32MiB")
    until(lambda: rank.backend._cache.connected)
    hits(rank, *stored(rank, 5))


def test_a_corrupted_record_is_a_shorter_prefix(tiny_directory: Path, tiered: Served, ranks: list[Rank]) -> None:
    from lmcache_sdk.backend import Item, open_backend

    rank = Rank(tiny_directory, tiered.url)
    ranks.append(rank)
    keys, content = stored(rank, 6)
    cache = rank.backend._cache
    assert cache is not None and cache.drain(10)
    tiered.stop()
    SharedPool.remove(tiered.pool)
    backend = open_backend(_tier(tiered))
    (record,) = [one for one in backend.scan() if keys[2] in one.key]
    body = bytearray(record.nbytes)
    backend.get([record.key], [memoryview(body)])
    body[len(body) // 2] ^= 1
    backend.put([Item(record.key, memoryview(body))], if_absent=False)
    backend.close(10.0)
    tiered.start("--tier", _tier(tiered), pool="32MiB")
    until(lambda: cache.connected)
    before = rank.fill(OTHERS, seed=99)
    assert timed(lambda: rank.get(keys, OTHERS)) == [True, True, False, False]
    width = 2 * rank.page
    assert torch.equal(rank.content(OTHERS), torch.cat([content[:, :width], before[:, width:]], dim=1))


def test_nothing_is_raised(tiny_directory: Path, served: Served, ranks: list[Rank]) -> None:
    rank = Rank(tiny_directory, served.url)
    ranks.append(rank)
    assert rank.backend.batch_exists(["no key"]) == 0
    assert rank.get(["no key"], [1]) == [False]
    assert rank.set(["no key"], [1]) == [False]
    assert rank.backend.batch_set_v1(digests(7, 1), torch.tensor([10**6] * rank.page)) == [False]
    assert rank.backend.batch_exists(digests(7, 1)) == 0
    assert rank.backend.batch_get_v1(digests(7, 1), torch.empty(0, dtype=torch.int64)) == [False]
    assert rank.backend.batch_get_v1([], torch.empty(0, dtype=torch.int64)) == []


def test_replaced_weights_end_the_cache(
    tiny_directory: Path, served: Served, ranks: list[Rank], monkeypatch: pytest.MonkeyPatch
) -> None:
    rank = Rank(tiny_directory, served.url)
    ranks.append(rank)
    keys, _ = stored(rank, 8)
    monkeypatch.setattr(weights, "_replaced", type(weights._replaced)())
    weights.note_check(None, SimpleNamespace(action="checksum"))
    assert not weights.replaced()
    weights.note_check(None, SimpleNamespace(action="reset_tensors"))
    assert weights.replaced()
    all_miss(rank, keys)
    assert rank.set(keys, PAGES) == [False] * 4
