"""Two daemons, as on two nodes, over one Redis server: ``python tests/vllm/fleet.py``, in the environment `backends`.

Prints the daemons' URLs as a JSON list when they are ready, an empty one if there is no server to be had, and ends all
of it when its stdin ends. vLLM's environment has neither the server nor a client for it, as an engine's need not have.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[2]))  # behind the installed package

from tests.backends.redis_server import Server
from tests.core.served import Served


def main() -> None:
    if shutil.which("redis-server") is None:
        print([], flush=True)
        return
    nodes = Served(), Served()
    try:
        with Server() as redis:
            for node in nodes:
                node.start("--tier", f"redis://127.0.0.1:{redis.port}", pool="64MiB")
            print(json.dumps([node.url for node in nodes]), flush=True)
            sys.stdin.read()
    finally:
        for node in nodes:
            node.close()


if __name__ == "__main__":
    main()
