"""The daemon: sockets over a Store.

One thread serves all sockets and waits for no client and no tier: what takes time answers later. (An instant tier is
asked at once what it has, which may be a page that its disk has to bring.) Nothing that a client sends can do more than
close its own connection. Memory that a client may still touch comes back only when
the client says so, or when its process is proven gone.
"""

from __future__ import annotations

import contextlib
import errno
import gc
import math
import os
import resource
import secrets
import selectors
import socket
import threading
import time
from collections import Counter
from dataclasses import dataclass
from heapq import nlargest
from operator import itemgetter
from pathlib import Path
from typing import NamedTuple
from weakref import WeakValueDictionary

import msgspec

from lmcache_sdk.daemon import protocol as p
from lmcache_sdk.daemon.answers import Answers, Owed
from lmcache_sdk.daemon.listening import inode, listen
from lmcache_sdk.daemon.peers import Client, Connection, Share, pidfd_of
from lmcache_sdk.errors import ConfigError, LMCacheSDKError
from lmcache_sdk.observe.logs import logger
from lmcache_sdk.pool.processes import identity, may_live
from lmcache_sdk.pool.shared import SharedPool
from lmcache_sdk.spec import Namespace, Producer
from lmcache_sdk.store import OpenSpace, Store

_log = logger("daemon")

_RECEIVE_BYTES = 1 << 18
_EXIT_GRACE_S = 0.25  # between a process's end and the reuse of its memory: a device may still be writing
_LOOK_S = 0.5  # between two looks at what nobody tells
# Between two collections of young garbage. Where as much is given up as is made, none comes by itself; and the longer
# it stays away, the longer it holds everybody up.
_COLLECT_S = 0.05
_HELLO_S = 5.0  # for a connection to say who it is
_READ_S = 10.0  # for a client to read a reply, or to send the rest of a message
_DEFAULT_CLIENT_SHARE = 0.5
_CONNECTIONS_PER_PROCESS = 512
_SPARE_DESCRIPTORS = 256  # for tiers, the pool, and one for each client's process
_MOST_SPACES = 1024
_MOST_GROUPS = 64
_MOST_CELLS = 16_384  # of a chunk
_MOST_TEXT = 16_384  # characters, of what describes a namespace or a producer
_MOST_TENANTS = 1000  # that are named to a tool


class Later(NamedTuple):
    """A reply that is owed."""

    connection: Connection
    deadline: float
    owed: Owed


@dataclass(frozen=True)
class Settings:
    """What the server itself needs to know.

    Attributes:
        socket: path of the unix socket.
        group: None = only this user; else members of this group too (a numeric id).
        require_salt: refuse requests without a cache salt.
        client_share: how much of the pool one process may hold by leases and reservations.
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
        BackendLocked, BackendUnavailable, ConfigError: as :func:`lmcache_sdk.daemon.listening.listen`; ConfigError also
            if the pool has too many segments.
    """

    def __init__(self, store: Store, pool: SharedPool, settings: Settings) -> None:
        if len(pool.sizes) > p.MOST_SEGMENTS:
            raise ConfigError(f"a pool of {len(pool.sizes)} segments cannot be passed on; {p.MOST_SEGMENTS} can")
        self.store = store
        self._pool = pool
        self._settings = settings
        self._selector = selectors.DefaultSelector()
        self._clients: dict[bytes, Client] = {}
        self._shares: WeakValueDictionary[tuple[int, int], Share] = WeakValueDictionary()  # of processes
        self._answers = Answers(store, int(sum(pool.sizes) * settings.client_share), require_salt=settings.require_salt)
        self._connections: set[Connection] = set()
        self._of_process: Counter[int] = Counter()
        self._most_connections = max(64, resource.getrlimit(resource.RLIMIT_NOFILE)[0] - _SPARE_DESCRIPTORS)
        self._later: list[Later] = []
        self._gone: list[tuple[float, Client]] = []
        self._earlier = {client.client_id: client for client in pool.journal.earlier_clients}
        self._dead: set[bytes] = set()
        self._look = time.monotonic() + _LOOK_S
        self._collect = 0.0
        self._full_until = 0.0
        self._stopping = False
        self._thread = threading.get_ident()
        self._changed = False
        self._wake_read, self._wake_write = socket.socketpair()
        for end in (self._wake_read, self._wake_write):
            end.setblocking(False)
        self._socket, self._inode = listen(settings.socket, settings.group)
        self._missed = False
        self._selector.register(self._wake_read, selectors.EVENT_READ, self._woken)
        self._selector.register(self._socket, selectors.EVENT_READ, self._accept)
        store.on_change = self._change
        if not self._earlier:
            store.end_earlier_life()

    @property
    def client_count(self) -> int:
        """Clients with a namespace; callable from another thread."""
        return sum(client.opened is not None for client in list(self._clients.values()))

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
        if inode(self._settings.socket) == self._inode:  # it may be another daemon's by now
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
        if self._collect <= now:
            self._collect = now + _COLLECT_S
            gc.collect(0)
        if self._look <= now:
            self._look = now + _LOOK_S
            self._look_around(now)

    def _pay(self, later: Later, now: float) -> bool:
        """Give an owed reply, if it is ready or due."""
        connection = later.connection
        try:
            reply = later.owed.late() if later.deadline <= now else later.owed.ready()
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
                _log.warning("process %d does not end its message, or read its reply: cut off", connection.pid)
                self._close(connection)
        for client in list(self._clients.values()):
            if client.opened is not None and client.pidfd < 0 and not may_live(client.pid, client.known):
                self._exited(client)
        self._check_earlier()
        if self._full_until and self._full_until <= now:
            self._full_until = 0.0
            self._selector.register(self._socket, selectors.EVENT_READ, self._accept)
        if inode(self._settings.socket) != self._inode and not self._missed:
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
            if body is None:
                connection.due = min(connection.due, time.monotonic() + _READ_S)
            else:
                if connection.client is not None:
                    connection.due = math.inf
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
        try:
            data = p.encode(message)
        except p.ProtocolError as error:  # what was asked for has been done: nothing that the client has done wrong
            raise RuntimeError(f"{type(message).__name__}: {error}") from error
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
            opened = self._open(hello.namespace, hello.producer)
        except LMCacheSDKError as error:
            return p.Refused("settings", str(error)[:1000])
        process = connection.pid, identity(connection.pid)
        share = self._shares.get(process) if process[1] else None  # a process that cannot be seen may be any
        client = Client(
            secrets.token_bytes(16), *process, opened, share or Share(), turn=hello.turn, sharing=hello.share
        )
        # Written down before it is told where the memory is: the next life must know of it.
        if not self._pool.journal.client_joined(client.id, client.pid, client.known):
            return p.Refused("limit", "1,024 processes use this pool that have neither left nor are known to be gone")
        self._clients[client.id] = client
        self._shares[process] = client.share
        client.pidfd = pidfd_of(connection.socket, client.pid)
        if client.pidfd >= 0:
            self._selector.register(client.pidfd, selectors.EVENT_READ, lambda _, __: self._exited(client))
        self._join(connection, client, self._pool.descriptors())
        return None

    def _open(self, namespace: Namespace, producer: Producer) -> OpenSpace:
        """Raises ConfigError, UnsupportedError."""
        _check_size(namespace, producer)
        opened = self.store.open_space(namespace, producer)
        if self.store.space_count > _MOST_SPACES:
            used = {client.opened for client in self._clients.values() if client.opened is not None}
            self.store.close_spaces(used | {opened})
            if self.store.space_count > _MOST_SPACES:
                self.store.close_spaces(used)
                raise ConfigError(
                    f"{_MOST_SPACES} namespaces have clients or chunks in this pool; clear one that is not needed"
                )
        return opened

    def _join(self, connection: Connection, client: Client, descriptors: list[int] | None = None) -> None:
        connection.client = client
        client.connections.add(connection)
        welcome = p.Welcome(p.PROTOCOL_VERSION, self.store.boot, client.id, tuple(self._pool.sizes))
        self._send(connection, welcome, descriptors)

    def _revive(self, client: Client, hello: p.Hello) -> None:
        """A client that had given this daemon up is back. What it has not heard of was in vain."""
        client.turn, client.sharing = hello.turn, hello.share
        for connection in list(client.connections):
            connection.client = None  # or the last one would take the client with it
            client.connections.discard(connection)
            self._close(connection)
        self._answers.take_back(client, but=set(hello.held))

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
        self._answers.forget_all(client)
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
        answer = self._answers.answer(client, request)
        return self._owe(connection, answer) if isinstance(answer, Owed) else answer

    def _owe(self, connection: Connection, owed: Owed) -> p.Message | None:
        reply = owed.ready()
        if reply is None and owed.timeout_s <= 0:
            return owed.late()
        if reply is None:
            self._later.append(Later(connection, time.monotonic() + owed.timeout_s, owed))
            connection.waiting = True
        return reply

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
            "tenants": dict(nlargest(_MOST_TENANTS, self.store.tenant_bytes().items(), key=itemgetter(1))),
            "segments": [{"bytes": info.nbytes, "node": info.node} for info in self._pool.describe()],
        }
        return {name: msgspec.Raw(msgspec.msgpack.encode(value)) for name, value in details.items()}


def _check_size(namespace: Namespace, producer: Producer) -> None:
    """Before anything is listed or kept. Raises ConfigError, UnsupportedError."""
    texts = (*_texts(namespace), *_texts(producer))
    if max(map(len, texts)) > _MOST_TEXT:
        raise ConfigError(f"a description of {max(map(len, texts))} characters; up to {_MOST_TEXT} are served")
    spec = namespace.spec
    if len(spec.groups) > _MOST_GROUPS:
        raise ConfigError(f"{len(spec.groups)} groups; up to {_MOST_GROUPS} are served")
    spec.validate()
    cells = sum(
        -(-len(group.layers) // (spec.grid.layers_per_cell or len(group.layers)))
        * -(-group.heads // (spec.grid.heads_per_cell or group.heads))
        for group in spec.groups
    )
    if cells > _MOST_CELLS:
        raise ConfigError(f"chunks of {cells} cells; up to {_MOST_CELLS} are served: raise layers_per_cell")


def _texts(described: Namespace | Producer) -> list[str]:
    values = (getattr(described, name) for name in described.__struct_fields__)
    return [value for value in values if isinstance(value, str)]
