"""The breaking proxy in a process of its own: for a client that stops this interpreter while it waits."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import Coroutine
from types import TracebackType
from typing import Any, Self

from lmcache_sdk.testing.proxy import Proxy


class ProxyProcess(Proxy):
    """Takes the same commands. What it counts stays in the process."""

    def __enter__(self) -> Self:
        self._child = subprocess.Popen(
            [sys.executable, __file__, self.target_host, str(self.target_port), str(self.seed)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1,
        )  # fmt: skip
        self.port = int(self._answer())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._child.communicate(timeout=10)

    def _answer(self) -> str:
        assert self._child.stdout is not None
        return self._child.stdout.readline()

    async def _change(self, mode: str, **options: Any) -> None:
        assert self._child.stdin is not None
        self._child.stdin.write(json.dumps({"mode": mode, **options}) + "\n")
        assert self._answer() == "done\n"

    def _run(self, work: Coroutine[Any, Any, None]) -> None:
        asyncio.run(work)


if __name__ == "__main__":
    with Proxy(sys.argv[1], int(sys.argv[2]), int(sys.argv[3])) as proxy:
        print(proxy.port, flush=True)
        for line in sys.stdin:
            proxy._run(proxy._change(**json.loads(line)))
            print("done", flush=True)
