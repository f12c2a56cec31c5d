"""An engine as a process of its own, that stores and loads prompts and can be held up between two layers of a copy."""

from __future__ import annotations

import json
import os
import pickle
import sys
import threading
from pathlib import Path
from typing import Any, Self

if __name__ == "__main__":
    sys.path.append(str(Path(__file__).resolve().parents[2]))  # behind what is installed, which is what is tested

import numpy as np

from lmcache_sdk.api import Cache, LookupState, Ticket
from lmcache_sdk.connector import GPUConnector
from lmcache_sdk.daemon.client import DaemonCache
from lmcache_sdk.kernels import CPUKernels
from lmcache_sdk.keys import Chain
from lmcache_sdk.spec import CellGrid, Namespace
from tests.core import engine
from tests.daemon.daemon_process import Daemon, Process

CHUNKS = 4
PAGES = 64


def layered(**arguments: Any) -> Namespace:
    """A cell for each layer: a copy is as many steps."""
    return engine.namespace(grid=CellGrid(layers_per_cell=1), **arguments)


def prompt(seed: int, chunks: int = CHUNKS) -> Any:
    return engine.tokens_of(seed, chunks * engine.CHUNK)


class Engine:
    """Stores and loads prompts that are named by a number, and knows what their KV must be."""

    def __init__(self, cache: Cache, kernels: Any = None, tenant: str = "") -> None:
        self.cache = cache
        self.tenant = tenant
        self.memory, self.expected = engine.PagedEngine(PAGES), engine.PagedEngine(PAGES)
        self.connector = GPUConnector(cache, self.memory.layout, write_op=self.memory.write, kernels=kernels)
        self.turn = 0

    @property
    def daemon(self) -> DaemonCache:
        assert isinstance(self.cache, DaemonCache)
        return self.cache

    def chain(self, seed: int, chunks: int) -> Chain:
        return Chain(prompt(seed, chunks), engine.CHUNK, tenant=self.tenant)

    def store(self, seed: int, chunks: int = CHUNKS) -> Any:
        chain, slots = self.chain(seed, chunks), engine.slots_of(seed, chunks * engine.CHUNK, PAGES)
        self.memory.compute(prompt(seed, chunks), slots)
        return self.connector.store(f"store-{seed}", chain, 0, slots)

    def claim(self, seed: int, chunks: int = CHUNKS, parts: int = 1) -> Ticket | None:
        self.turn += 1
        rid = f"load-{self.turn}"
        found = self.cache.lookup(rid, self.chain(seed, chunks))
        if found.state is LookupState.PENDING:
            found = self.cache.wait(rid, 10)
        ticket = self.cache.claim(rid, found.chunks, parts=parts) if found.chunks else None
        self.cache.forget(rid)
        return ticket

    def start(self, ticket: Ticket, seed: int) -> Any:
        for layer in self.memory.kv:
            for plane in layer:
                plane[:] = 0
        slots = engine.slots_of(seed + 1, ticket.boundary * engine.CHUNK, PAGES)
        return self.connector.load(ticket, slots), slots

    def finish(self, transfer: Any, slots: Any, seed: int) -> dict[str, Any]:
        """What came, and whether it is right: of each chunk that is said to be loaded, all bytes are compared."""
        assert transfer.wait(30)
        failed = set(transfer.failed_chunks())
        chunks = len(slots) // engine.CHUNK
        self.expected.compute(prompt(seed, chunks), slots)
        wrong = []
        for chunk in set(range(chunks)) - failed:
            mine = slots[chunk * engine.CHUNK : (chunk + 1) * engine.CHUNK]
            if not np.array_equal(self.memory.rows(mine), self.expected.rows(mine)):
                wrong.append(chunk)
        return {"hit": chunks, "failed": sorted(failed), "wrong": wrong}

    def load(self, seed: int, chunks: int = CHUNKS) -> dict[str, Any]:
        ticket = self.claim(seed, chunks)
        if ticket is None:
            return {"hit": 0, "failed": [], "wrong": []}
        return self.finish(*self.start(ticket, seed), seed)


def connect(daemon: Daemon, **options: Any) -> Engine:
    """An engine in this process."""
    return Engine(DaemonCache(daemon.socket, layered(), engine.PRODUCER, **options))


def close(me: Engine) -> None:
    assert me.connector.close()
    me.cache.close()


class Held(CPUKernels):
    """Kernels that stop half way through the n-th copy until they are told to go on."""

    def __init__(self) -> None:
        self.at: tuple[str, int] | None = None
        self.go = threading.Event()

    def gather(self, planes: Any, heads: Any, plan: Any, chunk: Any) -> None:
        before = chunk.copy()
        super().gather(planes, heads, plan, chunk)
        if self._now("gather"):
            whole, half = chunk.copy(), len(chunk) // 2
            chunk[half:] = before[half:]
            self._hold()
            chunk[half:] = whole[half:]

    def scatter(self, planes: Any, heads: Any, plan: Any, chunk: Any) -> None:
        if self._now("scatter"):
            self._hold()
        super().scatter(planes, heads, plan, chunk)

    def _now(self, what: str) -> bool:
        if self.at is None or self.at[0] != what:
            return False
        self.at = (what, self.at[1] - 1)
        return self.at[1] < 0

    def _hold(self) -> None:
        self.at = None
        self.go.clear()
        print('"held"', flush=True)
        self.go.wait()


class EngineProcess(Process):
    """An engine on a daemon; see :func:`main` for what it understands."""

    def __init__(self, daemon: Daemon, **options: Any) -> None:
        arguments = json.dumps({"url": daemon.url} | options)
        super().__init__([sys.executable, __file__, arguments], daemon.folder / "engines.log")
        assert self.hear() == "ready"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()


def main() -> None:
    from lmcache_sdk import open_cache

    options = json.loads(sys.argv[1])
    if "uid" in options:  # here, and not before: that user may not be able to read what has been imported
        once = Engine(open_cache("memory://", namespace=layered(), producer=engine.PRODUCER))
        assert once.store(0).wait(30) and once.load(0)["hit"]
        close(once)
        os.setgroups(options.get("groups", []))
        os.setgid(options["uid"])
        os.setuid(options["uid"])
    cache = open_cache(
        options["url"], namespace=layered(fingerprint=options.get("fingerprint", "f")), producer=engine.PRODUCER
    )
    kernels = Held()
    me = Engine(cache, kernels)
    print('"ready"', flush=True)
    under_way: Any = None
    seed = 0
    tickets: list[Ticket] = []
    for line in sys.stdin:
        message = json.loads(line)
        seed = message.get("seed", seed)
        chunks = message.get("chunks", CHUNKS)
        answer: Any = None
        match message["do"]:
            case "store":
                transfer = me.store(seed, chunks)
                # Sealed as well: only then a daemon that is killed leaves it to the next.
                answer = transfer.wait(30)
                me.cache.drain(2)
            case "load":
                answer = me.load(seed, chunks)
            case "claim":
                ticket = me.claim(seed, chunks)
                tickets += [ticket] if ticket else []
                answer = ticket.boundary if ticket else 0
            case "hand over":
                ticket = me.claim(seed, chunks)
                answer = pickle.dumps(ticket).hex()
            case "release":
                for ticket in tickets:
                    cache.release(ticket)
                tickets, answer = [], True
            case "held store":  # answers "held"; then "go" ends it
                kernels.at = ("gather", message["at"])
                under_way = me.store(seed, chunks)
                continue
            case "held load":
                ticket = me.claim(seed, chunks)
                assert ticket is not None
                kernels.at = ("scatter", message["at"])
                under_way = me.start(ticket, seed)
                continue
            case "go":
                kernels.go.set()
                loading = isinstance(under_way, tuple)
                answer = me.finish(*under_way, seed) if loading else under_way.wait(30)
            case "connected":
                answer = bool(cache.connected)  # type: ignore[union-attr]
            case "close":
                me.connector.close()
                cache.close()
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
