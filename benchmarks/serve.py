"""A daemon of its own process for the benchmarks: prefaulted, without tiers, its pool removed at the end."""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from benchmarks.prompts import PRODUCER
from lmcache_sdk.daemon.client import DaemonCache
from lmcache_sdk.daemon.serve import daemon, run
from lmcache_sdk.daemon.server import Settings
from lmcache_sdk.observe.logs import log_to_stderr
from lmcache_sdk.pool import journal
from lmcache_sdk.spec import Namespace


class Daemon(NamedTuple):
    """A daemon that runs."""

    socket: Path
    pid: int

    def own_bytes(self) -> int:
        """Resident memory of its own: without the pool."""
        for line in Path(f"/proc/{self.pid}/status").read_text(encoding="ascii").splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) << 10
        raise AssertionError("no RssAnon")


def connect(socket: Path, space: Namespace, timeout_s: float = 10.0) -> DaemonCache:
    """A client, by default of much patience: a call that is late is to be measured, not to be given up."""
    cache = DaemonCache(socket, space, PRODUCER, call_timeout_s=timeout_s)
    assert cache.connected
    return cache


@contextlib.contextmanager
def running(pool_bytes: int, *, extent_bytes: int = 0) -> Iterator[Daemon]:
    """Start a daemon, and end it.

    Args:
        extent_bytes: have room in the journal for extents of this size, where they are much smaller than a model's.
    """
    with tempfile.TemporaryDirectory(prefix="lmcache-sdk-bench-") as folder:
        socket = Path(folder) / "socket"
        command = [sys.executable, "-m", "benchmarks.serve", str(socket), str(pool_bytes), str(extent_bytes)]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
            try:
                assert process.stdout is not None
                assert process.stdout.readline() == b"ready\n", "the daemon did not start"
                yield Daemon(socket, process.pid)
            finally:
                process.send_signal(signal.SIGCONT)
                process.terminate()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("socket", type=Path)
    parser.add_argument("pool_bytes", type=int)
    parser.add_argument("extent_bytes", type=int)
    options = parser.parse_args()
    log_to_stderr("WARNING")
    if options.extent_bytes:
        journal._TYPICAL_EXTENT_BYTES = options.extent_bytes
    with daemon(Settings(options.socket), pool_bytes=options.pool_bytes, keep_pool=False) as running:
        running.pool.prefault()

        def ready() -> None:
            os.write(1, b"ready\n")

        run(running, ready)


if __name__ == "__main__":
    main()
