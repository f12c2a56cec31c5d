"""A real ``lmcache-sdk serve`` on a socket of its own, as systemd would start it; and what the tests ask of one."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from lmcache_sdk.daemon.serve import pool_directory
from lmcache_sdk.pool.shared import SharedPool

COMMAND = [sys.executable, "-c", "from lmcache_sdk.cli import main; main()"]


def environment(**variables: str) -> dict[str, str]:
    """Of this process, without anybody's settings."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("LMCACHE_SDK_")}
    return kept | variables


def command(*arguments: object, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run ``lmcache-sdk`` to its end."""
    line = [*COMMAND, *map(str, arguments)]
    return subprocess.run(line, capture_output=True, text=True, check=False, env=environment(**variables), timeout=30)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Served:
    """A place for a daemon: folder, socket, pool. ``start`` can be called again after ``stop``."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="kv-", dir="/tmp"))  # short: a socket's path has 107 bytes
        self.socket = self.folder / "s"
        self.url = f"unix://{self.socket}"
        self.pool = pool_directory(self.socket)
        self.process: subprocess.Popen[bytes] | None = None
        self.seconds = 0.0

    def start(self, *arguments: object, pool: str = "8MiB", **variables: str) -> None:
        """Returns when the daemon has told that it is ready. Its log goes to ``log``."""
        notify = self.folder / "notify"
        notify.unlink(missing_ok=True)
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as channel, (self.folder / "log").open("ab") as log:
            channel.bind(str(notify))
            channel.settimeout(20)
            started = time.perf_counter()
            line = [*COMMAND, "serve", "--socket", str(self.socket), "--pool", pool, *map(str, arguments)]
            self.process = subprocess.Popen(
                line, stderr=log, env=environment(NOTIFY_SOCKET=str(notify), **variables), cwd=self.folder
            )
            try:
                assert channel.recv(100) == b"READY=1"
            except TimeoutError:
                raise AssertionError(self.log()) from None
            self.seconds = time.perf_counter() - started

    def stop(self, number: int = signal.SIGTERM) -> int:
        """The exit status."""
        assert self.process is not None
        self.process.send_signal(number)
        return self.process.wait(20)

    def log(self) -> str:
        return (self.folder / "log").read_text()

    def status(self) -> Any:
        done = command("status", "--socket", self.socket, "--json")
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    def close(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        SharedPool.remove(self.pool)
        shutil.rmtree(self.folder)
