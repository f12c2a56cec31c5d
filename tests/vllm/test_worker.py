"""On a device: copies are queued behind what vLLM has queued when it asks for them."""

from __future__ import annotations

import time
from itertools import count
from typing import Any

import numpy as np
import pytest

from lmcache_adapters.vllm.messages import Load, StepMeta, Store
from lmcache_adapters.vllm.worker import Worker
from lmcache_sdk.api import Ticket
from lmcache_sdk.connector import CopyTransfer


class Copies:
    """In the place of a GPUConnector."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, Any]] = []

    def load(self, ticket: Any, slots: np.ndarray, *, after: Any) -> CopyTransfer:
        self.asked.append(("load", after))
        return CopyTransfer([], 1)

    def store(self, rid: str, chain: Any, first: int, slots: np.ndarray, *, after: Any) -> CopyTransfer:
        self.asked.append(("store", after))
        return CopyTransfer([], 1)


def test_each_copy_waits_for_what_was_queued_before_it() -> None:
    copies, events = Copies(), count(1)
    worker = Worker(copies, 64, 32, lambda: f"event {next(events)}")
    ticket = Ticket(lease=1, boot="b", cells=(0,), extents=bytes(16), first=0, boundary=1)
    worker.start_loads(StepMeta(loads=[Load("a", ticket, 0, 64, [1, 2])]))
    worker.start_stores(StepMeta(stores=[Store("b", 0, bytes(32), [3, 4], "", False)]))
    assert copies.asked == [("load", "event 1"), ("store", "event 2")]


def test_loads_are_waited_for_where_nothing_is_computed_and_only_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM's newer model runner begins them when its forward context is gone: that would not tell."""
    monkeypatch.setattr("lmcache_adapters.vllm.worker._IDLE_WAIT_S", 0.3)
    copies = Copies()
    copies.load = lambda *_, **__: CopyTransfer([0], 1)  # a copy that does not end
    ticket = Ticket(lease=1, boot="b", cells=(0,), extents=bytes(16), first=0, boundary=1)
    worker = Worker(copies, 64, 32)
    took = []
    for idle in (False, True):
        began = time.perf_counter()
        worker.start_loads(StepMeta(idle=idle, loads=[Load("a", ticket, 0, 64, [1, 2])]))
        took.append(time.perf_counter() - began)
    assert took[0] < 0.3 <= took[1]
