"""A daemon in this process, whose bounds a test can move."""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lmcache_sdk.daemon import serve
from lmcache_sdk.daemon.server import Settings
from tests.daemon.daemon_process import until


class Here:
    """What tests need to know of it."""

    def __init__(self, socket: Path, running: serve.Daemon) -> None:
        self.socket = socket
        self.store = running.store
        self.server = running.server

    def held(self) -> tuple[int, int]:
        """Leases and reservations, after a look at all that it knows."""
        self.store.check_integrity()
        with self.store._lock:
            return len(self.store._core.leases), len(self.store._core.reservations)

    def settled(self, seconds: float = 5.0) -> None:
        until(lambda: self.held() == (0, 0), seconds, "giving everything back")


@contextmanager
def daemon_here(*, pool_bytes: int = 1 << 20, **settings: Any) -> Iterator[Here]:
    with (
        tempfile.TemporaryDirectory(prefix="kv-", dir="/tmp") as folder,
        tempfile.TemporaryDirectory(prefix="lmcache-sdk-test-", dir="/dev/shm") as memory,
    ):
        socket = Path(folder) / "s"
        with serve.daemon(
            Settings(socket, **settings), pool_bytes=pool_bytes, directory=Path(memory) / "pool", keep_pool=False
        ) as running:
            thread = threading.Thread(target=running.server.serve)
            thread.start()
            try:
                yield Here(socket, running)
            finally:
                running.server.stop()
                thread.join(10)
