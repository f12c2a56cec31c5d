"""KV events for a router: which chunks became readable, which went away. Never tokens."""

from __future__ import annotations

import threading
from collections import deque
from itertools import islice

import msgspec


class Event(msgspec.Struct, frozen=True, array_like=True):
    """One chunk became readable or went away.

    Attributes:
        sequence: ascending by one within a life of the store.
        stored: False = removed.
        namespace: 32 hex digits.
        digest, parent: of the chunk and of the one before it; ``parent`` is empty where it is not known.
        reason: of a removal: evicted, deleted, cleared, failed, abandoned.
    """

    sequence: int
    stored: bool
    namespace: str
    digest: bytes
    parent: bytes = b""
    reason: str = ""


class EventLog:
    """The last events of one life, for readers that come back for more. Thread-safe.

    Args:
        limit: how many are kept.
    """

    def __init__(self, limit: int = 65_536) -> None:
        self._events: deque[Event] = deque(maxlen=limit)
        self._next = 1
        self._lock = threading.Lock()

    def add(self, *, stored: bool, namespace: str, digest: bytes, parent: bytes = b"", reason: str = "") -> None:
        """Append an event."""
        with self._lock:
            self._events.append(Event(self._next, stored, namespace, digest, parent, reason))
            self._next += 1

    @property
    def last(self) -> int:
        """The sequence of the last event; 0 if there was none."""
        return self._next - 1

    def after(self, sequence: int, limit: int) -> tuple[tuple[Event, ...], bool]:
        """At most ``limit`` events after ``sequence``, and whether earlier ones that the reader lacks are lost."""
        with self._lock:
            first = self._events[0].sequence if self._events else self._next
            lost = sequence + 1 < first or sequence >= self._next
            start = 0 if lost else sequence + 1 - first
            return tuple(islice(self._events, start, start + limit)), lost
