"""A backend that fails on purpose, and the same way each time for the same seed."""

from __future__ import annotations

import random
import threading
from collections.abc import Sequence
from typing import ClassVar, NamedTuple, Self

from lmcache_sdk.backend import Backend, Buffer, Item, Miss, Url
from lmcache_sdk.errors import BackendFull, BackendUnavailable, ConfigError


class Faults(NamedTuple):
    """How often what goes wrong, each a probability between 0 and 1.

    Attributes:
        unavailable: a call raises BackendUnavailable, before it does anything.
        full: a put raises BackendFull, before it writes anything.
        late: a call does its work and then raises BackendUnavailable.
        lost: a record that is there is reported absent by get.
        truncated: get returns a shorter length.
        flipped: get returns bytes with one bit changed.
    """

    unavailable: float = 0.0
    full: float = 0.0
    late: float = 0.0
    lost: float = 0.0
    truncated: float = 0.0
    flipped: float = 0.0


NO_FAULTS = Faults()


class FaultyBackend:
    """Wraps a backend and breaks it.

    ``gate`` is an event that every call waits for before it begins: clear it to make the backend hang, set it
    to let it go on. No time passes by itself. ``entered`` is a semaphore that every call releases as it comes
    to the gate, so that a test can wait until one hangs.

    Args:
        inner: the backend that does the work.
        faults: what goes wrong how often; may be replaced at any time.
        seed: of the faults. Calls from several threads draw in the order in which they arrive.
    """

    instant: ClassVar[bool] = False

    def __init__(self, inner: Backend, faults: Faults = NO_FAULTS, *, seed: int = 0) -> None:
        self.inner = inner
        self.faults = faults
        self.gate = threading.Event()
        self.gate.set()
        self.entered = threading.Semaphore(0)
        self.calls: list[str] = []  # the names of the calls so far
        self.injected: list[str] = []  # the faults so far
        self._random = random.Random(seed)  # noqa: S311
        self._lock = threading.Lock()

    @classmethod
    def from_url(cls, url: Url) -> Self:
        """Not addressable: it is made around a backend."""
        raise ConfigError(f"a faulty backend has no URL, got {url.text!r}")

    def get(self, keys: Sequence[str], buffers: Sequence[Buffer]) -> list[int | Miss]:
        """Read, and then lose, shorten or change some of it."""
        self._arrive("get")
        answers = [
            self._spoil(answer, buffer) for answer, buffer in zip(self.inner.get(keys, buffers), buffers, strict=True)
        ]
        self._leave()
        return answers

    def put(self, items: Sequence[Item], *, if_absent: bool = True) -> list[bool]:
        """Write, or have no room."""
        self._arrive("put")
        if self._draw("full"):
            raise BackendFull("injected: no room")
        answers = self.inner.put(items, if_absent=if_absent)
        self._leave()
        return answers

    def contains(self, keys: Sequence[str]) -> list[bool]:
        """As the inner backend says."""
        self._arrive("contains")
        return self.inner.contains(keys)

    def prefix_len(self, keys: Sequence[str]) -> int:
        """As the inner backend says."""
        self._arrive("prefix_len")
        return self.inner.prefix_len(keys)

    def delete(self, keys: Sequence[str]) -> int:
        """Remove."""
        self._arrive("delete")
        count = self.inner.delete(keys)
        self._leave()
        return count

    def close(self, timeout_s: float) -> None:
        """Close the inner backend. Never fails, and waits for no gate."""
        self.inner.close(timeout_s)

    def _arrive(self, call: str) -> None:
        with self._lock:
            self.calls.append(call)
        self.entered.release()
        self.gate.wait()
        if self._draw("unavailable"):
            raise BackendUnavailable("injected: unavailable")

    def _leave(self) -> None:
        if self._draw("late"):
            raise BackendUnavailable("injected: failed after the work was done")

    def _spoil(self, answer: int | Miss, buffer: Buffer) -> int | Miss:
        if isinstance(answer, Miss):
            return answer
        if self._draw("lost"):
            return Miss.ABSENT
        if answer and self._draw("flipped"):
            bit = self._below(answer * 8)
            buffer[bit // 8] ^= 1 << bit % 8
        if answer and self._draw("truncated"):
            return self._below(answer)
        return answer

    def _draw(self, fault: str) -> bool:
        probability: float = getattr(self.faults, fault)
        with self._lock:
            hit = probability > 0 and self._random.random() < probability
            if hit:
                self.injected.append(fault)
        return hit

    def _below(self, limit: int) -> int:
        with self._lock:
            return self._random.randrange(limit)
