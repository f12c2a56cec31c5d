"""The backends for tests: what they remember, and how long they take."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from lmcache_backends.memory import MemoryBackend
from lmcache_sdk.backend import Miss, Scan
from lmcache_sdk.errors import BackendUnavailable
from lmcache_sdk.testing.backends import BackendTests, item, read
from lmcache_sdk.testing.faulty import Faults, Faulty
from lmcache_sdk.testing.latency import Latency
from lmcache_sdk.testing.logged import Logged
from lmcache_sdk.testing.throttled import Throttled


class TestLogged(BackendTests):
    def open(self, place: Path) -> Logged:
        return Logged(MemoryBackend())

    def raw_get(self, backend: Logged, key: str) -> bytes | None:
        return backend.inner._records.get(key)

    def raw_set(self, backend: Logged, key: str, data: bytes) -> None:
        backend.inner._records[key] = data

    def test_it_remembers_every_call(self) -> None:
        faulty = Faulty(MemoryBackend())
        backend = Logged(faulty)
        before = time.monotonic()
        backend.put([item("a", b"1"), item("b", b"2")])
        backend.contains(["a"])
        backend.prefix_len(["a", "b"])
        read(backend, "absent")
        backend.delete(["a"])
        faulty.faults = Faults(unavailable=1)
        with pytest.raises(BackendUnavailable):
            backend.contains(["a"])
        assert backend.names() == ["put", "contains", "prefix_len", "get", "delete", "contains"]
        assert [call.answer for call in backend.calls] == [[True, True], [True], 2, [Miss.ABSENT], 1, None]
        assert [call.keys for call in backend.calls][:2] == [("a", "b"), ("a",)]
        assert isinstance(backend.calls[-1].error, BackendUnavailable)
        assert before <= backend.calls[0].started <= time.monotonic()
        assert all(call.seconds >= 0 for call in backend.calls)
        assert isinstance(backend, Scan)


def test_latency_lets_calls_wait_side_by_side() -> None:
    backend = Latency(MemoryBackend(), 0.2)
    assert backend.instant is False
    start = time.monotonic()
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda _: backend.contains(["k"]), range(4))) == [[False]] * 4
    assert 0.2 <= time.monotonic() - start < 0.8


def test_jitter_is_the_same_for_the_same_seed() -> None:
    def waits(seed: int) -> list[float]:
        seconds: list[float] = []
        backend = Latency(MemoryBackend(), 1.0, jitter_s=0.5, seed=seed)
        backend._closed.wait = lambda timeout=None: seconds.append(timeout)  # type: ignore[assignment]
        for _ in range(20):
            backend.contains(["k"])
        return seconds

    assert waits(1) == waits(1) != waits(2)
    assert 1.0 <= min(waits(1)) < max(waits(1)) <= 1.5


@pytest.mark.parametrize("slow", [lambda inner: Latency(inner, 60), lambda inner: Throttled(inner, 1)])
def test_closing_ends_the_waiting_and_leaves_the_inner_backend(slow) -> None:  # type: ignore[no-untyped-def]
    inner = MemoryBackend()
    inner.put([item("k", bytes(100))])
    backend, inside = slow(inner), threading.Event()

    def call() -> object:
        inside.set()
        return read(backend, "k")

    with ThreadPoolExecutor(1) as pool:
        job = pool.submit(call)
        assert inside.wait(10)
        backend.close(1)
        assert job.result(timeout=10) == bytes(100)
    assert inner.contains(["k"]) == [True]


def test_a_wire_is_shared() -> None:
    backend = Throttled(MemoryBackend(), 1_000_000)
    backend.put([item(f"k{i}", bytes(100_000)) for i in range(3)])
    start = time.monotonic()
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(lambda i: read(backend, f"k{i}"), range(3)))
    assert 0.3 <= time.monotonic() - start < 2
