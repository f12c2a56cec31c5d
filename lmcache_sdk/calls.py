"""Counting the calls inside a backend, so that closing waits for them and none starts after."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from types import TracebackType

from lmcache_sdk.errors import BackendUnavailable


class Calls:
    """A door: every call enters it (``with calls:``); ``close`` shuts it and waits until all have left.

    Args:
        name: what the error of a late call names.
        release: frees what the calls use. Runs once: in ``close`` or, where calls outlast its timeout, in the
            thread of the last call to leave. Must not raise.
    """

    def __init__(self, name: str, release: Callable[[], None]) -> None:
        self._name = name
        self._release = release
        self._pid = os.getpid()
        self._changed = threading.Condition(threading.Lock())
        self._inside = 0
        self._closed = False
        self._released = False

    def check(self) -> None:
        """Raise BackendUnavailable if closed, or in a process that was forked after the opening."""
        if self._closed:
            raise BackendUnavailable(f"{self._name} is closed")
        if os.getpid() != self._pid:
            raise BackendUnavailable(f"{self._name} was opened before this process was forked; open it after")

    def __enter__(self) -> None:
        self.check()
        with self._changed:
            self.check()
            self._inside += 1

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._changed:
            self._inside -= 1
            last = self._closed and self._inside == 0
            self._changed.notify_all()
        if last:
            self._release_once()

    def close(self, timeout_s: float) -> bool:
        """Shut the door. True if all calls left within ``timeout_s``; else the last one frees. Idempotent."""
        if os.getpid() != self._pid:
            return True  # the parent's to close, not ours
        with self._changed:
            self._closed = True
            left = self._changed.wait_for(lambda: self._inside == 0, timeout_s)
        if left:
            self._release_once()
        return left

    def _release_once(self) -> None:
        with self._changed:
            if self._released:
                return
            self._released = True
        self._release()
