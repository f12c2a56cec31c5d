"""Threads that do a store's work on its tiers, and what is asked of a tier on the side."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from contextlib import suppress

from lmcache_sdk.backend import Backend, Usage, UsageReport
from lmcache_sdk.errors import BackendError
from lmcache_sdk.observe.logs import logger

_log = logger("store")

_USAGE_S = 0.5  # between two questions to a tier how full it is, or ten times what the last one took


class Worker:
    """A queue and the threads that empty it. A task must not raise; one that does is logged, the thread lives on."""

    def __init__(self, name: str, threads: int = 1) -> None:
        self._tasks: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._threads = [
            threading.Thread(target=self._work, name=f"lmcache-{name}-{i}", daemon=True) for i in range(threads)
        ]
        for thread in self._threads:
            thread.start()

    @property
    def waiting(self) -> int:
        """Tasks that no thread has taken up."""
        return self._tasks.qsize()

    @property
    def alive(self) -> bool:
        """Whether a thread has not ended."""
        return any(thread.is_alive() for thread in self._threads)

    def submit(self, task: Callable[[], None]) -> None:
        """Have it done, after what was submitted before."""
        self._tasks.put(task)

    def stop(self) -> None:
        """End the threads after what is queued."""
        for _ in self._threads:
            self._tasks.put(None)

    def join(self, deadline: float) -> None:
        """Wait for the threads' end, at most to the deadline."""
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))

    def _work(self) -> None:
        while (task := self._tasks.get()) is not None:
            try:
                task()
            except Exception:  # noqa: BLE001 - a worker that dies silently stops all that is queued behind
                _log.exception("a task of %s failed", threading.current_thread().name)


class KnownUsage:
    """How full a tier is, as it said last: it is asked by its own worker, so that nobody waits for the answer.

    Attributes:
        report: None while it has not said, or cannot.
    """

    def __init__(self, backend: Backend, worker: Worker) -> None:
        self.report: UsageReport | None = None
        self._backend = backend if isinstance(backend, Usage) else None
        self._worker = worker
        self._stale = self._backend is not None
        self._asking = False
        self._next = 0.0

    @property
    def stale(self) -> bool:
        """Whether it is to be asked again."""
        return self._stale

    def changed(self) -> None:
        """It may say something else by now."""
        self._stale = self._backend is not None

    def refresh(self, now: float) -> None:
        """Ask again if that is due; one question at a time, however long it takes."""
        if self._stale and not self._asking and now >= self._next:
            self._stale, self._asking = False, True
            self._worker.submit(self._ask)

    def _ask(self) -> None:
        assert self._backend is not None
        started = time.monotonic()
        try:
            with suppress(BackendError):
                self.report = self._backend.usage()
        finally:
            now = time.monotonic()
            self._next = now + max(_USAGE_S, 10 * (now - started))
            self._asking = False
