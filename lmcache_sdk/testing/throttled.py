"""A backend that is as slow as it is told to be."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from typing import ClassVar, Self

from lmcache_sdk.backend import Backend, Buffer, Item, Miss, Url
from lmcache_sdk.errors import ConfigError


class ThrottledBackend:
    """Wraps a backend and gives it the speed of a wire: all reads share it, one after the other.

    Closing it leaves the inner backend open, so that another one may be put around the same records.

    Args:
        inner: the backend that does the work.
        bytes_per_s: of all reads together; may be changed at any time.
        latency_s: of each read, side by side with others.
    """

    instant: ClassVar[bool] = True  # it is the reading that is slow

    def __init__(self, inner: Backend, bytes_per_s: float, *, latency_s: float = 0.0) -> None:
        self.inner = inner
        self.bytes_per_s = bytes_per_s
        self.latency_s = latency_s
        self._lock = threading.Lock()
        self._free_at = 0.0
        self._closed = threading.Event()

    @classmethod
    def from_url(cls, url: Url) -> Self:
        """Not addressable: it is made around a backend."""
        raise ConfigError(f"a throttled backend has no URL, got {url.text!r}")

    def get(self, keys: Sequence[str], buffers: Sequence[Buffer]) -> list[int | Miss]:
        """Read, and answer when that many bytes have come over the wire."""
        answers = self.inner.get(keys, buffers)
        nbytes = sum(answer for answer in answers if not isinstance(answer, Miss))
        with self._lock:
            now = time.monotonic()
            self._free_at = max(now, self._free_at) + nbytes / self.bytes_per_s
            seconds = self._free_at - now
        self._closed.wait(seconds + self.latency_s)
        return answers

    def put(self, items: Sequence[Item], *, if_absent: bool = True) -> list[bool]:
        """At full speed."""
        return self.inner.put(items, if_absent=if_absent)

    def contains(self, keys: Sequence[str]) -> list[bool]:
        """At once."""
        return self.inner.contains(keys)

    def prefix_len(self, keys: Sequence[str]) -> int:
        """At once."""
        return self.inner.prefix_len(keys)

    def delete(self, keys: Sequence[str]) -> int:
        """At once."""
        return self.inner.delete(keys)

    def close(self, timeout_s: float) -> None:
        """End all waiting."""
        self._closed.set()
