"""A Cache that talks to the daemon. No engine waits for a daemon that is gone, slow, or not what it should be.

Every call has a deadline. The first one that fails opens the breaker: from then on lookups miss at once and stores are
dropped, until a thread of its own has reached the daemon again. If that is still the same life of it, this client is
known there, and what it holds is. If it is another life, memory of the earlier one stays mapped until the copies that
use it have ended; then the daemon is told.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
import select
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import takewhile
from pathlib import Path
from typing import TypeVar

import numpy as np

from lmcache_sdk.api import Bytes, Lookup, LookupState, Part, PoolStats, Reservation, Stats, Ticket
from lmcache_sdk.core.extents import SEGMENT_SHIFT
from lmcache_sdk.daemon import protocol as p
from lmcache_sdk.daemon.channel import Channel
from lmcache_sdk.errors import BackendFormatError, ConfigError, LMCacheSDKError
from lmcache_sdk.keys import DIGEST_BYTES, Chain
from lmcache_sdk.lineage import Lineage
from lmcache_sdk.observe.logs import logger
from lmcache_sdk.pool.mapping import map_segments
from lmcache_sdk.spec import WHOLE, Namespace, Producer, Share

_log = logger("client")
_M = TypeVar("_M", bound=p.Message)

CALL_TIMEOUT_S = 0.5
CONNECT_TIMEOUT_S = 1.0
RECONNECT_S = 0.2
_FIRST_DIGESTS = 16
_GROWTH = 128  # a round trip costs as much as some hundred digests, which a store of the rest needs as well
_CLEAR_S = 60.0
_MOST_ASKED = 4096  # requests whose digests the daemon is known to have
_MOST_CLAIMED = 16_384
_UNTAKEN_S = 60.0  # for a worker to take its part of a claim
_LAST_WORD_S = 0.03  # for what is said at the end, though no time is left
_EMPTY = Stats(PoolStats(0, 0, 0, 0, 0), 0, 0, (), {})


class Life:
    """One life of the daemon, as this client knows it.

    Attributes:
        under_way: (lease, part) that this process copies, and whose copies have not ended.
        claimed: those that it has claimed and that it or a worker may take, and since when; oldest first. What a
            worker has taken is not told here, so they are bounded in time and number: who takes an older one asks the
            daemon.
        given_up: claimed by it and not taken here in time: they are being given back, and must not be taken here.
        asked: by request: how many digests the daemon has, and the last of them.
        turn: how often this client had come by then; what was begun in an earlier turn was in vain.
        watch: a connection that nothing is said on: its end is the daemon's.
    """

    def __init__(self, welcome: p.Welcome, segments: Sequence[Bytes], watch: Channel) -> None:
        self.boot = welcome.boot
        self.client = welcome.client
        self.sizes = welcome.segments
        self.segments = segments
        self.under_way: set[tuple[int, int]] = set()
        self.claimed: dict[tuple[int, int], float] = {}
        self.given_up: set[tuple[int, int]] = set()
        self.asked: dict[str, tuple[int, bytes]] = {}
        self.idle: list[Channel] = []
        self.watch = watch
        self.turn = 0

    def holds(self, lease: int, part: int) -> bool:
        """Whether this process is the one to give it back."""
        return (lease, part) in self.under_way or (lease, part) in self.claimed


class DaemonCache:
    """See :class:`lmcache_sdk.api.Cache` for the methods.

    Args:
        path: of the daemon's socket. The daemon need not be there (yet).
        lineage: what the engine's memory holds; by default that of this cache alone.
        call_timeout_s: deadline of every call but ``wait``, ``drain``, ``clear`` and ``close``.
        starts_later: that the daemon is not there yet is as it should be.

    Raises:
        BackendFormatError: the daemon is of another release.
        ConfigError: the daemon refuses this namespace, and the message says why; or the path is too long.
    """

    def __init__(
        self,
        path: Path,
        namespace: Namespace,
        producer: Producer,
        *,
        share: str = Share.VERIFIED,
        lineage: Lineage | None = None,
        call_timeout_s: float = CALL_TIMEOUT_S,
        starts_later: bool = False,
    ) -> None:
        namespace.spec.validate()
        if len(os.fsencode(path)) > 107:
            raise ConfigError(f"the socket path {path} has over 107 bytes; choose a shorter one")
        self.path = path
        self._namespace = namespace
        self._producer = producer
        self._share = Share.of(share)
        self._lineage = lineage or Lineage()  # here and not in the daemon, which may be another life of it later
        self._cell_bytes = np.array([cell.nbytes for cell in namespace.spec.cells])
        self._timeout_s = call_timeout_s
        self._lock = threading.Condition()
        self._life: Life | None = None
        self._earlier: dict[bytes, Life] = {}  # by client id
        self._turn = 0
        self._process = os.getpid()
        self._closing = False
        self._closed = threading.Event()
        self._bell, self._rope = socket.socketpair()  # something for the keeper to do
        self._rope.setblocking(False)
        try:
            self._connect()
        except (BackendFormatError, ConfigError):
            self._bell.close()
            self._rope.close()
            raise
        except (OSError, LMCacheSDKError) as error:
            if not starts_later:
                _log.warning("no daemon at %s (%s): the engine runs without a cache until there is one", path, error)
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
        return self._current() is not None

    def lookup(self, rid: str, chain: Chain, *, over: Part = WHOLE, prefetch: bool = True) -> Lookup:
        del over  # a chunk is ready only when all its cells are, whatever the asker holds
        life = self._current()
        if life is None:
            return Lookup(LookupState.MISS, why="no daemon")
        if chain.chunk_tokens != self._namespace.spec.chunk_tokens:
            return Lookup(LookupState.MISS, why=f"chunks of {chain.chunk_tokens} tokens")
        rid = _short(rid)
        deadline = time.monotonic() + self._timeout_s
        length, answer = len(chain), Lookup(LookupState.MISS, why="no daemon")
        # The daemon gets as many digests as it finds chunks, and a few more; and each of them once.
        start, last = life.asked.get(rid, (0, b""))
        if start and (start > length or chain.digests(start)[-1] != last):
            start = 0
        count = max(start, min(_FIRST_DIGESTS, length))
        while True:
            digests = chain.digests(count)
            message = p.Lookup(
                rid,
                start,
                b"".join(digests[start:]),
                total=length,
                tenant=chain.tenant,
                salted=chain.salted,
                positions_known=chain.positions_known,
                prefetch=prefetch,
            )
            following = min(count * _GROWTH, count + p.MOST_DIGESTS, length)

            def hash_on(until: int = following) -> bool:
                chain.digests(chain.hashed + _FIRST_DIGESTS)
                return chain.hashed < until

            found = self._call(life, message, p.Found, deadline - time.monotonic(), hash_on)
            if found is None or not 0 <= found.chunks <= count:
                return answer
            if found.walked == p.AGAIN and start:
                start, count = 0, min(_FIRST_DIGESTS, length)
                continue
            answer = _lookup(found)
            if digests:
                _note(life.asked, rid, (count, digests[-1]))
            if found.walked < count or count == length or time.monotonic() >= deadline:
                return answer
            start, count = count, following

    def wait(self, rid: str, timeout_s: float, *, settle: bool = True) -> Lookup:
        seconds = _bounded(timeout_s, p.LONGEST_WAIT_S)
        found = self._call(self._current(), p.Wait(_short(rid), seconds, settle), p.Found, seconds + self._timeout_s)
        return _lookup(found) if found is not None else Lookup(LookupState.MISS, why="no daemon")

    def claim(self, rid: str, boundary: int, *, first: int = 0, parts: int = 1) -> Ticket | None:
        boundary, first, parts = int(boundary), int(first), int(parts)  # an engine's may be numpy's
        life = self._current()
        if life is None or self._closing or not 0 <= first < boundary or not 1 <= parts <= p.MOST_PARTS:
            return None
        with self._or_lost(life) as turn:
            return self._claim(life, turn, p.Claim(_short(rid), boundary, first, parts))

    def _claim(self, life: Life, turn: int, message: p.Claim) -> Ticket | None:
        first, boundary, parts = message.first, message.boundary, message.parts
        claimed = self._call(life, message, p.Claimed)
        ticket = claimed.ticket if claimed is not None else None
        if ticket is None:
            return None
        good = (ticket.first, ticket.boundary, ticket.parts) == (first, boundary, parts)
        good = good and len(ticket.inexact) in (0, DIGEST_BYTES)
        if not good or not self._fits(life, ticket, boundary - first):
            self._lose(life, turn, p.ProtocolError("a ticket that cannot be"))
            return None
        claims = [(ticket.lease, part) for part in range(parts)]
        with self._lock:
            good = self._is_good(life, turn)
            if good:
                life.claimed.update(dict.fromkeys(claims, time.monotonic()))
                while len(life.claimed) > _MOST_CLAIMED:
                    del life.claimed[next(iter(life.claimed))]
        if good:
            return ticket
        for claim in claims:
            if self._call(life, p.Release(*claim), p.Count) is None:
                break
        return None

    def take(self, ticket: Ticket, part: int = 0) -> bool:
        """Before this process copies a part of a ticket that another one has claimed; False: it must not.

        From here on the part is this process's to give back.
        """
        life = self._current()
        if life is None or life.boot != ticket.boot or self._closing:
            return False
        self._lineage.loaded(ticket)
        copy = (ticket.lease, int(part))
        with self._or_lost(life) as turn:
            with self._lock:
                if copy in life.given_up:
                    return False
                if self._is_good(life, turn) and (copy in life.claimed or copy in life.under_way):
                    life.under_way.add(copy)
                    life.claimed.pop(copy, None)
                    return True
            taken = self._call(life, p.Take(*copy), p.Count)
            if taken is None or not taken.count or not self._fits(life, ticket, ticket.boundary - ticket.first):
                return False
            return self._begin(life, turn, copy, p.Release(*copy))

    def release(self, ticket: Ticket, part: int = 0) -> None:
        self._ended(ticket.boot, ticket.lease, int(part), p.Release(ticket.lease, int(part)))

    def forget(self, rid: str) -> None:
        life = self._current()
        if life is not None:
            life.asked.pop(_short(rid), None)
            self._call(life, p.Forget(_short(rid)), p.Count)

    def reserve(self, rid: str, chain: Chain, first: int, count: int, part: Part = WHOLE) -> Reservation | None:
        del rid  # what a request has loaded its engine may have given to another one: the chain tells
        first, count = int(first), min(int(count), p.MOST_DIGESTS)
        life = self._current()
        if life is None or self._closing or first < 0 or count < 1:
            return None
        if chain.chunk_tokens != self._namespace.spec.chunk_tokens:
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
            inexact=self._lineage.first_inexact(chain, first + count),
        )
        with self._or_lost(life) as turn:
            return self._reserve(life, turn, message, range(first, first + count))

    def _reserve(self, life: Life, turn: int, message: p.Reserve, wanted: range) -> Reservation | None:
        reserved = self._call(life, message, p.Reserved)
        reservation = reserved.reservation if reserved is not None else None
        if reservation is None:
            return None
        asked = reservation.cells == message.cells and all(at in wanted for at in reservation.chunks)
        if not asked or not self._fits(life, reservation, len(reservation.chunks)):
            self._lose(life, turn, p.ProtocolError("a reservation that cannot be"))
            return None
        begun = self._begin(life, turn, (reservation.lease, 0), p.Publish(reservation.lease, ()))
        return reservation if begun else None

    def publish(self, reservation: Reservation, chunks: Sequence[int] | None = None) -> None:
        written = None if chunks is None else tuple({int(at) for at in chunks} & set(reservation.chunks))
        self._ended(reservation.boot, reservation.lease, 0, p.Publish(reservation.lease, written))

    def abort(self, reservation: Reservation) -> None:
        self.publish(reservation, ())

    def segments(self, boot: str) -> Sequence[Bytes]:
        life = self._current()
        if life is None or life.boot != boot:
            with self._lock:
                life = next((earlier for earlier in self._earlier.values() if earlier.boot == boot), None)
        return life.segments if life is not None else ()

    def pin(self, chain: Chain, ttl_s: float) -> int:
        digests = chain.digests(p.MOST_DIGESTS)
        return self._count(p.Pin(b"".join(digests), _bounded(ttl_s, p.LONGEST_PIN_S)))

    def delete(self, chain: Chain) -> int:
        digests, size = chain.digests(), p.MOST_DIGESTS
        pieces = [digests[at : at + size] for at in range(0, len(digests), size)]
        return sum(self._count(p.Delete(b"".join(piece))) for piece in reversed(pieces))

    def clear(self) -> int | None:
        """Piece by piece, since it holds up everybody: of a pool with very many chunks for up to 60 s. What is left
        then stays, and the answer is None, as it is when the daemon is lost: call it again.
        """
        total, deadline = 0, time.monotonic() + _CLEAR_S
        while time.monotonic() < deadline:
            reply = self._call(self._current(), p.Clear(), p.Count)
            if reply is None or not reply.count:
                return total if reply is not None else None
            total += reply.count
        return None

    def stats(self) -> Stats:
        figures = self._call(self._current(), p.Ask(), p.Figures)
        return figures.stats if figures is not None else _EMPTY

    def drain(self, timeout_s: float) -> bool:
        seconds = _bounded(timeout_s, p.LONGEST_WAIT_S)
        reply = self._call(self._current(), p.Drain(seconds), p.Count, seconds + self._timeout_s)
        return reply is not None and reply.count == 1

    def close(self, timeout_s: float = 10.0) -> None:
        """Wait for the copies that are under way. If they do not end in time, the daemon keeps their memory out of
        use until this process has ended.
        """
        if self._closing or os.getpid() != self._process:
            return
        deadline = time.monotonic() + _bounded(timeout_s, p.LONGEST_WAIT_S)
        with self._lock:
            self._closing = True
            ended = self._lock.wait_for(lambda: not self._under_way(), deadline - time.monotonic())
        life = self._current()
        if ended and life is not None:
            self._tell_drained(life, deadline)
            self._call(life, p.Bye(), p.Count, self._until(deadline))
        self._closed.set()
        self._ring()
        self._keeper.join(max(_LAST_WORD_S, deadline - time.monotonic()))
        with self._lock:
            late, self._life = self._life, None
        if late is not None:
            if late is not life:  # the keeper has reached it meanwhile
                self._leave(late, late.watch)
            _close_all(late)
            late.watch.close()

    # The conversation

    def _current(self) -> Life | None:
        """The daemon's life; None while there is none, and in a child that was forked: a conversation has two sides."""
        return self._life if os.getpid() == self._process else None

    @contextlib.contextmanager
    def _or_lost(self, life: Life) -> Iterator[int]:
        """Of what the daemon has carried out nothing may be forgotten, though an interrupt comes in between: then it is
        given up, and when it is back it is told what is held. The value is the life's turn.
        """
        turn = life.turn
        try:
            yield turn
        except BaseException as error:
            self._lose(life, turn, error)
            raise

    def _call(
        self,
        life: Life | None,
        message: p.Message,
        reply: type[_M],
        timeout_s: float | None = None,
        meanwhile: Callable[[], bool] | None = None,
    ) -> _M | None:
        """The reply, or None if the daemon refuses, if there is none or it does not do as it should; after the last
        two the breaker is open. For ``meanwhile`` see :meth:`Channel.send`.
        """
        if life is None or life is not self._life or self._closed.is_set():
            return None
        deadline = time.monotonic() + (self._timeout_s if timeout_s is None else timeout_s)
        try:
            frame = p.encode(message)
        except p.ProtocolError as error:
            _log.warning("a %s was not sent: %s", type(message).__name__, error)
            return None
        channel, turn = None, life.turn
        try:
            with self._lock:
                channel = life.idle.pop() if life.idle else None
            if channel is None:
                channel = self._join(life, deadline)
            answer = channel.send(frame, deadline - time.monotonic(), meanwhile=meanwhile)
            if not isinstance(answer, reply | p.Refused):
                raise p.ProtocolError(f"expected {reply.__name__}, got {type(answer).__name__}")
        except BaseException as error:
            if channel is not None:
                channel.close()
            self._lose(life, turn, error)
            if isinstance(error, (OSError, LMCacheSDKError)):
                return None
            raise
        if isinstance(answer, p.Refused):
            _log.warning("the daemon refused a %s: %s", type(message).__name__, answer.message)
            channel.close()
            if answer.kind == "internal":  # it may have been carried out
                self._lose(life, turn, p.ProtocolError(answer.message))
            return None
        with self._lock:
            if life is self._life and life.turn == turn and not self._closed.is_set():
                life.idle.append(channel)
                return answer
        channel.close()
        return answer

    def _join(self, life: Life, deadline: float) -> Channel:
        """One more connection of this client. Raises as :meth:`Channel.call`."""
        channel = Channel(self.path, max(0.001, min(deadline - time.monotonic(), CONNECT_TIMEOUT_S)))
        try:
            hello = p.Hello(p.PROTOCOL_VERSION, client=life.client)
            joined = channel.call(hello, deadline - time.monotonic())
            if not isinstance(joined, p.Welcome) or (joined.boot, joined.client) != (life.boot, life.client):
                raise ConnectionError("the daemon is another one")
        except BaseException:
            channel.close()
            raise
        return channel

    def _count(self, message: p.Message) -> int:
        reply = self._call(self._current(), message, p.Count)
        return reply.count if reply is not None else 0

    def _is_good(self, life: Life, turn: int) -> bool:
        """Under the lock: whether an answer counts; not if the daemon was lost since it was asked, or is being left."""
        return life is self._life and life.turn == turn and not self._closing

    def _begin(self, life: Life, turn: int, copy: tuple[int, int], give_back: p.Message) -> bool:
        """Note that a copy may be made; False if it must not any more, and then what it was for is given back."""
        with self._lock:
            good = self._is_good(life, turn)
            if good:
                life.under_way.add(copy)
        if not good:  # a daemon that has been lost is going to be told what is held, and this is not among it
            self._call(life, give_back, p.Count)
        return good

    def _until(self, deadline: float) -> float:
        """Seconds for a call that is to end by then."""
        return min(self._timeout_s, max(_LAST_WORD_S, deadline - time.monotonic()))

    def _ended(self, boot: str, lease: int, part: int, message: p.Message) -> None:
        """A copy has ended: tell the daemon that gave it, or note it if that one is gone."""
        if os.getpid() != self._process:
            return
        with self._lock:
            lives = [life for life in (self._life, *self._earlier.values()) if life is not None]
            given = next((life for life in lives if life.holds(lease, part) and life.boot == boot), None)
            if given is None:
                return
            # First of all: should the daemon be lost while it is told, it hears of it when it is back.
            given.under_way.discard((lease, part))
            given.claimed.pop((lease, part), None)
            self._lock.notify_all()
            current = given is self._life
        if current:
            told = self._call(given, message, p.Count)
            if told is None and isinstance(message, p.Publish):  # refused, or not even sent
                self._call(given, p.Publish(lease, ()), p.Count)
        else:
            self._ring()  # the keeper tells the daemon when that was the last

    def _under_way(self) -> bool:
        lives = [*self._earlier.values(), *([self._life] if self._life is not None else [])]
        return any(life.under_way for life in lives)

    def _lose(self, life: Life, turn: int, error: BaseException) -> None:
        with self._lock:
            if self._life is not life or life.turn != turn:
                return
            self._life = None
            self._earlier[life.client] = life
            life.asked.clear()
        if self._closing:
            _log.debug("closed the connection to the daemon at %s (%s)", self.path, error)
        else:
            _log.warning(
                "lost the daemon at %s (%s: %s): no cache until it is back", self.path, type(error).__name__, error
            )
        _close_all(life)
        self._ring()

    def _connect(self) -> None:
        """Raises OSError, ProtocolError; BackendFormatError and ConfigError for a refusal that lasts."""
        with self._lock:
            last = next(reversed(self._earlier.values()), None)
            self._turn += 1
            hello = p.Hello(
                p.PROTOCOL_VERSION,
                client=last.client if last is not None else b"",
                namespace=self._namespace,
                producer=self._producer,
                turn=self._turn,
                held=(*last.under_way, *last.claimed) if last is not None else (),
                share=self._share,
            )
        deadline = time.monotonic() + CONNECT_TIMEOUT_S
        channel = Channel(self.path, CONNECT_TIMEOUT_S)
        try:
            welcome = channel.call(hello, deadline - time.monotonic())
            if isinstance(welcome, p.Refused):
                p.raise_refusal(welcome)
            if not isinstance(welcome, p.Welcome):
                raise p.ProtocolError(f"expected a welcome, got {type(welcome).__name__}")
            if last is not None and (last.boot, last.client) == (welcome.boot, welcome.client):
                life = last
            else:
                life = Life(welcome, _map(channel.descriptors, welcome), channel)
            channel.drop_descriptors()
        except BaseException:
            channel.close()
            raise
        with self._lock:
            late = self._closed.is_set()
            if not late:
                self._earlier.pop(life.client, None)
                life.watch, life.turn = channel, hello.turn
                self._life = life
            ended = [copy for copy in hello.held if not life.holds(*copy)] if life is last else []
        if late:
            self._leave(life, channel)
            channel.close()
            return
        for lease, part in ended:  # while the daemon was being reached; which of the two it was is not known here
            self._call(life, p.Release(lease, part), p.Count)
            self._call(life, p.Publish(lease, ()), p.Count)
        self._tell_drained(life)

    def _leave(self, life: Life, channel: Channel) -> None:
        """Say that this client ends to a daemon that was reached too late, unless a copy is under way."""
        if not (life.under_way or self._under_way()):
            with contextlib.suppress(OSError, LMCacheSDKError):
                channel.call(p.Bye(), self._until(0.0))

    def _give_up_untaken(self, life: Life) -> None:
        """Give back what was claimed long ago and taken by nobody: its worker may have been without a daemon then.

        The daemon ignores it if a worker has the part, and refuses one that comes for it later.
        """
        with self._lock:
            due = time.monotonic() - _UNTAKEN_S
            old = list(takewhile(lambda claim: life.claimed[claim] <= due, life.claimed))
            for claim in old:
                del life.claimed[claim]
            life.given_up.update(old)
        for claim in old:
            if self._call(life, p.Release(*claim), p.Count) is None:
                break  # a daemon that comes back is told what is held, and these are not among it
        with self._lock:
            life.given_up.difference_update(old)

    def _tell_drained(self, life: Life, deadline: float = math.inf) -> None:
        """Tell the daemon which of its earlier lives this process has no copies of any more."""
        with self._lock:
            ended = [earlier for earlier in self._earlier.values() if not earlier.under_way]
        for earlier in ended:
            if self._call(life, p.Drained(earlier.client), p.Count, self._until(deadline)) is not None:
                with self._lock:
                    self._earlier.pop(earlier.client, None)

    def _ring(self) -> None:
        with contextlib.suppress(OSError):  # it has rung already
            self._rope.send(b"\0")

    def _keep(self) -> None:
        """Notice that the daemon is gone, and reach it again."""
        told = ""
        while not self._closed.is_set():
            life = self._life
            if life is not None:
                self._watch(life)
                continue
            try:
                self._connect()
                _log.info("reached the daemon at %s", self.path)
                told = ""
            except Exception as error:  # noqa: BLE001 - without this thread there would never be a cache again
                if not isinstance(error, (ConnectionRefusedError, FileNotFoundError)) and str(error) != told:
                    told = str(error)
                    _log.warning("no daemon at %s: %s", self.path, error)
                self._closed.wait(RECONNECT_S)
        self._bell.close()
        self._rope.close()

    def _watch(self, life: Life) -> None:
        """Until this life is lost."""
        poll = select.poll()
        poll.register(self._bell, select.POLLIN)
        poll.register(life.watch.fileno(), select.POLLIN)
        turn = life.turn
        while self._life is life and not self._closed.is_set():
            ready = {descriptor for descriptor, _ in poll.poll(1000 * _UNTAKEN_S / 4)}
            if self._bell.fileno() in ready:
                self._bell.recv(4096)
            if life.watch.fileno() in ready:
                self._lose(life, turn, ConnectionError("it has closed the connection"))
            self._tell_drained(life)
            self._give_up_untaken(life)
        if self._life is not life:
            life.watch.close()

    def _fits(self, life: Life, given: Ticket | Reservation, chunks: int) -> bool:
        """Whether what the daemon gives lies in its segments: a wrong place would be another chunk's bytes."""
        cells = given.cells
        if given.boot != life.boot or len(given.extents) != chunks * len(cells) * 16 or not cells:
            return False
        if not all(0 <= cell < len(self._cell_bytes) for cell in cells):
            return False
        places = given.places()
        segments, offsets = places[..., 0], places[..., 1]
        room = np.array([*life.sizes, 1 << SEGMENT_SHIFT])[segments.clip(-1, len(life.sizes))]
        inside = (offsets >= 0) & (offsets <= room - self._cell_bytes[list(cells)])
        return bool(((segments < len(life.sizes)) & ((segments < 0) | inside)).all())


def _lookup(found: p.Found) -> Lookup:
    boundaries = range(1, found.chunks + 1) if found.state is LookupState.READY else ()
    return Lookup(
        found.state, boundaries, found.why, found.sources, found=found.found, missing=found.missing, eta_s=found.eta_s
    )


def _short(rid: str) -> str:
    """Request ids may come from users: of any length, and not even text."""
    if len(rid) <= p.RID_LIMIT and rid.isascii():
        return rid
    return hashlib.sha256(rid.encode(errors="surrogatepass")).hexdigest()


def _bounded(seconds: float, most: float) -> float:
    seconds = float(seconds)
    return min(max(seconds, 0.0), most) if not math.isnan(seconds) else 0.0


def _note(asked: dict[str, tuple[int, bytes]], rid: str, sent: tuple[int, bytes]) -> None:
    if rid not in asked and len(asked) >= _MOST_ASKED:
        asked.clear()  # they are sent again, no more
    asked[rid] = sent


def _map(descriptors: list[int], welcome: p.Welcome) -> list[Bytes]:
    """Raises ProtocolError, BackendUnavailable."""
    sizes = welcome.segments
    if len(descriptors) != len(sizes) or not all(0 < size < 1 << SEGMENT_SHIFT for size in sizes) or not sizes:
        raise p.ProtocolError(f"the daemon's welcome names {len(sizes)} segments and brings {len(descriptors)}")
    try:
        return list(map_segments(descriptors, list(sizes)))
    except BackendFormatError as error:  # which would tell of another release
        raise p.ProtocolError(str(error)) from error


def _close_all(life: Life) -> None:
    while life.idle:
        with contextlib.suppress(IndexError):
            life.idle.pop().close()
