"""Bounds for a tier whose store has none of its own: the oldest records are deleted, in the background."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from heapq import heappush, heappushpop
from typing import NamedTuple

from lmcache_sdk.backend import Backend, Scan
from lmcache_sdk.errors import BackendError, UnsupportedError
from lmcache_sdk.listing import parse_key
from lmcache_sdk.observe.logs import logger

_log = logger("janitor")

SWEEP_S = 60.0  # between two sweeps; longer where listing takes long
_IDLE_PART = 20  # listing may take one part in so many of the time
_MOST = 10_000  # deleted in one sweep, so that what is remembered of a store of millions stays small
_BATCH = 256
_DOWN_TO = 0.95  # of the size, so that not every sweep has work


class Swept(NamedTuple):
    """What one look at a store found and did."""

    records: int
    nbytes: int
    deleted: int
    deleted_bytes: int


def sweep(
    backend: Backend,
    *,
    size: int = 0,
    ttl_s: float = 0.0,
    keep: Callable[[str], bool] = lambda key: False,
    now: float | None = None,
    stopped: Callable[[], bool] = lambda: False,
) -> Swept:
    """List a store, and delete what is older than ``ttl_s`` and, oldest first, what is beyond ``size`` bytes.

    What is no chunk's record is left alone and not counted: descriptions, and what others keep there.

    Args:
        size, ttl_s: 0 = no bound.
        keep: keys that stay for all the size says; what is too old goes nevertheless.
        now: seconds since the epoch.
        stopped: asked in between; once it is true, nothing more is done.

    Raises:
        BackendError: as the backend does.
        UnsupportedError: it does not tell when records were written.
    """
    assert isinstance(backend, Scan)
    now = time.time() if now is None else now
    oldest: list[tuple[float, str, int]] = []  # (minus the time, key, bytes): the youngest of them first
    records = nbytes = 0
    for stat in backend.scan():
        if stopped():
            return Swept(records, nbytes, 0, 0)
        named = parse_key(stat.key)
        if named is None or named.is_manifest:
            continue
        if not stat.modified:
            raise UnsupportedError("the store does not tell when its records were written, so size and ttl do nothing")
        records += 1
        nbytes += stat.nbytes
        item = (-stat.modified, stat.key, stat.nbytes)
        if len(oldest) < _MOST:
            heappush(oldest, item)
        else:
            heappushpop(oldest, item)
    too_much = nbytes - int(_DOWN_TO * size) if size and nbytes > size else 0
    going, gone = [], 0
    for negative, key, length in sorted(oldest, reverse=True):
        if (ttl_s and -negative < now - ttl_s) or (gone < too_much and not keep(key)):
            going.append(key)
            gone += length
    for at in range(0, len(going), _BATCH):
        if stopped():
            break
        backend.delete(going[at : at + _BATCH])
    return Swept(records, nbytes, len(going), gone)


class Janitor:
    """A thread that sweeps one tier from time to time.

    Args:
        name: the tier's.
        size, ttl_s, keep: as in :func:`sweep`.
        on_error: told what went wrong; the next sweep tries again.
    """

    def __init__(
        self,
        name: str,
        backend: Backend,
        *,
        size: int,
        ttl_s: float,
        keep: Callable[[str], bool],
        on_error: Callable[[Exception], None],
    ) -> None:
        self._name = name
        self._backend = backend
        self._size, self._ttl_s, self._keep = size, ttl_s, keep
        self._on_error = on_error
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, name=f"lmcache-{name}-janitor", daemon=True)
        self._thread.start()

    def stop(self, deadline: float) -> bool:
        """End it; False if a call of the backend is still under way at the deadline (of :func:`time.monotonic`)."""
        self._stop.set()
        self._thread.join(max(0.0, deadline - time.monotonic()))
        return not self._thread.is_alive()

    def _work(self) -> None:
        pause_s = 0.0
        while not self._stop.wait(pause_s):
            started = time.monotonic()
            more = False
            try:
                swept = sweep(
                    self._backend,
                    size=self._size,
                    ttl_s=self._ttl_s,
                    keep=self._keep,
                    stopped=self._stop.is_set,
                )
                more = swept.deleted >= _MOST
                if swept.deleted:
                    _log.info("%s: deleted the oldest %d of %d records", self._name, swept.deleted, swept.records)
            except UnsupportedError as error:
                _log.error("%s: %s", self._name, error)
                return
            except Exception as error:  # noqa: BLE001 - a backend is other people's code
                if not self._stop.is_set():
                    self._on_error(error)
                    _log.warning("%s: %s", self._name, error, exc_info=not isinstance(error, BackendError))
            took_s = time.monotonic() - started
            pause_s = _IDLE_PART * took_s if more else max(SWEEP_S, _IDLE_PART * took_s)
