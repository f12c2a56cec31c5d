"""The daemon: sockets over a Store.

One thread serves all sockets and never waits for a tier, a client or a disk: what takes time answers later. Nothing
that a client sends can do more than close its own connection. Memory that a client may still touch comes back only when
the client says so, or when its process is proven gone.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import selectors
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from lmcache_sdk.api import LookupState
from lmcache_sdk.daemon import protocol as p
from lmcache_sdk.errors import BackendLocked, BackendUnavailable, ConfigError, LMCacheSDKError
from lmcache_sdk.keys import Chain
from lmcache_sdk.observe.logs import logger
from lmcache_sdk.pool.processes import process_alive, start_time
from lmcache_sdk.pool.shared import SharedPool
from lmcache_sdk.store import OpenSpace, Store

_log = logger("daemon")

_RECEIVE_BYTES = 1 << 18
_SEND_LIMIT = 64 << 20  # replies that a client does not read; then it is cut off
_EXIT_GRACE_S = 0.25  # between a process's end and the reuse of its memory: a device may still be writing
_LONGEST_WAIT_S = 600.0
_SO_PEERPIDFD = 77  # Linux 6.5: works across pid namespaces, too
_DEFAULT_CLIENT_SHARE = 0.5


@dataclass(eq=False)
class Client:
    """A process that reads or writes the pool, over one or more connections."""

    id: bytes
    pid: int
    opened: OpenSpace | None
    pidfd: int = -1
    connections: set[Connection] = field(default_factory=set)
    leases: dict[int, int] = field(default_factory=dict)  # number -> bytes
    reservations: dict[int, int] = field(default_factory=dict)
    requests: set[str] = field(default_factory=set)
    said_bye: bool = False

    @property
    def held_bytes(self) -> int:
        return sum(self.leases.values()) + sum(self.reservations.values())


@dataclass(eq=False)
class Connection:
    """One socket."""

    socket: socket.socket
    frames: p.FrameReader = field(default_factory=p.FrameReader)
    out: bytearray = field(default_factory=bytearray)
    client: Client | None = None
    waiting: bool = False  # a reply is owed: further requests wait


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
        ConfigError: the socket's folder is missing, or its path is too long.
    """

    def __init__(self, store: Store, pool: SharedPool, settings: Settings) -> None:
        self.store = store
        self._pool = pool
        self._settings = settings
        self._selector = selectors.DefaultSelector()
        self._clients: dict[bytes, Client] = {}
        self._later: list[Later] = []
        self._gone: list[tuple[float, Client]] = []
        self._earlier = {client.client_id: client for client in pool.journal.earlier_clients}
        self._stopping = False
        self._limit = int(sum(pool.sizes) * settings.client_share)
        self._wake_read, self._wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._selector.register(self._wake_read, selectors.EVENT_READ, self._woken)
        self._socket = self._listen(settings)
        self._selector.register(self._socket, selectors.EVENT_READ, self._accept)
        store.on_change = self._wake
        self._check_earlier()

    def serve(self) -> None:
        """Serve until :meth:`stop`."""
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
        for client in list(self._clients.values()):
            for connection in list(client.connections):
                self._close(connection)
        with contextlib.suppress(OSError):
            self._settings.socket.unlink()
        self._selector.close()
        self._socket.close()
        os.close(self._wake_read)
        os.close(self._wake_write)

    # The loop

    def _listen(self, settings: Settings) -> socket.socket:
        path = settings.socket
        if len(os.fsencode(path)) > 107:
            raise ConfigError(f"the socket path {path} has over 107 bytes; choose a shorter one")
        if not path.parent.is_dir():
            raise ConfigError(f"{path.parent} does not exist; create it, or choose another socket")
        if path.is_socket():
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
                probe.settimeout(1.0)
                with contextlib.suppress(ConnectionRefusedError, FileNotFoundError):
                    probe.connect(str(path))
                    raise BackendLocked(f"another daemon answers on {path}; stop it, or choose another socket")
            path.unlink()
        elif path.exists():
            raise ConfigError(f"{path} exists and is no socket; choose another path")
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        mask = os.umask(0o177)
        try:
            listener.bind(str(path))
        except OSError as error:
            listener.close()
            raise BackendUnavailable(f"cannot create the socket {path}: {error.strerror}") from error
        finally:
            os.umask(mask)
        if settings.group is not None:
            os.chown(path, -1, settings.group)
            path.chmod(0o660)
        listener.listen(128)
        return listener

    def _pause(self) -> float | None:
        """Seconds until something is due."""
        now = time.monotonic()
        due = [later.deadline for later in self._later] + [when for when, _ in self._gone]
        if self._earlier:
            due.append(now + 1.0)
        return max(0.0, min(due) - now) if due else None

    def _wake(self) -> None:
        with contextlib.suppress(BlockingIOError, OSError):
            os.write(self._wake_write, b"\0")

    def _woken(self, _: object, __: int) -> None:
        with contextlib.suppress(BlockingIOError):
            os.read(self._wake_read, 4096)

    def _settle(self) -> None:
        """Give the replies that can be given, and take back what belonged to the dead."""
        now = time.monotonic()
        if self._later:
            owed, self._later = self._later, []
            for later in owed:
                if later.connection.client is None:
                    continue  # it has closed
                reply = later.late() if later.deadline <= now else later.ready()
                if reply is None:
                    self._later.append(later)
                    continue
                later.connection.waiting = False
                self._send(later.connection, reply)
                self._process(later.connection, b"")
        for when, client in list(self._gone):
            if when <= now:
                self._gone.remove((when, client))
                self._forget_client(client)
        self._check_earlier()

    # Connections

    def _accept(self, _: object, __: int) -> None:
        try:
            accepted, _address = self._socket.accept()
        except OSError as error:
            _log.warning("cannot accept a connection: %s", error)
            return
        accepted.setblocking(False)
        _pid, uid, gid = p.peer_of(accepted)
        group = self._settings.group
        if uid not in (0, os.getuid()) and (group is None or not _is_member(uid, gid, group)):
            _log.warning("refused a connection of user %d", uid)
            accepted.close()
            return
        connection = Connection(accepted)
        self._selector.register(accepted, selectors.EVENT_READ, lambda _, events: self._ready(connection, events))

    def _ready(self, connection: Connection, events: int) -> None:
        if events & selectors.EVENT_WRITE:
            self._flush(connection)
        if events & selectors.EVENT_READ and connection.socket.fileno() >= 0:
            try:
                data = connection.socket.recv(_RECEIVE_BYTES)
            except BlockingIOError:
                return
            except OSError:
                data = b""
            if not data:
                self._close(connection)
                return
            self._process(connection, data)

    def _process(self, connection: Connection, data: bytes) -> None:
        """Carry out the requests that are complete. A client that sends nonsense is cut off, nothing else happens."""
        try:
            connection.frames.add(data)
            while not connection.waiting and connection.socket.fileno() >= 0:
                body = connection.frames.next()
                if body is None:
                    return
                request = p.decode_request(body)
                if connection.client is None and not isinstance(request, p.Hello):
                    raise p.ProtocolError("the first message must be a hello")
                reply = self._answer(connection, request)
                if reply is not None:
                    self._send(connection, reply)
        except p.ProtocolError as error:
            _log.warning("a connection is closed: %s", error)
            self._send(connection, p.Refused("message", str(error)))
            self._close(connection)

    def _send(self, connection: Connection, message: p.Message, descriptors: list[int] | None = None) -> None:
        if connection.socket.fileno() < 0:
            return
        data = p.encode(message)
        if descriptors and not connection.out:
            try:
                sent = socket.send_fds(connection.socket, [data], descriptors)
            except OSError:
                self._close(connection)
                return
            data = data[sent:]
        connection.out += data
        self._flush(connection)

    def _flush(self, connection: Connection) -> None:
        try:
            while connection.out:
                sent = connection.socket.send(connection.out)
                del connection.out[:sent]
        except BlockingIOError:
            if len(connection.out) > _SEND_LIMIT:
                _log.warning("a client does not read its replies and is cut off")
                self._close(connection)
                return
        except OSError:
            self._close(connection)
            return
        events = selectors.EVENT_READ | (selectors.EVENT_WRITE if connection.out else 0)
        key = self._selector.get_key(connection.socket)
        if key.events != events:
            self._selector.modify(connection.socket, events, key.data)

    def _close(self, connection: Connection) -> None:
        if connection.socket.fileno() < 0:
            return
        with contextlib.suppress(KeyError, ValueError):
            self._selector.unregister(connection.socket)
        connection.socket.close()
        client, connection.client = connection.client, None
        if client is None:
            return
        client.connections.discard(connection)
        if client.connections or client.id not in self._clients:
            return
        if client.said_bye or client.opened is None:
            self._forget_client(client)
        elif client.pidfd < 0:
            # Nobody can tell whether the process lives. A closed socket proves nothing, so what it holds stays held.
            _log.warning("process %d left without a word; %d bytes stay held", client.pid, client.held_bytes)

    # Clients

    def _hello(self, connection: Connection, hello: p.Hello) -> p.Message | None:
        if connection.client is not None:
            raise p.ProtocolError("a second hello")
        if hello.version != p.PROTOCOL_VERSION:
            return p.Refused(
                "version",
                f"this daemon speaks protocol {p.PROTOCOL_VERSION}, the client {hello.version}; "
                "install the same release of lmcache-sdk on both sides",
            )
        if hello.client:
            client = self._clients.get(hello.client)
            if client is None:
                return p.Refused("client", "this client is not known (any more)")
            self._join(connection, client)
            return None
        opened = None
        if hello.namespace is not None and hello.producer is not None:
            try:
                opened = self.store.open_space(hello.namespace, hello.producer)
            except LMCacheSDKError as error:
                return p.Refused("settings", str(error))
        pid, _, _ = p.peer_of(connection.socket)
        client = Client(secrets.token_bytes(16), pid, opened)
        if opened is not None and not self._watch(client, connection.socket):
            return p.Refused("limit", "too many clients")
        self._clients[client.id] = client
        self._join(connection, client)
        return None

    def _join(self, connection: Connection, client: Client) -> None:
        connection.client = client
        client.connections.add(connection)
        welcome = p.Welcome(p.PROTOCOL_VERSION, self.store.boot, client.id, tuple(self._pool.sizes))
        self._send(connection, welcome, self._pool.descriptors() if client.opened is not None else None)

    def _watch(self, client: Client, connection: socket.socket) -> bool:
        """Learn of the process's end, which alone frees what it holds; and write it down for the next life."""
        client.pidfd = _pidfd_of(connection, client.pid)
        if client.pidfd >= 0:
            self._selector.register(client.pidfd, selectors.EVENT_READ, lambda _, __: self._exited(client))
        return self._pool.journal.client_joined(client.id, client.pid, start_time(client.pid) or 0)

    def _exited(self, client: Client) -> None:
        self._unwatch(client)
        for connection in list(client.connections):
            self._close(connection)
        self._gone.append((time.monotonic() + _EXIT_GRACE_S, client))

    def _unwatch(self, client: Client) -> None:
        if client.pidfd >= 0:
            with contextlib.suppress(KeyError, ValueError):
                self._selector.unregister(client.pidfd)
            os.close(client.pidfd)
            client.pidfd = -1

    def _forget_client(self, client: Client) -> None:
        """Take back all that a client held: it has said that it is done, or is gone."""
        if self._clients.pop(client.id, None) is None:
            return
        self._unwatch(client)
        for lease in client.leases:
            self.store.release_parts(lease)
        for reservation in client.reservations:
            self.store.abort_lease(reservation)
        for rid in client.requests:
            self.store.forget(rid)
        if client.opened is not None:
            self._pool.journal.client_left(client.id)

    def _check_earlier(self) -> None:
        """The pool is wholly ours again when no client of an earlier life is left."""
        for client_id, earlier in list(self._earlier.items()):
            if not process_alive(earlier.pid, earlier.started):
                self._earlier_left(client_id)
        if not self._earlier:
            self.store.end_earlier_life()

    def _earlier_left(self, client_id: bytes) -> None:
        self._earlier.pop(client_id, None)
        self._pool.journal.client_left(client_id)

    # Requests

    def _answer(self, connection: Connection, request: p.Request) -> p.Message | None:
        """The reply, or None if it is owed or has been sent."""
        client = connection.client
        if isinstance(request, p.Hello):
            return self._hello(connection, request)
        assert client is not None
        match request:
            case p.Ask():
                return p.Figures(self.store.boot, self.store.stats(), self._details())
            case p.Subscribe():
                return self._subscribe(connection, request)
            case p.Drained():
                self._earlier_left(request.client)
                self._check_earlier()
                return p.Count()
            case p.Bye():
                client.said_bye = True
                return p.Count()
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
                    store.hurry(rid)
                    return self._found(rid)

                return self._owe(connection, request.timeout_s, ready, late)
            case p.Claim():
                return self._claim(client, request)
            case p.Release():
                ticket_bytes = client.leases.get(request.lease)
                if ticket_bytes is not None and store.release_part(request.lease, request.part):
                    del client.leases[request.lease]
                return p.Count()
            case p.Forget():
                client.requests.discard(self._rid(client, request.rid))
                store.forget(self._rid(client, request.rid))
                return p.Count()
            case p.Reserve():
                return self._reserve(client, opened, request)
            case p.Publish():
                if client.reservations.pop(request.lease, None) is not None:
                    store.publish_lease(request.lease, request.chunks)
                return p.Count()
            case p.Pin():
                return p.Count(store.pin(opened, p.cut_digests(request.digests), request.ttl_s))
            case p.Delete():
                return p.Count(store.delete(opened, p.cut_digests(request.digests)))
            case p.Clear():
                return p.Count(store.clear(opened))
        raise p.ProtocolError(f"{type(request).__name__} is no request for here")

    def _lookup(self, client: Client, opened: OpenSpace, request: p.Lookup) -> p.Message:
        if self._settings.require_salt and not request.salted:
            return p.Found(LookupState.MISS, 0, 0, "a cache salt is required", {})
        rid = self._rid(client, request.rid)
        digests = p.cut_digests(request.digests)
        if request.start:
            known = self.store.digests_of(rid)
            if len(known) != request.start:
                return p.Found(LookupState.MISS, 0, 0, "send all digests again", {})
            digests = known + digests
        chain = Chain.from_digests(
            digests, opened.spec.chunk_tokens, tenant=request.tenant, positions_known=request.positions_known
        )
        client.requests.add(rid)
        self.store.lookup(opened, rid, chain, prefetch=request.prefetch)
        return self._found(rid)

    def _found(self, rid: str) -> p.Found:
        found, walked = self.store.found(rid)
        return p.Found(found.state, found.chunks, walked, found.why, dict(found.sources))

    def _claim(self, client: Client, request: p.Claim) -> p.Message:
        if client.held_bytes > self._limit:
            _log.warning("process %d holds %d bytes by leases: no more for it", client.pid, client.held_bytes)
            return p.Claimed(None)
        ticket = self.store.claim(self._rid(client, request.rid), request.boundary, request.first, request.parts)
        if ticket is not None:
            assert client.opened is not None
            client.leases[ticket.lease] = (request.boundary - request.first) * client.opened.space.chunk_bytes
        return p.Claimed(ticket)

    def _reserve(self, client: Client, opened: OpenSpace, request: p.Reserve) -> p.Message:
        if self._settings.require_salt and not request.salted:
            return p.Reserved(None)
        if client.held_bytes > self._limit or request.first < 0:
            return p.Reserved(None)
        cells = range(len(opened.payload_bytes))
        if not request.cells or not set(request.cells) <= set(cells):
            raise p.ProtocolError(f"cells {request.cells} are not within 0 .. {len(cells) - 1}")
        parent = p.cut_digests(request.parent)
        reservation = self.store.reserve(
            opened,
            p.cut_digests(request.digests),
            request.first,
            request.cells,
            parent=parent[0] if parent else None,
            tenant=request.tenant,
            positions_known=request.positions_known,
        )
        if reservation is not None:
            client.reservations[reservation.lease] = len(reservation.chunks) * opened.space.chunk_bytes
        return p.Reserved(reservation)

    def _subscribe(self, connection: Connection, request: p.Subscribe) -> p.Message | None:
        boot, log = self.store.boot, self.store.events
        sequence = request.sequence if request.boot == boot else -1

        def ready() -> p.Message | None:
            events, lost = log.after(sequence, min(max(request.limit, 1), 10_000))
            return p.Events(boot, events, lost) if events or lost else None

        return ready() or self._owe(connection, request.timeout_s, ready, lambda: ready() or p.Events(boot, (), False))

    def _owe(
        self,
        connection: Connection,
        timeout_s: float,
        ready: Callable[[], p.Message | None],
        late: Callable[[], p.Message],
    ) -> p.Message | None:
        reply = ready()
        if reply is None:
            seconds = min(max(timeout_s, 0.0), _LONGEST_WAIT_S)
            self._later.append(Later(connection, time.monotonic() + seconds, ready, late))
            connection.waiting = True
        return reply

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
            }
            for client in self._clients.values()
            if client.opened is not None
        ]
        details = {
            "clients": clients,
            "earlier_clients": len(self._earlier),
            "namespaces": self.store.describe_spaces(),
            "tenants": self.store.tenant_bytes(),
            "segments": [{"bytes": info.nbytes, "node": info.node} for info in self._pool.describe()],
        }
        return {name: msgspec.Raw(msgspec.msgpack.encode(value)) for name, value in details.items()}


def _pidfd_of(connection: socket.socket, pid: int) -> int:
    """A descriptor that becomes readable when the peer's process ends; -1 if the kernel cannot give one."""
    with contextlib.suppress(OSError):
        return connection.getsockopt(socket.SOL_SOCKET, _SO_PEERPIDFD)
    if pid > 0:
        with contextlib.suppress(OSError):
            return os.pidfd_open(pid)
    return -1


def _is_member(uid: int, gid: int, group: int) -> bool:
    if gid == group:
        return True
    import grp
    import pwd

    with contextlib.suppress(KeyError):
        return pwd.getpwuid(uid).pw_name in grp.getgrgid(group).gr_mem
    return False
