"""A Cache that talks to the daemon. No engine waits for a daemon that is gone, slow, or not what it should be.

Every call has a deadline. The first one that fails opens the breaker: from then on lookups miss at once and stores are
dropped, until a thread of its own has reached the daemon again. Memory of an earlier life stays mapped until the copies
that use it have ended; then the daemon is told.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

from lmcache_sdk.api import Bytes, Lookup, LookupState, Part, PoolStats, Reservation, Stats, Ticket
from lmcache_sdk.daemon import protocol as p
from lmcache_sdk.errors import BackendFormatError, BackendUnavailable, ConfigError, LMCacheSDKError
from lmcache_sdk.keys import Chain
from lmcache_sdk.observe.logs import logger
from lmcache_sdk.pool.mapping import map_segments
from lmcache_sdk.spec import WHOLE, Namespace, Producer

_log = logger("client")
_M = TypeVar("_M", bound=p.Message)

CALL_TIMEOUT_S = 0.5
CONNECT_TIMEOUT_S = 1.0
RECONNECT_S = 0.2
_FIRST_DIGESTS = 16
_GROWTH = 8
_MOST_SEGMENTS = 64  # descriptors in one message: 4 TiB of pool
_EMPTY = Stats(PoolStats(0, 0, 0, 0, 0), 0, 0, (), {})


class Channel:
    """One connection: a request, then its reply. Any trouble is an OSError or ProtocolError, and ends it."""

    def __init__(self, path: Path, timeout_s: float) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._frames = p.FrameReader()
        self.descriptors: list[int] = []
        try:
            self._socket.settimeout(timeout_s)
            self._socket.connect(str(path))
        except BaseException:
            self._socket.close()
            raise

    def call(self, message: p.Message, timeout_s: float) -> p.Message:
        """Raises TimeoutError at the deadline, ConnectionError, other OSErrors, or ProtocolError."""
        deadline = time.monotonic() + timeout_s
        self._socket.settimeout(timeout_s)
        self._socket.sendall(p.encode(message))
        while (body := self._frames.next()) is None:
            left = deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError(f"no answer within {timeout_s} s")
            self._socket.settimeout(left)
            self._frames.add(self._receive(isinstance(message, p.Hello)))
        return p.decode_reply(body)

    def _receive(self, with_descriptors: bool) -> bytes:
        if with_descriptors:
            data, descriptors, _, _ = socket.recv_fds(self._socket, 1 << 16, _MOST_SEGMENTS)
            self.descriptors += descriptors
        else:
            data = self._socket.recv(1 << 18)
        if not data:
            raise ConnectionError("the daemon closed the connection")
        return data

    def close(self) -> None:
        self._socket.close()
        for descriptor in self.descriptors:
            os.close(descriptor)
        self.descriptors = []


class Life:
    """One life of the daemon, as this client knows it.

    Attributes:
        under_way: (lease, part) of tickets and reservations whose copies have not ended.
    """

    def __init__(self, welcome: p.Welcome, segments: Sequence[Bytes]) -> None:
        self.boot = welcome.boot
        self.client = welcome.client
        self.segments = segments
        self.under_way: set[tuple[int, int]] = set()
        self.idle: list[Channel] = []


class DaemonCache:
    """See :class:`lmcache_sdk.api.Cache` for the methods.

    Args:
        path: of the daemon's socket. The daemon need not be there (yet).
        call_timeout_s: deadline of every call but ``wait``, ``drain`` and ``close``.

    Raises:
        BackendFormatError: the daemon is of another release.
        ConfigError: the daemon refuses this namespace; the message says why.
    """

    def __init__(
        self, path: Path, namespace: Namespace, producer: Producer, *, call_timeout_s: float = CALL_TIMEOUT_S
    ) -> None:
        namespace.spec.validate()
        self.path = path
        self._namespace = namespace
        self._producer = producer
        self._timeout_s = call_timeout_s
        self._lock = threading.Lock()
        self._life: Life | None = None
        self._earlier: dict[str, Life] = {}
        self._closed = threading.Event()
        self._lost = threading.Event()
        try:
            self._connect()
        except (OSError, p.ProtocolError) as error:
            _log.warning("no daemon at %s (%s): the engine runs without a cache until there is one", path, error)
            self._lost.set()
        self._keeper = threading.Thread(target=self._keep, name="lmcache-reconnect", daemon=True)
        self._keeper.start()

    @property
    def namespace(self) -> Namespace:
        return self._namespace

    @property
    def producer(self) -> Producer:
        return self._producer

    @property
    def connected(self) -> bool:
        """Whether the breaker is closed."""
        return self._life is not None

    def lookup(self, rid: str, chain: Chain, *, over: Part = WHOLE, prefetch: bool = True) -> Lookup:
        del over  # a chunk is ready only when all its cells are, whatever the asker holds
        life = self._life
        if life is None:
            return Lookup(LookupState.MISS, why="no daemon")
        if chain.chunk_tokens != self._namespace.spec.chunk_tokens:
            return Lookup(LookupState.MISS, why=f"chunks of {chain.chunk_tokens} tokens")
        length, start, count = len(chain), 0, _FIRST_DIGESTS
        while True:
            count = min(count, length)
            message = p.Lookup(
                rid,
                start,
                b"".join(chain.digests(count)[start:]),
                tenant=chain.tenant,
                salted=chain.salted,
                positions_known=chain.positions_known,
                prefetch=prefetch,
            )
            found = self._call(life, message, p.Found)
            if found is None:
                return Lookup(LookupState.MISS, why="no daemon")
            if found.walked < count or count == length:
                return _lookup(found)
            start, count = count, count * _GROWTH

    def wait(self, rid: str, timeout_s: float) -> Lookup:
        life = self._life
        found = self._call(life, p.Wait(rid, timeout_s), p.Found, timeout_s + self._timeout_s)
        return _lookup(found) if found is not None else Lookup(LookupState.MISS, why="no daemon")

    def claim(self, rid: str, boundary: int, *, first: int = 0, parts: int = 1) -> Ticket | None:
        life = self._life
        claimed = self._call(life, p.Claim(rid, boundary, first, parts), p.Claimed)
        if claimed is None or claimed.ticket is None or life is None:
            return None
        with self._lock:
            life.under_way.update((claimed.ticket.lease, part) for part in range(parts))
        return claimed.ticket

    def release(self, ticket: Ticket, part: int = 0) -> None:
        self._ended(ticket.boot, ticket.lease, part, p.Release(ticket.lease, part))

    def forget(self, rid: str) -> None:
        self._call(self._life, p.Forget(rid), p.Count)

    def reserve(self, rid: str, chain: Chain, first: int, count: int, part: Part = WHOLE) -> Reservation | None:
        del rid  # all that is loaded is exact, so there is no lesser fidelity to inherit from the request
        life = self._life
        if life is None or chain.chunk_tokens != self._namespace.spec.chunk_tokens or first < 0 or count < 1:
            return None
        digests = chain.digests(first + count)
        message = p.Reserve(
            b"".join(digests[first:]),
            first,
            self._namespace.spec.cells_of(part),
            parent=digests[first - 1] if 0 < first <= len(digests) else b"",
            tenant=chain.tenant,
            salted=chain.salted,
            positions_known=chain.positions_known,
        )
        reserved = self._call(life, message, p.Reserved)
        if reserved is None or reserved.reservation is None:
            return None
        with self._lock:
            life.under_way.add((reserved.reservation.lease, 0))
        return reserved.reservation

    def publish(self, reservation: Reservation, chunks: Sequence[int] | None = None) -> None:
        written = None if chunks is None else tuple(chunks)
        self._ended(reservation.boot, reservation.lease, 0, p.Publish(reservation.lease, written))

    def abort(self, reservation: Reservation) -> None:
        self.publish(reservation, ())

    def segments(self, boot: str) -> Sequence[Bytes]:
        life = self._life
        if life is None or life.boot != boot:
            life = self._earlier.get(boot)
        return life.segments if life is not None else ()

    def pin(self, chain: Chain, ttl_s: float) -> int:
        return self._count(p.Pin(b"".join(chain.digests()), ttl_s))

    def delete(self, chain: Chain) -> int:
        return self._count(p.Delete(b"".join(chain.digests())))

    def clear(self) -> int:
        return self._count(p.Clear())

    def stats(self) -> Stats:
        figures = self._call(self._life, p.Ask(), p.Figures)
        return figures.stats if figures is not None else _EMPTY

    def drain(self, timeout_s: float) -> bool:
        reply = self._call(self._life, p.Drain(timeout_s), p.Count, timeout_s + self._timeout_s)
        return reply is not None and reply.count == 1

    def close(self, timeout_s: float = 10.0) -> None:
        if self._closed.is_set():
            return
        self._call(self._life, p.Bye(), p.Count, min(timeout_s, self._timeout_s))
        self._closed.set()
        self._lost.set()
        self._keeper.join(timeout_s)
        with self._lock:
            life, self._life = self._life, None
        if life is not None:
            _close_all(life)

    # The conversation

    def _call(
        self, life: Life | None, message: p.Message, reply: type[_M], timeout_s: float | None = None
    ) -> _M | None:
        """The reply, or None if there is no daemon or it does not do as it should; then the breaker is open."""
        if life is None or self._closed.is_set():
            return None
        seconds = self._timeout_s if timeout_s is None else timeout_s
        channel = None
        try:
            with self._lock:
                channel = life.idle.pop() if life.idle else None
            if channel is None:
                channel = Channel(self.path, min(seconds, CONNECT_TIMEOUT_S))
                joined = channel.call(p.Hello(p.PROTOCOL_VERSION, client=life.client), seconds)
                if not isinstance(joined, p.Welcome) or joined.boot != life.boot:
                    raise ConnectionError(f"the daemon is another one: {joined}")
            answer = channel.call(message, seconds)
            if isinstance(answer, p.Refused):
                raise p.ProtocolError(f"refused: {answer.message}")
            if not isinstance(answer, reply):
                raise p.ProtocolError(f"expected {reply.__name__}, got {type(answer).__name__}")
        except (OSError, LMCacheSDKError) as error:
            if channel is not None:
                channel.close()
            self._lose(life, error)
            return None
        with self._lock:
            if life is self._life:
                life.idle.append(channel)
                return answer
        channel.close()
        return answer

    def _count(self, message: p.Message) -> int:
        reply = self._call(self._life, message, p.Count)
        return reply.count if reply is not None else 0

    def _ended(self, boot: str, lease: int, part: int, message: p.Message) -> None:
        """A copy has ended: tell the daemon that gave it, or note it if that one is gone."""
        life = self._life
        if life is not None and life.boot == boot:
            self._call(life, message, p.Count)
            with self._lock:
                life.under_way.discard((lease, part))
            return
        with self._lock:
            earlier = self._earlier.get(boot)
            if earlier is not None:
                earlier.under_way.discard((lease, part))
        self._lost.set()  # the keeper tells the daemon when that was the last

    def _lose(self, life: Life, error: Exception) -> None:
        with self._lock:
            if self._life is not life:
                return
            self._life = None
            self._earlier[life.boot] = life
        _log.warning(
            "lost the daemon at %s (%s: %s): no cache until it is back", self.path, type(error).__name__, error
        )
        _close_all(life)
        self._lost.set()

    def _connect(self) -> None:
        """Raises OSError, ProtocolError; BackendFormatError and ConfigError for a refusal that lasts."""
        channel = Channel(self.path, CONNECT_TIMEOUT_S)
        try:
            welcome = channel.call(
                p.Hello(p.PROTOCOL_VERSION, namespace=self._namespace, producer=self._producer), CONNECT_TIMEOUT_S
            )
            if isinstance(welcome, p.Refused):
                kind = {"version": BackendFormatError, "settings": ConfigError}.get(welcome.kind, BackendUnavailable)
                raise kind(f"the daemon at {self.path} refuses: {welcome.message}")
            if not isinstance(welcome, p.Welcome) or len(channel.descriptors) != len(welcome.segments):
                raise p.ProtocolError("the daemon's welcome is not one")
            life = Life(welcome, map_segments(channel.descriptors, list(welcome.segments)))
        except BaseException:
            channel.close()
            raise
        for descriptor in channel.descriptors:
            os.close(descriptor)
        channel.descriptors = []
        life.idle.append(channel)
        with self._lock:
            self._life = life
        self._tell_drained(life)

    def _tell_drained(self, life: Life) -> None:
        """Tell the daemon which of its earlier lives this process has no copies of any more."""
        with self._lock:
            ended = [earlier for earlier in self._earlier.values() if not earlier.under_way]
        for earlier in ended:
            if self._call(life, p.Drained(earlier.client), p.Count) is not None:
                with self._lock:
                    self._earlier.pop(earlier.boot, None)

    def _keep(self) -> None:
        """Reach the daemon again whenever it is lost."""
        told = ""
        while True:
            self._lost.wait()
            self._lost.clear()
            while self._life is None and not self._closed.is_set():
                try:
                    self._connect()
                    _log.info("reached the daemon at %s", self.path)
                    told = ""
                except (OSError, LMCacheSDKError) as error:
                    if not isinstance(error, (ConnectionError, FileNotFoundError)) and str(error) != told:
                        told = str(error)
                        _log.warning("no daemon at %s: %s", self.path, error)
                    self._closed.wait(RECONNECT_S)
            if self._closed.is_set():
                return
            life = self._life
            if life is not None:
                self._tell_drained(life)


def _lookup(found: p.Found) -> Lookup:
    state = LookupState(found.state)
    boundaries = range(1, found.chunks + 1) if state is LookupState.READY else ()
    return Lookup(state, boundaries, found.why, found.sources)


def _close_all(life: Life) -> None:
    while life.idle:
        with contextlib.suppress(IndexError):
            life.idle.pop().close()
