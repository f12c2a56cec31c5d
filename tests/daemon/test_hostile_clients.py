"""Whatever one client sends, the daemon serves the others and loses nothing."""

from __future__ import annotations

import contextlib
import os
import random
import socket
import struct
from collections.abc import Iterator
from itertools import pairwise
from typing import Any, Self

import msgspec
import pytest

from lmcache_sdk.daemon import protocol as p
from lmcache_sdk.daemon.channel import Channel
from tests.core.engine import CHUNK, PRODUCER
from tests.daemon.daemon_process import Daemon, until
from tests.daemon.engine_process import CHUNKS, Engine, EngineProcess, close, connect, layered, prompt

SEED = int(os.environ.get("LMCACHE_SDK_SEED", "20261124"))
EXACT = {"hit": CHUNKS, "failed": [], "wrong": []}
HELLO = p.Hello(p.PROTOCOL_VERSION, namespace=layered(), producer=PRODUCER)


@pytest.fixture
def engine(daemon: Daemon) -> Iterator[Engine]:
    """A good client with a prompt in the daemon; afterwards it is served as before."""
    engine = connect(daemon)
    assert engine.store(1).wait(10)
    boot = daemon.check()["boot"]
    yield engine
    assert engine.load(1) == EXACT
    assert engine.store(99).wait(10)
    assert engine.load(99) == EXACT
    assert engine.daemon.connected
    figures = daemon.settled()
    assert figures["boot"] == boot
    close(engine)


class Raw:
    """A client that says what it likes."""

    def __init__(self, daemon: Daemon) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.socket.connect(str(daemon.socket))
        self.socket.settimeout(15)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def say(self, message: p.Message | bytes | dict[str, Any]) -> None:
        if isinstance(message, dict):
            body = msgspec.msgpack.encode(message)
            message = struct.pack("<I", len(body)) + body
        data = message if isinstance(message, bytes) else p.encode(message)
        with contextlib.suppress(ConnectionError):
            self.socket.sendall(data)

    def hear(self) -> Any:
        """A reply; None if the daemon has closed the connection."""
        frames = p.FrameReader()
        while (body := frames.next()) is None:
            try:
                data, descriptors, _, _ = socket.recv_fds(self.socket, 1 << 16, 64)
            except ConnectionError:
                return None
            for descriptor in descriptors:
                os.close(descriptor)
            if not data:
                return None
            frames.add(data)
        return p.decode_reply(body)

    def ask(self, message: p.Message | bytes | dict[str, Any]) -> Any:
        self.say(message)
        return self.hear()

    def closed(self) -> bool:
        return self.hear() is None


def digests(seed: int, chunks: int = CHUNKS) -> bytes:
    from lmcache_sdk.keys import Chain

    return b"".join(Chain(prompt(seed, chunks), CHUNK).digests())


@pytest.mark.parametrize(
    "data",
    [
        b"GET / HTTP/1.1\r\n\r\n",
        b"\xff" * 100,
        struct.pack("<I", p.FRAME_LIMIT + 1),
        struct.pack("<I", 0),
        struct.pack("<I", 5) + b"hello",
        p.encode(p.Ask()),
        p.encode(p.Count(1)),
        p.encode(HELLO) + p.encode(p.Ask()),
    ],
    ids=["http", "ff", "oversized", "empty", "no message", "no hello", "a reply", "ahead"],
)
def test_a_bad_beginning(daemon: Daemon, engine: Engine, data: bytes) -> None:
    with Raw(daemon) as raw:
        reply = raw.ask(data)
        assert isinstance(reply, p.Refused) and reply.kind == "message"
        assert raw.closed()


@pytest.mark.parametrize(
    "message",
    [
        HELLO,
        {"op": "exec", "code": "1"},
        {"op": "lookup"},
        {"op": "lookup", "rid": 3, "start": 0, "digests": b""},
        {"op": "claim", "rid": "r", "boundary": 1, "parts": 1 << 50},
        {"op": "wait", "rid": "r", "timeout_s": float("nan")},
        p.Lookup("r", 0, b"x" * 31),
        p.Lookup("r", 0, b"x" * 64),
        p.Reserve(b"x" * 32, 0, ()),
        p.Reserve(b"x" * 32, 0, (0, 1, 2, 3)),
        p.Reserve(b"x" * 32, 0, (0, 0)),
        p.Reserve(b"x" * 32, 0, (4_000_000_000,)),
        p.Reserve(b"x" * 32, 1, (0,), parent=b"y"),
        p.Reserve(b"x" * 32, 1, (0,), parent=b"x" * 32),
    ],
    ids=lambda message: str(message)[:40],
)
def test_a_bad_request(daemon: Daemon, engine: Engine, message: Any) -> None:
    with Raw(daemon) as raw:
        assert isinstance(raw.ask(HELLO), p.Welcome)
        reply = raw.ask(message)
        assert isinstance(reply, p.Refused) and reply.kind == "message", reply
        assert raw.closed()


def test_wrong_numbers_of_leases_do_nothing(daemon: Daemon, engine: Engine) -> None:
    """Nobody gives back what another one holds, not even one who knows its number."""
    ticket = engine.claim(1)
    assert ticket is not None
    rng = random.Random(SEED)
    with Raw(daemon) as raw:
        assert isinstance(raw.ask(HELLO), p.Welcome)
        guesses = [*range(40), ticket.lease, ticket.lease + 1, *(rng.getrandbits(63) for _ in range(40))]
        for number in guesses:
            assert raw.ask(p.Release(number)) == p.Count()
            assert raw.ask(p.Publish(number)) == p.Count()
        assert raw.ask(p.Take(ticket.lease, 5)) == p.Count(0)
        assert raw.ask(p.Drained(engine.daemon._life.client)) == p.Count()  # type: ignore[union-attr]
        assert daemon.check()["leases"] == 1
    engine.cache.release(ticket)
    engine.cache.release(ticket)


def test_lease_numbers_tell_nothing_of_others(daemon: Daemon, engine: Engine) -> None:
    tickets = [engine.claim(1) for _ in range(5)]
    numbers = sorted(ticket.lease for ticket in tickets if ticket)
    assert len(numbers) == 5 and min(b - a for a, b in pairwise(numbers)) > 1 << 32
    for ticket in tickets:
        assert ticket is not None
        engine.cache.release(ticket)


def test_the_id_of_a_client_is_not_guessed(daemon: Daemon, engine: Engine) -> None:
    for guess in (b"\0" * 16, b"\1", os.urandom(16)):
        with Raw(daemon) as raw:
            reply = raw.ask(p.Hello(p.PROTOCOL_VERSION, client=guess))
            assert isinstance(reply, p.Refused) and reply.kind == "client"


def test_a_tool_cannot_touch_chunks(daemon: Daemon, engine: Engine) -> None:
    with Raw(daemon) as raw:
        welcome = raw.ask(p.Hello(p.PROTOCOL_VERSION))
        assert isinstance(welcome, p.Welcome)
        for message in (p.Lookup("r", 0, digests(1)), p.Clear(), p.Delete(digests(1)), p.Reserve(b"", 0, (0,))):
            reply = raw.ask(message)
            assert isinstance(reply, p.Refused) and reply.kind == "settings"
        assert isinstance(raw.ask(p.Ask()), p.Figures)


def test_a_namespace_that_cannot_be_served(daemon: Daemon, engine: Engine) -> None:
    import msgspec.structs as structs

    space = layered()
    group = space.spec.groups[0]
    for change in ({"heads": 1 << 31}, {"dtype": "int3"}, {"dim": 1 << 40}, {"layers": tuple(range(5000))}):
        spec = structs.replace(space.spec, groups=(structs.replace(group, **change),))  # type: ignore[arg-type]
        with Raw(daemon) as raw:
            hello = p.Hello(p.PROTOCOL_VERSION, namespace=structs.replace(space, spec=spec), producer=PRODUCER)
            reply = raw.ask(hello)
            assert isinstance(reply, p.Refused) and reply.kind == "settings", (change, reply)


def test_another_version_is_told_both(daemon: Daemon, engine: Engine) -> None:
    with Raw(daemon) as raw:
        reply = raw.ask({"op": "hello", "version": 99, "new": [1, 2]})
        assert isinstance(reply, p.Refused) and reply.kind == "version"
        assert "99" in reply.message and f" {p.PROTOCOL_VERSION}," in reply.message


def test_a_client_that_stops_in_mid_frame(daemon: Daemon, engine: Engine) -> None:
    frame = p.encode(p.Lookup("r", 0, digests(1)))
    with Raw(daemon) as raw:
        assert isinstance(raw.ask(HELLO), p.Welcome)
        raw.say(frame[: len(frame) // 2])
        assert engine.load(1) == EXACT
        raw.say(frame[len(frame) // 2 :])
        assert isinstance(raw.hear(), p.Found)
        raw.say(frame[:-1])


def test_a_client_that_never_reads(daemon: Daemon, engine: Engine) -> None:
    with Raw(daemon) as raw:
        assert isinstance(raw.ask(HELLO), p.Welcome)
        raw.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
        raw.socket.settimeout(0.2)
        sent = 0
        with contextlib.suppress(OSError):  # cut off for speaking while a reply waits, or no more room
            while sent < 20_000:
                raw.socket.sendall(p.encode(p.Ask()))
                sent += 1
        assert 0 < sent < 20_000
        assert engine.load(1) == EXACT


def test_a_client_that_waits_and_is_gone(daemon: Daemon, engine: Engine) -> None:
    before = daemon.check()["descriptors"]
    for _ in range(50):
        with Raw(daemon) as raw:
            assert isinstance(raw.ask(HELLO), p.Welcome)
            raw.say(p.Subscribe(timeout_s=600.0, boot=daemon.check()["boot"], sequence=10**6))
        with Raw(daemon) as raw:
            assert isinstance(raw.ask(HELLO), p.Welcome)
            raw.say(p.Drain(600.0))
    until(lambda: daemon.check()["clients"] == 1)
    assert daemon.check()["descriptors"] <= before + 2


def test_speaking_while_a_reply_is_owed(daemon: Daemon, engine: Engine) -> None:
    with Raw(daemon) as raw:
        welcome = raw.ask(HELLO)
        raw.say(p.Subscribe(welcome.boot, 10**6 - 1, timeout_s=600.0))
        lost = raw.hear()
        assert isinstance(lost, p.Events) and lost.lost
        last = raw.ask(p.Subscribe(welcome.boot, 0)).events[-1].sequence
        raw.say(p.Subscribe(welcome.boot, last, timeout_s=600.0))
        raw.say(p.Ask())
        assert isinstance(raw.hear(), p.Refused)
        assert raw.closed()


def test_many_connections(daemon: Daemon, engine: Engine) -> None:
    """One process may have so many; its next one is refused, and others are served."""
    raws: list[Raw] = []
    try:
        with EngineProcess(daemon) as other:
            assert other.ask(do="load", seed=1) == EXACT
            raws += [Raw(daemon) for _ in range(600)]
            raws[-1].socket.settimeout(5)
            assert raws[-1].ask(HELLO) is None, "closed, and not just left alone"
            assert other.ask(do="load", seed=1) == EXACT
    finally:
        for raw in raws:
            raw.socket.close()
    until(lambda: daemon.check()["descriptors"] < 100)
    until(lambda: engine.daemon.connected, 3)


def test_a_client_is_bounded_and_others_go_on() -> None:
    """It hangs with leases and reservations: half of the pool at most, and only its process's end gives it back."""
    with Daemon(pool_bytes=160 << 10, client_share=0.25) as daemon:
        daemon.start()
        limit = (160 << 10) // 4
        with EngineProcess(daemon) as hung, EngineProcess(daemon) as good:
            for seed in range(3):
                assert good.ask(do="store", seed=seed)
            got = [hung.ask(do="claim", seed=seed % 3) for seed in range(12)]
            assert got[0] == CHUNKS
            assert 0 < daemon.check()["leases"] == sum(chunks > 0 for chunks in got)
            with Raw(daemon) as raw:
                assert isinstance(raw.ask(HELLO), p.Welcome)
                reserved = [raw.ask(p.Reserve(digests(100 + n), 0, (0, 1, 2))).reservation for n in range(10)]
                chunks = sum(len(reservation.chunks) for reservation in reserved if reservation)
                chunk_bytes = daemon.check()["used_bytes"] // daemon.check()["chunks"]
                assert limit - chunk_bytes <= chunks * chunk_bytes <= limit
                for reservation in reserved:
                    if reservation:
                        raw.ask(p.Publish(reservation.lease, ()))
            hung.stop()
            for seed in range(50, 60):
                assert good.ask(do="store", seed=seed)
                assert good.ask(do="load", seed=seed) == EXACT
            assert daemon.check()["leases"] > 0, "a hung process is no proof"
            hung.kill()
            daemon.settled()


def test_what_many_requests_share_counts_once(daemon: Daemon) -> None:
    with Daemon(pool_bytes=160 << 10, client_share=0.25) as daemon:
        daemon.start()
        engine = connect(daemon)
        assert engine.store(1).wait(10)
        tickets = [engine.claim(1) for _ in range(30)]
        assert all(tickets)
        for ticket in tickets:
            assert ticket is not None
            engine.cache.release(ticket)
        daemon.settled()
        close(engine)


def test_pins_are_bounded() -> None:
    with Daemon(pool_bytes=160 << 10, client_share=0.25) as daemon:
        daemon.start()
        engine = connect(daemon)
        for seed in range(8):
            assert engine.store(seed).wait(10)
        pinned = [engine.cache.pin(engine.chain(seed, CHUNKS), float("inf")) for seed in range(8)]
        assert pinned[0] == CHUNKS and pinned[-1] == 0
        for seed in range(20, 60):
            assert engine.store(seed).wait(10)
            assert engine.load(seed) == EXACT, "there is room left"
        assert engine.load(0) == EXACT
        close(engine)


def test_require_salt() -> None:
    from lmcache_sdk.keys import Chain

    with Daemon(require_salt=True) as daemon:
        daemon.start()
        engine = connect(daemon)
        assert engine.store(1).wait(10)
        assert engine.load(1)["hit"] == 0
        plain = engine.cache.lookup("r", Chain(prompt(1), CHUNK))
        assert "salt" in plain.why
        salted = Chain(prompt(1), CHUNK, cache_salt="s")
        reservation = engine.cache.reserve("r", salted, 0, CHUNKS)
        assert reservation is not None
        engine.cache.publish(reservation)
        assert engine.cache.lookup("s", salted).chunks == CHUNKS
        close(engine)


@pytest.mark.parametrize("seed", range(3))
def test_random_conversations(daemon: Daemon, engine: Engine, seed: int) -> None:
    """Known messages with wrong values, cut and mixed: the daemon's own books stay right."""
    print(f"seed {SEED + seed}")
    rng = random.Random(SEED + seed)
    for _ in range(60):
        with Raw(daemon) as raw:
            raw.socket.settimeout(1)
            welcome = raw.ask(HELLO)
            leases = [rng.getrandbits(63)]
            for _ in range(rng.randint(1, 25)):
                n = rng.randrange(4)
                message = rng.choice(
                    [
                        p.Lookup(f"r{n}", rng.choice([0, 0, 0, 2, 4]), digests(n, rng.randint(0, 6))),
                        p.Claim(f"r{n}", rng.randrange(6), rng.randrange(3), rng.randint(1, 3)),
                        p.Release(rng.choice(leases), rng.randrange(3)),
                        p.Take(rng.choice(leases), rng.randrange(3)),
                        p.Publish(rng.choice(leases), rng.choice([None, (), (0, 1), (7, 9), (4_000_000_000,)])),
                        p.Reserve(
                            digests(n, rng.randint(0, 6)), rng.randrange(9), rng.choice([(0,), (2, 1), (0, 1, 2)])
                        ),
                        p.Pin(digests(n, 3), rng.random() * 0.1),
                        p.Delete(digests(n, 6)),
                        p.Forget(f"r{n}"),
                        p.Wait(f"r{n}", 0.01),
                        p.Subscribe("x", rng.randrange(9), 5, 0.0),
                        p.Drained(b"x" * 16),
                        p.Clear(),
                        p.Ask(),
                        p.Reopen("x", ("one", "two")),
                    ]
                )
                frame = p.encode(message)
                if rng.random() < 0.05:
                    at = rng.randrange(4, len(frame))
                    frame = frame[:at] + rng.randbytes(1) + frame[at + 1 :]
                if rng.random() < 0.03:
                    raw.say(frame[: rng.randrange(len(frame))])
                    break
                try:
                    reply = raw.ask(frame)
                except TimeoutError:
                    break  # it waits for longer than was meant
                if reply is None or (isinstance(reply, p.Refused) and reply.kind == "message"):
                    break
                assert not (isinstance(reply, p.Refused) and reply.kind == "internal"), message
                if isinstance(reply, p.Claimed) and reply.ticket:
                    leases.append(reply.ticket.lease)
                if isinstance(reply, p.Reserved) and reply.reservation:
                    leases.append(reply.reservation.lease)
        daemon.check()
        with Raw(daemon) as raw:  # or what was held would be this process's to its end
            assert isinstance(raw.ask(msgspec.structs.replace(HELLO, client=welcome.client, turn=1)), p.Welcome)
            assert raw.ask(p.Bye()) == p.Count()
    until(lambda: daemon.check()["clients"] == 1)
    assert engine.store(1).wait(10)


def test_a_bye_ends_all_connections_of_a_client(daemon: Daemon, engine: Engine) -> None:
    with Raw(daemon) as raw:
        welcome = raw.ask(HELLO)
        channel = Channel(daemon.socket, 1.0)
        assert isinstance(channel.call(p.Hello(p.PROTOCOL_VERSION, client=welcome.client), 1.0), p.Welcome)
        assert raw.ask(p.Bye()) == p.Count()
        assert raw.closed()
        with pytest.raises((OSError, p.ProtocolError)):
            channel.call(p.Ask(), 1.0)
        channel.close()


def test_one_that_comes_back_keeps_what_it_says_and_no_more(daemon: Daemon, engine: Engine) -> None:
    with Raw(daemon) as old:
        welcome = old.ask(HELLO)
        tickets = []
        for n in range(3):
            assert old.ask(p.Lookup(f"r{n}", 0, digests(1))).state == "ready"
            tickets.append(old.ask(p.Claim(f"r{n}", CHUNKS)).ticket)
        room = old.ask(p.Reserve(digests(7), 0, (0, 1, 2))).reservation
        assert daemon.check()["leases"] == 3 and daemon.check()["reservations"] == 1
        with Raw(daemon) as new, Raw(daemon) as late:
            back = msgspec.structs.replace(
                HELLO, client=welcome.client, turn=2, held=((tickets[1].lease, 0), (room.lease, 0))
            )
            again = new.ask(back)
            assert again.client == welcome.client and old.closed()
            assert daemon.check()["leases"] == 1 and daemon.check()["reservations"] == 1
            reply = late.ask(msgspec.structs.replace(back, turn=1, held=()))
            assert isinstance(reply, p.Refused), "sent before, and read after"
            assert daemon.check()["leases"] == 1
            assert new.ask(p.Bye()) == p.Count()
    assert daemon.settled()["clients"] == 1
