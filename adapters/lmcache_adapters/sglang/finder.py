"""What the cache has for SGLang's requests, asked on a thread of its own, so that nobody waits longer than agreed.

SGLang asks on its scheduler's thread, which all requests share, and may ask for every waiting request before each
batch. So an answer that is late counts as a miss; while one is late, all miss at once; and what was asked a moment ago
is not asked again.
"""

from __future__ import annotations

import queue
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, Generic, NamedTuple, TypeVar

from lmcache_adapters.sglang.identity import digests_of
from lmcache_sdk.api import Cache, Chain, LookupState
from lmcache_sdk.connector import GPUConnector, Taken
from lmcache_sdk.observe.logs import logger

_log = logger("sglang")
_T = TypeVar("_T")

# How long an answer serves: one that time cut short only until the rest may have come from its tier.
_FRESH_S = 1.0
_CUT_FRESH_S = 0.02
_WAIT = 0.8  # of the time for an answer: how long a tier is waited for, so that what it has brought is told in time
_MOST_ASKED = 1024  # requests; a wait for one that was forgotten is asked again, no more


class _Asked(NamedTuple):
    """The first ``pages`` of ``keys`` can be loaded; one that cannot may follow. This counts until ``until``."""

    keys: list[str]
    pages: int
    until: float


class _Task(Generic[_T]):
    """Something to do on the thread for somebody who waits, but not for ever."""

    def __init__(self, do: Callable[[], _T | None], undo: Callable[[_T], None]) -> None:
        self._do = do
        self._undo = undo
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._result: _T | None = None
        self._given_up = False

    def run(self) -> None:
        result = None
        try:
            result = self._do()
        except Exception:  # noqa: BLE001 - a miss, and the thread goes on
            _log.exception("a question to the cache failed")
        with self._lock:
            self._result = result
            late = self._given_up
            self._ended.set()
        if late and result is not None:
            self._undo(result)

    def wait(self, timeout_s: float) -> _T | None:
        """Its result; None if it failed, or is late: then what it will have done is undone."""
        self._ended.wait(timeout_s)
        with self._lock:
            self._given_up = not self._ended.is_set()
            return self._result

    @property
    def under_way(self) -> bool:
        return not self._ended.is_set()


class Finder:
    """See the module's docstring. Its methods are for one thread, SGLang's scheduler's.

    Args:
        timeout_s: the longest that any method blocks.
    """

    def __init__(self, cache: Cache, connector: GPUConnector, *, timeout_s: float) -> None:
        self._cache = cache
        self._connector = connector
        self._width = cache.namespace.spec.chunk_tokens
        self._timeout_s = timeout_s
        self._asked: OrderedDict[str, _Asked] = OrderedDict()
        self._late: _Task[Any] | None = None
        self._tasks: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="lmcache-find", daemon=True)
        self._thread.start()

    def find(self, rid: str, keys: list[str]) -> int:
        """How many pages from the front can be loaded for a request, all there and verified."""
        if not getattr(self._cache, "connected", True):
            return 0
        now = time.monotonic()
        before = self._asked.get(rid)
        at = _place(before.keys, keys) if before is not None else None
        if before is not None and at is not None and now < before.until:
            return max(0, min(before.pages - at, len(keys)))
        # Who has waited for a tier once is not waited for again: what has come since is found.
        patience_s = _WAIT * self._timeout_s if at is None else 0.0
        found = self._ask(lambda: self._lookup(rid, keys, now + patience_s), lambda _: None)
        if found is None:
            return 0
        pages, cut = found
        fresh_s = _CUT_FRESH_S if cut else _FRESH_S
        self._asked[rid] = _Asked(keys[: pages + 1], pages, time.monotonic() + fresh_s)
        self._asked.move_to_end(rid)
        if not pages and not cut:
            self._forget(rid)
        if len(self._asked) > _MOST_ASKED:
            self._forget(self._asked.popitem(last=False)[0])
        return pages

    def take(self, rid: str, keys: list[str]) -> Taken | None:
        """Pages that were found for a request: no more can happen to them; None if something has. Either way the
        request is forgotten.
        """
        asked = self._asked.pop(rid, None)
        at = _place(asked.keys, keys) if asked is not None else None
        if asked is None or at is None or at + len(keys) > asked.pages:
            return None
        taken = self._ask(lambda: self._take(rid, at, at + len(keys)), self.give_back)
        self._forget(rid)
        return taken

    def give_back(self, taken: Taken) -> None:
        """It is not going to be loaded. Does not block."""
        self._tasks.put(lambda: self._cache.release(taken.ticket))

    def forget_all(self) -> None:
        """SGLang has no requests any more."""
        for rid in self._asked:
            self._forget(rid)
        self._asked.clear()

    def close(self, timeout_s: float) -> None:
        """End the thread after what is under way."""
        self._tasks.put(None)
        self._thread.join(timeout_s)

    def _forget(self, rid: str) -> None:
        self._tasks.put(lambda: self._cache.forget(rid))

    # On the thread

    def _lookup(self, rid: str, keys: list[str], deadline: float) -> tuple[int, bool]:
        """(pages that can be loaded, whether more of them are on their way)."""
        found = self._cache.lookup(rid, Chain.from_digests(digests_of(keys), self._width))
        if found.state != LookupState.PENDING:
            return found.chunks, False
        left = max(0.0, deadline - time.monotonic())
        in_time = found.eta_s is None or found.eta_s < left
        pages = self._cache.wait(rid, left if in_time else 0.0).chunks
        return pages, pages < max(found.found, 1)

    def _take(self, rid: str, first: int, end: int) -> Taken | None:
        ticket = self._cache.claim(rid, end, first=first)
        return self._connector.take(ticket) if ticket is not None else None

    def _work(self) -> None:
        while (task := self._tasks.get()) is not None:
            try:
                task()
            except Exception:  # noqa: BLE001 - without this thread there would be no hit any more
                _log.exception("something was not done")

    def _ask(self, do: Callable[[], _T | None], undo: Callable[[_T], None]) -> _T | None:
        if self._late is not None and self._late.under_way:
            return None
        task = _Task(do, undo)
        self._tasks.put(task.run)
        result = task.wait(self._timeout_s)
        self._late = task if task.under_way else None
        return result


def _place(held: list[str], keys: list[str]) -> int | None:
    """Where ``keys`` begin in ``held``, and are the same as far as it goes; None if they do not."""
    try:
        at = held.index(keys[0])
    except (ValueError, IndexError):
        return None
    count = min(len(held) - at, len(keys))
    return at if held[at : at + count] == keys[:count] else None
