"""Chunks of other producers, between processes: engines, their workers, lives of the daemon."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from types import SimpleNamespace

import pytest

from lmcache_sdk import ConfigError
from lmcache_sdk.api import PairStats
from lmcache_sdk.cli.daemon import reopen
from lmcache_sdk.daemon.client import DaemonCache
from lmcache_sdk.pool.shared import SharedPool
from lmcache_sdk.spec import Producer, Share
from tests.core.served import Served, command
from tests.core.test_sharing import CHUNK, NAMESPACE, ONE, TWO, overlap_of, read, shifted, text, write
from tests.daemon.daemon_process import until


class Place(Served):
    def begin(self) -> None:
        self.start("--tier", f"lmdb://{self.folder}/store?size=64MiB")

    def engine(self, producer: Producer, share: str = Share.VERIFIED) -> DaemonCache:
        return DaemonCache(self.socket, NAMESPACE, producer, share=share, call_timeout_s=5.0)


@pytest.fixture
def place() -> Iterator[Place]:
    place = Place()
    try:
        place.begin()
        yield place
    finally:
        place.close()


def state(cache: DaemonCache) -> list[str]:
    return [pair.state for pair in cache.stats().pairs]


def test_engines_of_one_daemon(place: Place) -> None:
    one, two, other = place.engine(ONE), place.engine(TWO), text(2, 6)
    write(one, other)
    assert read(two, other) == ([], "")
    overlap_of(one, two)
    until(lambda: state(two) == ["open"])
    assert read(two, other) == (["one"] * 6, "foreign")
    shown = command("status", "--socket", place.socket).stdout
    assert "one-1-cpu and two-1-cpu  open" in shown.replace("two-1-cpu and one-1-cpu", "one-1-cpu and two-1-cpu")
    (pair,) = place.status()["stats"]["pairs"]
    assert (pair["state"], pair["depth"]) == ("open", 9 * CHUNK)
    assert place.status()["stats"]["counters"]["lmcache_foreign_chunks_total"] == 6
    for cache in (one, two):
        cache.close()


def test_a_producer_that_is_wrong(place: Place) -> None:
    one, two, other = place.engine(ONE), place.engine(TWO), text(2, 6)
    write(one, other)
    overlap_of(one, two, change=shifted)
    until(lambda: state(two) == ["closed"])
    assert read(two, other) == ([], "")
    assert read(place.engine(TWO, "own"), other) == ([], "")
    assert read(place.engine(TWO, "any"), other) == (["one"] * 6, "foreign")
    one.close()
    place.stop()
    place.begin()
    until(lambda: two.connected)
    until(lambda: state(two) == ["closed"])
    assert read(two, other) == ([], "")
    wrong = command("reopen", "one-2", "two", "--socket", place.socket)
    assert wrong.returncode == 2 and "no closed pair has names that start with 'one-2' and 'two'" in wrong.stderr
    assert ONE.name in wrong.stderr
    done = command("reopen", "two", "one", "--socket", place.socket)
    assert (done.returncode, done.stderr) == (0, "") and done.stdout.endswith(" are compared anew\n")
    assert state(two) == ["checking"]
    place.stop(9)
    place.begin()
    until(lambda: two.connected)
    assert state(two) == ["checking"]
    two.close()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_what_agreed_is_open_in_the_next_life(place: Place, number: int) -> None:
    """Hits go on for the engines that were connected, though nothing is compared again."""
    one, two, other = place.engine(ONE), place.engine(TWO), text(2, 9)
    write(one, other)
    overlap_of(one, two)
    until(lambda: [pair.depth for pair in two.stats().pairs] == [9 * CHUNK])
    assert read(two, other) == (["one"] * 9, "foreign")
    assert one.drain(10)
    place.stop(number)
    place.begin()
    until(lambda: one.connected and two.connected)
    (pair,) = two.stats().pairs
    assert (pair.state, pair.depth, pair.compared) == ("open", 9 * CHUNK, 3)
    assert read(two, other) == (["one"] * 9, "foreign")
    more = text(3, 9)
    assert write(two, more) == 9
    assert read(one, more) == (["two"] * 9, "foreign")
    for cache in (one, two):
        cache.close()


def test_producers_that_are_gone_are_not_listed(place: Place) -> None:
    one, two = place.engine(ONE), place.engine(TWO)
    overlap_of(one, two)
    until(lambda: state(two) == ["open"])
    assert two.clear()
    assert one.drain(10)
    two.close()

    def listed() -> str:
        return command("status", "--socket", place.socket).stdout

    until(lambda: TWO.name not in listed())
    assert ONE.name in listed() and "1 pair more with producers that have neither clients nor chunks" in listed()
    assert [pair["state"] for pair in place.status()["stats"]["pairs"]] == ["open"], "for scripts it is there"
    two = place.engine(TWO)
    assert TWO.name in listed() and " more with producers" not in listed()
    one.close()
    two.close()


def test_a_worker_that_has_loaded_foreign_chunks_stores_none_as_exact(place: Place) -> None:
    """The scheduler claims, another process copies and stores; and the daemon is another one by then."""
    one, scheduler, worker, chain = place.engine(ONE), place.engine(TWO, "any"), place.engine(TWO, "any"), text(1, 8)
    write(one, chain, 0, 4)
    scheduler.lookup("r", chain)
    ticket = scheduler.claim("r", scheduler.wait("r", 10).chunks)
    assert ticket is not None and worker.take(ticket)
    worker.release(ticket)
    one.drain(10)
    place.stop(9)
    place.begin()
    until(lambda: worker.connected and scheduler.connected)
    assert write(worker, chain) >= 4
    spaces = {(s["producer"], s["fidelity"]): s["chunks"] for s in place.status()["namespaces"]}
    assert spaces[TWO.name, "foreign.any"] >= 4 and not spaces.get((TWO.name, "exact"))
    for cache in (one, scheduler, worker):
        cache.close()


def test_from_the_tier_of_an_earlier_daemon(place: Place) -> None:
    one, chain = place.engine(ONE), text(1, 6)
    write(one, chain)
    assert one.drain(10)
    one.close()
    place.stop()
    place.process = None
    SharedPool.remove(place.pool)
    place.begin()
    two = place.engine(TWO, "any")
    until(lambda: len(two.stats().pairs) == 1)
    assert read(two, chain) == (["one"] * 6, "foreign")
    two.close()


def test_a_name_that_begins_another_one_can_be_named(monkeypatch: pytest.MonkeyPatch) -> None:
    names = [("a-1-cpu", "b-1-cpu"), ("a-1-cpu", "b-1-cpu-2-cpu")]
    pairs = tuple(PairStats("f", pair, "closed", 1, 1, 0, {}, "") for pair in names)
    reopened = []
    monkeypatch.setattr(
        "lmcache_sdk.cli.daemon._look", lambda path: SimpleNamespace(stats=SimpleNamespace(pairs=pairs))
    )
    monkeypatch.setattr("lmcache_sdk.daemon.serve.reopen", lambda path, *pair: reopened.append(pair))
    with pytest.raises(ConfigError, match="2 closed pairs have"):
        reopen("a", "b", socket="s")
    for pair in names:
        reopen(pair[1], pair[0], socket="s")
    assert reopened == [("f", pair) for pair in names]
