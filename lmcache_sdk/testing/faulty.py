"""A backend that fails on purpose, and the same way each time for the same seed."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

from lmcache_sdk.backend import Backend, Buffer, Miss
from lmcache_sdk.errors import BackendFull, BackendUnavailable
from lmcache_sdk.testing.around import Around

_T = TypeVar("_T")


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


class Faulty(Around):
    """Wraps a backend and breaks it.

    ``gate`` is an event that every call waits for before it begins: clear it to make the backend hang, set it
    to let it go on. No time passes by itself. ``entered`` is a semaphore that every call releases as it comes
    to the gate, so that a test can wait until one hangs. Closing waits for no gate.

    Args:
        inner: the backend that does the work.
        faults: what goes wrong how often; may be replaced at any time.
        seed: of the faults. Calls from several threads draw in the order in which they arrive.

    Attributes:
        calls: the names of the calls so far.
        injected: the faults so far.
    """

    def __init__(self, inner: Backend, faults: Faults = NO_FAULTS, *, seed: int = 0) -> None:
        super().__init__(inner)
        self.instant = False  # type: ignore[misc]  # it may hang, whatever is in it
        self.faults = faults
        self.gate = threading.Event()
        self.gate.set()
        self.entered = threading.Semaphore(0)
        self.calls: list[str] = []
        self.injected: list[str] = []
        self._random = random.Random(seed)  # noqa: S311
        self._lock = threading.Lock()

    def around(self, call: str, keys: Sequence[str], work: Callable[[], _T]) -> _T:
        with self._lock:
            self.calls.append(call)
        self.entered.release()
        self.gate.wait()
        if self._draw("unavailable"):
            raise BackendUnavailable("injected: unavailable")
        if call == "put" and self._draw("full"):
            raise BackendFull("injected: no room")
        answer = work()
        if self._draw("late"):
            raise BackendUnavailable("injected: failed after the work was done")
        return answer

    def get(self, keys: Sequence[str], buffers: Sequence[Buffer]) -> list[int | Miss]:
        def read() -> list[int | Miss]:
            answers = self.inner.get(keys, buffers)
            return [self._spoil(answer, buffer) for answer, buffer in zip(answers, buffers, strict=True)]

        return self.around("get", keys, read)

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
