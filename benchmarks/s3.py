"""``s3://`` beside the bare client, and records of several chunks beside records of one."""

from __future__ import annotations

import itertools
import random
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import obstore
from obstore.store import S3Store

from benchmarks.harness import Paired, Row, at_least, paired, table
from benchmarks.prompts import PRODUCER, namespace, store, tokens
from lmcache_sdk.backend import Backend, Item, open_backend
from lmcache_sdk.jobs import Tier
from lmcache_sdk.keys import Chain
from lmcache_sdk.open import LocalCache
from lmcache_sdk.pool import extent_bytes
from lmcache_sdk.store import Store
from lmcache_sdk.testing.proxy import Proxy
from tests.backends.seaweed import SeaweedFS, serving

CONNECTIONS = 8
LOAD_BYTES, STORE_BYTES = 64 << 20, 32 << 20  # a run
MODEL = (4, 8, 128)  # layers, heads, dim: 1 MiB of KV in a chunk of 64 tokens
CHUNKS = 32


class Records:
    """Records of one size, by a backend and by the client alone, with as many requests at once."""

    def __init__(self, backend: Backend, bare: S3Store, nbytes: int) -> None:
        self._backend = backend
        self._bare = bare
        self._data = memoryview(random.Random(nbytes).randbytes(nbytes))
        self._numbers = itertools.count()
        self._threads = ThreadPoolExecutor(CONNECTIONS)
        self._nbytes = nbytes

    def load(self, repeats: int) -> Paired:
        count = LOAD_BYTES // self._nbytes
        keys = [f"load/{self._nbytes}/{number}" for number in range(count)]
        buffers = [memoryview(bytearray(self._nbytes)) for _ in range(count)]
        assert self._backend.put([Item(key, self._data) for key in keys]) == [True] * count
        names = [entry["path"] for page in obstore.list(self._bare, f"load/{self._nbytes}") for entry in page]
        assert len(names) == count

        def ours() -> None:
            assert self._backend.get(keys, buffers) == [self._nbytes] * count

        def one(name: str, buffer: memoryview) -> None:
            data = memoryview(obstore.get(self._bare, name).bytes())
            np.copyto(np.frombuffer(buffer, np.uint8), np.frombuffer(data, np.uint8))

        return paired(ours, lambda: list(self._threads.map(one, names, buffers)), LOAD_BYTES, repeats)

    def store(self, repeats: int) -> Paired:
        """New records each time, and none that is there is replaced."""
        count = STORE_BYTES // self._nbytes

        def ours() -> None:
            keys = [f"store/{self._nbytes}/{next(self._numbers)}" for _ in range(count)]
            assert self._backend.put([Item(key, self._data) for key in keys]) == [True] * count

        def one(name: str) -> None:
            obstore.put(self._bare, name, self._data, use_multipart=False, mode="create")

        def bare() -> None:
            list(self._threads.map(one, [f"bare/{self._nbytes}/{next(self._numbers)}" for _ in range(count)]))

        return paired(ours, bare, STORE_BYTES, repeats)


def against_the_client(server: SeaweedFS, repeats: int) -> Iterator[Row]:
    backend = open_backend(server.url("bench", connections=CONNECTIONS, timeout=60))
    bare = server.client("bench", unsigned_payload=True)
    for mib in (1, 4, 8):
        records = Records(backend, bare, mib << 20)
        yield at_least(f"S3 load, {mib} MiB records / bare obstore", records.load(repeats), 0.85)
        yield at_least(f"S3 store, {mib} MiB records / bare obstore", records.store(repeats), 0.85)
    backend.close(10)


def packing(server: SeaweedFS, endpoint: str, away: str, repeats: int) -> Iterator[Row]:
    """Prompts of 32 chunks of 1 MiB through a whole store, in records of 8 chunks and of one."""
    space = namespace(64, *MODEL)
    nbytes = CHUNKS * space.spec.chunk_bytes
    numbers = itertools.count()

    def open_it(name: str, pack_bytes: int) -> LocalCache:
        backend = open_backend(
            server.url(f"packing{bool(away):d}/{name}", endpoint=endpoint, connections=CONNECTIONS, timeout=60)
        )
        tier = Tier("s3", backend, pack_bytes=pack_bytes)
        # Two prompts do not fit: each load evicts what was loaded before.
        return LocalCache(Store([tier], pool_bytes=CHUNKS * extent_bytes(space.spec.chunk_bytes)), space, PRODUCER)

    caches = [open_it("packed", 16 << 20), open_it("plain", 0)]

    def writing(cache: LocalCache) -> Callable[[], None]:
        seeds = itertools.count(100)

        def write() -> None:
            store(cache, Chain(tokens(next(seeds), CHUNKS * 64), 64))
            assert cache.drain(120)

        return write

    def loading(cache: LocalCache) -> Callable[[], None]:
        seeds = itertools.cycle([100, 101])

        def load() -> None:
            rid = str(next(numbers))
            cache.lookup(rid, Chain(tokens(next(seeds), CHUNKS * 64), 64))
            found = cache.wait(rid, 60)
            assert found.chunks == CHUNKS and found.sources == {"s3": CHUNKS}, found
            cache.forget(rid)

        return load

    try:
        writes = [writing(cache) for cache in caches]
        yield at_least(f"S3 store of a prompt{away}, 8 chunks a record / one", paired(*writes, nbytes, repeats))
        loads = [loading(cache) for cache in caches]
        yield at_least(f"S3 load of a prompt{away}, 8 chunks a record / one", paired(*loads, nbytes, repeats))
    finally:
        for cache in caches:
            cache.close()


def rows(repeats: int = 7) -> Iterator[Row]:
    with tempfile.TemporaryDirectory(prefix="lmcache-sdk-bench-") as folder, serving(Path(folder)) as server:
        yield from against_the_client(server, repeats)
        yield from packing(server, server.endpoint, "", repeats)
        with Proxy("127.0.0.1", server.port) as proxy:
            proxy.latency(0.02)
            yield from packing(server, f"http://127.0.0.1:{proxy.port}", ", 20 ms away", repeats)


if __name__ == "__main__":
    for row in rows():
        print(table([row]), *(f"{row.raw[name]:.2f}" for name in ("gbps", "reference_gbps")), file=sys.stderr)
