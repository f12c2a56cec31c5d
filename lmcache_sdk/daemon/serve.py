"""Putting a daemon together: pool, tiers, store, server; and its orderly end."""

from __future__ import annotations

import hashlib
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from lmcache_sdk.backend import open_backend
from lmcache_sdk.core import Limits
from lmcache_sdk.daemon.server import Server, Settings
from lmcache_sdk.observe.logs import logger
from lmcache_sdk.pool.shared import SharedPool
from lmcache_sdk.store import Store, Tier

_log = logger("daemon")

DRAIN_S = 30.0


@dataclass(frozen=True)
class Daemon:
    """Everything that runs; made by :func:`daemon`."""

    pool: SharedPool
    store: Store
    server: Server


def pool_directory(socket: Path) -> Path:
    """Where the pool of the daemon on this socket lies: on tmpfs, so that it outlives the process."""
    name = hashlib.sha256(os.fsencode(socket.absolute())).hexdigest()[:12]
    return Path("/dev/shm") / f"lmcache-sdk-{os.getuid()}-{name}"  # noqa: S108 - SharedPool refuses what is not ours


@contextmanager
def daemon(
    settings: Settings,
    *,
    pool_bytes: int,
    tiers: Sequence[str] = (),
    directory: Path | None = None,
    limits: Limits | None = None,
    keep_pool: bool = True,
) -> Iterator[Daemon]:
    """A daemon that is ready to serve; ended in order on leaving: writes are drained, the pool is kept.

    Args:
        tiers: URLs, fastest first.
        directory: of the pool; by default :func:`pool_directory`.
        keep_pool: leave the pool for the next life.

    Raises:
        ConfigError, BackendError: what cannot be opened, and the fix.
    """
    with ExitStack() as undo:
        pool = SharedPool.open(directory or pool_directory(settings.socket), pool_bytes)
        undo.callback(lambda: pool.close(keep=keep_pool))
        opened: list[Tier] = []
        with ExitStack() as failed:
            for url in tiers:
                tier = Tier(url.partition("://")[0], open_backend(url))
                failed.callback(tier.backend.close, 1.0)
                opened.append(tier)
            store = Store(opened, pool=pool, limits=limits)
            failed.pop_all()
        undo.callback(store.close, DRAIN_S)
        server = Server(store, pool, settings)
        undo.callback(server.close)
        yield Daemon(pool, store, server)


def run(running: Daemon, on_ready: Callable[[], None] = lambda: None) -> None:
    """Serve until SIGTERM or SIGINT. In the main thread."""
    started = time.perf_counter()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: running.server.stop())
    _log.info("ready after %.2f s", time.perf_counter() - started)
    on_ready()
    running.server.serve()
    _log.info("stopping: writing what is not yet in the tiers")
