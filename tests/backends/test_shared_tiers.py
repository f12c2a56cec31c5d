"""Daemons on one store, each a process with a real server behind it: what one has stored the others find."""

from __future__ import annotations

import base64
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from lmcache_sdk import open_cache
from lmcache_sdk.keys import Chain
from tests.backends.redis_server import Server, wait_until
from tests.backends.seaweed import SeaweedFS
from tests.core.engine import CHUNK, PRODUCER, PagedEngine, load, namespace, slots_of, store, tokens_of
from tests.core.served import Served

CHUNKS = 12
TOKENS = tokens_of(11, CHUNKS * CHUNK)


@pytest.fixture
def places() -> Iterator[tuple[Served, Served]]:
    places = Served(), Served()
    yield places
    for place in places:
        place.close()


def put(place: Served) -> np.ndarray:
    """Store a prompt and see it written; the answer is its rows."""
    cache, engine = open_cache(place.url, namespace=namespace(), producer=PRODUCER), PagedEngine()
    connector = engine.connect(cache)
    store(cache, engine, connector, TOKENS)
    assert cache.drain(20)
    connector.close()
    cache.close()
    return engine.rows(slots_of(1, len(TOKENS)))


def get(place: Served) -> np.ndarray:
    """As much of it as there is."""
    cache, engine = open_cache(place.url, namespace=namespace(), producer=PRODUCER), PagedEngine()
    connector = engine.connect(cache)
    slots = slots_of(2, len(TOKENS))
    chunks, transfer = load(cache, connector, TOKENS, slots)
    assert transfer is None or not transfer.failed_chunks()
    connector.close()
    cache.close()
    return engine.rows(slots[: chunks * CHUNK])


def found(place: Served, rid: str = "found") -> int:
    cache = open_cache(place.url, namespace=namespace(), producer=PRODUCER)
    cache.lookup(rid, Chain(TOKENS, CHUNK))
    chunks = cache.wait(rid, 10).chunks
    cache.close()
    return chunks


def tiers_of(place: Served) -> dict[str, dict[str, object]]:
    return {tier["name"]: tier for tier in place.status()["stats"]["tiers"]}


@pytest.mark.parametrize("write", ["through", "back&back=200ms"])
def test_two_daemons_on_one_redis(redis_server: Server, places: tuple[Served, Served], write: str) -> None:
    with redis_server.client() as client:
        client.flushall()
    one, two = places
    for place in places:
        place.start("--tier", f"{redis_server.url()}#write={write}&missing=1s")
    assert found(two) == 0, "and it is remembered that there is nothing"
    rows = put(one)
    wait_until(lambda: found(two) == CHUNKS, "a no expires", 10.0)
    assert np.array_equal(get(two), rows)


def test_a_daemon_finds_what_was_encrypted_by_another_with_the_same_key_only(
    redis_server: Server, places: tuple[Served, Served], tmp_path: Path
) -> None:
    with redis_server.client() as client:
        client.flushall()
    keys = [tmp_path / name for name in ("right", "wrong")]
    for number, key in enumerate(keys):
        key.write_text(base64.b64encode(bytes([number]) * 32).decode())
        key.chmod(0o600)
    one, two = places
    tier = f"{redis_server.url()}#missing=0&prefix=fleet&encrypt_key_file="
    one.start("--tier", f"{tier}{keys[0]}")
    two.start("--tier", f"{tier}{keys[1]}")
    rows = put(one)
    assert len(get(two)[0]) == 0, "a miss, not other bytes"
    assert two.stop() == 0
    two.start("--tier", f"{tier}{keys[0]}")
    assert np.array_equal(get(two), rows)


def test_a_disk_and_a_bucket(seaweed: SeaweedFS, places: tuple[Served, Served], tmp_path: Path) -> None:
    """The disk at once; the bucket when the daemon ends, in large objects, for another machine to find."""
    one, two = places
    bucket = f"{seaweed.url('shared-tiers')}#write=evict&name=bucket"
    one.start("--tier", f"lmdb://{tmp_path}/one?size=64MiB", "--tier", bucket, "--no-keep-pool")
    rows = put(one)
    assert one.stop() == 0
    two.start("--tier", f"lmdb://{tmp_path}/two?size=64MiB", "--tier", bucket)
    assert np.array_equal(get(two), rows)
    assert two.stop() == 0
    shutil.rmtree(two.pool)
    two.start("--tier", f"lmdb://{tmp_path}/two?size=64MiB")
    assert np.array_equal(get(two), rows), "from the disk, to which it went as well"


def test_a_server_that_is_gone_costs_a_lookup_nothing(places: tuple[Served, Served]) -> None:
    place, _ = places
    with Server() as server:
        url = server.url(parameters="timeout=0.5s")
        place.start("--tier", f"{url}#failures=1&retry=1m&missing=0&probe=300ms")
        rows = put(place)
        server.stop()
        assert np.array_equal(get(place), rows), "from the pool"
        cache = open_cache(place.url, namespace=namespace(), producer=PRODUCER)
        other = Chain(tokens_of(12, CHUNK), CHUNK)
        started = time.monotonic()
        cache.lookup("a", other)
        assert time.monotonic() - started < 0.2
        assert cache.wait("a", 10, settle=False).chunks == 0
        assert time.monotonic() - started < 3.0
        assert tiers_of(place)["redis"]["breaker"] == "open"
        assert cache.wait("a", 0.0).chunks == 0
        cache.close()
