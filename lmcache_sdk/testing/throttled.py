"""A backend at the end of a slow wire."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence

from lmcache_sdk.backend import Backend, Buffer, Miss
from lmcache_sdk.testing.around import Around


class Throttled(Around):
    """Wraps a backend and gives it the speed of a wire: all reads share it, one after the other.

    Closing it ends all waiting and leaves the inner backend open, so that another one may be put around it.

    Args:
        inner: the backend that does the work.
        bytes_per_s: of all reads together; may be changed at any time.
        latency_s: of each read, side by side with others.
    """

    def __init__(self, inner: Backend, bytes_per_s: float, *, latency_s: float = 0.0) -> None:
        super().__init__(inner)
        self.bytes_per_s = bytes_per_s
        self.latency_s = latency_s
        self._lock = threading.Lock()
        self._free_at = 0.0
        self._closed = threading.Event()

    def get(self, keys: Sequence[str], buffers: Sequence[Buffer]) -> list[int | Miss]:
        answers = self.inner.get(keys, buffers)
        nbytes = sum(answer for answer in answers if not isinstance(answer, Miss))
        with self._lock:
            now = time.monotonic()
            self._free_at = max(now, self._free_at) + nbytes / self.bytes_per_s
            seconds = self._free_at - now
        self._closed.wait(seconds + self.latency_s)
        return answers

    def close(self, timeout_s: float) -> None:
        self._closed.set()
