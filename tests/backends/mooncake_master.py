"""A Mooncake store on this machine: a master, and nodes that give it memory; and, run as a program, such a node."""

from __future__ import annotations

import importlib
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pytest

READY_S = 20.0


def client_module() -> Any:
    """The store's own client. Without it the test is skipped, but fails where ``CI`` is ``true``; here and not by
    ``programs.lacking``, since this file is a program, too.
    """
    try:
        return importlib.import_module("mooncake.store")
    except ImportError as error:
        reason = f"the Mooncake client does not load ({error}); the environment `backends` has what it needs"
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)


def bare_client(master: str, segment: int = 0, staging: int = 16 << 20) -> Any:
    """A client without anything of ours."""
    client = client_module().MooncakeDistributedStore()
    code = client.setup("127.0.0.1", "P2PHANDSHAKE", segment, staging, "tcp", "", master)
    assert code == 0, f"setup: {code}"
    return client


class MooncakeMaster:
    """``mooncake_master`` on free ports of the loopback interface. A context manager.

    Args:
        folder: for its log.
        lease_s: how long what was looked for is not evicted.
        lost_s: after how long without a sign of life a node is given up.
    """

    def __init__(self, folder: Path, lease_s: float = 5.0, lost_s: float = 2.0) -> None:
        self._program = Path(client_module().__file__).with_name("mooncake_master")
        self._log = folder / "mooncake.log"
        self._nodes: list[subprocess.Popen[str]] = []
        self._options = [f"--default_kv_lease_ttl={round(lease_s * 1000)}", f"--client_ttl={round(lost_s)}"]
        with socket.socket() as rpc, socket.socket() as metrics:
            rpc.bind(("127.0.0.1", 0))
            metrics.bind(("127.0.0.1", 0))
            self.port: int = rpc.getsockname()[1]
            self._metrics_port: int = metrics.getsockname()[1]
        self.address = f"127.0.0.1:{self.port}"

    def start(self) -> None:
        """Start it, or start it again: at the same port, and without what it knew."""
        line = [
            str(self._program), f"--rpc_port={self.port}", "--rpc_address=127.0.0.1",
            f"--metrics_port={self._metrics_port}", "--metrics_host=127.0.0.1", *self._options,
        ]  # fmt: skip
        with self._log.open("ab") as log:
            self.process = subprocess.Popen(line, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        deadline = time.monotonic() + READY_S
        while True:
            try:
                socket.create_connection(("127.0.0.1", self.port), 1).close()
                return
            except OSError:
                assert self.process.poll() is None, self._log.read_text()[-2000:]
                assert time.monotonic() < deadline, f"no master after {READY_S} s: {self._log.read_text()[-2000:]}"
                time.sleep(0.01)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def add_node(self, nbytes: int) -> subprocess.Popen[str]:
        """A process that gives memory to the store, until its stdin is closed."""
        with self._log.open("ab") as log:
            node = subprocess.Popen(
                [sys.executable, __file__, self.address, str(nbytes)],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True,
            )  # fmt: skip
        self._nodes.append(node)
        assert node.stdout is not None
        for text in node.stdout:  # the client prints, too
            if text.startswith("ready"):
                return node
        raise AssertionError(f"the node ended ({node.wait()}): {self._log.read_text()[-2000:]}")

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for process in (*self._nodes, self.process):
            process.send_signal(signal.SIGCONT)
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    pipe.close()


if __name__ == "__main__":
    held = bare_client(sys.argv[1], int(sys.argv[2]))
    print("\nready", flush=True)
    sys.stdin.read()
    held.close()
