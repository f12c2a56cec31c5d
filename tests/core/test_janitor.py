"""Bounds for stores that have none: what is deleted, what stays, and that little is remembered of much."""

from __future__ import annotations

import os
import queue
import time
from pathlib import Path

import pytest

from lmcache_backends.file import FileBackend
from lmcache_backends.memory import MemoryBackend
from lmcache_sdk import janitor
from lmcache_sdk.backend import Item, open_backend
from lmcache_sdk.errors import BackendUnavailable, UnsupportedError
from lmcache_sdk.janitor import Janitor, Swept, sweep
from lmcache_sdk.keys import Origin, key_text
from lmcache_sdk.testing.faulty import Faulty

NOW = 1_000_000.0
KB = bytes(1000)
NAMESPACE = "a" * 32


def name(number: int) -> str:
    """The key of a chunk's record."""
    return key_text(Origin(NAMESPACE, "b" * 16), number.to_bytes(32), "full", "L0-1.H0-1")


@pytest.fixture
def store(tmp_path: Path) -> FileBackend:
    backend = open_backend(f"file://{tmp_path}/store?size=64MiB")
    assert isinstance(backend, FileBackend)
    return backend


def put(store: FileBackend, key: str, written: float) -> None:
    store.put([Item(key, memoryview(KB))])
    os.utime(store.path_of(key), (written, written))


def keys(store: FileBackend) -> list[str]:
    return sorted(stat.key for stat in store.scan())


def test_what_is_too_old_is_deleted(store: FileBackend) -> None:
    for age in range(10):
        put(store, name(age), NOW - age)
    assert sweep(store, ttl_s=4.5, now=NOW) == Swept(10, 10_000, 5, 5000)
    assert keys(store) == [name(age) for age in range(5)]
    assert sweep(store, ttl_s=4.5, now=NOW).deleted == 0


def test_beyond_the_size_the_oldest_go(store: FileBackend) -> None:
    for age in range(10):
        put(store, name(age), NOW - age)
    assert sweep(store, size=10_000).deleted == 0
    assert sweep(store, size=6000).deleted == 5, "a little more than needed, so that the next time has nothing to do"
    assert keys(store) == [name(age) for age in range(5)]


def test_what_is_in_use_stays_unless_it_is_too_old(store: FileBackend) -> None:
    for age in range(10):
        put(store, name(age), NOW - age)
    sweep(store, size=6000, keep=lambda key: key == name(9))
    assert keys(store) == [name(age) for age in (0, 1, 2, 3, 9)]
    sweep(store, ttl_s=5, keep=lambda key: True, now=NOW)
    assert name(9) not in keys(store)


def test_descriptions_stay(store: FileBackend) -> None:
    put(store, f"{NAMESPACE}/manifest", NOW - 100)
    put(store, f"{NAMESPACE}/{'b' * 16}/manifest", NOW - 100)
    assert sweep(store, ttl_s=1, size=1, now=NOW) == Swept(0, 0, 0, 0)
    assert len(keys(store)) == 2


def test_what_others_keep_there_is_left_alone(store: FileBackend) -> None:
    theirs = ["session/42", f"team-a/{name(1)}", f"team-a/{NAMESPACE}/manifest"]
    for key in theirs:
        put(store, key, NOW - 100)
    put(store, name(1), NOW - 100)
    assert sweep(store, ttl_s=1, size=1, now=NOW) == Swept(1, 1000, 1, 1000)
    assert keys(store) == sorted(theirs)


def test_one_sweep_deletes_so_many_and_the_oldest_of_all(store: FileBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(janitor, "_MOST", 3)
    for age in (5, 2, 8, 1, 9, 4, 7, 3, 6, 0):
        put(store, name(age), NOW - age)
    assert sweep(store, ttl_s=1.5, now=NOW).deleted == 3
    assert keys(store) == [name(age) for age in range(7)]


def test_a_store_that_does_not_know_when_is_told() -> None:
    backend = MemoryBackend()
    backend.put([Item(name(1), memoryview(KB))])
    with pytest.raises(UnsupportedError, match="does not tell when"):
        sweep(backend, size=1)
    assert backend.contains([name(1)]) == [True]


def test_the_thread_sweeps_and_ends(store: FileBackend) -> None:
    put(store, name(1), NOW)
    put(store, name(2), time.time())
    errors: list[Exception] = []
    worker = Janitor("t", store, size=0, ttl_s=60.0, keep=lambda key: False, on_error=errors.append)
    deadline = time.monotonic() + 10
    while keys(store) != [name(2)]:
        assert time.monotonic() < deadline
    assert worker.stop(time.monotonic() + 5)
    assert not errors


class Unlistable(Faulty):
    def scan(self, prefix: str = "") -> object:
        raise BackendUnavailable("injected: unavailable")


def test_a_store_in_trouble_is_told(store: FileBackend) -> None:
    told: queue.SimpleQueue[Exception] = queue.SimpleQueue()
    worker = Janitor("t", Unlistable(store), size=1, ttl_s=0.0, keep=lambda key: False, on_error=told.put)
    assert isinstance(told.get(timeout=10), BackendUnavailable)
    assert worker.stop(time.monotonic() + 5), "it sleeps until the next sweep"
