"""The daemon: sockets over a Store.

One thread serves all sockets and never waits for a tier, a client or a disk: what takes time answers later. Nothing
that a client sends can do more than close its own connection. Memory that a client may still touch comes back only when
the client says so, or when its process is proven gone.
"""

from __future__ import annotations

import contextlib
import errno
import math
import os
import resource
import secrets
import selectors
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from lmcache_sdk.api import LookupState
from lmcache_sdk.daemon import protocol as p
from lmcache_sdk.errors import BackendLocked, BackendUnavailable, ConfigError, LMCacheSDKError
from lmcache_sdk.keys import DIGEST_BYTES, Chain
from lmcache_sdk.observe.logs import logger
from lmcache_sdk.pool.processes import identity, may_live
from lmcache_sdk.pool.shared import SharedPool
from lmcache_sdk.spec import Namespace
from lmcache_sdk.store import OpenSpace, Store

_log = logger("daemon")

_RECEIVE_BYTES = 1 << 18
_EXIT_GRACE_S = 0.25  # between a process's end and the reuse of its memory: a device may still be writing
_LOOK_S = 0.5  # between two looks at what nobody tells
_HELLO_S = 5.0  # for a connection to say who it is
_READ_S = 10.0  # for a client to read a reply
_SO_PEERPIDFD = 77  # Linux 6.5: works across pid namespaces, too
_DEFAULT_CLIENT_SHARE = 0.5
_CONNECTIONS_PER_PROCESS = 512
_SPARE_DESCRIPTORS = 256  # for tiers, the pool, and one for each client's process
_MOST_REQUESTS = 16_384  # of a client at a time; then the oldest is forgotten
_MOST_PINS = 1024
_MOST_LAYERS = _MOST_HEADS = 4096


@dataclass(frozen=True)
class Held:
    """Chunks that a client may touch. ``number`` is the store's; ``places``: where they are, ``[chunk, cell, 2]``."""

    number: int
    chunk_bytes: int
    cells: int
    places: bytes

    @property
    def nbytes(self) -> int:
        return len(self.places) // (self.cells * 16) * self.chunk_bytes

    def chunks(self) -> Iterator[bytes]:
        width = self.cells * 16
        return (self.places[at : at + width] for at in range(0, len(self.places), width))


@dataclass(frozen=True)
class Lease(Held):
    """``parts``: which client has which, of those that have not been given back."""

    parts: dict[int, Client]


@dataclass(eq=False)
class Client:
    """A process that reads or writes the pool, over one or more connections.

    Attributes:
        known: its process, see :func:`lmcache_sdk.pool.processes.identity`.
        leases, rooms: by the numbers that clients know, which cannot be guessed.
        requests: rids, oldest first.
        pins: (until, bytes).
        turn: of the last Hello that made or revived it.
    """

    id: bytes
    pid: int
    known: int
    opened: OpenSpace | None
    pidfd: int = -1
    connections: set[Connection] = field(default_factory=set)
    leases: dict[int, Lease] = field(default_factory=dict)
    rooms: dict[int, Held] = field(default_factory=dict)
    requests: dict[str, None] = field(default_factory=dict)
    pins: list[tuple[float, int]] = field(default_factory=list)
    turn: int = 0

    @property
    def held_bytes(self) -> int:
        """By leases and reservations; what is leased twice counts twice."""
        return sum(held.nbytes for held in (*self.leases.values(), *self.rooms.values()))

    def room_for(self, nbytes: int, limit: int) -> int:
        """How many more bytes it may hold within a limit; looked at closely only if ``nbytes`` might be too many."""
        left = limit - self.held_bytes
        if left >= nbytes or self.opened is None:
            return left
        # A prefix that many requests share is leased many times, and held once.
        chunks = {chunk for held in (*self.leases.values(), *self.rooms.values()) for chunk in held.chunks()}
        return limit - len(chunks) * self.opened.space.chunk_bytes


@dataclass(eq=False)
class Connection:
    """One socket.

    Attributes:
        waiting: a reply is owed.
        due: when it is closed, if by then it has not said hello, or read its reply.
    """

    socket: socket.socket
    pid: int
    due: float
    frames: p.FrameReader = field(default_factory=p.FrameReader)
    out: bytearray = field(default_factory=bytearray)
    client: Client | None = None
    waiting: bool = False

    @property
    def closed(self) -> bool:
        return self.socket.fileno() < 0


@dataclass(eq=False)
class Later:
    """A reply that is owed. ``ready`` gives it, or None while there is none yet; ``late`` gives it at the deadline."""

    connection: Connection
    deadline: float
    ready: Callable[[], p.Message | None]
    late: Callable[[], p.Message]


@dataclass(frozen=True)
class Settings:
    """What the server itself needs to know.

    Attributes:
        socket: path of the unix socket.
        group: None = only this user; else members of this group too (a numeric id).
        require_salt: refuse requests without a cache salt.
        client_share: how much of the pool one client may hold by leases and reservations.
    """

    socket: Path
    group: int | None = None
    require_salt: bool = False
    client_share: float = _DEFAULT_CLIENT_SHARE


class Server:
    """See the module's docstring.

    Args:
        store: over a :class:`SharedPool`.
        pool: whose segments clients map.

    Raises:
        BackendLocked: another daemon answers on the socket.
        BackendUnavailable: the socket cannot be made.
        ConfigError: the socket's folder is missing, its path is too long or something else, or the pool has too many
            segments.
    """

    def __init__(self, store: Store, pool: SharedPool, settings: Settings) -> None:
        if len(pool.sizes) > p.MOST_SEGMENTS:
            raise ConfigError(f"a pool of {len(pool.sizes)} segments cannot be passed on; {p.MOST_SEGMENTS} can")
        self.store = store
        self._pool = pool
        self._settings = settings
        self._selector = selectors.DefaultSelector()
        self._clients: dict[bytes, Client] = {}
        self._leases: dict[int, Lease] = {}
        self._connections: set[Connection] = set()
        self._of_process: Counter[int] = Counter()
        self._most_connections = max(64, resource.getrlimit(resource.RLIMIT_NOFILE)[0] - _SPARE_DESCRIPTORS)
        self._later: list[Later] = []
        self._gone: list[tuple[float, Client]] = []
        self._earlier = {client.client_id: client for client in pool.journal.earlier_clients}
        self._dead: set[bytes] = set()
        self._look = time.monotonic() + _LOOK_S
        self._full_until = 0.0
        self._stopping = False
        self._thread = threading.get_ident()
        self._limit = int(sum(pool.sizes) * settings.client_share)
        self._changed = False
        self._wake_read, self._wake_write = socket.socketpair()
        for end in (self._wake_read, self._wake_write):
            end.setblocking(False)
        self._socket, self._inode = _listen(settings)
        self._missed = False
        self._selector.register(self._wake_read, selectors.EVENT_READ, self._woken)
        self._selector.register(self._socket, selectors.EVENT_READ, self._accept)
        store.on_change = self._change
        if not self._earlier:
            store.end_earlier_life()

    @property
    def client_count(self) -> int:
        """Clients with a namespace."""
        return sum(client.opened is not None for client in self._clients.values())

    def serve(self) -> None:
        """Serve until :meth:`stop`."""
        self._thread = threading.get_ident()
        while not self._stopping:
            for key, events in self._selector.select(self._pause()):
                key.data(key.fileobj, events)
            self._settle()

    def stop(self) -> None:
        """End :meth:`serve`; callable from a signal handler or another thread."""
        self._stopping = True
        self._wake()

    def close(self) -> None:
        """Close all sockets. Clients see that the daemon is gone; what they hold stays theirs in the journal."""
        self.store.on_change = lambda: None
        for connection in list(self._connections):
            self._close(connection)
        for client in list(self._clients.values()):
            self._unwatch(client)
        self._socket.close()
        if _inode(self._settings.socket) == self._inode:  # it may be another daemon's by now
            with contextlib.suppress(OSError):
                self._settings.socket.unlink()
        self._selector.close()
        self._wake_read.close()
        self._wake_write.close()

    # The loop

    def _pause(self) -> float:
        """Seconds until something is due."""
        if self._changed and self._later:
            return 0.0
        due = [self._look, *(later.deadline for later in self._later), *(when for when, _ in self._gone)]
        return max(0.0, min(due) - time.monotonic())

    def _change(self) -> None:
        """Something in the store has: owed replies may be ready."""
        self._changed = True
        if threading.get_ident() != self._thread:
            self._wake()

    def _wake(self) -> None:
        with contextlib.suppress(OSError):  # it is full: the loop is going to wake anyway
            self._wake_write.send(b"\0")

    def _woken(self, _: object, __: int) -> None:
        with contextlib.suppress(BlockingIOError):
            self._wake_read.recv(4096)

    def _settle(self) -> None:
        """Give the replies that can be given, and take back what belonged to the dead."""
        now = time.monotonic()
        changed = self._changed
        if changed:  # and not otherwise: another thread may set it now
            self._changed = False
        if self._later and (changed or min(later.deadline for later in self._later) <= now):
            owed, self._later = self._later, []
            for later in owed:
                if not later.connection.closed and not self._pay(later, now):
                    self._later.append(later)
        for when, client in list(self._gone):
            if when <= now:
                self._gone.remove((when, client))
                self._forget_client(client)
        if self._look <= now:
            self._look = now + _LOOK_S
            self._look_around(now)

    def _pay(self, later: Later, now: float) -> bool:
        """Give an owed reply, if it is ready or due."""
        connection = later.connection
        try:
            reply = later.late() if later.deadline <= now else later.ready()
            if reply is not None:
                connection.waiting = False
                self._send(connection, reply)
            return reply is not None
        except Exception as error:  # noqa: BLE001 - as in _ready
            self._fail(connection, error)
            return True

    def _look_around(self, now: float) -> None:
        """What nobody tells: processes of an earlier life that have ended, connections that hang, a lost socket."""
        for connection in list(self._connections):
            if connection.due <= now:
                _log.warning("process %d does not say hello or read its reply: cut off", connection.pid)
                self._close(connection)
        for client in list(self._clients.values()):
            if client.opened is not None and client.pidfd < 0 and not may_live(client.pid, client.known):
                self._exited(client)
        self._check_earlier()
        if self._full_until and self._full_until <= now:
            self._full_until = 0.0
            self._selector.register(self._socket, selectors.EVENT_READ, self._accept)
        if _inode(self._settings.socket) != self._inode and not self._missed:
            self._missed = True
            _log.error("%s is no longer this daemon's socket: no client finds it; restart it", self._settings.socket)

    # Connections

    def _accept(self, _: object, __: int) -> None:
        try:
            accepted, _address = self._socket.accept()
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                # It would be reported again and again: look away for a while.
                _log.warning("cannot accept a connection: %s", error)
                self._selector.unregister(self._socket)
                self._full_until = time.monotonic() + _LOOK_S
            return
        accepted.setblocking(False)
        try:
            pid = self._admit(accepted)
        except OSError as error:
            _log.warning("refused a connection: %s", error)
            accepted.close()
            return
        connection = Connection(accepted, pid, time.monotonic() + _HELLO_S)
        self._connections.add(connection)
        self._of_process[pid] += 1
        self._selector.register(accepted, selectors.EVENT_READ, lambda _, events: self._ready(connection, events))

    def _admit(self, accepted: socket.socket) -> int:
        """The process number of a peer that may be here; raises OSError."""
        pid, uid, gid = p.peer_of(accepted)
        if uid not in (0, os.geteuid()) and self._settings.group not in {gid, *p.peer_groups(accepted)}:
            raise PermissionError(f"user {uid} is not this daemon's, nor of its group")
        if len(self._connections) >= self._most_connections:
            raise OSError(f"there are {len(self._connections)} already")
        if pid and self._of_process[pid] >= _CONNECTIONS_PER_PROCESS:
            raise OSError(f"process {pid} has {self._of_process[pid]} already")
        return pid

    def _ready(self, connection: Connection, events: int) -> None:
        """Carry out a request. A client that sends nonsense is cut off, nothing else happens."""
        try:
            if events & selectors.EVENT_WRITE:
                self._flush(connection)
            if not events & selectors.EVENT_READ or connection.closed:
                return
            try:
                data = connection.socket.recv(_RECEIVE_BYTES)
            except BlockingIOError:
                return
            except OSError:
                data = b""
            if not data:
                self._close(connection)
                return
            if connection.waiting or connection.out:
                raise p.ProtocolError("a request was sent before the reply to the last one was read")
            connection.frames.add(data)
            body = connection.frames.next()
            if body is not None:
                reply = self._answer(connection, body)
                if reply is not None:
                    self._send(connection, reply)
        except Exception as error:  # noqa: BLE001 - whatever one client does, the others are served
            self._fail(connection, error)

    def _fail(self, connection: Connection, error: Exception) -> None:
        """Cut a connection off, and say why."""
        if isinstance(error, p.ProtocolError):
            _log.warning("a connection of process %d is closed: %s", connection.pid, error)
            refusal = p.Refused("message", str(error)[:1000])
        else:
            _log.exception("a request of process %d failed", connection.pid, exc_info=error)
            refusal = p.Refused("internal", type(error).__name__)
        with contextlib.suppress(OSError):
            if not connection.out and not connection.closed:
                connection.socket.send(p.encode(refusal))
        self._close(connection)

    def _send(self, connection: Connection, message: p.Message, descriptors: list[int] | None = None) -> None:
        if connection.closed:
            return
        data = p.encode(message)
        if descriptors:  # with the first bytes on this connection: there is nothing before them
            try:
                data = data[socket.send_fds(connection.socket, [data], descriptors) :]
            except OSError as error:
                _log.warning("cannot pass the pool to process %d: %s", connection.pid, error)
                self._close(connection)
                return
        connection.out += data
        self._flush(connection)

    def _flush(self, connection: Connection) -> None:
        try:
            while connection.out:
                del connection.out[: connection.socket.send(connection.out)]
        except BlockingIOError:
            pass
        except OSError:
            self._close(connection)
            return
        events = selectors.EVENT_READ
        if connection.out:
            events |= selectors.EVENT_WRITE
            connection.due = min(connection.due, time.monotonic() + _READ_S)
        elif connection.client is not None:
            connection.due = math.inf
        key = self._selector.get_key(connection.socket)
        if key.events != events:
            self._selector.modify(connection.socket, events, key.data)

    def _close(self, connection: Connection) -> None:
        if connection.closed:
            return
        self._selector.unregister(connection.socket)
        connection.socket.close()
        self._connections.discard(connection)
        self._of_process[connection.pid] -= 1
        if not self._of_process[connection.pid]:
            del self._of_process[connection.pid]
        client, connection.client = connection.client, None
        if client is None:
            return
        client.connections.discard(connection)
        if not client.connections and not (client.leases or client.rooms):
            self._forget_client(client)  # should it come back, there is nothing that it would miss
        # Else what it holds stays held: a closed socket proves nothing.

    # Clients

    def _hello(self, connection: Connection, hello: p.Hello) -> p.Message | None:
        client = self._clients.get(hello.client) if hello.client else None
        if hello.namespace is None or hello.producer is None:
            if hello.client and client is None:
                return p.Refused("client", "this client is not known (any more)")
            if client is None:
                client = Client(secrets.token_bytes(16), connection.pid, 0, None)
                self._clients[client.id] = client
            self._join(connection, client)
            return None
        if client is not None:
            if hello.turn <= client.turn:
                return p.Refused("client", "this client has come back already")
            self._revive(client, hello)
            self._join(connection, client)
            return None
        try:
            _check_size(hello.namespace)
            opened = self.store.open_space(hello.namespace, hello.producer)
        except LMCacheSDKError as error:
            return p.Refused("settings", str(error))
        client = Client(secrets.token_bytes(16), connection.pid, identity(connection.pid), opened, turn=hello.turn)
        # Written down before it is told where the memory is: the next life must know of it.
        if not self._pool.journal.client_joined(client.id, client.pid, client.known):
            return p.Refused("limit", "there are too many clients")
        self._clients[client.id] = client
        client.pidfd = _pidfd_of(connection.socket, client.pid)
        if client.pidfd >= 0:
            self._selector.register(client.pidfd, selectors.EVENT_READ, lambda _, __: self._exited(client))
        self._join(connection, client, self._pool.descriptors())
        return None

    def _join(self, connection: Connection, client: Client, descriptors: list[int] | None = None) -> None:
        connection.client = client
        client.connections.add(connection)
        welcome = p.Welcome(p.PROTOCOL_VERSION, self.store.boot, client.id, tuple(self._pool.sizes))
        self._send(connection, welcome, descriptors)

    def _revive(self, client: Client, hello: p.Hello) -> None:
        """A client that had given this daemon up is back. What it has not heard of was in vain."""
        client.turn = hello.turn
        for connection in list(client.connections):
            connection.client = None  # or the last one would take the client with it
            client.connections.discard(connection)
            self._close(connection)
        held = set(hello.held)
        for number, lease in list(client.leases.items()):
            for part in [part for part, owner in lease.parts.items() if owner is client]:
                if (number, part) not in held:
                    self._release(client, number, part)
        for number in [number for number in client.rooms if (number, 0) not in held]:
            self.store.abort_lease(client.rooms.pop(number).number)

    def _exited(self, client: Client) -> None:
        """Its process has ended, which alone frees what it holds."""
        self._unwatch(client)
        if self._clients.get(client.id) is not client or any(client is gone for _, gone in self._gone):
            return
        self._gone.append((time.monotonic() + _EXIT_GRACE_S, client))
        for connection in list(client.connections):
            self._close(connection)

    def _unwatch(self, client: Client) -> None:
        if client.pidfd >= 0:
            self._selector.unregister(client.pidfd)
            os.close(client.pidfd)
            client.pidfd = -1

    def _forget_client(self, client: Client) -> None:
        """Take back all that a client held: it has said that it is done, or is gone."""
        if self._clients.pop(client.id, None) is None:
            return
        self._unwatch(client)
        for number, lease in list(client.leases.items()):
            for part in [part for part, owner in lease.parts.items() if owner is client]:
                self._release(client, number, part)
        for room in client.rooms.values():
            self.store.abort_lease(room.number)
        for rid in client.requests:
            self.store.forget(rid)
        if client.opened is not None:
            self._pool.journal.client_left(client.id)

    def _check_earlier(self) -> None:
        """The pool is wholly ours again when no client of an earlier life is left."""
        if not self._earlier:
            return
        dead = {number for number, earlier in self._earlier.items() if not may_live(earlier.pid, earlier.started)}
        for number in dead & self._dead:  # for the second time: the grace is over
            self._earlier_left(number)
        self._dead = dead

    def _earlier_left(self, number: bytes) -> None:
        if self._earlier.pop(number, None) is not None:
            self._pool.journal.client_left(number)
            if not self._earlier:
                self.store.end_earlier_life()

    # Requests

    def _answer(self, connection: Connection, body: bytes) -> p.Message | None:
        """The reply, or None if it is owed or has been sent."""
        client = connection.client
        if client is None:
            version = p.version_of(body)
            if version is not None and version != p.PROTOCOL_VERSION:
                return p.Refused("version", p.skew(p.PROTOCOL_VERSION, version))
        request = p.decode_request(body)
        if client is None:
            if not isinstance(request, p.Hello):
                raise p.ProtocolError("the first message must be a hello")
            return self._hello(connection, request)
        match request:
            case p.Hello():
                raise p.ProtocolError("a second hello")
            case p.Ask():
                return p.Figures(self.store.boot, self.store.stats(), self._details())
            case p.Subscribe():
                return self._subscribe(connection, request)
            case p.Drained():
                earlier = self._earlier.get(request.client)
                if earlier is not None and earlier.pid == client.pid:
                    self._earlier_left(request.client)
                return p.Count()
            case p.Bye():
                self._send(connection, p.Count())
                self._forget_client(client)
                for other in list(client.connections):
                    self._close(other)
                return None
            case p.Drain():
                return self._owe(
                    connection,
                    request.timeout_s,
                    lambda: p.Count(1) if self.store.drained() else None,
                    lambda: p.Count(int(self.store.drained())),
                )
        if client.opened is None:
            return p.Refused("settings", "this connection named no namespace")
        return self._carry_out(connection, client, client.opened, request)

    def _carry_out(
        self, connection: Connection, client: Client, opened: OpenSpace, request: p.Request
    ) -> p.Message | None:
        store = self.store
        match request:
            case p.Lookup():
                return self._lookup(client, opened, request)
            case p.Wait():
                rid = self._rid(client, request.rid)

                def ready() -> p.Message | None:
                    found = self._found(rid)
                    return None if found.state == LookupState.PENDING else found

                def late() -> p.Message:
                    if request.settle:
                        store.hurry(rid)
                    return self._found(rid)

                return self._owe(connection, request.timeout_s, ready, late)
            case p.Claim():
                return self._claim(client, opened, request)
            case p.Take():
                return p.Count(int(self._take(client, request)))
            case p.Release():
                self._release(client, request.lease, request.part)
                return p.Count()
            case p.Forget():
                rid = self._rid(client, request.rid)
                client.requests.pop(rid, None)
                store.forget(rid)
                return p.Count()
            case p.Reserve():
                return self._reserve(client, opened, request)
            case p.Publish():
                room = client.rooms.pop(request.lease, None)
                if room is not None:
                    store.publish_lease(room.number, request.chunks)
                return p.Count()
            case p.Pin():
                return p.Count(self._pin(client, opened, request))
            case p.Delete():
                return p.Count(store.delete(opened, p.cut_digests(request.digests)))
            case p.Clear():
                return p.Count(store.clear_some(opened))
        raise p.ProtocolError(f"{type(request).__name__} is no request for here")

    def _lookup(self, client: Client, opened: OpenSpace, request: p.Lookup) -> p.Message:
        if self._settings.require_salt and not request.salted:
            return p.Found(LookupState.MISS, 0, 0, "a cache salt is required", {})
        rid = self._rid(client, request.rid)
        digests = p.cut_digests(request.digests)
        if request.start:
            known = self.store.digests_of(rid)
            if len(known) != request.start:
                return p.Found(LookupState.MISS, 0, p.AGAIN, "send all digests again", {})
            digests = known + digests
        chain = Chain.from_digests(
            digests, opened.spec.chunk_tokens, tenant=request.tenant, positions_known=request.positions_known
        )
        client.requests.pop(rid, None)
        client.requests[rid] = None
        if len(client.requests) > _MOST_REQUESTS:
            oldest = next(iter(client.requests))
            del client.requests[oldest]
            self.store.forget(oldest)
        self.store.lookup(opened, rid, chain, prefetch=request.prefetch, total=request.total)
        return self._found(rid)

    def _found(self, rid: str) -> p.Found:
        found, walked = self.store.found(rid)
        sources = dict(found.sources)
        return p.Found(found.state, found.chunks, walked, found.why, sources, found.found, found.missing, found.eta_s)

    def _claim(self, client: Client, opened: OpenSpace, request: p.Claim) -> p.Message:
        ticket = self.store.claim(self._rid(client, request.rid), request.boundary, request.first, request.parts)
        if ticket is None:
            return p.Claimed(None)
        parts = dict.fromkeys(range(request.parts), client)
        lease = Lease(ticket.lease, opened.space.chunk_bytes, len(ticket.cells), ticket.extents, parts)
        number = self._number()
        self._leases[number] = client.leases[number] = lease
        if client.room_for(0, self._limit) < 0:
            _log.warning("process %d holds %d bytes: no lease for it", client.pid, client.held_bytes)
            for part in list(parts):
                self._release(client, number, part)
            return p.Claimed(None)
        return p.Claimed(msgspec.structs.replace(ticket, lease=number))

    def _take(self, client: Client, request: p.Take) -> bool:
        number, lease = request.lease, self._leases.get(request.lease)
        owner = lease.parts.get(request.part) if lease is not None else None
        if lease is None or owner is None or owner.opened is not client.opened:
            return False
        lease.parts[request.part] = client
        client.leases[number] = lease
        if owner not in lease.parts.values():
            del owner.leases[number]
        return True

    def _release(self, client: Client, number: int, part: int) -> None:
        lease = client.leases.get(number)
        if lease is None or lease.parts.get(part) is not client:
            return
        del lease.parts[part]
        self.store.release_part(lease.number, part)
        if client not in lease.parts.values():
            del client.leases[number]
        if not lease.parts:
            del self._leases[number]

    def _reserve(self, client: Client, opened: OpenSpace, request: p.Reserve) -> p.Message:
        if self._settings.require_salt and not request.salted:
            return p.Reserved(None)
        cells = range(len(opened.payload_bytes))
        if not request.cells or not set(request.cells) <= set(cells) or len(set(request.cells)) != len(request.cells):
            raise p.ProtocolError(f"cells {request.cells[:8]} … are not within 0 .. {len(cells) - 1}, each once")
        digests = p.cut_digests(request.digests)
        if len(request.parent) not in (0, DIGEST_BYTES) or request.parent in digests:
            raise p.ProtocolError("the parent is no digest of a chunk before")
        chunk_bytes = opened.space.chunk_bytes
        most = client.room_for(len(digests) * chunk_bytes, self._limit) // chunk_bytes
        if most < len(digests):
            _log.warning("process %d holds %d bytes: room for %d chunks only", client.pid, client.held_bytes, most)
        reservation = self.store.reserve(
            opened,
            digests[: max(0, most)],
            request.first,
            request.cells,
            parent=request.parent or None,
            tenant=request.tenant,
            positions_known=request.positions_known,
        )
        if reservation is None:
            return p.Reserved(None)
        number = self._number()
        client.rooms[number] = Held(reservation.lease, chunk_bytes, len(request.cells), reservation.extents)
        return p.Reserved(msgspec.structs.replace(reservation, lease=number))

    def _pin(self, client: Client, opened: OpenSpace, request: p.Pin) -> int:
        now = time.monotonic()
        client.pins = [pin for pin in client.pins if pin[0] > now]
        digests = p.cut_digests(request.digests)
        pinned = sum(nbytes for _, nbytes in client.pins)
        nbytes = len(digests) * opened.space.chunk_bytes
        if len(client.pins) >= _MOST_PINS or pinned + nbytes > self._limit:
            _log.warning("process %d has pinned %d bytes: no more for it", client.pid, pinned)
            return 0
        count = self.store.pin(opened, digests, request.ttl_s)
        if count:
            client.pins.append((now + request.ttl_s, count * opened.space.chunk_bytes))
        return count

    def _subscribe(self, connection: Connection, request: p.Subscribe) -> p.Message | None:
        boot, log = self.store.boot, self.store.events
        sequence = request.sequence if request.boot == boot else -1

        def ready() -> p.Message | None:
            events, lost = log.after(sequence, request.limit)
            return p.Events(boot, events, lost) if events or lost else None

        return self._owe(connection, request.timeout_s, ready, lambda: ready() or p.Events(boot, (), False))

    def _owe(
        self,
        connection: Connection,
        timeout_s: float,
        ready: Callable[[], p.Message | None],
        late: Callable[[], p.Message],
    ) -> p.Message | None:
        reply = ready()
        if reply is None and timeout_s <= 0:
            return late()
        if reply is None:
            self._later.append(Later(connection, time.monotonic() + timeout_s, ready, late))
            connection.waiting = True
        return reply

    def _number(self) -> int:
        """Of a lease or reservation, as clients know it: who has it has been given it."""
        return secrets.randbits(63)

    def _rid(self, client: Client, rid: str) -> str:
        """Requests of different clients never meet."""
        return f"{client.id.hex()}/{rid}"

    def _details(self) -> dict[str, msgspec.Raw]:
        clients = [
            {
                "pid": client.pid,
                "engine": client.opened.producer.name,
                "model": client.opened.namespace.label,
                "held_bytes": client.held_bytes,
                "connected": bool(client.connections),
            }
            for client in self._clients.values()
            if client.opened is not None
        ]
        details = {
            "pid": os.getpid(),
            "events": {"boot": self.store.boot, "sequence": self.store.events.last},
            "clients": clients,
            "earlier_clients": len(self._earlier),
            "namespaces": self.store.describe_spaces(),
            "tenants": self.store.tenant_bytes(),
            "segments": [{"bytes": info.nbytes, "node": info.node} for info in self._pool.describe()],
        }
        return {name: msgspec.Raw(msgspec.msgpack.encode(value)) for name, value in details.items()}


def _listen(settings: Settings) -> tuple[socket.socket, tuple[int, int]]:
    """The listening socket, and what its file is. Whoever finds the file can connect, and nobody who may not."""
    path = settings.socket
    place = path.with_name(f".{os.getpid()}")
    if max(len(os.fsencode(path)), len(os.fsencode(place))) > 107:
        raise ConfigError(f"the socket path {path} has over 107 bytes; choose a shorter one")
    if not path.parent.is_dir():
        raise ConfigError(f"{path.parent} does not exist; create it, or choose another socket")
    _check_free(path)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        os.fchmod(listener.fileno(), 0o600)  # of the file that bind makes
        place.unlink(missing_ok=True)
        listener.bind(str(place))
        if settings.group is not None:
            os.chown(place, -1, settings.group)
            place.chmod(0o660)
        listener.listen(1024)
        found = _inode(place)
        assert found is not None
        place.rename(path)
    except OSError as error:
        listener.close()
        with contextlib.suppress(OSError):
            place.unlink()
        raise BackendUnavailable(f"cannot create the socket {path}: {error.strerror}") from error
    return listener, found


def _check_free(path: Path) -> None:
    """Raises BackendLocked if somebody answers there, ConfigError if it is no socket."""
    if not path.exists():
        return
    if not path.is_socket():
        raise ConfigError(f"{path} exists and is no socket; choose another path")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(str(path))
        except (ConnectionRefusedError, FileNotFoundError):
            return  # a daemon that was killed has left it
        except OSError as error:
            why = error.strerror or "it does not accept connections"
            raise BackendLocked(f"{path} is in use ({why}); stop that daemon, or choose another socket") from error
    raise BackendLocked(f"another daemon answers on {path}; stop it, or choose another socket")


def _inode(path: Path) -> tuple[int, int] | None:
    try:
        status = path.lstat()
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _pidfd_of(connection: socket.socket, pid: int) -> int:
    """A descriptor that becomes readable when the peer's process ends; -1 if the kernel cannot give one."""
    with contextlib.suppress(OSError):
        return connection.getsockopt(socket.SOL_SOCKET, _SO_PEERPIDFD)
    if pid > 0:
        with contextlib.suppress(OSError):
            return os.pidfd_open(pid)
    return -1


def _check_size(namespace: Namespace) -> None:
    """Before its cells are listed. Raises ConfigError."""
    for group in namespace.spec.groups:
        if len(group.layers) > _MOST_LAYERS or group.heads > _MOST_HEADS:
            raise ConfigError(
                f"group {group.name!r} has {len(group.layers)} layers and {group.heads} heads; "
                f"up to {_MOST_LAYERS} and {_MOST_HEADS} are served"
            )
