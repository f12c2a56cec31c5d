"""Memory over a slow disk, asked through a daemon: what a client is told, and that ten clients read once."""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from lmcache_backends.memory import MemoryBackend
from lmcache_sdk.api import LookupState
from lmcache_sdk.backend import Buffer, Miss
from lmcache_sdk.config import Tenant
from lmcache_sdk.daemon.client import DaemonCache
from lmcache_sdk.daemon.server import Server, Settings
from lmcache_sdk.keys import Chain
from lmcache_sdk.open import LocalCache
from lmcache_sdk.pool import extent_bytes
from lmcache_sdk.pool.shared import SharedPool
from lmcache_sdk.store import Store, Tier
from lmcache_sdk.testing.throttled import Throttled
from tests.core.engine import CHUNK, PRODUCER, PagedEngine, load, namespace, slots_of, store, tokens_of

CHUNKS = 8
CHUNK_BYTES = 3 * 2 * CHUNK * 4 * 8 * 2
EXTENT_BYTES = extent_bytes(CHUNK_BYTES)
TOKENS = [tokens_of(seed, CHUNKS * CHUNK) for seed in range(3)]


class CountingBackend(Throttled):
    reads = 0

    def get(self, keys: list[str], buffers: list[Buffer]) -> list[int | Miss]:  # type: ignore[override]
        self.reads += sum(not key.endswith("/manifest") for key in keys)
        return super().get(keys, buffers)


class Place:
    """A daemon on threads of this process, over a tier that has three prompts already."""

    def __init__(self, tier: CountingBackend, **arguments: object) -> None:
        self.tier = tier
        self.folder = Path(tempfile.mkdtemp(prefix="lmcache-sdk-test-", dir="/dev/shm"))
        self.pool = SharedPool.open(self.folder / "pool", 2 << 20)
        self.store = Store([Tier("slow", tier)], pool=self.pool, **arguments)  # type: ignore[arg-type]
        self.server = Server(self.store, self.pool, Settings(self.folder / "s"))
        self.thread = threading.Thread(target=self.server.serve)
        self.thread.start()
        self.caches: list[DaemonCache] = []

    def connect(self) -> DaemonCache:
        self.caches.append(DaemonCache(self.folder / "s", namespace(), PRODUCER))
        return self.caches[-1]

    def close(self) -> None:
        for cache in self.caches:
            cache.close()
        self.server.stop()
        self.thread.join()
        self.store.check_integrity()
        self.server.close()
        self.store.close()
        self.pool.close(keep=False)
        self.folder.rmdir()


@pytest.fixture
def records() -> MemoryBackend:
    records = MemoryBackend()
    cache = LocalCache(Store([Tier("t", Throttled(records, 1e9))], pool_bytes=1 << 20), namespace(), PRODUCER)
    engine = PagedEngine()
    connector = engine.connect(cache)
    for tokens in TOKENS:
        store(cache, engine, connector, tokens)
    connector.close()
    cache.close()
    return records


@pytest.fixture
def place(records: MemoryBackend) -> Iterator[Place]:
    place = Place(CountingBackend(records, bytes_per_s=CHUNKS * CHUNK_BYTES / 0.3))
    yield place
    place.close()


def test_a_client_is_told_how_long_a_load_will_take(place: Place) -> None:
    cache = place.connect()
    first = cache.lookup("first", Chain(TOKENS[0], CHUNK))
    assert (first.state, first.found, first.missing, first.eta_s) == (LookupState.PENDING, CHUNKS, CHUNKS, None)
    assert cache.wait("first", 10.0).chunks == CHUNKS
    second = cache.lookup("second", Chain(TOKENS[1], CHUNK))
    assert second.state is LookupState.PENDING
    assert second.eta_s == pytest.approx(0.3, rel=0.5)
    still = cache.wait("second", 0.0, settle=False)
    assert still.state is LookupState.PENDING, "nothing has been given up"
    assert cache.wait("second", 10.0, settle=False).chunks == CHUNKS


def test_what_is_not_waited_for_comes_nevertheless(place: Place) -> None:
    cache = place.connect()
    chain = Chain(TOKENS[0], CHUNK)
    assert cache.lookup("hasty", chain).state is LookupState.PENDING
    assert cache.wait("hasty", 0.0).why == "timed out"
    cache.forget("hasty")
    cache.lookup("later", chain)
    assert cache.wait("later", 10.0).chunks == CHUNKS
    assert place.tier.reads == CHUNKS
    cache.lookup("again", chain)
    assert cache.wait("again", 0.0).sources == {"pool": CHUNKS}, "it stays in memory"


def test_ten_clients_read_once(place: Place) -> None:
    caches = [place.connect() for _ in range(10)]

    def ask(cache: DaemonCache) -> int:
        cache.lookup("same name", Chain(TOKENS[0], CHUNK))
        return cache.wait("same name", 10.0).chunks

    with ThreadPoolExecutor(10) as threads:
        assert list(threads.map(ask, caches)) == [CHUNKS] * 10
    assert place.tier.reads == CHUNKS


def test_tenants_through_a_daemon(records: MemoryBackend) -> None:
    quota = 3 * EXTENT_BYTES
    place = Place(CountingBackend(records, 1e9), tenants={"small": Tenant(quota=quota)})
    try:
        cache = place.connect()
        assert cache.lookup("a", Chain(TOKENS[0], CHUNK, tenant="small")).state is LookupState.PENDING
        assert cache.wait("a", 10.0).chunks == 3
        assert place.store.tenant_bytes() == {"small": quota}
        cache.forget("a")
        cache.lookup("b", Chain(TOKENS[1], CHUNK, tenant="large"))
        assert cache.wait("b", 10.0).chunks == CHUNKS
        assert place.store.tenant_bytes() == {"small": quota, "large": CHUNKS * EXTENT_BYTES}
        engine = PagedEngine()
        connector = engine.connect(cache)
        assert load(cache, connector, TOKENS[1], slots_of(2, len(TOKENS[1])))[0] == CHUNKS
        connector.close()
    finally:
        place.close()
