"""One process claims, others copy: a scheduler and its workers, across a daemon's restart, and to their bounds."""

from __future__ import annotations

import pickle
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import msgspec
import pytest

from lmcache_sdk.api import Ticket
from lmcache_sdk.daemon import client as client_module
from lmcache_sdk.daemon import protocol as p
from lmcache_sdk.daemon.client import DaemonCache
from tests.core.engine import CHUNK, slots_of
from tests.daemon.daemon_process import Daemon, until
from tests.daemon.engine_process import CHUNKS, PAGES, Engine, EngineProcess, close, connect, prompt
from tests.daemon.test_hostile_clients import HELLO, Raw, digests

PARTS = 2
EXACT = {"hit": CHUNKS, "failed": [], "wrong": []}


@pytest.fixture
def scheduler(daemon: Daemon) -> Iterator[Engine]:
    """With a prompt in the daemon."""
    engine = connect(daemon)
    assert engine.store(1).wait(10)
    assert engine.cache.drain(10)
    yield engine
    close(engine)


@pytest.fixture
def workers(daemon: Daemon) -> Iterator[list[DaemonCache]]:
    caches = [connect(daemon) for _ in range(PARTS)]
    yield [each.daemon for each in caches]
    for each in caches:
        close(each)


def claim(scheduler: Engine) -> Ticket:
    ticket = scheduler.claim(1, parts=PARTS)
    assert ticket is not None
    return ticket


def copy(ticket: Ticket, workers: list[DaemonCache]) -> None:
    for rank, worker in enumerate(workers):
        assert worker.take(ticket, rank)
    for rank, worker in enumerate(workers):
        worker.release(ticket, rank)


def test_what_workers_have_copied_does_not_keep_a_restarted_daemon_from_its_memory(
    daemon: Daemon, scheduler: Engine, workers: list[DaemonCache]
) -> None:
    copy(claim(scheduler), workers)
    daemon.kill()
    daemon.start()
    until(lambda: scheduler.daemon.connected and all(worker.connected for worker in workers), 3)
    with Raw(daemon) as raw:
        assert isinstance(raw.ask(p.Hello(p.PROTOCOL_VERSION)), p.Welcome)

        def earlier() -> Any:
            return msgspec.msgpack.decode(raw.ask(p.Ask()).details["earlier_clients"])

        until(lambda: earlier() == 0, 3, "all saying that they are done")
    daemon.settled()
    started = time.monotonic()
    scheduler.cache.close(5.0)
    assert time.monotonic() - started < 1.0, "nothing of its own was under way"


def test_a_part_that_is_copied_here_is_waited_for(daemon: Daemon, scheduler: Engine) -> None:
    ticket = claim(scheduler)
    assert scheduler.cache.take(ticket, 0), "claimed here, and so without a round trip"
    started = time.monotonic()
    scheduler.cache.close(0.3)
    assert 0.3 <= time.monotonic() - started < 1.0
    assert daemon.check()["leases"] == 1, "this process may still copy"


def test_a_part_that_was_claimed_is_taken_without_the_daemon(daemon: Daemon, scheduler: Engine) -> None:
    assert daemon.process is not None
    ticket = claim(scheduler)
    daemon.process.stop()
    started = time.monotonic()
    assert scheduler.cache.take(ticket, 0) and scheduler.cache.take(ticket, 0)
    assert time.monotonic() - started < 0.1
    daemon.process.go_on()
    for part in range(PARTS):
        scheduler.cache.release(ticket, part)
    daemon.settled()


def test_what_was_claimed_is_kept_for_one_that_comes_back(
    daemon: Daemon, scheduler: Engine, workers: list[DaemonCache]
) -> None:
    """Also what it has not begun to copy, and what its workers are copying."""
    assert daemon.process is not None
    ticket = claim(scheduler)
    assert workers[0].take(ticket, 0)
    daemon.process.stop()
    assert not scheduler.cache.stats().chunks
    daemon.process.go_on()
    until(lambda: scheduler.daemon.connected, 3)
    assert daemon.check()["leases"] == 1
    assert workers[1].take(ticket, 1)
    for rank, worker in enumerate(workers):
        worker.release(ticket, rank)
    daemon.settled()


def test_claims_are_remembered_to_a_bound(
    daemon: Daemon, scheduler: Engine, workers: list[DaemonCache], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client_module, "_MOST_CLAIMED", 3 * PARTS)
    life = scheduler.daemon._life
    assert life is not None
    for _ in range(10):
        copy(claim(scheduler), workers)
        assert len(life.claimed) <= 3 * PARTS
    tickets = [claim(scheduler) for _ in range(5)]
    for ticket in tickets:  # what is no longer remembered here is still known there
        for part in range(PARTS):
            assert scheduler.cache.take(ticket, part)
            scheduler.cache.release(ticket, part)
    assert not life.claimed and not life.under_way
    daemon.settled()


@pytest.mark.parametrize("what", ["claim", "take", "reserve"])
def test_what_is_given_while_the_cache_is_being_closed_is_given_back(
    daemon: Daemon, scheduler: Engine, workers: list[DaemonCache], what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A copy that is under way holds up the end, and what comes in meanwhile must not stay with the daemon."""
    mine, theirs = claim(scheduler), claim(scheduler)
    assert workers[0].take(mine, 0)
    scheduler.cache.lookup("r", scheduler.chain(1, CHUNKS))
    calls: dict[str, tuple[DaemonCache, Callable[[DaemonCache], Any]]] = {
        "claim": (scheduler.daemon, lambda cache: cache.claim("r", CHUNKS)),
        "take": (workers[0], lambda cache: cache.take(theirs, 0)),
        "reserve": (workers[0], lambda cache: cache.reserve("s", scheduler.chain(9, CHUNKS), 0, CHUNKS)),
    }
    cache, call = calls[what]
    assert cache.take(mine, 0 if what != "claim" else 1)
    before = daemon.check()
    through = cache._call

    def slowly(life: Any, message: p.Message, *arguments: Any) -> Any:
        answer = through(life, message, *arguments)
        if isinstance(message, p.Claim | p.Take | p.Reserve):
            cache._closing = True  # as close does, between the daemon's answer and its arrival
        return answer

    monkeypatch.setattr(cache, "_call", slowly)
    assert not call(cache)
    after = daemon.check()
    assert (after["leases"], after["reservations"]) == (before["leases"], before["reservations"])
    cache._closing = False
    for part, owner in ((0, workers[0]), (1, scheduler.daemon)):
        owner.release(mine, part)
        scheduler.cache.release(theirs, part)
    workers[0].release(theirs, 0)
    if what == "take":
        daemon.settled()


def test_a_part_that_is_taken_counts_for_who_takes_it() -> None:
    with Daemon(pool_bytes=160 << 10, client_share=0.25) as daemon:
        daemon.start()
        with EngineProcess(daemon) as first, EngineProcess(daemon) as second:
            worker = connect(daemon)
            for seed in range(4):
                assert worker.store(seed).wait(10)
            tickets = []
            for seed, owner in enumerate((first, first, second, second)):
                pickled = owner.ask(do="hand over", seed=seed)
                tickets.append(pickle.loads(bytes.fromhex(pickled)))
            taken = [worker.cache.take(ticket) for ticket in tickets]
            assert taken[0] and not taken[-1]
            for ticket in tickets:
                worker.cache.release(ticket)
            assert worker.cache.take(tickets[0]) is False
            close(worker)
        daemon.settled()


def test_a_part_that_its_worker_could_not_take_is_given_back(
    daemon: Daemon, scheduler: Engine, workers: list[DaemonCache], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It had no daemon for a moment, and nobody tells the one who claimed."""
    assert daemon.process is not None
    monkeypatch.setattr(client_module, "_UNTAKEN_S", 1.0)
    ticket = claim(scheduler)
    daemon.process.stop()
    assert not workers[0].take(ticket, 0)
    workers[0].release(ticket, 0)
    daemon.process.go_on()
    until(lambda: scheduler.daemon.connected and workers[0].connected, 3)
    assert workers[1].take(ticket, 1)
    daemon.process.stop()
    assert not scheduler.cache.stats().chunks  # or its keeper would wait for as long as it was told at first
    daemon.process.go_on()
    until(lambda: scheduler.daemon.connected, 3)
    life = scheduler.daemon._life
    assert life is not None
    until(lambda: not life.claimed and not life.given_up, 5, "giving up")
    assert daemon.check()["leases"] == 1, "the other worker has its part, and may be hung for as long as it likes"
    assert not workers[0].take(ticket, 0), "its memory may be another chunk's by now"
    assert not scheduler.cache.take(ticket, 0)
    assert workers[1].take(ticket, 1)
    workers[1].release(ticket, 1)
    daemon.settled()


def test_a_part_is_not_given_back_while_it_is_being_taken_here(
    daemon: Daemon, scheduler: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The release may overtake the take, or be overtaken: in neither case is there a copy of what is free."""
    ticket, cache = claim(scheduler), scheduler.daemon
    monkeypatch.setattr(client_module, "_UNTAKEN_S", 0.0)
    through, taken = cache._call, []

    def slowly(life: Any, message: p.Message, *arguments: Any) -> Any:
        if isinstance(message, p.Release):
            taken.append(cache.take(ticket, message.part))
        return through(life, message, *arguments)

    monkeypatch.setattr(cache, "_call", slowly)
    assert cache.take(ticket, 1)
    life = cache._life
    assert life is not None
    cache._give_up_untaken(life)
    assert taken == [False] and not life.given_up
    monkeypatch.undo()
    assert daemon.check()["leases"] == 1 and not cache.take(ticket, 0)
    cache.release(ticket, 1)
    daemon.settled()


def test_a_prompt_over_a_clients_share_is_found_as_far_as_it_may_be_claimed() -> None:
    with Daemon(pool_bytes=160 << 10, client_share=0.25) as daemon:
        daemon.start()
        engine, chunks = connect(daemon), 12
        slots = slots_of(1, chunks * CHUNK, PAGES)
        engine.memory.compute(prompt(1, chunks), slots)
        for first in range(0, chunks, CHUNKS):
            piece = slots[first * CHUNK : (first + CHUNKS) * CHUNK]
            assert engine.connector.store("s", engine.chain(1, chunks), first, piece).wait(10)
        assert daemon.check()["chunks"] == chunks
        found, *again = (engine.cache.lookup("r", engine.chain(1, chunks)) for _ in range(3))
        assert 0 < found.chunks < chunks
        assert sum(found.sources.values()) == found.chunks
        assert found.why == "more than one client may hold"
        assert again == [found, found]
        assert engine.cache.claim("r", found.chunks) is not None
        other = connect(daemon)
        loaded = other.load(1, chunks)
        assert loaded == {"hit": found.chunks, "failed": [], "wrong": []}
        close(other)
        close(engine)


def test_the_bound_on_pins_outlives_a_connection() -> None:
    with Daemon(pool_bytes=160 << 10, client_share=0.25) as daemon:
        daemon.start()
        engine = connect(daemon)
        pinned = 0
        for seed in range(8):
            assert engine.store(seed).wait(10)
            with Raw(daemon) as raw:
                assert isinstance(raw.ask(HELLO), p.Welcome)
                pinned += raw.ask(p.Pin(digests(seed), 600.0)).count
                assert raw.ask(p.Bye()) == p.Count()
        assert CHUNKS <= pinned < 4 * CHUNKS
        with Raw(daemon) as raw:  # the same again costs nothing
            assert isinstance(raw.ask(HELLO), p.Welcome)
            counts = [raw.ask(p.Pin(digests(0), 600.0)).count for _ in range(20)]
        assert counts == [CHUNKS] * 20 or counts == [0] * 20
        for seed in range(20, 40):
            assert engine.store(seed).wait(10)
            assert engine.load(seed) == EXACT, "there is room left"
        close(engine)


def test_an_orderly_end_is_no_loss(daemon: Daemon, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG", "lmcache_sdk")
    for _ in range(5):
        engine = connect(daemon)
        assert engine.store(1).wait(10)
        close(engine)
    lost = [record for record in caplog.records if record.levelname == "WARNING"]
    assert not lost, lost


def test_closing_takes_no_longer_than_it_may(daemon: Daemon) -> None:
    assert daemon.process is not None
    engine = connect(daemon)
    daemon.process.stop()
    started = time.monotonic()
    engine.cache.close(0.2)
    took = time.monotonic() - started
    daemon.process.go_on()
    print(f"close: {took:.3f} s")
    assert took < 0.4
    close(engine)


def test_clients_are_counted_while_they_come_and_go() -> None:
    """For the metrics, which are asked for in other threads."""
    from lmcache_sdk.daemon.server import Server

    server = object.__new__(Server)

    class Coming:
        @property
        def opened(self) -> object:
            server._clients[threading.active_count().to_bytes(8, "big") + bytes([len(server._clients)])] = self  # type: ignore[assignment]
            return self

    server._clients = {b"": Coming(), b"2": Coming()}  # type: ignore[dict-item]
    assert server.client_count == 2
