"""A daemon as a process of its own, over a small pool; and, run as a program, that process."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Self

from lmcache_sdk.pool.shared import SharedPool

READY_S = 20.0


def until(true: Callable[[], Any], seconds: float = 10.0, what: str = "it") -> float:
    """Wait for something that another process does; the answer is how long that took."""
    started, pause = time.monotonic(), threading.Event()
    while not true():
        assert time.monotonic() - started < seconds, f"{what} did not happen within {seconds} s"
        pause.wait(0.005)
    return time.monotonic() - started


class Process:
    """A child that is given and gives lines of JSON; its log goes to a file."""

    def __init__(self, line: Sequence[str], log: Path) -> None:
        self.log = log
        with log.open("ab") as file:
            self.child = subprocess.Popen(
                line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=file, text=True, bufsize=1
            )

    @property
    def pid(self) -> int:
        return self.child.pid

    def ask(self, **message: Any) -> Any:
        self.tell(**message)
        return self.hear()

    def tell(self, **message: Any) -> None:
        assert self.child.stdin is not None
        self.child.stdin.write(json.dumps(message) + "\n")
        self.child.stdin.flush()

    def hear(self) -> Any:
        assert self.child.stdout is not None
        line = self.child.stdout.readline()
        assert line, f"the process ended by itself ({self.child.wait(10)}): {self.log.read_text()[-4000:]}"
        return json.loads(line)

    def stop(self) -> None:
        """SIGSTOP; returns when it has stopped."""
        os.kill(self.pid, signal.SIGSTOP)
        until(lambda: Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0] == "T")

    def go_on(self) -> None:
        os.kill(self.pid, signal.SIGCONT)

    def kill(self) -> None:
        if self.child.poll() is None:
            self.child.kill()
            self.child.wait(20)
        for pipe in (self.child.stdin, self.child.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):  # a line that nobody reads any more
                    pipe.close()


class Daemon:
    """A place for a daemon: a folder, a socket, a pool. ``start`` can be called again, as often as it has ended.

    Args:
        lmdb: whether it has a disk below its memory.
        command: what the process is put behind, such as ``unshare``.
        settings: of the server.
    """

    def __init__(self, *, pool_bytes: int = 1 << 20, lmdb: bool = False, hold_s: float = 60.0, **settings: Any) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="kv-", dir="/tmp")
        self.folder = Path(self._folder.name)
        self.socket = self.folder / "s"
        self.url = f"unix://{self.socket}"
        self.pool = Path(tempfile.mkdtemp(prefix="lmcache-sdk-test-", dir="/dev/shm"))
        self.options: dict[str, Any] = {
            "socket": str(self.socket),
            "directory": str(self.pool / "pool"),
            "pool_bytes": pool_bytes,
            "tiers": [f"lmdb://{self.folder}/kv?size=64MiB"] if lmdb else [],
            "hold_s": hold_s,
            "settings": settings,
        }
        self.process: Process | None = None

    def start(self, *, command: Sequence[str] = (), **options: Any) -> Process:
        """Returns when it is ready."""
        assert self.process is None or self.process.child.poll() is not None, "it is there already"
        self.end()
        line = [*command, sys.executable, __file__, json.dumps(self.options | options)]
        self.process = Process(line, self.folder / "log")
        assert self.process.hear() == "ready"
        return self.process

    def fail(self, *, command: Sequence[str] = (), **options: Any) -> str:
        """Start it where it cannot: what it says."""
        line = [*command, sys.executable, __file__, json.dumps(self.options | options)]
        done = subprocess.run(line, capture_output=True, text=True, check=False, timeout=30, stdin=subprocess.DEVNULL)
        assert done.returncode != 0, done.stdout
        return done.stderr

    def check(self) -> Any:
        """Its figures, after a look at all that it knows."""
        assert self.process is not None
        return self.process.ask(do="check")

    def settled(self, seconds: float = 5.0) -> Any:
        """Its figures once nobody holds anything."""
        figures: Any = {}

        def quiet() -> bool:
            nonlocal figures
            figures = self.check()
            return bool(figures["leases"] == figures["reservations"] == figures["quarantined_bytes"] == 0)

        until(quiet, seconds, "giving everything back")
        return figures

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            until(self._unlocked)  # behind unshare it ends a little later than what was killed

    def _unlocked(self) -> bool:
        lock = self.pool / "pool" / "LOCK"
        if not lock.exists():
            return True
        with lock.open("rb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
        return True

    def terminate(self) -> int:
        assert self.process is not None
        self.process.child.terminate()
        return self.process.child.wait(20)

    def end(self) -> None:
        self.kill()
        self.process = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()
        SharedPool.remove(self.pool / "pool")
        self.pool.rmdir()
        self._folder.cleanup()


def main() -> None:
    from lmcache_sdk.core import Limits
    from lmcache_sdk.daemon.serve import daemon, run
    from lmcache_sdk.daemon.server import Settings
    from lmcache_sdk.observe.logs import log_to_stderr

    log_to_stderr()
    options = json.loads(sys.argv[1])
    settings = Settings(Path(options["socket"]), **options["settings"])
    with daemon(
        settings,
        pool_bytes=options["pool_bytes"],
        tiers=options["tiers"],
        directory=Path(options["directory"]),
        limits=Limits(hold_s=options["hold_s"]),
    ) as running:

        def listen() -> None:
            store = running.store
            for line in sys.stdin:
                message = json.loads(line)
                if message["do"] == "check":
                    store.check_integrity()
                    stats = store.stats()
                    answer = {name: getattr(stats.pool, name) for name in stats.pool.__struct_fields__}
                    assert stats.pool.free_bytes + stats.pool.used_bytes + stats.pool.quarantined_bytes == (
                        stats.pool.total_bytes
                    )
                    with store._lock:
                        answer["reservations"] = len(store._core.reservations)
                    answer |= {"leases": stats.leases, "chunks": stats.chunks, "boot": store.boot}
                    answer["clients"] = running.server.client_count
                    answer["descriptors"] = sum(1 for _ in Path("/proc/self/fd").iterdir())
                    answer["record_failures"] = sum(
                        value for name, value in stats.counters.items() if "record_failures" in name
                    )
                print(json.dumps(answer), flush=True)

        threading.Thread(target=listen, daemon=True).start()
        run(running, lambda: print('"ready"', flush=True))


if __name__ == "__main__":
    main()
