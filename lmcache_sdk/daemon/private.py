"""A daemon of one engine's own, for an engine of several processes that asks for a store by its URL.

It has its own socket and pool, and ends with the engine: when that closes it, and when that is gone, however it went.
Nothing of its pool remains, whoever is killed first.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import select
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lmcache_sdk import errors
from lmcache_sdk.daemon.client import DaemonCache
from lmcache_sdk.errors import BackendUnavailable, LMCacheSDKError
from lmcache_sdk.lineage import Lineage
from lmcache_sdk.observe.logs import log_to_stderr, logger
from lmcache_sdk.pool.shared import SharedPool
from lmcache_sdk.spec import Namespace, Producer, Share

_log = logger("private")

_START_S = 30.0
_START_S_PER_GIB = 3.0  # the kernel hands out memory at 0.3 s per GiB, where nothing else goes on
_CLOSE_S = 60.0
_LAST_S = 0.2  # to end without being killed, though no time is left


class PrivateDaemon:
    """The engine's side; made by :func:`start_private`."""

    def __init__(self, process: subprocess.Popen[bytes], socket: Path) -> None:
        self.socket = socket
        self.url = f"unix://{socket}"
        self._process = process
        self._owner = os.getpid()

    @property
    def pid(self) -> int:
        return self._process.pid

    def close(self, timeout_s: float = _CLOSE_S) -> None:
        """End it: it writes to its tiers what is not there yet. At the deadline it is killed. Idempotent.

        Without effect in a child that was forked: it is the parent's.
        """
        if os.getpid() != self._owner:
            return
        process = self._process
        assert process.stdin is not None and process.stdout is not None
        if not process.stdin.closed:
            with contextlib.suppress(BrokenPipeError):
                process.stdin.write(b"\n")  # the order to end; a child that was forked keeps the pipe open
                process.stdin.close()
        try:
            process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            _log.warning("the private daemon did not end within %.1f s and is killed", timeout_s)
            process.kill()
            process.wait()
        process.stdout.close()
        if self.socket.parent.exists():  # it was killed, and could not do this itself
            from lmcache_sdk.daemon.serve import pool_directory

            shutil.rmtree(self.socket.parent, ignore_errors=True)
            with contextlib.suppress(LMCacheSDKError):
                SharedPool.remove(pool_directory(self.socket))


class PrivateCache(DaemonCache):
    """A Cache in a daemon of its own, which ends with it. See :class:`lmcache_sdk.api.Cache` for the methods."""

    def __init__(
        self,
        private: PrivateDaemon,
        namespace: Namespace,
        producer: Producer,
        *,
        share: str = Share.VERIFIED,
        lineage: Lineage | None = None,
    ) -> None:
        self._private = private
        try:
            super().__init__(private.socket, namespace, producer, share=share, lineage=lineage)
        except BaseException:
            private.close(1.0)
            raise

    def close(self, timeout_s: float = 10.0) -> None:
        deadline = time.monotonic() + timeout_s
        super().close(timeout_s)
        self._private.close(max(_LAST_S, deadline - time.monotonic()))


def start_private(tiers: Sequence[str], pool_bytes: int, *, socket: Path | None = None) -> PrivateDaemon:
    """Start a daemon for this process, and wait until it is ready.

    Args:
        tiers: URLs of stores, fastest first.
        socket: for processes that must know it beforehand; its folder must not exist, and goes with the daemon. By
            default in a new folder with a random name.

    Raises:
        ConfigError, BackendError: as the daemon says; BackendUnavailable also if it is not ready in time.
    """
    if socket is None:
        socket = Path(tempfile.mkdtemp(prefix="lmcache-sdk-")) / "socket"
    else:
        try:
            socket.parent.mkdir(mode=0o700)
        except OSError as error:
            raise BackendUnavailable(f"cannot make {socket.parent} for the engine's own daemon: {error}") from error
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "lmcache_sdk.daemon.private"],  # -P: nothing from the current directory
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=os.environ | {"OPENBLAS_NUM_THREADS": "1"},  # its numpy multiplies nothing: threads only cost time to start
        start_new_session=True,  # Ctrl-C is for the engine, which then closes or leaves it
    )
    private = PrivateDaemon(process, socket)
    assert process.stdin is not None and process.stdout is not None
    level = logging.getLevelName(_log.getEffectiveLevel())
    # By its input and not its arguments, which all users can see: URLs may hold passwords.
    settings = {
        "socket": str(socket),
        "tiers": list(tiers),
        "pool_bytes": pool_bytes,
        "parent": os.getpid(),
        "log_level": level,
    }
    timeout_s = _START_S + _START_S_PER_GIB * pool_bytes / (1 << 30)
    try:
        with contextlib.suppress(BrokenPipeError):  # then it says why, or nothing
            process.stdin.write(json.dumps(settings).encode() + b"\n")
            process.stdin.flush()
        answer = _line(process.stdout.fileno(), timeout_s)
        if answer is None:
            raise BackendUnavailable(
                f"the private daemon was not ready within {timeout_s:.0f} s; make its pool smaller"
            )
        if not answer.get("ready"):
            kind = getattr(errors, answer.get("error", ""), BackendUnavailable)
            raise kind(answer.get("message", "the private daemon ended at start; its output says why"))
        return private
    except BaseException:
        private.close(1.0)
        raise


def _line(descriptor: int, timeout_s: float) -> dict[str, Any] | None:
    """What the daemon says when it is ready, or has failed; {} if it ended without a word, None if it says nothing."""
    deadline, text = time.monotonic() + timeout_s, b""
    while b"\n" not in text:
        readable, _, _ = select.select([descriptor], [], [], max(0.0, deadline - time.monotonic()))
        if not readable:
            return None
        data = os.read(descriptor, 1 << 16)
        if not data:
            return {}
        text += data
    found: dict[str, Any] = json.loads(text)
    return found


# The daemon's side


def main() -> None:
    """Serve until the parent closes the pipe or is gone."""
    settings = json.loads(sys.stdin.buffer.readline())
    log_to_stderr(settings["log_level"])
    from lmcache_sdk.daemon.serve import daemon, run
    from lmcache_sdk.daemon.server import Settings

    socket = Path(settings["socket"])
    try:
        with daemon(
            Settings(socket=socket, client_share=1.0),
            pool_bytes=settings["pool_bytes"],
            tiers=settings["tiers"],
            keep_pool=False,
        ) as running:
            watch = threading.Thread(target=_watch, args=(settings["parent"], running.server.stop), daemon=True)
            watch.start()
            run(running, lambda: _say({"ready": True}))
    except LMCacheSDKError as error:
        _say({"error": type(error).__name__, "message": str(error)})
        sys.exit(1)
    finally:
        shutil.rmtree(socket.parent, ignore_errors=True)


def _watch(parent: int, stop: Callable[[], None]) -> None:
    """Wait for the parent's word or its end.

    The pipe alone would not do: children that the parent has forked hold it open. Nor would the kernel's signal on a
    parent's death, which comes when the thread ends that has started us.
    """
    waiting = select.poll()
    waiting.register(sys.stdin.fileno(), select.POLLIN)
    with contextlib.suppress(OSError):
        waiting.register(os.pidfd_open(parent), select.POLLIN)
    if os.getppid() == parent:  # else it is gone already, and the number perhaps another's
        waiting.poll()
    stop()


def _say(answer: dict[str, Any]) -> None:
    with contextlib.suppress(BrokenPipeError):
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
