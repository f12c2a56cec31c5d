"""Who is at the other end: connections, the clients that they belong to, and what those hold."""

from __future__ import annotations

import contextlib
import os
import socket
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Self

from lmcache_sdk import spec
from lmcache_sdk.api import Reservation, Ticket
from lmcache_sdk.daemon import protocol as p
from lmcache_sdk.store import OpenSpace

_SO_PEERPIDFD = 77  # Linux 6.5: works across pid namespaces, too


@dataclass(frozen=True)
class Held:
    """Chunks that a client may touch.

    Attributes:
        number: the store's.
        chunk_bytes: of each.
        places: a name for each chunk, that it has wherever it is leased: the place of its first cell.
    """

    number: int
    chunk_bytes: int
    places: Sequence[bytes]

    @classmethod
    def of(cls, given: Ticket | Reservation, chunk_bytes: int) -> Self:
        width, extents = p.PLACE_BYTES * len(given.cells), given.extents
        return cls(given.lease, chunk_bytes, [extents[at : at + p.PLACE_BYTES] for at in range(0, len(extents), width)])

    @property
    def nbytes(self) -> int:
        return len(self.places) * self.chunk_bytes


@dataclass(frozen=True)
class Lease(Held):
    """``parts``: which client has which, of those that have not been given back."""

    parts: dict[int, Client] = field(default_factory=dict)


class Share:
    """What the clients of one process hold of the pool together. A prefix that many requests share is leased many
    times, and counts once.

    Attributes:
        nbytes: by leases and reservations.
        leased: chunks, counted as often as they are leased.
    """

    def __init__(self) -> None:
        self.nbytes = 0
        self.leased = 0
        self._times: Counter[bytes] = Counter()

    def lease(self, lease: Held) -> None:
        times = self._times
        for place in lease.places:
            times[place] += 1
            if times[place] == 1:
                self.nbytes += lease.chunk_bytes
        self.leased += len(lease.places)

    def give_back(self, lease: Held) -> None:
        times = self._times
        for place in lease.places:
            times[place] -= 1
            if not times[place]:
                del times[place]
                self.nbytes -= lease.chunk_bytes
        self.leased -= len(lease.places)


@dataclass(eq=False)
class Client:
    """One who reads or writes the pool, over one or more connections; a process may be several.

    Attributes:
        known: its process, see :func:`lmcache_sdk.pool.processes.identity`.
        share: of its process.
        leases, rooms: by the numbers that clients know, which cannot be guessed.
        requests: rids, oldest first.
        turn: of the last Hello that made or revived it.
        sharing: whose chunks it is given.
    """

    id: bytes
    pid: int
    known: int
    opened: OpenSpace | None
    share: Share = field(default_factory=Share)
    pidfd: int = -1
    connections: set[Connection] = field(default_factory=set)
    leases: dict[int, Lease] = field(default_factory=dict)
    rooms: dict[int, Held] = field(default_factory=dict)
    requests: dict[str, None] = field(default_factory=dict)
    turn: int = 0
    sharing: spec.Share = spec.Share.OWN

    @property
    def held_bytes(self) -> int:
        """By leases and reservations; what is leased twice counts twice."""
        return sum(held.nbytes for held in (*self.leases.values(), *self.rooms.values()))

    def lease(self, number: int, lease: Lease) -> None:
        self.leases[number] = lease
        self.share.lease(lease)

    def end_lease(self, number: int) -> None:
        self.share.give_back(self.leases.pop(number))

    def reserve(self, number: int, room: Held) -> None:
        self.rooms[number] = room
        self.share.nbytes += room.nbytes

    def end_room(self, number: int) -> Held | None:
        room = self.rooms.pop(number, None)
        if room is not None:
            self.share.nbytes -= room.nbytes
        return room


@dataclass(eq=False)
class Connection:
    """One socket.

    Attributes:
        waiting: a reply is owed.
        due: when it is closed, if by then it has not said hello, sent what it has begun to send, or read its reply.
    """

    socket: socket.socket
    pid: int
    due: float
    frames: p.FrameReader = field(default_factory=lambda: p.FrameReader(p.REQUEST_LIMIT))
    out: bytearray = field(default_factory=bytearray)
    client: Client | None = None
    waiting: bool = False

    @property
    def closed(self) -> bool:
        return self.socket.fileno() < 0


def pidfd_of(connection: socket.socket, pid: int) -> int:
    """A descriptor that becomes readable when the peer's process ends; -1 if the kernel cannot give one."""
    with contextlib.suppress(OSError):
        return connection.getsockopt(socket.SOL_SOCKET, _SO_PEERPIDFD)
    if pid > 0:
        with contextlib.suppress(OSError):
            return os.pidfd_open(pid)
    return -1
