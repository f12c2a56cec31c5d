"""Nobody takes anybody along: engines and the daemon die at chosen points, and all bytes stay exact."""

from __future__ import annotations

import pickle

import pytest

from tests.daemon.daemon_process import Daemon, until
from tests.daemon.engine_process import CHUNKS, EngineProcess, close, connect

EXACT = {"hit": CHUNKS, "failed": [], "wrong": []}
STEPS = CHUNKS * 3


@pytest.mark.parametrize("at", [0, 4, STEPS - 1])
def test_an_engine_killed_in_mid_store_leaves_nothing_behind(daemon: Daemon, at: int) -> None:
    with EngineProcess(daemon) as victim, EngineProcess(daemon) as other:
        assert other.ask(do="store", seed=1)
        before = daemon.settled()
        victim.tell(do="held store", seed=2, at=at)
        assert victim.hear() == "held"
        held = daemon.check()
        assert held["reservations"] == 1 and held["used_bytes"] > before["used_bytes"]
        victim.kill()
        after = daemon.settled()
        assert after["used_bytes"] == before["used_bytes"], "half a chunk is none"
        assert after["clients"] == 1
        assert other.ask(do="load", seed=2)["hit"] == 0
        assert other.ask(do="store", seed=2)
        assert other.ask(do="load", seed=2) == other.ask(do="load", seed=1) == EXACT


@pytest.mark.parametrize("at", [0, 5])
def test_an_engine_killed_in_mid_load_gives_its_leases_back(daemon: Daemon, at: int) -> None:
    with EngineProcess(daemon) as victim, EngineProcess(daemon) as other:
        assert other.ask(do="store", seed=1)
        victim.tell(do="held load", seed=1, at=at)
        assert victim.hear() == "held"
        assert daemon.check()["leases"] == 1
        assert other.ask(do="load", seed=1) == EXACT, "the other one goes on"
        victim.kill()
        assert daemon.settled()["chunks"] == CHUNKS
        assert other.ask(do="load", seed=1) == EXACT


def test_a_closed_socket_frees_nothing_while_the_process_lives(daemon: Daemon) -> None:
    engine = connect(daemon)
    assert engine.store(1).wait(10)
    ticket = engine.claim(1)
    assert ticket is not None
    life = engine.daemon._life
    assert life is not None
    for channel in life.idle:
        channel.close()
    life.idle.clear()
    until(lambda: daemon.check()["leases"] == 1)
    assert engine.load(1) == EXACT, "over a new connection, as the same client"
    engine.cache.release(ticket)
    assert daemon.settled()["clients"] == 1
    close(engine)


@pytest.mark.parametrize("lmdb", [False, True])
def test_what_is_sealed_survives_the_daemon(lmdb: bool) -> None:
    with Daemon(lmdb=lmdb) as daemon:
        daemon.start()
        with EngineProcess(daemon) as engine:
            for seed in range(5):
                assert engine.ask(do="store", seed=seed)
            cache = connect(daemon)
            assert cache.cache.drain(10)  # sealed, too
            close(cache)
            daemon.kill()
            until(lambda: not engine.ask(do="connected"), 1)
            assert engine.ask(do="load", seed=0)["hit"] == 0
            daemon.start()
            took = until(lambda: engine.ask(do="connected"), 2)
            print(f"back {took:.3f} s after the daemon was ready")
            assert took < 1.0
            for seed in range(5):
                assert engine.ask(do="load", seed=seed) == EXACT
            assert daemon.settled()["record_failures"] == 0


@pytest.mark.parametrize("restart", [False, True])
@pytest.mark.parametrize("at", [1, 7])
def test_the_daemon_dies_between_two_layers_of_a_load(restart: bool, at: int) -> None:
    with Daemon(pool_bytes=64 << 10) as daemon:
        daemon.start()
        with EngineProcess(daemon) as engine:
            assert engine.ask(do="store", seed=1)
            engine.tell(do="held load", seed=1, at=at)
            assert engine.hear() == "held"
            daemon.kill()
            if restart:
                daemon.start()
                with EngineProcess(daemon) as other:  # which uses up all the memory that there is
                    for seed in range(10, 20):
                        assert other.ask(do="store", seed=seed)
                        other.ask(do="load", seed=seed)
            loaded = engine.ask(do="go")
            assert not loaded["wrong"], "what is said to be loaded is exact, from memory that is still mapped"
            assert loaded == EXACT, "nothing had to fail: the memory was kept"
            if not restart:
                daemon.start()
            until(lambda: engine.ask(do="connected"), 3)
            daemon.settled()
            assert engine.ask(do="store", seed=2)
            assert engine.ask(do="load", seed=2) == EXACT


def test_two_engines_and_one_dies(daemon: Daemon) -> None:
    with EngineProcess(daemon) as first, EngineProcess(daemon) as second:
        assert first.ask(do="store", seed=1)
        assert second.ask(do="load", seed=1) == EXACT
        assert first.ask(do="claim", seed=1) == CHUNKS
        first.kill()
        assert second.ask(do="load", seed=1) == EXACT
        assert second.ask(do="store", seed=2)
        figures = daemon.settled()
        assert figures["clients"] == 1 and figures["chunks"] == 2 * CHUNKS


def test_an_engine_that_was_there_before_the_daemon() -> None:
    with Daemon() as daemon, EngineProcess(daemon) as engine:
        assert engine.ask(do="connected") is False
        assert engine.ask(do="store", seed=1), "skipped"
        daemon.start()
        assert until(lambda: engine.ask(do="connected"), 2) < 1.0
        assert engine.ask(do="load", seed=1)["hit"] == 0
        assert engine.ask(do="store", seed=1)
        assert engine.ask(do="load", seed=1) == EXACT


def test_an_orderly_end_keeps_what_was_published(daemon: Daemon) -> None:
    with EngineProcess(daemon) as engine:
        assert engine.ask(do="store", seed=1)
        assert daemon.terminate() == 0
        assert not daemon.socket.exists()
        until(lambda: not engine.ask(do="connected"), 1)
        daemon.start()
        until(lambda: engine.ask(do="connected"), 2)
        assert engine.ask(do="load", seed=1) == EXACT


def test_the_earlier_life_ends_with_its_last_client(daemon: Daemon) -> None:
    """A client that died while no daemon was there is no reason to keep memory from use for ever."""
    with EngineProcess(daemon) as engine:
        engine.tell(do="held store", seed=1, at=2)
        assert engine.hear() == "held"
        daemon.kill()
        daemon.start()
        assert daemon.check()["quarantined_bytes"] > 0
        engine.kill()
        assert daemon.settled()["used_bytes"] == 0


def test_a_worker_takes_and_releases_its_part(daemon: Daemon) -> None:
    engines = scheduler, worker, stranger = connect(daemon), connect(daemon), connect(daemon)
    assert scheduler.store(1).wait(10)
    ticket = scheduler.claim(1, parts=2)
    assert ticket is not None
    assert worker.daemon.take(ticket, 1)
    stranger.cache.release(ticket, 0)
    stranger.cache.release(ticket, 1)
    scheduler.cache.release(ticket, 0)
    scheduler.cache.release(ticket, 1)
    assert daemon.check()["leases"] == 1, "the worker still copies"
    worker.cache.release(ticket, 1)
    assert daemon.settled()["chunks"] == CHUNKS
    assert not worker.daemon.take(ticket, 1)
    for engine in engines:
        close(engine)


def test_what_a_worker_has_taken_outlives_the_scheduler(daemon: Daemon) -> None:
    with EngineProcess(daemon) as scheduler:
        worker = connect(daemon)
        assert worker.store(1).wait(10)
        ticket = pickle.loads(bytes.fromhex(scheduler.ask(do="hand over", seed=1)))
        assert worker.daemon.take(ticket, 0)
        scheduler.kill()
        until(lambda: daemon.check()["clients"] == 1)
        assert daemon.check()["leases"] == 1
        loaded = worker.finish(*worker.start(ticket, 1), 1)
        assert loaded == EXACT
        assert daemon.settled()["chunks"] == CHUNKS
        close(worker)
