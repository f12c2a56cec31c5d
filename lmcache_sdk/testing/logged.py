"""A backend that remembers what it was asked."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

from lmcache_sdk.backend import Backend
from lmcache_sdk.testing.around import Around

_T = TypeVar("_T")


class Call(NamedTuple):
    """One call that has ended. ``started`` is of ``time.monotonic``; ``answer`` is None where it raised ``error``."""

    name: str
    keys: tuple[str, ...]
    started: float
    seconds: float
    answer: object
    error: Exception | None


class Logged(Around):
    """Wraps a backend and records every call, in the order in which they end.

    Attributes:
        calls: all so far; a test may clear it.
    """

    def __init__(self, inner: Backend) -> None:
        super().__init__(inner)
        self.calls: list[Call] = []

    def around(self, call: str, keys: Sequence[str], work: Callable[[], _T]) -> _T:
        started = time.monotonic()
        answer: _T | None = None
        error: Exception | None = None
        try:
            answer = work()
            return answer
        except Exception as raised:
            error = raised
            raise
        finally:
            self.calls.append(Call(call, tuple(keys), started, time.monotonic() - started, answer, error))

    def names(self) -> list[str]:
        """The calls' names."""
        return [call.name for call in self.calls]
