"""What vLLM does to a request, and the cache with it: real scheduler, real daemon, real memory, no model."""

from __future__ import annotations

import dataclasses
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from vllm.lora.request import LoRARequest
from vllm.v1.request import RequestStatus

import lmcache_adapters.vllm.lora as lora_module
from tests.core.served import Served
from tests.vllm.pretend import PretendEngine, until

Make = Callable[..., PretendEngine]


@pytest.fixture
def make(tiny_directory: Path, shared_daemon: Served) -> Iterator[Make]:
    engines = []

    def start(url: str = shared_daemon.url, **options: Any) -> PretendEngine:
        engines.append(PretendEngine(tiny_directory, url, **options))
        return engines[-1]

    yield start
    for engine in engines:
        engine.close()


_seeds = iter(range(1_000_000))


def prompt(tokens: int, seed: int | None = None) -> list[int]:
    """Another one each time, so that tests do not meet in the daemon."""
    return np.random.default_rng([7, next(_seeds) if seed is None else seed]).integers(10, 1000, tokens).tolist()


@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
@pytest.mark.parametrize(
    ("block", "chunk", "tokens", "hit"),
    [
        (32, 64, 300, 256),
        (32, 64, 256, 224),  # all of it is known: a block is left to compute
        (64, 32, 300, 256),  # known are 288
        (32, 48, 300, 288),
        (64, 96, 300, 256),  # a load ends within a chunk
        (128, 64, 300, 256),
        (32, 1, 100, 96),
        (32, 512, 300, 0),
        (32, 64, 20, 0),
    ],
)
def test_a_prompt_is_found_again(make: Make, block: int, chunk: int, tokens: int, hit: int, asynchronous: bool) -> None:
    engine = make(block_tokens=block, chunk_tokens=chunk, asynchronous=asynchronous)
    ids = prompt(tokens)
    assert engine.run("cold", ids) == 0
    engine.flush()
    assert engine.run("warm", ids) == hit
    assert engine.computed["warm"] == tokens - hit
    engine.flush()
    shared = (hit + 5) // chunk * chunk // block * block
    assert engine.run("branch", ids[: hit + 5] + prompt(40)) == shared
    other = make(block_tokens=block, chunk_tokens=chunk)
    assert other.run("elsewhere", ids) == hit


def test_another_block_size_finds_it_too(make: Make) -> None:
    ids = prompt(500)
    first = make(block_tokens=32)
    first.run("a", ids)
    first.flush()
    assert make(block_tokens=128).run("b", ids) == 384


def test_only_what_vllm_lacks_is_loaded(make: Make) -> None:
    engine = make()
    ids = prompt(500)
    engine.run("cold", ids)
    engine.flush()
    engine.run("start", ids[:100], params={"no_load": True})  # three blocks; the second chunk is a half of one
    assert engine.run("warm", ids) == 448 - 96
    assert engine.computed["warm"] == 500 - 448
    assert engine.run("again", ids) == 0


def test_replies_are_stored_with_their_prompts(make: Make) -> None:
    engine = make()
    ids = prompt(100)
    engine.run("turn", ids, max_tokens=200)
    turn = engine.tokens["turn"]
    assert len(turn) == 300
    engine.flush()
    assert engine.run("next", turn + prompt(30)) == 256


@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
def test_a_reply_that_ends_with_a_chunk_is_stored_whole(make: Make, asynchronous: bool) -> None:
    engine = make(asynchronous=asynchronous)
    engine.run("turn", prompt(100), max_tokens=29)  # the last is never computed: 128 are
    engine.flush()
    assert engine.run("next", engine.tokens["turn"] + prompt(40)) == 128


def test_chunked_prefill(make: Make) -> None:
    engine = make(budget=96)
    ids = prompt(700)
    engine.run("cold", ids)
    engine.flush()
    assert engine.run("warm", ids[:650]) == 640


def test_two_at_once_with_a_shared_prefix(make: Make) -> None:
    engine = make()
    shared = prompt(200)
    engine.run("cold", shared)
    engine.flush()
    for name in "ab":
        engine.add(name, shared + prompt(60), max_tokens=5)
    engine.settle()
    assert engine.loaded == {"cold": 0, "a": 192, "b": 192}


@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
def test_preemption_and_resumption(make: Make, asynchronous: bool) -> None:
    engine = make(blocks=40, asynchronous=asynchronous)  # 1,248 tokens for four requests that grow to 400
    prompts = [prompt(220) for _ in range(4)]
    for number, ids in enumerate(prompts):
        engine.add(f"r{number}", ids, max_tokens=180)
    engine.settle()
    assert engine.preempted > 0
    assert len(engine.finished) == 4
    engine.flush()
    for number in range(4):
        assert engine.run(f"again{number}", engine.tokens[f"r{number}"][:399]) == 384


def test_under_pressure_everything_is_evicted_and_comes_back(make: Make) -> None:
    engine = make(blocks=24)
    prompts = [prompt(400) for _ in range(4)]
    for number, ids in enumerate(prompts):
        engine.run(f"cold{number}", ids)
    for number, ids in enumerate(prompts):
        assert engine.run(f"warm{number}", ids) > 0


@pytest.mark.parametrize("late", [(), ("_store",), ("_load",)], ids=["prompt", "late stores", "late loads"])
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
def test_abort_at_any_time(make: Make, asynchronous: bool, ranks: int, late: tuple[str, ...]) -> None:
    engine = make(asynchronous=asynchronous, ranks=ranks)
    ids = prompt(900)
    engine.run("cold", ids)
    engine.flush()
    _delay(engine, 0.02, *late)
    for steps in range(8):
        rid = f"abort{steps}"
        engine.add(rid, ids, max_tokens=20)

        def abort(rid: str = rid) -> None:
            engine.scheduler.finish_requests(rid, RequestStatus.FINISHED_ABORTED)

        for _ in range(steps // 2):
            engine.step()
        if steps % 2:
            engine.step(abort)
        else:
            abort()
        engine.settle()
        assert not engine.scheduler.requests
        engine.flush()  # which fails while a block is held
    assert engine.run("warm", ids) == 896


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
def test_abort_of_a_load_whose_request_is_stored_from_an_earlier_life(
    make: Make, asynchronous: bool, ranks: int
) -> None:
    """Its stores have ended, but that is not known yet: it must not be named as received and as sent."""
    engine = make(asynchronous=asynchronous, ranks=ranks, chunk_tokens=32)
    ids = prompt(300)
    engine.run("cold", ids)
    engine.flush()
    _delay(engine, 0.05, "_store", "_load")
    engine.add("r", ids, max_tokens=40, params={"no_load": True})
    state = engine.connector._scheduler._state(engine.requests["r"])
    while not state.storing:
        engine.step()
    while engine._waiting:  # else its blocks are not free, and vLLM cannot
        engine._update()
    state.wishes = dataclasses.replace(state.wishes, load=True)
    assert engine.scheduler.reset_prefix_cache(reset_running_requests=True)

    def abort() -> None:
        assert state.loading and state.storing
        engine.scheduler.finish_requests("r", RequestStatus.FINISHED_ABORTED)

    engine.step(abort)
    engine.settle()
    assert not engine.scheduler.requests
    assert not engine.connector.has_pending_block_frees()
    engine.flush()
    assert engine.run("warm", ids) == 288


def test_an_aborted_load_stores_nothing(make: Make, served: Served) -> None:
    """vLLM counts tokens as computed while they are still being loaded."""
    ids = prompt(300)
    writer = make(served.url)
    writer.run("cold", ids)
    writer.flush()
    reader = make(served.url)
    reader.add("r", ids)
    reader.ranks[0].connector._worker._connector.load = _never  # the copy does not come
    reader.step()
    assert reader.requests["r"].num_computed_tokens == 256
    reader.scheduler.finish_requests("r", RequestStatus.FINISHED_ABORTED)
    assert not reader.connector._scheduler._step.stores


def _never(ticket: Any, slots: Any, **_: Any) -> Any:
    from lmcache_sdk.connector import CopyTransfer

    return CopyTransfer(range(ticket.first, ticket.boundary), 1)


@pytest.mark.parametrize(("share", "found"), [("any", 256), ("verified", 0), ("own", 0)])
def test_whose_kv_is_used(make: Make, served: Served, share: str, found: int) -> None:
    """That of an engine which is another producer, and which nobody has compared with this one."""

    def other(config: Any) -> None:
        config.model_config.hf_overrides = {"of": "another engine"}

    ids = prompt(300)
    stranger = make(served.url, change=other)
    stranger.run("cold", ids)
    stranger.flush()
    engine = make(served.url, share=share)
    assert engine.run("theirs", ids) == found
    engine.flush()
    assert engine.run("its own", ids) == 256
    if share != "any":  # a second text of both: the pair is compared, and agrees
        until(lambda: [pair["state"] for pair in served.status()["stats"]["pairs"]] == ["open"])
        again = prompt(300)
        stranger.run("again", again)
        stranger.flush()
        assert engine.run("theirs, compared", again) == (256 if share == "verified" else 0)


def test_salts_are_apart(make: Make) -> None:
    engine = make()
    ids = prompt(200)
    engine.run("a", ids, salt="a")
    engine.flush()
    assert engine.run("none", ids) == 0
    engine.flush()
    assert engine.run("b", ids, salt="b") == 0
    engine.flush()
    assert engine.run("a2", ids, salt="a") == 192


def test_what_a_request_may_ask_for(make: Make) -> None:
    engine = make()
    ids = prompt(200)
    engine.run("unstored", ids, params={"no_store": True})
    engine.flush()
    assert engine.run("cold", ids) == 0
    engine.flush()
    assert engine.run("unloaded", ids, params={"no_load": True}) == 0
    engine.flush()
    assert engine.run("warm", ids, params={"pin": 60, "do_remote_prefill": False}) == 192
    engine.flush()
    assert engine.run("odd", ids, params={"pin": "for ever", "no_store": "yes", "tenant": 7}) == 192


def test_chunks_count_against_their_tenant(make: Make, served: Served) -> None:
    engine = make(served.url)
    engine.run("a", prompt(300), params={"tenant": "t"})
    engine.run("b", prompt(200))
    engine.flush()
    tenants = served.status()["tenants"]
    assert tenants["t"] * 3 == tenants[""] * 4 > 0


def test_pinned_chunks_outlast_others(make: Make, served: Served) -> None:
    engine = make(served.url)
    pinned, plain = prompt(300), prompt(300)
    engine.run("pinned", pinned, params={"pin": 60})
    engine.run("plain", plain)
    engine.flush()
    for number in range(16):
        engine.run(f"flood{number}", prompt(400))
        engine.flush()
    assert engine.run("plain again", plain, params={"no_store": True}) == 0
    assert engine.run("pinned again", pinned) == 256


def test_roles(make: Make) -> None:
    ids = prompt(200)
    producer, consumer = make(role="kv_producer"), make(role="kv_consumer")
    assert consumer.run("a", ids) == 0
    producer.run("b", ids)
    producer.flush()
    assert producer.run("c", ids) == 0
    assert make(role="kv_consumer").run("d", ids) == 192
    assert not producer.connector.requires_kv_delivery


def test_the_daemon_goes_and_comes_back(make: Make, served: Served) -> None:
    engine = make(served.url)
    ids = prompt(300)
    engine.run("cold", ids)
    engine.flush()
    served.stop(signal.SIGKILL)
    began = time.monotonic()
    assert engine.run("alone", ids) == 0
    assert engine.run("other", prompt(300)) == 0
    assert time.monotonic() - began < 5
    engine.flush()
    assert engine.scheduler.reset_prefix_cache(reset_connector=True) is False  # what is stored would come back
    served.start()
    until(lambda: engine.connector._scheduler._cache.connected and engine.ranks[0].connector._worker_cache.connected)
    engine.run("refill", ids)
    engine.flush()
    assert engine.run("warm", ids) == 256


def test_the_daemon_dies_between_lease_and_load(make: Make, served: Served) -> None:
    """vLLM has taken blocks for what will not come: it computes it, and the request ends as it should."""
    engine = make(served.url)
    ids = prompt(300)
    engine.run("cold", ids)
    engine.flush()
    engine.add("lost", ids, max_tokens=3)
    schedule = engine.scheduler.schedule

    def kill_after() -> Any:
        output = schedule()
        if output.kv_connector_metadata.loads:
            served.stop(signal.SIGKILL)
        return output

    engine.scheduler.schedule = kill_after
    engine.settle()
    assert str(engine.finished["lost"]) == "length"
    assert engine.computed["lost"] == 302


def test_a_failed_load_ends_its_request_under_the_policy_fail(make: Make, capfd: pytest.CaptureFixture[str]) -> None:
    engine = make(policy="fail")
    assert 'set "kv_load_failure_policy": "recompute"' in capfd.readouterr().err
    ids = prompt(300)
    engine.run("cold", ids)
    engine.flush()
    engine.connector._scheduler._cache.claim = lambda *_, **__: None  # too late for a lease
    engine.add("lost", ids)
    engine.settle()
    assert str(engine.finished["lost"]) == "error"


@pytest.mark.parametrize("failed", [0, 2, 3])
def test_some_chunks_do_not_come(make: Make, failed: int) -> None:
    engine = make()
    ids = prompt(300)
    engine.run("cold", ids)
    engine.flush()
    copies = engine.ranks[0].connector._worker._connector
    load = copies.load

    def lose(ticket: Any, slots: Any, **fields: Any) -> Any:
        transfer = load(ticket, slots, **fields)
        assert transfer.wait(10)
        transfer.fail([failed])
        return transfer

    copies.load = lose
    engine.add("lost", ids, max_tokens=3)
    engine.settle()
    assert engine.computed["lost"] == 302 - failed * 64
    copies.load = load
    engine.flush()
    assert engine.run("warm", ids) == 256


def test_reset_of_the_connector_removes_what_is_stored(make: Make, served: Served) -> None:
    engine = make(served.url)
    ids = prompt(200)
    engine.run("cold", ids)
    engine.flush()
    assert engine.scheduler.reset_prefix_cache(reset_connector=True)
    assert engine.run("again", ids) == 0


def test_a_reset_that_did_not_get_to_its_end_says_so(
    make: Make, served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make(served.url)
    engine.run("cold", prompt(200))
    engine.flush()
    with monkeypatch.context() as patch:
        patch.setattr("lmcache_sdk.daemon.client._CLEAR_S", 0.0)  # of a pool with very many chunks
        assert engine.scheduler.reset_prefix_cache(reset_connector=True) is False
    assert served.process is not None
    served.process.send_signal(signal.SIGSTOP)
    began = time.monotonic()
    assert engine.scheduler.reset_prefix_cache(reset_connector=True) is False
    assert time.monotonic() - began < 2
    served.process.send_signal(signal.SIGCONT)
    until(lambda: engine.connector._scheduler._cache.connected)
    assert engine.scheduler.reset_prefix_cache(reset_connector=True)
    assert served.status()["stats"]["chunks"] == 0


def test_a_reset_does_not_say_true_while_stores_are_under_way(make: Make, served: Served) -> None:
    engine = make(served.url)
    _delay(engine, 0.3, "_store")
    engine.add("r", prompt(200), max_tokens=40)
    engine.step()  # its prompt is being stored
    assert engine.scheduler.reset_prefix_cache(reset_running_requests=True, reset_connector=True) is False
    assert engine.ranks[0].connector._worker.drain(10)
    assert served.status()["stats"]["chunks"] == 3  # that is what would have been left
    engine.settle()
    assert engine.scheduler.reset_prefix_cache(reset_connector=True)
    assert served.status()["stats"]["chunks"] == 0


@pytest.mark.parametrize("ranks", [1, 2])
def test_reset_while_requests_run(make: Make, ranks: int) -> None:
    engine = make(chunk_tokens=32, ranks=ranks)
    _delay(engine, 0.02, "_store")
    for number in range(3):
        engine.add(f"r{number}", prompt(200), max_tokens=40)
    for _ in range(5):
        engine.step()
    assert any(state.storing for state in engine.connector._scheduler._states.values())
    assert engine.scheduler.reset_prefix_cache(reset_running_requests=True)
    engine.settle()
    assert len(engine.finished) == 3


def test_asking_has_no_side_effects_and_is_cheap(make: Make) -> None:
    engine = make()
    ids = prompt(2000)
    engine.run("cold", ids)
    engine.flush()
    request = engine.add("warm", ids)
    half = engine.connector._scheduler
    calls = 0
    lookup = half._cache.lookup

    def counted(*args: Any, **fields: Any) -> Any:
        nonlocal calls
        calls += 1
        return lookup(*args, **fields)

    half._cache.lookup = counted
    begin = time.perf_counter()
    answers = {engine.connector.get_num_new_matched_tokens(request, 0) for _ in range(1000)}
    assert answers == {(1984, True)}
    assert calls == 1
    assert time.perf_counter() - begin < 1.0
    assert engine.connector.get_num_new_matched_tokens(request, 1984) == (0, False)
    assert engine.connector.get_num_new_matched_tokens(request, 96) == (1888, True)
    engine.settle()
    assert engine.computed["warm"] == 16


def test_nobody_waits_for_an_adapter_that_is_long_in_reading(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither vLLM's scheduler nor, beyond its patience, the request; that is stored if it still runs then."""
    (tmp_path / "adapter_model.safetensors").write_bytes(b"weights")
    lora, read, go = LoRARequest("l", 1, str(tmp_path)), lora_module._digest, threading.Event()
    monkeypatch.setattr("lmcache_adapters.vllm.lora._digest", lambda *args: go.wait(30) and read(*args))
    engine = make()
    ask, times = engine.connector.get_num_new_matched_tokens, []

    def timed(*args: Any) -> Any:
        began = time.perf_counter()
        answer = ask(*args)
        times.append((time.perf_counter() - began, answer))
        return answer

    engine.connector.get_num_new_matched_tokens = timed
    half, ids = engine.connector._scheduler, prompt(300)
    half.speed.add(0, 300, 2.0)  # so that its patience is 3 % of about that
    assert engine.run("a", ids, lora_request=lora) == 0
    assert times[0][1] == (None, False) and times[-1][1] == (0, False)
    assert min(seconds for seconds, _ in times) < 0.005 and max(seconds for seconds, _ in times) < 0.5
    engine.flush()

    engine.add("b", ids, lora_request=lora, max_tokens=60)
    while not engine.computed["b"]:
        engine.step()
    go.set()
    until(half._states["b"].lora.done)
    engine.settle()
    engine.flush()
    assert engine.run("c", ids, lora_request=lora) == 256


@pytest.mark.parametrize("wishes", [{}, {"no_load": True, "no_store": True}], ids=["kept", "not kept"])
def test_what_an_adapter_computed_before_it_was_trained_again_is_not_its_own(
    make: Make, tmp_path: Path, wishes: dict[str, Any]
) -> None:
    """vLLM's prefix cache has it still, by the adapter's name and path, when it is loaded again with another number."""
    engine, ids, old, new = make(), prompt(300), tmp_path / "l", tmp_path / "same"
    for folder, weights in ((old, b"before"), (new, b"behind")):
        folder.mkdir()
        (folder / "adapter_model.safetensors").write_bytes(weights)
    engine.run("before", ids, lora_request=LoRARequest("l", 1, str(old)), params=wishes)
    (old / "adapter_model.safetensors").write_bytes(b"behind")
    engine.run("behind", ids, lora_request=LoRARequest("l", 2, str(old)))
    assert engine.computed["behind"] == 12
    engine.flush()
    assert make().run("elsewhere", ids, lora_request=LoRARequest("same", 1, str(new))) == 0


def test_hit_sources(make: Make) -> None:
    pytest.importorskip("vllm.v1.metrics.cache_hit_source", reason="older than hit sources")
    engine = make()
    ids = prompt(300)
    engine.run("cold", ids)
    engine.flush()
    request = engine.add("warm", ids)
    engine.step()
    found = engine.connector.get_external_cache_hit_sources(request, 256)
    assert {source.value: tokens for source, tokens in found.items()} == {"host": 256}
    assert engine.connector.get_external_cache_hit_sources(request, 0) == {}
    engine.settle()


@pytest.mark.parametrize("first", [1, 2])
def test_tensor_parallel_engines_of_different_size_share_with_a_fine_grid(make: Make, first: int) -> None:
    ids = prompt(300)
    writer = make(ranks=first, heads_per_cell=2)
    writer.run("cold", ids)
    writer.flush()
    assert writer.run("warm", ids) == 256
    reader = make(ranks=3 - first, heads_per_cell=2)
    assert reader.run("elsewhere", ids, max_tokens=3) == 256


def test_with_the_default_grid_they_do_not_share(make: Make, capfd: pytest.CaptureFixture[str]) -> None:
    ids = prompt(300)
    writer = make(ranks=2)
    assert "cells of 2 KV heads, the shard of tensor parallelism 2" in capfd.readouterr().err
    writer.run("cold", ids)
    writer.flush()
    assert writer.run("warm", ids) == 256
    assert make().run("elsewhere", ids) == 0


def test_preemption_with_two_ranks(make: Make) -> None:
    engine = make(blocks=40, ranks=2)
    for number in range(4):
        engine.add(f"r{number}", prompt(220), max_tokens=180)
    engine.settle()
    assert engine.preempted > 0
    assert len(engine.finished) == 4


def _delay(engine: PretendEngine, seconds: float, *names: str) -> None:
    """Copies begin late, as on a busy machine: whatever may overwrite their blocks has all the time to."""
    for rank in engine.ranks:
        copies = rank.connector._worker._connector
        for name in names:
            copy, pause = getattr(copies, name), threading.Event()

            def late(*arguments: Any, copy: Any = copy, pause: Any = pause) -> None:
                pause.wait(seconds)
                copy(*arguments)

            setattr(copies, name, late)


@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
@pytest.mark.parametrize("ranks", [1, 2])
def test_late_stores_read_what_they_should(make: Make, ranks: int, asynchronous: bool) -> None:
    """Blocks of requests that have ended are not given away while a store reads them."""
    engine = make(blocks=22, ranks=ranks, asynchronous=asynchronous)
    _delay(engine, 0.1, "_store")
    prompts = [prompt(260) for _ in range(6)]
    for number, ids in enumerate(prompts):
        engine.add(f"r{number}", ids, max_tokens=2 if number % 2 else 100)
    engine.settle()
    assert len(engine.finished) == 6
    engine.flush()
    for number, ids in enumerate(prompts):
        assert engine.run(f"warm{number}", ids) == 256  # and each row is compared
        engine.flush()


@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
def test_preempted_blocks_wait_for_their_stores(make: Make, asynchronous: bool) -> None:
    engine = make(blocks=18, chunk_tokens=32, asynchronous=asynchronous)
    _delay(engine, 0.03, "_store")
    for number in range(4):
        engine.add(f"r{number}", prompt(95), max_tokens=120)
    engine.settle()
    assert engine.preempted
    engine.flush()
    for number in range(4):
        assert engine.run(f"warm{number}", engine.tokens[f"r{number}"]) == 192
        engine.flush()


def test_blocks_are_not_held_for_longer_than_it_takes(make: Make) -> None:
    engine = make()
    engine.run("a", prompt(300), max_tokens=1)
    for rank in engine.ranks:
        assert rank.connector._worker.drain(10)
    engine.settle()
    assert engine.scheduler.reset_prefix_cache()
    assert not engine.connector.has_pending_block_frees()
    _delay(engine, 0.2, "_store")
    engine.add("b", prompt(300), max_tokens=1)
    engine.step()
    assert engine.connector.has_pending_block_frees()
    assert not engine.scheduler.reset_prefix_cache()
    engine.settle()
    assert engine.scheduler.reset_prefix_cache()
