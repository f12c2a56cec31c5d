"""Mooncake on a real master: this process is a client, another one holds the memory."""

from __future__ import annotations

import mmap
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

from lmcache_backends.mooncake import EMPTY, MooncakeBackend
from lmcache_sdk.backend import Item, Miss, RegisterMemory, Url
from lmcache_sdk.errors import BackendFull, BackendUnavailable, ConfigError
from lmcache_sdk.testing.backends import BackendTests, backend_state_machine, item, read, some_bytes
from tests.backends.mooncake_master import MooncakeMaster, bare_client

MIB = 1 << 20


class Running:
    """The store that all tests of this file share, and a client of it to look behind the backend's back."""

    master: MooncakeMaster
    client: Any
    backend: MooncakeBackend | None = None  # leaving the store takes a second: one serves many tests


@pytest.fixture(scope="module", autouse=True)
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with MooncakeMaster(tmp_path_factory.mktemp("mooncake")) as Running.master:
        Running.master.add_node(256 * MIB)
        Running.client = bare_client(Running.master.address)
        yield
        if Running.backend is not None:
            Running.backend.close(10)
        Running.client.close()


def opened() -> MooncakeBackend:
    return MooncakeBackend.from_url(Url(f"mooncake://{Running.master.address}/?staging=1MiB&timeout=2"))


def shared() -> MooncakeBackend:
    """A backend on an empty store; a test may close it."""
    Running.client.remove_all(True)
    try:
        assert Running.backend is not None
        Running.backend.contains(["k"])
    except (AssertionError, BackendUnavailable):
        Running.backend = opened()
    return Running.backend


class TestMooncake(BackendTests):
    durable = True  # as long as the node that holds the records lives

    @pytest.fixture
    def backend(self) -> MooncakeBackend:
        return shared()

    def open(self, place: Path) -> MooncakeBackend:
        return opened()

    def raw_get(self, backend: MooncakeBackend, key: str) -> bytes | None:
        data: bytes = Running.client.get(key) if Running.client.is_exist(key) == 1 else b""
        return b"" if data == EMPTY else data or None

    def raw_set(self, backend: MooncakeBackend, key: str, data: bytes) -> None:
        assert Running.client.upsert(key, data or EMPTY) == 0


class Mooncake(TestMooncake):
    durable = False  # opening anew is slow

    def open(self, place: Path) -> MooncakeBackend:
        Running.client.remove_all(True)
        return opened()


TestMooncakeAtRandom = backend_state_machine(Mooncake()).TestCase
TestMooncakeAtRandom.settings = settings(
    max_examples=12,
    stateful_step_count=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)

# Memory that was registered: the pool's, which the client reads from and writes into itself


@pytest.fixture
def backend() -> MooncakeBackend:
    return shared()


@pytest.fixture
def pool(backend: MooncakeBackend) -> Iterator[memoryview]:
    """A registered segment, larger than the memory for what is not."""
    assert isinstance(backend, RegisterMemory)
    segment = memoryview(mmap.mmap(-1, 16 * MIB))
    backend.register_memory(segment)
    yield segment
    backend.unregister_memory(segment)


def test_registered_memory(backend: MooncakeBackend, pool: memoryview) -> None:
    data = some_bytes(4 * MIB + 3)
    pool[5 : 5 + len(data)] = data
    assert backend.put([Item("k", pool[5 : 5 + len(data)])]) == [True]
    assert Running.client.get_size("k") == len(data)
    pool[:] = b"\xa5" * len(pool)
    place = pool[9 : 9 + len(data) + 100]
    assert backend.get(["k"], [place]) == [len(data)]
    assert place[: len(data)] == data
    pool[9 : 9 + len(data)] = b"\xa5" * len(data)
    assert bytes(pool).strip(b"\xa5") == b"", "touched beyond the record"


def test_registered_and_other_memory_in_one_batch(backend: MooncakeBackend, pool: memoryview) -> None:
    rng = random.Random(1)
    records = {f"k{i}": rng.randbytes(rng.choice((0, 1, 40, 300_000))) for i in range(30)}
    at = 0
    items = []
    for i, (key, data) in enumerate(records.items()):
        if i % 2:
            pool[at : at + len(data)] = data
            items.append(Item(key, pool[at : at + len(data)]))
            at += len(data)
        else:
            items.append(item(key, data))
    assert backend.put(items) == [True] * len(items)
    buffers = [
        pool[i * 400_000 : i * 400_000 + 300_050] if i % 3 else memoryview(bytearray(300_050))
        for i in range(len(items))
    ]
    before = [bytes(buffer) for buffer in buffers]
    answers = backend.get(list(records), buffers)
    assert answers == [len(data) for data in records.values()]
    for data, buffer, was in zip(records.values(), buffers, before, strict=True):
        assert buffer == data + was[len(data) :]


def test_a_registered_buffer_that_is_too_small(backend: MooncakeBackend, pool: memoryview) -> None:
    backend.put([item("k", some_bytes(5000))])
    pool[:] = b"\xa5" * len(pool)
    assert backend.get(["k", "none", "k", "k"], [pool[:4999], pool[:5000], pool[:0], pool[9000:9010]]) == [
        Miss.TOO_LARGE,
        Miss.ABSENT,
        Miss.TOO_LARGE,
        Miss.TOO_LARGE,
    ]
    assert bytes(pool).strip(b"\xa5") == b""


def test_memory_that_is_no_longer_registered_is_staged(backend: MooncakeBackend) -> None:
    segment = memoryview(mmap.mmap(-1, 2 * MIB))
    backend.register_memory(segment)
    backend.put([Item("k", segment)])
    backend.unregister_memory(segment)
    assert backend.get(["k"], [segment[:1000]]) == [Miss.TOO_LARGE]
    with pytest.raises(BackendFull, match=r"does not fit .* 1\.0 MiB; raise staging="):
        backend.get(["k"], [segment])
    with pytest.raises(BackendFull, match=r"2\.0 MiB does not fit .* 1\.0 MiB; raise staging="):
        backend.put([Item("other", segment)])
    backend.put([Item("other", segment[:1000])])
    assert read(backend, "other", 3 * MIB) == segment[:1000]
    backend.delete(["other"])
    assert backend.contains(["k", "other"]) == [True, False]


def test_memory_after_closing(backend: MooncakeBackend, pool: memoryview) -> None:
    """A client that is closed would crash."""
    with pytest.raises(BackendUnavailable, match="in use already"):
        backend.register_memory(pool)
    late = opened()
    late.register_memory(pool)
    late.close(10)
    for call in (late.register_memory, late.unregister_memory):
        with pytest.raises(BackendUnavailable, match="closed"):
            call(pool)


# What the store does by itself


def test_a_promised_record_may_vanish(backend: MooncakeBackend) -> None:
    backend.put([item("k", some_bytes(1000))])
    assert backend.prefix_len(["k"]) == 1
    assert Running.client.remove("k", True) == 0
    assert read(backend, "k") is Miss.ABSENT


def test_a_record_that_is_being_read_is_deleted(backend: MooncakeBackend) -> None:
    backend.put([item("k", some_bytes(1000))])
    assert Running.client.get("k") == some_bytes(1000)
    assert Running.client.remove("k") == -706, "the lease does not hold"
    assert backend.delete(["k"]) == 1
    assert backend.contains(["k"]) == [False]


def test_the_bytes_that_stand_for_an_empty_record_are_refused(backend: MooncakeBackend) -> None:
    with pytest.raises(BackendUnavailable, match="length 0"):
        backend.put([item("k", EMPTY)])
    assert backend.put([item("k", EMPTY + b"!")]) == [True]
    assert read(backend, "k") == EMPTY + b"!"


def test_more_than_the_store_holds(backend: MooncakeBackend) -> None:
    """It evicts by itself, or says that it is full: what is found is right."""
    data = [memoryview(some_bytes(MIB, seed)) for seed in range(4)]
    refused = []
    for i in range(600):
        try:
            assert backend.put([Item(f"k{i}", data[i % 4])]) == [True]
        except BackendFull as error:
            refused.append(str(error))
    assert all("has no room" in message for message in refused)
    present = backend.contains([f"k{i}" for i in range(600)])
    assert 50 < sum(present) <= 256
    assert sum(present) + len(refused) <= 600
    for i in range(0, 600, 7):
        assert read(backend, f"k{i}") in (data[i % 4], Miss.ABSENT)


# What is wrong with a URL


@pytest.mark.parametrize(
    ("url", "named"),
    [
        ("mooncake://", "names no host"),
        ("mooncake:///path", "names no host"),
        ("mooncake://host:0", "port 0"),
        ("mooncake://first,second:50051", "'first,second' in .* is neither"),
        ("mooncake://host/path", "must name the master"),
        ("mooncake://user:secret@host", r"user:\*\*\*@host"),
        ("mooncake://host?protocol=udp", "'udp' is neither tcp nor rdma"),
        ("mooncake://host?timeout=never", "timeout='never'"),
        ("mooncake://host?timeout=-1", "timeout='-1'"),
        ("mooncake://host?segment=much", "'much' is not a size"),
        ("mooncake://host?segmnt=1GiB", "unknown parameter 'segmnt'"),
    ],
)
def test_bad_urls(url: str, named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        MooncakeBackend.from_url(Url(url))
