"""How long a request is told to ask again, before it computes instead."""

from __future__ import annotations

import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.lora.request import LoRARequest

from lmcache_adapters.vllm.scheduler import Scheduler
from lmcache_sdk.api import Lookup, LookupState
from lmcache_sdk.patience import FIRST_WAIT_S, SLACK
from lmcache_sdk.spec import Group, GroupKind, KVSpec, Namespace, Producer

TOKENS = 1001


class SlowCache:
    """A cache whose tier takes ``seconds`` by the clock, and is believed to take ``eta_s``."""

    def __init__(self, seconds: float, eta_s: float | None = None) -> None:
        group = Group("full", GroupKind.FULL, (0,), 1, 8, "bfloat16")
        self.namespace, self.producer = Namespace("f", KVSpec((group,))), Producer("vllm", "0", "cpu")
        self.now, self.seconds, self.eta_s = 0.0, seconds, eta_s
        self.asked = self.forgotten = 0

    def lookup(self, rid: str, chain: Any, **_: Any) -> Lookup:
        self.asked += 1
        if self.now >= self.seconds:
            return Lookup(LookupState.READY, range(1, 16))
        eta_s = None if self.eta_s is None else max(0.0, self.eta_s - self.now)
        return Lookup(LookupState.PENDING, found=15, missing=10, eta_s=eta_s)

    def wait(self, rid: str, timeout_s: float, *, settle: bool) -> Lookup:
        assert (timeout_s, settle) == (0.0, True)
        return Lookup(LookupState.READY, range(1, 6))  # what was in the pool already

    def forget(self, rid: str) -> None:
        self.forgotten += 1

    def clear(self) -> int:
        return 0


def request() -> Any:
    return SimpleNamespace(
        request_id="r",
        num_tokens=TOKENS,
        all_token_ids=list(range(TOKENS)),
        cache_salt=None,
        lora_request=None,
        mm_features=[],
        prompt_embeds=None,
        kv_transfer_params=None,
    )


def ask(cache: SlowCache, computing_s: float | None = None, computed: int = 0) -> tuple[float, int]:
    """Until there is an answer: how long it took, and how many tokens it names."""
    scheduler = Scheduler(cache, block_tokens=32, clock=lambda: cache.now)
    if computing_s is not None:
        scheduler.speed.add(0, 640, computing_s)  # the ten chunks that are missing
    asking = request()
    while (answer := scheduler.matched(asking, computed))[0] is None:
        assert answer == (None, False)
        cache.now += 0.001
        assert cache.now < 60
    return cache.now, answer[0]


def test_what_comes_soon_is_waited_for() -> None:
    assert ask(SlowCache(0.2, 0.2), computing_s=2.0) == (pytest.approx(0.2, abs=0.01), 960)


def test_an_engine_that_has_computed_nothing_yet_has_some_patience() -> None:
    waited, tokens = ask(SlowCache(100.0))
    assert (waited, tokens) == (pytest.approx(FIRST_WAIT_S, abs=0.01), 320)
    assert ask(SlowCache(1.0)) == (pytest.approx(1.0, abs=0.01), 960)


def test_what_is_sooner_computed_is_not_waited_for() -> None:
    assert ask(SlowCache(10.0, 10.0), computing_s=2.0) == (0.0, 320)


def test_a_tier_that_is_slower_than_it_says_is_given_up() -> None:
    waited, tokens = ask(SlowCache(100.0, 0.5), computing_s=10.0)
    assert tokens == 320
    assert waited <= 0.5 + 2 * SLACK * 10.0


def test_while_nothing_is_known_little_is_waited() -> None:
    waited, tokens = ask(SlowCache(100.0), computing_s=10.0)
    assert (waited, tokens) == (pytest.approx(SLACK * 10.0, abs=0.1), 320)


def test_a_cache_is_not_asked_more_often_than_makes_sense() -> None:
    cache = SlowCache(0.5)
    ask(cache)
    assert cache.asked <= 0.5 / 0.003 + 2


def test_patience_begins_anew_with_each_wait() -> None:
    """vLLM had no blocks for what was found, and meanwhile it was evicted to the tier."""
    cache = SlowCache(0.0)
    scheduler = Scheduler(cache, block_tokens=32, clock=lambda: cache.now)
    scheduler.speed.add(0, 640, 2.0)
    asking = request()
    cache.seconds, cache.eta_s = 0.1, 0.1
    assert scheduler.matched(asking, 0) == (None, False)
    cache.now = 0.2
    assert scheduler.matched(asking, 0) == (960, True)
    cache.now, cache.seconds, cache.eta_s = 50.0, 50.1, 50.1
    assert scheduler.matched(asking, 0) == (None, False)
    cache.now = 50.2
    assert scheduler.matched(asking, 0) == (960, True)
    assert "lookups_given_up" not in scheduler.figures


def test_what_was_found_before_a_reset_is_not_promised_after_it() -> None:
    cache = SlowCache(0.0)
    scheduler = Scheduler(cache, block_tokens=32, clock=lambda: cache.now)
    asking = request()
    assert scheduler.matched(asking, 0) == (960, True)
    assert scheduler.reset()
    assert cache.forgotten == 1
    cache.lookup = lambda *_, **__: Lookup(LookupState.MISS)
    assert scheduler.matched(asking, 0) == (0, False)


def test_what_vllm_has_itself_is_not_waited_for() -> None:
    cache = SlowCache(100.0)
    assert ask(cache, computed=992) == (0.0, 0)
    assert cache.asked == 0


def test_the_hold_of_a_lookup_that_is_not_used_is_given_back() -> None:
    cache = SlowCache(0.0)
    scheduler = Scheduler(cache, block_tokens=32, clock=lambda: cache.now)
    asking = request()
    assert scheduler.matched(asking, 960) == (0, False)
    scheduler.allocated(asking, [1, 2, 3], 0)
    assert cache.forgotten == 1
    assert scheduler.matched(asking, 0) == (960, True)
    asking.num_computed_tokens = 0
    assert scheduler.finished(asking, []) is False
    assert cache.forgotten == 2


def test_a_cache_that_raises_is_a_miss_and_vllm_goes_on() -> None:
    class Raising(SlowCache):
        def lookup(self, rid: str, chain: Any, **_: Any) -> Lookup:
            raise RuntimeError("no")

        forget = clear = lookup

    cache = Raising(0.0)
    scheduler = Scheduler(cache, block_tokens=32, clock=lambda: cache.now)
    asking = request()
    assert scheduler.matched(asking, 0) == (0, False)
    scheduler.allocated(asking, [1, 2, 3], 0)
    asking.num_computed_tokens = 0
    assert scheduler.finished(asking, []) is False
    assert scheduler.reset() is False


def test_an_adapter_that_is_being_read_is_waited_for_like_a_tier(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "adapter_model.safetensors").write_bytes(b"weights")
    go = threading.Event()
    monkeypatch.setattr("lmcache_adapters.vllm.lora._digest", lambda *_: go.wait(30) and "lora:x")
    cache, asking = SlowCache(0.0), request()
    asking.lora_request = LoRARequest("l", 1, str(tmp_path))
    scheduler = Scheduler(cache, block_tokens=32, clock=lambda: cache.now)
    assert scheduler.matched(asking, 0) == (None, False)
    cache.now = FIRST_WAIT_S
    assert scheduler.matched(asking, 0) == (0, False)
    assert scheduler.figures == {"lookups_given_up": 1}
    cache.now += 2.0  # vLLM had no blocks, and asks once more
    assert scheduler.matched(asking, 0) == (None, False)
    go.set()
    assert scheduler._states["r"].lora.result(10) == "lora:x"
    cache.now += 0.01
    assert scheduler.matched(asking, 0) == (960, True)
