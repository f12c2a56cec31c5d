"""KV events for a router: what became readable and what went away, in order, and never a token."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest

from lmcache_sdk.daemon import protocol as p
from lmcache_sdk.daemon.channel import Channel
from tests.core.engine import CHUNK
from tests.daemon.daemon_process import Daemon, until
from tests.daemon.engine_process import CHUNKS, Engine, close, connect, layered, prompt


class Router:
    """Follows a daemon as the specification says."""

    def __init__(self, daemon: Daemon) -> None:
        self.channel = Channel(daemon.socket, 1.0)
        assert isinstance(self.channel.call(p.Hello(p.PROTOCOL_VERSION), 1.0), p.Welcome)
        self.boot, self.sequence = "", 0
        self.readable: set[bytes] = set()

    def follow(self, timeout_s: float = 0.0, limit: int = 1000) -> p.Events:
        asked = p.Subscribe(self.boot, self.sequence, limit, timeout_s)
        reply: Any = self.channel.call(asked, timeout_s + 1)
        assert isinstance(reply, p.Events)
        if reply.lost:
            self.readable.clear()
            self.sequence = 0
        self.boot = reply.boot
        for event in reply.events:
            assert event.sequence == self.sequence + 1 or reply.lost
            self.sequence = event.sequence
            if event.stored:
                self.readable.add(event.digest)
            else:
                self.readable.discard(event.digest)
        return reply


@pytest.fixture
def engine(daemon: Daemon) -> Iterator[Engine]:
    engine = connect(daemon)
    yield engine
    close(engine)


def test_a_router_follows(daemon: Daemon, engine: Engine) -> None:
    router = Router(daemon)
    first = router.follow()
    assert first.lost and not first.events, "it knows nothing yet: a fresh view, which is empty"
    assert engine.store(1).wait(10)
    told = router.follow(1.0)
    digests = engine.chain(1, CHUNKS).digests()
    assert [event.digest for event in told.events] == digests
    assert [event.parent for event in told.events] == [b"", *digests[:-1]]
    assert {event.namespace for event in told.events} == {layered().id}
    assert engine.cache.delete(engine.chain(1, CHUNKS)) == CHUNKS
    assert {event.reason for event in router.follow(1.0).events} == {"deleted"}
    assert not router.readable
    router.channel.close()


def test_it_waits_for_the_next_one(daemon: Daemon, engine: Engine) -> None:
    router = Router(daemon)
    router.follow()
    started = time.monotonic()
    assert not router.follow(0.2).events
    assert 0.2 <= time.monotonic() - started < 0.7
    transfer = engine.store(1)
    started = time.monotonic()
    assert router.follow(10.0).events
    assert time.monotonic() - started < 5
    assert transfer.wait(10)
    router.channel.close()


def test_it_resumes_in_small_steps_and_over_a_new_connection(daemon: Daemon, engine: Engine) -> None:
    router = Router(daemon)
    router.follow()
    for seed in range(3):
        assert engine.store(seed).wait(10)
    while router.follow(limit=5).events:
        pass
    assert len(router.readable) == 3 * CHUNKS
    router.channel.close()
    again = Router(daemon)
    again.boot, again.sequence, again.readable = router.boot, router.sequence, router.readable
    assert engine.store(9).wait(10)
    reply = again.follow(1.0)
    assert not reply.lost and len(again.readable) == 4 * CHUNKS
    again.channel.close()


def test_what_is_kept_is_bounded_and_a_gap_is_told(daemon: Daemon, engine: Engine) -> None:
    router = Router(daemon)
    router.follow()
    assert engine.store(1).wait(10)
    router.follow(1.0)
    router.sequence += 10**6  # events that never were
    reply = router.follow()
    assert reply.lost and router.readable == {event.digest for event in reply.events}
    router.channel.close()


def test_another_life_is_told(daemon: Daemon, engine: Engine) -> None:
    router = Router(daemon)
    router.follow()
    assert engine.store(1).wait(10)
    router.follow(1.0)
    assert router.readable and engine.cache.drain(10)
    boot = router.boot
    daemon.kill()
    daemon.start()
    router.channel.close()
    again = Router(daemon)
    again.boot, again.sequence, again.readable = boot, router.sequence, router.readable
    reply = again.follow()
    assert reply.lost and reply.boot != boot and not again.readable
    until(lambda: engine.daemon.connected, 3)
    assert engine.load(1)["hit"] == CHUNKS
    again.follow(1.0)
    assert len(again.readable) == CHUNKS, "what was adopted is told when it has been verified"
    again.channel.close()


def test_no_event_has_tokens(daemon: Daemon, engine: Engine) -> None:
    router = Router(daemon)
    assert engine.store(1).wait(10)
    wire = msgspec.msgpack.encode(router.follow(1.0))
    tokens = prompt(1)
    for at in range(0, len(tokens), CHUNK):
        assert tokens[at : at + CHUNK].tobytes() not in wire
    for width in ("<u4", ">u4"):
        assert tokens[:2].astype(width).tobytes() not in wire
    assert "token" not in wire.decode("latin1")
    router.channel.close()
