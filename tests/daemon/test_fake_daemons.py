"""What answers on the socket is no good daemon: the client degrades to misses, within its deadlines."""

from __future__ import annotations

import contextlib
import os
import random
import socket
import statistics
import struct
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Self

import msgspec
import pytest

from lmcache_sdk import BackendFormatError, ConfigError, Lookup, LookupState
from lmcache_sdk.api import Reservation, Ticket
from lmcache_sdk.daemon import protocol as p
from lmcache_sdk.daemon.channel import Channel
from lmcache_sdk.daemon.client import DaemonCache
from lmcache_sdk.keys import Chain
from tests.core.engine import CHUNK, PRODUCER
from tests.daemon.daemon_process import until
from tests.daemon.engine_process import CHUNKS, layered, prompt

TIMEOUT_S = 0.3
SLACK_S = 0.5
SEED = int(os.environ.get("LMCACHE_SDK_SEED", "20261124"))
SEGMENT = 1 << 20
Answer = Callable[[Any], bytes | p.Message | None]


class FakeDaemon:
    """Answers as it is told. ``answer`` gives a message, bytes, or None: nothing, ever."""

    def __init__(self, path: Path, answer: Answer, *, hello: bool = True) -> None:
        self.answer, self.hello = answer, hello
        self.seen: list[str] = []
        self._file = tempfile.TemporaryFile(dir="/dev/shm")  # noqa: SIM115 - closed on leaving
        os.posix_fallocate(self._file.fileno(), 0, SEGMENT)
        self._open: list[socket.socket] = []
        self._ended = threading.Event()
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.bind(str(path))
        self._socket.listen()
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._socket.shutdown(socket.SHUT_RDWR)
        for connection in self._open:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(5)
        for connection in (*self._open, self._socket):
            connection.close()
        self._file.close()

    def _accept(self) -> None:
        while not self._ended.is_set():
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return
            self._open.append(connection)
            self._threads.append(threading.Thread(target=self._serve, args=(connection,)))
            self._threads[-1].start()

    def _serve(self, connection: socket.socket) -> None:
        frames = p.FrameReader()
        while not self._ended.is_set():
            try:
                data = connection.recv(1 << 16)
            except OSError:
                return
            if not data:
                return
            frames.add(data)
            body = frames.next()
            if body is None:
                continue
            request: Any = p.decode_request(body)
            self.seen.append(type(request).__name__)
            try:
                if isinstance(request, p.Hello) and self.hello:
                    welcome = p.Welcome(p.PROTOCOL_VERSION, "boot", b"c" * 16, (SEGMENT,))
                    descriptors = [self._file.fileno()] if request.namespace is not None and not request.client else []
                    socket.send_fds(connection, [p.encode(welcome)], descriptors)
                    continue
                reply = self.answer(request)
                if reply is not None:
                    connection.sendall(reply if isinstance(reply, bytes) else p.encode(reply))
            except OSError:
                return


@pytest.fixture
def path() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="kv-", dir="/tmp") as folder:
        yield Path(folder) / "s"


def cache_at(path: Path) -> DaemonCache:
    return DaemonCache(path, layered(), PRODUCER, call_timeout_s=TIMEOUT_S)


def open_files() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


def chain(chunks: int = CHUNKS) -> Chain:
    return Chain(prompt(1, chunks), CHUNK)


def timed(call: Callable[[], Any], limit_s: float = TIMEOUT_S) -> Any:
    started = time.monotonic()
    answer = call()
    assert time.monotonic() - started < limit_s + SLACK_S
    return answer


def expect_nothing(cache: DaemonCache) -> None:
    """Every call, in time, without an exception, and with nothing to be had."""
    assert timed(lambda: cache.lookup("r", chain())).state is LookupState.MISS
    assert timed(lambda: cache.wait("r", 0.1), TIMEOUT_S + 0.1).state is not LookupState.READY
    assert timed(lambda: cache.claim("r", 1)) is None
    assert timed(lambda: cache.reserve("r", chain(), 0, 2)) is None
    timed(lambda: cache.forget("r"))
    assert timed(lambda: cache.pin(chain(), 1.0)) == 0
    assert timed(lambda: cache.delete(chain())) == 0
    assert not timed(cache.clear)
    assert timed(cache.stats).chunks == 0
    assert timed(lambda: cache.drain(0.1), TIMEOUT_S + 0.1) is False
    ticket = Ticket(lease=7, boot="boot", cells=(0, 1, 2), extents=bytes(48), first=0, boundary=1)
    timed(lambda: cache.release(ticket))


def garbage(request: Any) -> bytes:
    return random.Random(SEED).randbytes(100)


BAD: dict[str, Answer] = {
    "garbage": garbage,
    "oversized": lambda _: struct.pack("<I", p.FRAME_LIMIT + 1) + b"x" * 100,
    "truncated": lambda _: p.encode(p.Count(1))[:-1],
    "only a length": lambda _: struct.pack("<I", 100),
    "no message": lambda _: struct.pack("<I", 3) + b"abc",
    "a request": lambda _: p.encode(p.Ask()),
    "another reply": lambda _: p.Events("b", (), False),
    "two replies": lambda _: p.encode(p.Count(1)) * 2,
    "never": lambda _: None,
    "refused": lambda _: p.Refused("message", "no"),
}


@pytest.mark.parametrize("kind", BAD)
@pytest.mark.parametrize("hello", [True, False], ids=["after hello", "from hello on"])
def test_a_daemon_that_answers_wrongly(path: Path, kind: str, hello: bool) -> None:
    with FakeDaemon(path, BAD[kind], hello=hello):
        cache = timed(lambda: cache_at(path), 1.0)
        expect_nothing(cache)
        timed(lambda: cache.close(1.0), 1.0 + TIMEOUT_S)


def test_a_daemon_that_drips(path: Path) -> None:
    """A byte now and then is no answer."""
    with FakeDaemon(path, lambda _: None) as fake:

        def drip(_: Any) -> None:
            connection, frame = fake._open[-1], p.encode(p.Found(LookupState.READY, 1, 1, "", {}))
            for byte in frame:
                if fake._ended.wait(TIMEOUT_S / 4):
                    return
                connection.sendall(bytes([byte]))

        fake.answer = drip  # type: ignore[assignment]
        cache = cache_at(path)
        assert timed(lambda: cache.lookup("r", chain())).state is LookupState.MISS
        cache.close(1.0)


def test_what_is_done_meanwhile_does_not_make_a_call_late(path: Path) -> None:
    with FakeDaemon(path, lambda _: None):
        channel = Channel(path, TIMEOUT_S)
        pause = threading.Event()

        def endlessly() -> bool:
            pause.wait(0.001)
            return True

        with pytest.raises(TimeoutError):
            timed(lambda: channel.send(p.encode(p.Ask()), TIMEOUT_S, meanwhile=endlessly))
        channel.close()


def test_the_rest_of_a_prompt_is_hashed_while_the_daemon_looks(path: Path) -> None:
    ours = chain(2000)
    with FakeDaemon(path, lambda _: p.Count(0)) as fake:

        def slowly(_: Any) -> p.Message:
            fake._ended.wait(TIMEOUT_S / 2)
            return p.Found(LookupState.MISS, 0, 0, "", {})

        fake.answer = slowly
        cache = cache_at(path)
        assert timed(lambda: cache.lookup("r", ours)).state is LookupState.MISS
        assert ours.hashed == 2000
        assert ours.digests() == Chain(prompt(1, 2000), CHUNK).digests()
        cache.close(0.0)


def test_a_slow_daemon_does_not_add_up(path: Path) -> None:
    """One that answers each part of a lookup just in time."""
    with FakeDaemon(path, lambda _: None) as fake:

        def slowly(request: Any) -> p.Message:
            fake._ended.wait(TIMEOUT_S * 0.7)
            return p.Found(LookupState.READY, CHUNKS, 1 << 20, "", {"pool": CHUNKS})

        fake.answer = slowly
        cache = cache_at(path)
        found = timed(lambda: cache.lookup("r", chain(2000)))
        assert isinstance(found, Lookup)
        cache.close(1.0)


TICKET = Ticket(lease=7, boot="boot", cells=(0, 1, 2), extents=b"", first=0, boundary=1)


def places(*pairs: tuple[int, int]) -> bytes:
    return struct.pack(f"<{2 * len(pairs)}q", *(number for pair in pairs for number in pair))


GOOD = places((0, 128), (0, 4096), (0, 8192))


@pytest.mark.parametrize(
    ("change", "good"),
    [
        ({"extents": GOOD}, True),
        ({"extents": GOOD[:-16]}, False),
        ({"extents": GOOD + GOOD}, False),
        ({"extents": places((0, 128), (0, 4096), (1, 0))}, False),
        ({"extents": places((0, 128), (0, 4096), (0, SEGMENT - 8))}, False),
        ({"extents": places((0, 128), (0, 4096), (0, -8))}, False),
        ({"extents": places((0, 128), (0, 4096), (1 << 40, 0))}, False),
        ({"extents": places((0, 128), (0, 4096), (0, 1 << 62))}, False),
        ({"extents": GOOD, "boot": "other"}, False),
        ({"extents": GOOD, "cells": (0, 1, 99)}, False),
        ({"extents": b"", "cells": ()}, False),
        ({"extents": GOOD, "first": 1, "boundary": 2}, False),
    ],
    ids=range(12),
)
def test_a_ticket_that_cannot_be(path: Path, change: dict[str, Any], good: bool) -> None:
    ticket = msgspec.structs.replace(TICKET, **change)
    with FakeDaemon(path, lambda _: p.Claimed(ticket)):
        cache = cache_at(path)
        assert (timed(lambda: cache.claim("r", 1)) is not None) == good
        cache.close(0.0)


def test_a_reservation_that_cannot_be(path: Path) -> None:
    good = Reservation(lease=7, boot="boot", cells=(0, 1, 2), extents=GOOD, chunks=(1,))
    for change in ({"chunks": (5,)}, {"chunks": (1, 2)}, {"cells": (2, 1, 0)}, {"extents": GOOD[16:]}):
        bad = msgspec.structs.replace(good, **change)  # type: ignore[arg-type]
        with FakeDaemon(path, lambda _, bad=bad: p.Reserved(bad)):
            cache = cache_at(path)
            assert timed(lambda: cache.reserve("r", chain(), 0, 2)) is None  # noqa: B023
            cache.close(0.0)
        path.unlink()


@pytest.mark.parametrize("chunks", [-1, CHUNKS + 1, 1 << 60])
def test_a_hit_longer_than_the_prompt(path: Path, chunks: int) -> None:
    with FakeDaemon(path, lambda _: p.Found(LookupState.READY, chunks, CHUNKS, "", {})):
        cache = cache_at(path)
        assert timed(lambda: cache.lookup("r", chain())).chunks == 0
        cache.close(0.0)


def test_another_version_of_the_daemon(path: Path) -> None:
    body = msgspec.msgpack.encode({"op": "welcome", "version": 99, "moon": "full"})
    later = FakeDaemon(path, lambda _: struct.pack("<I", len(body)) + body, hello=False)
    with later, pytest.raises(BackendFormatError, match=rf"99.*{p.PROTOCOL_VERSION}"):
        cache_at(path)
    path.unlink()
    refusal = p.Refused("version", p.skew(99, p.PROTOCOL_VERSION))
    with FakeDaemon(path, lambda _: refusal, hello=False), pytest.raises(BackendFormatError, match="99"):
        cache_at(path)


def test_a_daemon_that_is_updated_while_the_engine_runs(path: Path) -> None:
    """No exception into the engine then: it has no cache, and the log says why."""
    with FakeDaemon(path, lambda _: p.Count(0)):
        cache = cache_at(path)
        assert cache.connected
    path.unlink()
    until(lambda: not cache.connected)
    body = msgspec.msgpack.encode({"op": "welcome", "version": 99})
    with FakeDaemon(path, lambda _: struct.pack("<I", len(body)) + body, hello=False) as fake:
        until(lambda: "Hello" in fake.seen)
        expect_nothing(cache)
    path.unlink()
    with FakeDaemon(path, lambda _: p.Count(3)) as fake:
        fake.answer = lambda _: p.Count(3)
        assert until(lambda: cache.connected, 2) < 1.0
        assert cache.pin(chain(), 1.0) == 3
    cache.close(0.0)


@pytest.mark.parametrize("sizes", [(), (0,), (-4096,), (1 << 50,), (SEGMENT, SEGMENT), (SEGMENT * 2,)])
def test_a_welcome_that_lies_about_its_segments(path: Path, sizes: tuple[int, ...]) -> None:
    """Touching a page that is not there would kill the engine."""
    with FakeDaemon(path, lambda _: None, hello=False) as fake:

        def welcome(request: Any) -> None:
            message = p.encode(p.Welcome(p.PROTOCOL_VERSION, "b", b"c" * 16, sizes))
            socket.send_fds(fake._open[-1], [message], [fake._file.fileno()])

        fake.answer = welcome  # type: ignore[assignment]
        before = open_files()
        cache = cache_at(path)
        expect_nothing(cache)
        assert open_files() < before + 40, "descriptors that came are closed"
        cache.close(1.0)


def test_requests_of_any_name(path: Path) -> None:
    """Engines pass on what users call their requests."""
    with FakeDaemon(path, lambda _: p.Found(LookupState.READY, 1, 1, "", {})):
        cache = cache_at(path)
        for rid in ("", "r" * 100_000, "\ud800", "ü" * 300, "\0"):
            assert cache.lookup(rid, chain(1)).chunks == 1
            assert cache.connected
        cache.close(0.0)


def test_numbers_that_are_none(path: Path) -> None:
    with FakeDaemon(path, lambda r: p.Found(LookupState.MISS, 0, 0, "", {}) if isinstance(r, p.Wait) else p.Count(1)):
        cache = cache_at(path)
        for seconds in (float("nan"), float("-inf"), -1.0):
            assert timed(lambda s=seconds: cache.wait("r", s)).state is LookupState.MISS
            cache.pin(chain(), seconds)
        cache.pin(chain(), float("inf"))
        assert cache.wait("r", float("inf")).state is LookupState.MISS
        assert cache.claim("r", 0) is None and cache.claim("r", 2, first=2) is None
        assert cache.claim("r", 1, parts=1 << 40) is None and cache.connected
        cache.close(0.0)


def test_a_lookup_while_there_is_no_daemon_costs_nothing(path: Path) -> None:
    cache = cache_at(path)
    ours, seconds = chain(), []
    for _ in range(2000):
        started = time.perf_counter()
        cache.lookup("r", ours)
        seconds.append(time.perf_counter() - started)
    print(f"lookup without a daemon: {1e6 * statistics.median(seconds):.1f} µs")
    assert statistics.median(seconds) < 50e-6
    expect_nothing(cache)
    cache.close(0.0)


def test_a_forked_child_has_no_cache(path: Path) -> None:
    """Two processes on one connection would read each other's replies."""
    with FakeDaemon(path, lambda _: p.Count(3)):
        cache = cache_at(path)
        assert cache.pin(chain(), 1.0) == 3
        child = os.fork()
        if child == 0:
            try:
                nothing = cache.pin(chain(), 1.0) == 0 and not cache.connected and cache.claim("r", 1) is None
                cache.close(1.0)
                os._exit(0 if nothing else 1)
            finally:
                os._exit(2)
        assert os.waitpid(child, 0)[1] == 0
        assert cache.pin(chain(), 1.0) == 3
        cache.close(0.0)


def test_a_path_that_cannot_be(path: Path) -> None:
    with pytest.raises(ConfigError, match="107"):
        cache_at(path.with_name("x" * 100))
    path.write_text("a file")
    cache = cache_at(path)
    assert not cache.connected
    expect_nothing(cache)
    cache.close(0.0)
