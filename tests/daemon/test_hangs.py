"""Who hangs: the daemon, a client in mid-gather across a restart, a client with leases. SIGSTOP, and real processes."""

from __future__ import annotations

import shutil
import signal
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lmcache_backends.memory import MemoryBackend
from lmcache_sdk import BackendLocked, LookupState
from lmcache_sdk.backend import Item
from lmcache_sdk.daemon import protocol as p
from lmcache_sdk.daemon import serve
from lmcache_sdk.daemon.server import Settings
from lmcache_sdk.pool.shared import SharedPool
from lmcache_sdk.store import Tier
from tests.core.engine import CHUNK, PRODUCER
from tests.daemon.daemon_process import Daemon, until
from tests.daemon.engine_process import CHUNKS, EngineProcess, close, connect, layered, prompt

EXACT = {"hit": CHUNKS, "failed": [], "wrong": []}
TIMEOUT_S = 0.3
SLACK_S = 0.5

CALLS: dict[str, Callable[[Any], Any]] = {
    "lookup": lambda e: e.cache.lookup("r", e.chain(1, CHUNKS)),
    "long lookup": lambda e: e.cache.lookup("l", e.chain(1, 3000)),
    "wait": lambda e: e.cache.wait("r", 0.1),
    "claim": lambda e: e.cache.claim("r", 1),
    "reserve": lambda e: e.cache.reserve("r", e.chain(5, CHUNKS), 0, CHUNKS),
    "take": lambda e: e.cache.take(e.other),
    "release": lambda e: e.cache.release(e.ticket),
    "publish": lambda e: e.cache.publish(e.room),
    "abort": lambda e: e.cache.abort(e.room),
    "forget": lambda e: e.cache.forget("r"),
    "pin": lambda e: e.cache.pin(e.chain(1, CHUNKS), 1.0),
    "delete": lambda e: e.cache.delete(e.chain(1, CHUNKS)),
    "clear": lambda e: e.cache.clear(),
    "stats": lambda e: e.cache.stats(),
    "drain": lambda e: e.cache.drain(0.1),
    "close": lambda e: e.cache.close(0.1),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_call_to_a_hung_daemon_ends_in_time(daemon: Daemon, name: str) -> None:
    assert daemon.process is not None
    engine = connect(daemon, call_timeout_s=TIMEOUT_S)
    assert engine.store(1).wait(10)
    assert engine.load(1) == EXACT
    scheduler = connect(daemon)
    held: Any = engine
    held.ticket, held.other = engine.claim(1), scheduler.claim(1)
    held.room = engine.cache.reserve("s", engine.chain(7, CHUNKS), 0, CHUNKS)
    assert held.ticket and held.other and held.room
    daemon.process.stop()
    started = time.monotonic()
    CALLS[name](engine)
    took = time.monotonic() - started
    daemon.process.go_on()
    print(f"{name}: {took:.3f} s")
    assert took < TIMEOUT_S + 0.1 + SLACK_S
    if name != "close":
        until(lambda: engine.daemon.connected, 3)
        engine.cache.release(held.ticket)
        engine.cache.abort(held.room)
    scheduler.cache.release(held.other)
    close(engine)
    close(scheduler)
    if name != "close":  # which had a copy under way
        daemon.settled()
        until(lambda: daemon.check()["clients"] == 0)


@pytest.mark.parametrize("what", ["claim", "take", "reserve", "lookup"])
def test_what_an_interrupted_call_was_for_is_not_held(daemon: Daemon, what: str) -> None:
    """Ctrl-C, or a signal that raises, while the daemon is slow."""
    assert daemon.process is not None
    engine, scheduler = connect(daemon), connect(daemon)
    assert engine.store(1).wait(10)
    assert engine.cache.lookup("r", engine.chain(1, CHUNKS)).chunks == CHUNKS
    ticket = scheduler.claim(1)
    assert ticket is not None
    calls: dict[str, Callable[[], Any]] = {
        "claim": lambda: engine.cache.claim("r", CHUNKS),
        "take": lambda: engine.cache.take(ticket),
        "reserve": lambda: engine.cache.reserve("s", engine.chain(9, CHUNKS), 0, CHUNKS),
        "lookup": lambda: engine.cache.lookup("q", engine.chain(1, CHUNKS)),
    }

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    daemon.process.stop()
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.1)
        with pytest.raises(KeyboardInterrupt):
            calls[what]()
    finally:
        signal.signal(signal.SIGALRM, before)
        daemon.process.go_on()
    until(lambda: engine.daemon.connected and scheduler.daemon.connected, 3)
    scheduler.cache.release(ticket)
    engine.cache.forget("r")
    daemon.settled()
    assert engine.load(1) == EXACT
    close(engine)
    close(scheduler)


def test_a_daemon_that_is_reached_after_the_end_is_left_again(daemon: Daemon) -> None:
    """The keeper is reaching it while its cache is closed."""
    assert daemon.process is not None
    for pause_s in (0.25, 0.4):
        engine = connect(daemon, call_timeout_s=TIMEOUT_S)
        assert engine.store(1).wait(10)
        assert engine.claim(1) is not None  # and not taken: a claim alone holds nothing up
        assert engine.connector.close()
        daemon.process.stop()
        engine.cache.stats()
        assert not engine.daemon.connected
        threading.Event().wait(pause_s)
        engine.cache.close(0.1)
        daemon.process.go_on()
        until(lambda: not engine.daemon._keeper.is_alive(), 3)  # noqa: B023
        assert not engine.daemon.connected
        until(lambda: daemon.check()["clients"] == 0, 3, "leaving")
        daemon.settled()


def test_numbers_may_be_numpys(daemon: Daemon) -> None:
    engine, zero, count = connect(daemon), np.int64(0), np.int64(CHUNKS)
    room = engine.cache.reserve("s", engine.chain(1, CHUNKS), zero, count)  # type: ignore[arg-type]
    assert room is not None
    engine.cache.publish(room, list(np.arange(CHUNKS)))
    assert engine.cache.lookup("r", engine.chain(1, CHUNKS)).chunks == CHUNKS
    ticket = engine.cache.claim("r", count, first=zero, parts=np.int32(1))  # type: ignore[arg-type]
    assert ticket is not None and engine.cache.take(ticket, zero)  # type: ignore[arg-type]
    engine.cache.release(ticket, zero)  # type: ignore[arg-type]
    assert engine.cache.pin(engine.chain(1, CHUNKS), np.float32(0.1)) == CHUNKS  # type: ignore[arg-type]
    daemon.settled()
    close(engine)


@pytest.mark.parametrize("chunks", [[-1], [1 << 70], [99]])
def test_a_publication_of_what_cannot_be_gives_the_room_back(daemon: Daemon, chunks: list[int]) -> None:
    engine = connect(daemon)
    room = engine.cache.reserve("s", engine.chain(1, CHUNKS), 0, CHUNKS)
    assert room is not None
    engine.cache.publish(room, chunks)
    assert daemon.settled()["chunks"] == 0
    close(engine)


def test_a_publication_that_is_refused_gives_the_room_back(daemon: Daemon, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = connect(daemon)
    room = engine.cache.reserve("s", engine.chain(1, CHUNKS), 0, CHUNKS)
    assert room is not None
    encode = p.encode

    def refuse(message: p.Message) -> bytes:
        if isinstance(message, p.Publish) and message.chunks != ():
            raise p.ProtocolError("a message over the limit")
        return encode(message)

    monkeypatch.setattr(p, "encode", refuse)
    engine.cache.publish(room)
    assert daemon.settled()["chunks"] == 0
    close(engine)


def test_a_hung_daemon_is_left_alone_and_found_again(daemon: Daemon) -> None:
    assert daemon.process is not None
    engine = connect(daemon, call_timeout_s=TIMEOUT_S)
    assert engine.store(1).wait(10)
    kept = engine.claim(1)
    assert kept is not None
    daemon.process.stop()
    engine.cache.lookup("first", engine.chain(1, CHUNKS))
    assert not engine.daemon.connected
    seconds, chain = [], engine.chain(1, CHUNKS)
    for _ in range(1000):
        started = time.perf_counter()
        assert engine.cache.lookup("r", chain).state is LookupState.MISS
        seconds.append(time.perf_counter() - started)
    print(f"lookup with the breaker open: {1e6 * statistics.median(seconds):.1f} µs")
    assert statistics.median(seconds) < 50e-6
    threading.Event().wait(3)  # for the client to try, in vain, several times
    daemon.process.go_on()
    print(f"back after {until(lambda: engine.daemon.connected, 2):.3f} s")
    assert engine.load(1) == EXACT
    figures = daemon.check()
    assert figures["clients"] == 1, "it is the same client as before"
    assert figures["leases"] == 1, "and holds what it held"
    engine.cache.release(kept)
    assert daemon.settled()["chunks"] == CHUNKS
    close(engine)


def test_what_a_client_never_heard_of_is_not_held_for_it(daemon: Daemon) -> None:
    """Claims and reservations that were carried out after their client had given up."""
    assert daemon.process is not None
    engine = connect(daemon, call_timeout_s=TIMEOUT_S)
    assert engine.store(1).wait(10)
    engine.cache.lookup("r", engine.chain(1, CHUNKS))
    daemon.process.stop()
    calls = [
        threading.Thread(target=call)
        for call in (
            lambda: engine.cache.claim("r", CHUNKS),
            lambda: engine.cache.reserve("s", engine.chain(9, CHUNKS), 0, CHUNKS),
        )
    ]
    for call in calls:
        call.start()
    for call in calls:
        call.join(5)
    daemon.process.go_on()
    until(lambda: engine.daemon.connected, 3)
    figures = daemon.settled()
    assert figures["clients"] == 1 and figures["chunks"] == CHUNKS
    close(engine)


def test_a_release_that_was_not_heard_is_made_up_for(daemon: Daemon) -> None:
    assert daemon.process is not None
    engine = connect(daemon, call_timeout_s=TIMEOUT_S)
    assert engine.store(1).wait(10)
    tickets = [engine.claim(1) for _ in range(3)]
    daemon.process.stop()
    assert not engine.cache.stats().chunks
    for ticket in tickets:
        assert ticket is not None
        engine.cache.release(ticket)
    daemon.process.go_on()
    until(lambda: engine.daemon.connected, 3)
    daemon.settled()
    close(engine)


@pytest.mark.parametrize("clean", [False, True], ids=["killed", "terminated"])
def test_a_gather_that_goes_on_in_the_next_life_harms_nobody(clean: bool) -> None:
    """Stopped in mid-gather, the daemon restarted, others fill the pool, then it writes the rest."""
    with Daemon(pool_bytes=48 << 10) as daemon:
        daemon.start()
        with EngineProcess(daemon) as late, EngineProcess(daemon) as other:
            late.tell(do="held store", seed=1, at=5)
            assert late.hear() == "held"
            late.stop()
            if clean:
                daemon.terminate()
            else:
                daemon.kill()
            daemon.start()
            until(lambda: other.ask(do="connected"), 3)
            assert daemon.check()["quarantined_bytes"] > 0
            kept = range(20, 22)
            for seed in (*range(10, 20), *kept):
                assert other.ask(do="store", seed=seed)
                assert not other.ask(do="load", seed=seed)["wrong"]
            late.go_on()
            assert late.ask(do="go") is True  # it has written all of it, and published to nobody
            for seed in kept:
                assert not other.ask(do="load", seed=seed)["wrong"]
            until(lambda: late.ask(do="connected"), 3)
            figures = daemon.settled(3)
            assert figures["quarantined_bytes"] == 0, "it has told that it is done"
            assert late.ask(do="load", seed=1)["hit"] == 0
            assert late.ask(do="store", seed=1)
            assert other.ask(do="load", seed=1) == EXACT


def test_memory_of_an_earlier_life_waits_for_the_slowest_client() -> None:
    with Daemon() as daemon:
        daemon.start()
        with EngineProcess(daemon) as first, EngineProcess(daemon) as second:
            for engine, seed in ((first, 1), (second, 2)):
                engine.tell(do="held store", seed=seed, at=1)
                assert engine.hear() == "held"
            for _ in range(3):  # several lives
                daemon.kill()
                daemon.start()
            held = daemon.check()["quarantined_bytes"]
            assert held > 0
            assert first.ask(do="go")
            until(lambda: first.ask(do="connected"), 3)
            assert daemon.check()["quarantined_bytes"] == held, "the other one still writes"
            second.kill()
            daemon.settled()


def test_a_hung_client_does_not_hold_up_the_others(daemon: Daemon) -> None:
    with EngineProcess(daemon) as hung, EngineProcess(daemon) as good:
        assert good.ask(do="store", seed=1)
        assert hung.ask(do="claim", seed=1) == CHUNKS
        hung.stop()
        slowest = 0.0
        for seed in range(10, 20):
            started = time.monotonic()
            assert good.ask(do="store", seed=seed)
            assert good.ask(do="load", seed=seed) == EXACT
            slowest = max(slowest, time.monotonic() - started)
        assert slowest < 1.0
        assert daemon.check()["leases"] == 1
        hung.go_on()
        assert hung.ask(do="release")
        daemon.settled()


def test_polling_a_lookup_goes_on_with_the_same_one(daemon: Daemon) -> None:
    """An engine that asks at every step must not begin anew with each."""
    engine = connect(daemon)
    assert engine.store(1, 12).wait(10)
    chain = engine.chain(1, 12)
    first = engine.cache.lookup("r", chain)
    assert first.chunks == 12
    hits = [daemon_hits(engine)]
    for _ in range(5):
        assert engine.cache.lookup("r", chain).chunks == 12
    hits.append(daemon_hits(engine))
    assert hits[1] == hits[0], "counted once"
    assert engine.cache.lookup("r", engine.chain(2, 12)).chunks == 0, "another prompt by the same name"
    assert engine.cache.lookup("r", chain).chunks == 12
    engine.cache.forget("r")
    assert engine.cache.lookup("r", chain).chunks == 12
    close(engine)


def daemon_hits(engine: Any) -> float:
    return float(engine.cache.stats().counters['lmcache_lookups_total{result="hit"}'])


def test_a_lookup_whose_hold_has_expired_is_asked_anew() -> None:
    with Daemon(hold_s=0.2) as daemon:
        daemon.start()
        engine = connect(daemon)
        assert engine.store(1).wait(10)
        chain = engine.chain(1, CHUNKS)
        assert engine.cache.lookup("r", chain).chunks == CHUNKS
        threading.Event().wait(0.5)
        assert engine.cache.claim("r", 1) is None, "it has expired"
        assert engine.cache.lookup("r", chain).chunks == CHUNKS
        assert len(prompt(1)) == CHUNKS * CHUNK
        close(engine)


class Hanging(MemoryBackend):
    """Its writes come back when they are told to."""

    def __init__(self) -> None:
        super().__init__()
        self.entered, self.go_on = threading.Event(), threading.Event()

    def put(self, items: Sequence[Item], *, if_absent: bool = True) -> list[bool]:
        self.entered.set()
        self.go_on.wait(30)
        return super().put(items, if_absent=if_absent)


def test_a_tier_that_does_not_return_keeps_the_pool_from_the_next_daemon(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may still be reading from the pool, or writing to it."""
    tier = Hanging()
    monkeypatch.setattr(serve, "open_tiers", lambda _: [Tier("hanging", tier)])
    monkeypatch.setattr(serve, "DRAIN_S", 0.3)
    directory = Path(tempfile.mkdtemp(prefix="lmcache-sdk-test-", dir="/dev/shm")) / "pool"
    try:
        with serve.daemon(Settings(tmp_path / "s"), pool_bytes=1 << 20, tiers=["x"], directory=directory) as running:
            running.store.open_space(layered(), PRODUCER)  # which is written down in the tiers
            assert tier.entered.wait(10)
            pool = running.pool
        with pytest.raises(BackendLocked):
            SharedPool.open(directory, 1 << 20)
        tier.go_on.set()
        until(lambda: running.store.close(0), what="the call returning")
        pool.close(keep=False)  # the process's end
        assert not directory.exists()
    finally:
        tier.go_on.set()
        shutil.rmtree(directory.parent)
