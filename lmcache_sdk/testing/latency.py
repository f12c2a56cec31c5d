"""A backend that is far away."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Sequence
from typing import ClassVar, TypeVar

from lmcache_sdk.backend import Backend
from lmcache_sdk.testing.around import Around

_T = TypeVar("_T")


class Latency(Around):
    """Wraps a backend and lets every call begin later; calls of several threads wait side by side.

    Closing it ends all waiting and leaves the inner backend open, so that another one may be put around it.

    Args:
        inner: the backend that does the work.
        seconds: how much later; may be changed at any time.
        jitter_s: up to so much more, evenly spread.
        seed: of the jitter. Calls from several threads draw in the order in which they arrive.
    """

    instant: ClassVar[bool] = False

    def __init__(self, inner: Backend, seconds: float, *, jitter_s: float = 0.0, seed: int = 0) -> None:
        super().__init__(inner)
        self.instant = False  # type: ignore[misc]  # whatever is in it
        self.seconds = seconds
        self.jitter_s = jitter_s
        self._random = random.Random(seed)  # noqa: S311 - no secret depends on it
        self._lock = threading.Lock()
        self._closed = threading.Event()

    def around(self, call: str, keys: Sequence[str], work: Callable[[], _T]) -> _T:
        with self._lock:
            more = self._random.uniform(0.0, self.jitter_s)
        self._closed.wait(self.seconds + more)
        return work()

    def close(self, timeout_s: float) -> None:
        self._closed.set()
