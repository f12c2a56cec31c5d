"""One server or the nodes of a cluster, with a few connections to each; and which of them has a key."""

from __future__ import annotations

import contextlib
import random
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import redis
from redis.connection import AbstractConnection, Connection, SSLConnection, UnixDomainSocketConnection
from redis.crc import key_slot

from lmcache_backends.redis.link import Link, ProtocolError, Refused, Reply, command
from lmcache_backends.redis.settings import Settings
from lmcache_backends.redis.trouble import lost, refusal, refused_connection
from lmcache_sdk.errors import BackendError, BackendUnavailable

SLOTS = 16_384
_GARBLED = (ValueError, TypeError, LookupError, RecursionError)  # of redis-py, on replies that are none


class Node:
    """A server. Connections are made when they are needed, and kept.

    Attributes:
        place: what messages call it.
    """

    def __init__(self, settings: Settings, host: str, port: int) -> None:
        self.address = (host, port)
        self.place = f"{settings.scheme}://{settings.path or f'{host}:{port}'}"
        self._settings = settings
        self._free: list[Link] = []  # the one used last is used next
        self._places = threading.BoundedSemaphore(settings.connections)

    @contextlib.contextmanager
    def link(self) -> Iterator[Link]:
        """A connection, alone in use; it is kept if nothing is under way on it at the end.

        Raises:
            BackendUnavailable: none can be had, or it broke while it was used.
        """
        settings = self._settings
        if not self._places.acquire(timeout=settings.timeout_s):
            raise BackendUnavailable(
                f"{self.place}: all {settings.connections} connections were in use for {settings.timeout_s:g} s; "
                f"raise connections"
            )
        link = None
        try:
            link = self._kept() or self._connected()
            yield link
            if link.idle:
                self._free.append(link)
                link = None
        except (OSError, ProtocolError) as error:
            if isinstance(error, BackendError):
                raise
            raise lost(self.place, error, settings) from error
        finally:
            if link:
                link.close()
            self._places.release()

    def ask(self, *words: bytes) -> Reply:
        """One command without a large value. Raises BackendError, also where it is refused."""
        with self.link() as link:
            link.send(command(*words))
            reply = link.reply()
        if isinstance(reply, Refused):
            raise refusal(self.place, reply, self._settings)
        return reply

    def close(self) -> None:
        """The connections that are not in use."""
        while link := self._popped():
            link.close()

    def _kept(self) -> Link | None:
        while link := self._popped():
            if not link.stale:
                return link
            link.close()
        return None

    def _popped(self) -> Link | None:
        try:
            return self._free.pop()
        except IndexError:
            return None

    def _connected(self) -> Link:
        connection = self._new()
        try:
            connection.connect()
            # What came beyond the last reply would be lost with redis-py's own buffer.
            if connection.can_read(0):
                raise ProtocolError("something came that nobody had asked for")
            return Link(connection, self._settings.timeout_s)
        except (redis.RedisError, OSError, *_GARBLED) as error:
            connection.disconnect()
            raise refused_connection(self.place, error, self._settings) from None  # its text may hold the password
        except BaseException:
            connection.disconnect()
            raise

    def _new(self) -> AbstractConnection:
        settings = self._settings
        common: dict[str, object] = {
            "db": settings.db,
            "username": settings.username,
            "password": settings.password,
            "protocol": 2,
            "socket_timeout": settings.connect_timeout_s,
            "socket_connect_timeout": settings.connect_timeout_s,
        }
        if settings.path:
            return UnixDomainSocketConnection(path=settings.path, **common)
        host, port = self.address
        if settings.tls is not None:
            return SSLConnection(host=host, port=port, **common, **settings.tls)
        return Connection(host=host, port=port, **common)


class Part(NamedTuple):
    """The keys that one node has, by their index. ``asking``: it has them only for those who say so."""

    node: Node
    indexes: Sequence[int]
    asking: bool = False


class Servers(Protocol):
    """Where the keys are. Every method raises BackendError."""

    def nodes(self) -> list[Node]:
        """All that have keys."""
        ...

    def parts(self, keys: Sequence[bytes]) -> list[Part]:
        """The keys by node, each part in the order of the keys."""
        ...

    def moved(self, where: Sequence[tuple[int, Refused]]) -> list[Part]:
        """Where these keys are now: the nodes that did not have them have said so. Empty if they are nowhere else."""
        ...

    def failed(self) -> None:
        """A node did not answer."""
        ...

    def close(self) -> None: ...


class Single:
    """One server."""

    def __init__(self, settings: Settings) -> None:
        self._node = Node(settings, settings.host, settings.port)
        if isinstance(self._node.ask(b"PING"), bytes):
            return
        raise BackendUnavailable(f"{self._node.place} does not talk as Redis does")

    def nodes(self) -> list[Node]:
        return [self._node]

    def parts(self, keys: Sequence[bytes]) -> list[Part]:
        return [Part(self._node, range(len(keys)))]

    def moved(self, where: Sequence[tuple[int, Refused]]) -> list[Part]:
        return []

    def failed(self) -> None:
        pass

    def close(self) -> None:
        self._node.close()


class Cluster:
    """The nodes of a cluster, as they say who has which slots. Asked again when they prove wrong."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._first = (settings.host, settings.port)
        self._lock = threading.Lock()  # of these three
        self._nodes: dict[tuple[str, int], Node] = {}
        self._slots: list[Node | None] = [None] * SLOTS
        self._current = threading.Event()  # as far as is known, these are true
        self._learning = threading.Lock()
        self._learn()

    def nodes(self) -> list[Node]:
        self._learn()
        with self._lock:
            return list({node.address: node for node in self._slots if node}.values())

    def parts(self, keys: Sequence[bytes]) -> list[Part]:
        self._learn()
        with self._lock:
            slots = self._slots
        indexes: dict[Node, list[int]] = {}
        for index, key in enumerate(keys):
            node = slots[key_slot(key)]
            if node is None:
                self.failed()
                raise BackendUnavailable(f"{self._settings.shown}: no node serves slot {key_slot(key)}")
            indexes.setdefault(node, []).append(index)
        return [Part(node, found) for node, found in indexes.items()]

    def moved(self, where: Sequence[tuple[int, Refused]]) -> list[Part]:
        parts = []
        for index, refused in where:
            address = refused.text.split(" ")[-1]
            host, _, port = address.rpartition(":")
            if not port.isdigit():
                raise BackendUnavailable(f"{self._settings.shown}: a node names {address[:100]!r} as another")
            parts.append(Part(self._node(host or self._first[0], int(port)), [index], refused.code == "ASK"))
        if any(refused.code == "MOVED" for _, refused in where):
            self.failed()
        return parts

    def failed(self) -> None:
        self._current.clear()

    def close(self) -> None:
        with self._lock:
            for node in self._nodes.values():
                node.close()

    def _node(self, host: str, port: int) -> Node:
        with self._lock:
            return self._nodes.setdefault((host, port), Node(self._settings, host, port))

    def _learn(self) -> None:
        """Ask the nodes, until one knows, for as long as one call may take."""
        if self._current.is_set():
            return
        with self._learning:
            if self._current.is_set():
                return
            with self._lock:
                known = list(self._nodes)
            random.shuffle(known)
            addresses = list(dict.fromkeys([*known, self._first]))
            until = time.monotonic() + self._settings.timeout_s
            for address in addresses:
                try:
                    self._take(self._node(*address).ask(b"CLUSTER", b"SLOTS"), address[0])
                except BackendError:
                    if address == addresses[-1] or time.monotonic() > until:
                        raise
                else:
                    self._current.set()
                    break

    def _take(self, reply: Any, asked: str) -> None:
        """What ``CLUSTER SLOTS`` says; a node that does not know its own name is the one that was asked."""
        slots: list[Node | None] = [None] * SLOTS
        try:
            for first, last, (host, port, *_), *_replicas in reply:
                if not 0 <= first <= last < SLOTS:
                    raise ValueError(first, last)
                slots[first : last + 1] = [self._node(host.decode() if host else asked, port)] * (last + 1 - first)
        except (TypeError, ValueError, AttributeError):
            raise BackendUnavailable(f"{self._settings.shown}: what CLUSTER SLOTS says is not understood") from None
        used = {node.address for node in slots if node}
        if not used:
            raise BackendUnavailable(f"{self._settings.shown} is of a cluster without slots; see CLUSTER INFO")
        with self._lock:
            self._slots = slots
            for address in self._nodes.keys() - used:
                self._nodes.pop(address).close()


def connect(settings: Settings) -> Servers:
    """Raises BackendUnavailable."""
    return Cluster(settings) if settings.cluster else Single(settings)
