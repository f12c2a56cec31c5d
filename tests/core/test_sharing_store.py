"""Sharing between producers in the store: what is closed, evicted, hung or broken meanwhile harms nobody else."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import msgspec
import pytest

from lmcache_backends.memory import MemoryBackend
from lmcache_sdk import ConfigError
from lmcache_sdk.api import LookupState
from lmcache_sdk.backend import Item
from lmcache_sdk.core import Action, StartJob
from lmcache_sdk.jobs import manifests
from lmcache_sdk.keys import Chain, manifest_key
from lmcache_sdk.open import LocalCache
from lmcache_sdk.pool import extent_bytes
from lmcache_sdk.sharing import Copy, Known, Turn
from lmcache_sdk.spec import Producer, Share
from lmcache_sdk.store import Store, Tier
from tests.core.test_sharing import CHUNK, NAMESPACE, ONE, SPEC, TWO, World, read, text, write
from tests.core.test_store import wait_until

CLOSED = (min(ONE.id, TWO.id), max(ONE.id, TWO.id))


@pytest.fixture
def world() -> Iterator[World]:
    world = World()
    yield world
    world.settle()
    world.store.close()


class Kept(MemoryBackend):
    """Outlives a store."""

    def close(self, timeout_s: float = 10.0) -> None:
        pass


class Hung(MemoryBackend):
    """Does not say what it has until it is let go."""

    instant = False

    def __init__(self) -> None:
        super().__init__()
        self.asked, self.go = threading.Event(), threading.Event()
        self.go.set()

    def prefix_len(self, keys: Sequence[str]) -> int:
        if not self.go.is_set():
            self.asked.set()
            self.go.wait(30)
        return super().prefix_len(keys)


def stored_by(producer: Producer, seed: int, chunks: int) -> Kept:
    """A tier with what one has stored in an earlier life."""
    tier = Kept()
    store = Store([Tier("memory", tier)], pool_bytes=4 << 20)
    write(LocalCache(store, NAMESPACE, producer), text(seed, chunks))
    assert store.drain(10) and store.close()
    return tier


def compared(store: Store) -> None:
    """All that waits to be compared."""
    done = threading.Event()
    store._producers.overlap.worker.submit(done.set)
    assert done.wait(10)


def in_manifest(tier: MemoryBackend) -> dict[str, Any]:
    buffer = memoryview(bytearray(1 << 21))
    (length,) = tier.get([manifest_key(NAMESPACE.id)], [buffer])
    assert isinstance(length, int)
    found: dict[str, Any] = msgspec.json.decode(buffer[:length])
    return found


def test_a_space_that_was_closed_before_its_comparison_harms_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    errors: list[Exception] = []
    monkeypatch.setattr(Store, "_tier_error", lambda self, tier, error: errors.append(error))
    store = Store([Tier("memory", stored_by(TWO, 1, 6))], pool_bytes=4 << 20)
    one = LocalCache(store, NAMESPACE, ONE)
    assert store.drain(10) and store.space_count == 2
    gate = threading.Event()
    store._producers.overlap.worker.submit(lambda: gate.wait(10))
    write(one, text(1, 6))
    wait_until(lambda: store._producers.overlap.worker.waiting >= 3)
    store.close_spaces({one._opened})
    assert store.space_count == 1
    gate.set()
    compared(store)
    assert read(one, text(1, 6))[0] == ["one"] * 6
    assert not errors
    store.check_integrity()
    assert store.close()


def test_a_tier_is_not_asked_for_a_space_that_is_gone() -> None:
    store = Store([Tier("memory", MemoryBackend())], pool_bytes=4 << 20)
    one, two = LocalCache(store, NAMESPACE, ONE), LocalCache(store, NAMESPACE, TWO)
    assert store.drain(10)
    store.close_spaces({one._opened})
    assert two.lookup("r", text(1, 2)).state is LookupState.MISS  # at once
    assert one.lookup("s", text(1, 2)).state is LookupState.MISS
    assert store.close()


def test_an_action_that_fails_takes_no_other_with_it(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    one, carry_out, failed = world.engine(ONE), world.store._carry_out, []

    def fails_once(action: Action) -> None:
        if not failed and not isinstance(action, StartJob):
            failed.append(action)
            raise KeyError("gone")
        carry_out(action)

    monkeypatch.setattr(world.store, "_carry_out", fails_once)
    one.lookup("a", text(1, 1))
    one.forget("a")
    assert len(failed) == 1
    write(one, text(2, 2))
    assert read(one, text(2, 2))[0] == ["one"] * 2


def test_room_for_one_run_is_not_made_of_the_run_before() -> None:
    tier = stored_by(ONE, 1, 8)
    store = Store([Tier("memory", tier)], pool_bytes=8 * extent_bytes(SPEC.cells[0].nbytes))
    two, chain = LocalCache(store, NAMESPACE, TWO, share=Share.ANY), text(1, 8)
    assert store.drain(10)
    store._producers.overlap.ended = True
    write(two, chain, 0, 4)
    assert store.drain(10)
    for seed in range(100, 104):  # used after the chunks of the prompt, which so are the first to go
        write(two, text(seed, 1))
        assert store.drain(10)
        assert read(two, text(seed, 1))[0] == ["two"]
    two.lookup("r", chain)
    assert two.wait("r", 10).chunks == 8
    store.check_integrity()
    two.forget("r")
    assert read(two, chain) == (["two"] * 4 + ["one"] * 4, "foreign")
    assert store.close()


def test_what_another_store_has_closed_is_taken_back_here(world: World) -> None:
    one, two, chain = world.engine(ONE), world.engine(TWO), text(1, 4)
    for seed in (11, 12, 13):
        for cache in (one, two):
            write(cache, text(seed, 4))
    world.agree()
    write(one, chain)
    world.settle()
    two.lookup("r", chain)
    assert two.wait("r", 10).chunks == 4
    world.tier.put(manifests(NAMESPACE, ONE, Known((ONE, TWO), (Turn(*CLOSED),)))[:1], if_absent=False)
    world.store._producers.meet(two._opened)
    world.settle()
    assert world.store.stats().pairs[0].state == "closed"
    assert two.claim("r", 4) is None


def test_the_end_writes_first_whatever_is_being_compared() -> None:
    hung, fast = Hung(), MemoryBackend()
    store = Store([Tier("fast", fast), Tier("hung", hung)], pool_bytes=4 << 20)
    one, _ = LocalCache(store, NAMESPACE, ONE), LocalCache(store, NAMESPACE, TWO)
    assert store.drain(10)
    hung.go.clear()
    write(one, text(1, 6))
    assert hung.asked.wait(10)
    started = time.monotonic()
    assert store.close(2.0)
    assert time.monotonic() - started < 4.0
    assert not store._producers.overlap.worker.alive
    hung.go.set()
    for prober in store._probers.values():
        prober.join(time.monotonic() + 10)
    store.check_integrity()


def test_a_comparison_stops_between_its_two_copies(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    one, two, overlap = world.engine(ONE), world.engine(TWO), world.store._producers.overlap
    copies: list[bytes] = []

    def copy(opened: object, digest: bytes) -> Copy:
        copies.append(digest)
        overlap.ended = True
        return Copy([], -1)

    monkeypatch.setattr(overlap, "_copy", copy)
    overlap._compare(one._opened, two._opened, b"d" * 32, 0)
    assert len(copies) == 1


def test_a_manifest_with_a_broken_entry_keeps_what_can_be_read() -> None:
    tier = MemoryBackend()
    producers = [
        msgspec.to_builtins(TWO),
        {"engine": "x", "version": 2, "device": "cpu"},
        {"engine": "y\n", "version": "1", "device": "cpu"},
        {"engine": "z" * 1000, "version": "1", "device": "cpu"},
    ]
    wrong = [7, ["alone"], [*CLOSED, 10**40], [*CLOSED, 0], ["x" * 1000, "y", 1], [*CLOSED[:1], CLOSED[1] + "\n", 1]]
    broken = msgspec.to_builtins(NAMESPACE) | {"producers": producers, "closed": [list(CLOSED), *wrong]}
    tier.put([Item(manifest_key(NAMESPACE.id), memoryview(msgspec.json.encode(broken)))], if_absent=False)
    store = Store([Tier("memory", tier)], pool_bytes=1 << 20)
    LocalCache(store, NAMESPACE, ONE)
    assert store.drain(10)
    assert [(pair.state, set(pair.producers)) for pair in store.stats().pairs] == [("closed", {ONE.name, TWO.name})]
    written = in_manifest(tier)
    assert written["closed"] == [[*CLOSED, 1]]
    assert {p["engine"] for p in written["producers"]} == {"one", "two"}
    assert store.close()


def test_a_manifest_that_is_too_large_is_left_as_it_is() -> None:
    tier = MemoryBackend()
    large = msgspec.to_builtins(NAMESPACE) | {"closed": [list(CLOSED)], "more": "x" * (1 << 20)}
    tier.put([Item(manifest_key(NAMESPACE.id), memoryview(msgspec.json.encode(large)))], if_absent=False)
    store = Store([Tier("memory", tier)], pool_bytes=1 << 20)
    one = LocalCache(store, NAMESPACE, ONE)
    write(one, text(1, 2))
    assert store.drain(10)
    assert in_manifest(tier)["closed"] == [list(CLOSED)]
    assert store.close()


@pytest.mark.parametrize("name", ["one\n2026 ERROR all is lost", "x" * 301, "\x1b[2J"])
def test_a_producer_has_a_name_that_can_be_shown(world: World, name: str) -> None:
    with pytest.raises(ConfigError, match="printable characters"):
        world.engine(Producer(name, "1", "cpu"))


def test_a_mixed_prefix_is_used_under_the_names_of_each_run(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    one, two, chain = world.engine(ONE), world.engine(TWO, Share.ANY), text(1, 4)
    write(one, chain)
    write(two, chain, 0, 2)
    world.settle()
    touched: list[str] = []
    touch: Callable[[Sequence[str]], None] = touched.extend
    monkeypatch.setattr(world.tier, "touch", touch, raising=False)
    assert read(two, chain) == (["two"] * 2 + ["one"] * 2, "foreign")
    world.settle()
    expected = [*reversed(one._opened.keys(chain.digests()[3])), *two._opened.keys(chain.digests()[1])]
    assert set(expected) <= set(touched)
    assert all(world.tier.contains(touched))


def test_what_comes_from_a_tier_knows_its_position() -> None:
    tier = stored_by(TWO, 6, 3)
    store = Store([Tier("memory", tier)], pool_bytes=1 << 20)
    one = LocalCache(store, NAMESPACE, ONE)
    assert store.drain(10)
    write(one, Chain.from_digests(text(6, 3).digests(), CHUNK))  # who stores it now does not
    assert store.drain(10)
    wait_until(lambda: store.stats().pairs[0].compared == 3)
    compared(store)
    (theirs,) = [space for space in store._spaces if space.origin.producer == TWO.id]
    positions = {entry.digest: entry.first_position for entry in theirs.entries.values()}
    assert [positions[digest] for digest in text(6, 3).digests()] == [0, 8, 16]
    assert store.stats().pairs[0].state == "open"
    assert store.close()
