"""The connector on a device whose copies are queued, and happen late, in parts and in any order."""

from __future__ import annotations

import dataclasses
import random
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from lmcache_sdk import open_cache
from lmcache_sdk.connector import CopyTransfer, GPUConnector
from lmcache_sdk.errors import DeviceError
from lmcache_sdk.kernels import DeviceKernels, host_buffer
from lmcache_sdk.kernels.host import Segments
from lmcache_sdk.keys import Chain
from lmcache_sdk.open import LocalCache
from tests.core.engine import CHUNK, HEADS, LAYERS, PAGE, PRODUCER, PagedEngine, namespace, slots_of, tokens_of
from tests.core.late_device import DEVICE, LateDevice, LateEvent, LateKernels, LateStream

POOL_BYTES = 4 << 20
MODES = ["direct", "staged"]
LAYER_BYTES = 2 * CHUNK * HEADS * 8 * 2
Slots = npt.NDArray[np.int64]


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.001)


class Rig:
    """An engine on a pretend device, its connector, its forward stream, and a cache."""

    def __init__(self, seed: int = 0) -> None:
        cache = open_cache("memory://", namespace=namespace(), producer=PRODUCER, pool_bytes=POOL_BYTES)
        assert isinstance(cache, LocalCache)
        self.cache = cache
        self.device = LateDevice(seed)
        self.kernels = LateKernels(self.device)
        self.engine = PagedEngine()
        self.forward = LateStream(self.device, self.kernels)

    def connect(self, pinning: str | None, **arguments: Any) -> GPUConnector:
        """``direct``: with the pool's memory registered already; ``host``: for an engine without a device."""
        self.device.go()  # for the proof
        self.connector = GPUConnector(
            self.cache,
            dataclasses.replace(self.engine.layout, device="cpu" if pinning == "host" else DEVICE),
            write_op=self.engine.write,
            kernels=None if pinning == "host" else self.kernels,
            pinning=pinning,
            **{"staging_bytes": 4 * LAYER_BYTES, **arguments},
        )
        if pinning == "direct":
            self.connector._registered(self.cache.store.boot, [self.memory])
            until(lambda: self.segments.are_direct(self.memory))
        self.device.rest()
        return self.connector

    @property
    def memory(self) -> npt.NDArray[np.uint8]:
        """The pool's only segment."""
        (segment,) = self.cache.store.pool.segments
        return segment

    @property
    def segments(self) -> Segments:
        segments = self.connector._segments
        assert segments is not None
        return segments

    def store(self, tokens: Any, slots: Slots, **arguments: Any) -> CopyTransfer:
        chain = Chain(tokens, CHUNK)
        return self.connector.store("s", chain, 0, slots[: len(chain) * CHUNK], **arguments)

    def stored(self, tokens: Any, slots: Slots) -> None:
        """Compute and store, to the end."""
        self.engine.compute(tokens, slots)
        self.device.go()
        transfer = self.store(tokens, slots)
        assert transfer.wait(10) and not transfer.failed_chunks()
        self.device.rest()

    def load(self, tokens: Any, slots: Slots, rid: str = "r", **arguments: Any) -> CopyTransfer:
        chain = Chain(tokens, CHUNK)
        self.cache.lookup(rid, chain)
        found = self.cache.wait(rid, 10)
        ticket = self.cache.claim(rid, found.chunks)
        assert ticket is not None and found.chunks == len(chain)
        self.cache.forget(rid)
        return self.connector.load(ticket, slots[: len(chain) * CHUNK], **arguments)

    def expected(self, tokens: Any, slots: Slots) -> npt.NDArray[np.uint16]:
        engine = PagedEngine()
        engine.compute(tokens, slots)
        return engine.rows(slots)

    def layer(self, layer: int, slots: Slots) -> npt.NDArray[np.uint16]:
        """What a forward pass reads of a layer."""
        return np.stack([memory[slots // PAGE, slots % PAGE] for memory in self.engine.kv[layer]])

    def found(self, tokens: Any) -> int:
        """Chunks that a lookup finds."""
        chunks = self.cache.lookup("found", Chain(tokens, CHUNK)).chunks
        self.cache.forget("found")
        return chunks

    @property
    def leases(self) -> int:
        return self.cache.stats().leases

    def close(self) -> None:
        self.device.go()
        assert self.connector.close()
        assert not self.kernels.pinned - {b.buffer.ctypes.data for b in self.kernels._bounces.values()}
        self.cache.close()
        self.device.close()


@pytest.fixture(autouse=True)
def small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layer by layer, though all layers are small."""
    monkeypatch.setattr("lmcache_sdk.connector.STEP_BYTES", LAYER_BYTES)


@pytest.fixture
def rig() -> Iterator[Rig]:
    rig = Rig()
    yield rig
    rig.close()


TOKENS = tokens_of(1, 3 * CHUNK)
OTHERS = tokens_of(2, 3 * CHUNK)
SLOTS, ELSEWHERE = slots_of(1, 3 * CHUNK), slots_of(2, 3 * CHUNK)


def test_the_pretend_device_is_one() -> None:
    device = LateDevice()
    assert isinstance(LateKernels(device), DeviceKernels)
    device.close()


@pytest.mark.parametrize("pinning", MODES)
def test_a_store_is_published_when_its_bytes_are_there(rig: Rig, pinning: str) -> None:
    rig.connect(pinning, staging_bytes=64 * LAYER_BYTES)
    rig.engine.compute(TOKENS, SLOTS)
    transfer = rig.store(TOKENS, SLOTS)
    until(lambda: transfer._queued is not None)
    assert not transfer.done() and not rig.connector.completed()
    assert rig.found(TOKENS) == 0
    rig.device.go()
    assert transfer.wait(10) and rig.connector.completed() == [transfer]
    rig.load(TOKENS, ELSEWHERE).wait(10)
    assert np.array_equal(rig.engine.rows(ELSEWHERE), rig.expected(TOKENS, ELSEWHERE))


@pytest.mark.parametrize("pinning", MODES)
def test_a_lease_lasts_until_the_last_copy_has_ended(rig: Rig, pinning: str) -> None:
    """Its memory could be given to others otherwise, under a copy that reads it."""
    rig.connect(pinning, staging_bytes=64 * LAYER_BYTES)
    rig.stored(TOKENS, SLOTS)
    transfer = rig.load(TOKENS, ELSEWHERE)
    until(lambda: len(transfer._marks) == LAYERS)
    assert rig.leases == 1 and not transfer.done()
    assert not rig.connector.drain(0.01)
    rig.device.go()
    assert rig.connector.drain(10) and rig.leases == 0


@pytest.mark.parametrize("pinning", MODES)
def test_a_forward_pass_follows_layer_by_layer(rig: Rig, pinning: str) -> None:
    """It is queued before any layer is there, and reads each as it comes."""
    rig.connect(pinning, staging_bytes=64 * LAYER_BYTES)
    rig.stored(TOKENS, SLOTS)
    transfer = rig.load(TOKENS, ELSEWHERE)
    seen: list[npt.NDArray[np.uint16]] = []
    early: list[bool] = []

    def read(layer: int) -> None:
        early.append(not transfer.done())
        seen.append(rig.layer(layer, ELSEWHERE))

    for layer in range(LAYERS):
        transfer.ready_on(layer, rig.forward)
        rig.forward.run(partial(read, layer))
    assert not transfer.wait_layer(0, 0.01)
    rig.device.go()
    until(lambda: len(seen) == LAYERS)
    assert np.array_equal(np.concatenate(seen), rig.expected(TOKENS, ELSEWHERE))
    assert early[0]
    assert all(transfer.wait_layer(layer, 10) for layer in range(LAYERS))


def test_a_forward_pass_that_does_not_wait_reads_what_was_there_before(rig: Rig) -> None:
    """So the tests above would see it."""
    rig.connect("direct")
    rig.stored(TOKENS, SLOTS)
    transfer = rig.load(TOKENS, ELSEWHERE)
    until(lambda: len(transfer._marks) == LAYERS)
    seen: list[npt.NDArray[np.uint16]] = []
    rig.forward.run(lambda: seen.append(rig.engine.rows(ELSEWHERE)))
    rig.device.prefer = rig.forward
    rig.device.go()
    assert transfer.wait(10) and seen
    assert not np.array_equal(seen[0], rig.expected(TOKENS, ELSEWHERE))


@pytest.mark.parametrize("pinning", MODES)
def test_a_fence_keeps_the_next_forward_pass_from_what_is_being_stored(rig: Rig, pinning: str) -> None:
    rig.connect(pinning, staging_bytes=64 * LAYER_BYTES)
    for seed in range(20):
        tokens = tokens_of(100 + seed, 3 * CHUNK)
        rig.device._random.seed(seed)
        rig.forward.run(partial(rig.engine.compute, tokens, SLOTS))
        transfer = rig.store(tokens, SLOTS, after=rig.forward.record())
        rig.connector.fence(rig.forward)
        rig.forward.run(partial(rig.engine.compute, OTHERS, SLOTS))
        rig.device.go()
        assert transfer.wait(10) and not transfer.failed_chunks()
        rig.load(tokens, ELSEWHERE).wait(10)
        rig.device.rest()
        assert np.array_equal(rig.engine.rows(ELSEWHERE), rig.expected(tokens, ELSEWHERE)), f"seed {seed}"


def test_a_fence_without_a_stream_blocks_the_host(rig: Rig) -> None:
    rig.connect("direct")
    rig.engine.compute(TOKENS, SLOTS)
    transfer = rig.store(TOKENS, SLOTS)
    fenced = threading.Event()
    thread = threading.Thread(target=lambda: (rig.connector.fence(), fenced.set()))
    thread.start()
    assert not fenced.wait(0.05)
    rig.device.go()
    assert fenced.wait(10) and transfer.wait(10)
    thread.join()


@pytest.mark.parametrize("first", ["store", "load"])
def test_what_touches_the_same_slots_happens_in_the_order_of_asking(rig: Rig, first: str) -> None:
    """Loads and stores are on queues of their own."""
    rig.connect("direct")
    rig.stored(OTHERS, ELSEWHERE)
    rig.engine.compute(TOKENS, SLOTS)
    if first == "store":
        stored = rig.store(TOKENS, SLOTS)
        loaded = rig.load(OTHERS, SLOTS)
    else:  # what is loaded is then stored under other keys
        loaded = rig.load(OTHERS, SLOTS)
        stored = rig.store(TOKENS, SLOTS)
    later = loaded if first == "store" else stored
    rig.device.go()
    assert loaded.wait(10) and stored.wait(10) and later.done()
    assert np.array_equal(rig.engine.rows(SLOTS), rig.expected(OTHERS, SLOTS))
    rig.load(TOKENS, ELSEWHERE).wait(10)
    wanted = rig.expected(TOKENS if first == "store" else OTHERS, ELSEWHERE)
    assert np.array_equal(rig.engine.rows(ELSEWHERE), wanted)


def test_other_slots_do_not_wait_for_each_other(rig: Rig) -> None:
    """A store that waits for a long forward pass holds up no load."""
    rig.connect("direct")
    rig.stored(OTHERS, ELSEWHERE)
    later = rig.forward.record()._replace(count=1)  # when something has run there
    slots, others = slots_of(3, 6 * CHUNK)[: 3 * CHUNK], slots_of(3, 6 * CHUNK)[3 * CHUNK :]
    stored = rig.store(TOKENS, slots, after=later)
    loaded = rig.load(OTHERS, others)
    rig.device.go()
    assert loaded.wait(10) and not stored.done()
    rig.forward.run(lambda: None)
    assert stored.wait(10)


def test_a_load_waits_for_the_event_that_it_is_given(rig: Rig) -> None:
    rig.connect("direct")
    rig.stored(TOKENS, SLOTS)
    rig.forward.run(lambda: rig.engine.compute(OTHERS, ELSEWHERE))
    transfer = rig.load(TOKENS, ELSEWHERE, after=rig.forward.record())
    rig.device.go()
    assert transfer.wait(10)
    assert np.array_equal(rig.engine.rows(ELSEWHERE), rig.expected(TOKENS, ELSEWHERE))


def test_cancelling_starts_no_further_copies_and_ends_those_under_way(rig: Rig) -> None:
    rig.connect("staged", staging_bytes=2 * LAYER_BYTES)  # so that it is held up after two steps
    rig.stored(TOKENS, SLOTS)
    transfer = rig.load(TOKENS, ELSEWHERE)
    stream = rig.connector._loads.stream._stream
    until(lambda: stream._queued > stream.ended)
    transfer.cancel()
    assert rig.leases == 1 and not transfer.done()
    rig.device.go()
    assert transfer.wait(10)
    assert list(transfer.failed_chunks()) == [0, 1, 2] and rig.leases == 0
    assert stream.ended == stream._queued < 2 * LAYERS * 3


@pytest.mark.parametrize("error", [DeviceError("failed"), RuntimeError("not foreseen")], ids=["device", "any"])
@pytest.mark.parametrize("verb", ["load", "store"])
def test_a_device_that_fails_is_a_failed_transfer_and_its_memory_is_not_reused(verb: str, error: Exception) -> None:
    rig = Rig()
    rig.connect("direct")
    rig.stored(TOKENS, SLOTS)
    free = rig.cache.stats().pool.free_bytes
    transfer = rig.load(TOKENS, ELSEWHERE) if verb == "load" else rig.store(OTHERS, SLOTS)
    until(lambda: len(transfer._marks) == LAYERS if verb == "load" else transfer._queued is not None)
    rig.device.fail(error)
    assert transfer.wait(10) and list(transfer.failed_chunks()) == [0, 1, 2]
    if isinstance(error, DeviceError):  # the only kind that events raise
        assert not transfer.wait_layer(0, 1)
        transfer.ready_on(0, rig.forward)
        rig.connector.fence(None)
    if verb == "load":
        assert rig.leases == 1
    else:
        assert rig.cache.stats().pool.free_bytes < free
        assert rig.found(OTHERS) == 0
    pinned = set(rig.kernels.pinned)
    assert rig.connector.close()
    ring = rig.connector._loads if verb == "load" else rig.connector._stores
    assert {rig.memory.ctypes.data, ring.stream._ring.ctypes.data} <= rig.kernels.pinned <= pinned
    rig.device.close()


def test_a_layer_that_no_forward_pass_can_wait_for_is_a_failed_transfer(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though all its copies end well: nothing is thrown into the forward pass."""
    rig.connect("direct")
    rig.stored(TOKENS, SLOTS)
    transfer = rig.load(TOKENS, ELSEWHERE)
    until(lambda: len(transfer._marks) == LAYERS)

    def refuse(event: LateEvent, stream: LateStream) -> None:
        raise DeviceError("no such stream")

    monkeypatch.setattr(LateEvent, "hold", refuse)
    transfer.ready_on(0, rig.forward)
    rig.device.go()
    assert transfer.wait(10) and list(transfer.failed_chunks()) == [0, 1, 2]


def test_what_is_asked_for_after_the_end_has_failed(rig: Rig) -> None:
    rig.connect("direct")
    rig.stored(TOKENS, SLOTS)
    rig.device.go()
    assert rig.connector.close()
    for transfer in (rig.load(TOKENS, ELSEWHERE), rig.store(OTHERS, SLOTS)):
        assert transfer.done() and list(transfer.failed_chunks()) == [0, 1, 2]
    assert rig.leases == 0


def changed(slots: Slots, at: int, value: int) -> Slots:
    slots = slots.copy()
    slots[at] = value
    return slots


@pytest.mark.parametrize("pinning", [*MODES, "host"])
@pytest.mark.parametrize(
    "slots",
    [
        changed(ELSEWHERE, CHUNK + 1, 32 * PAGE),
        changed(ELSEWHERE, CHUNK + 1, 2**62),
        changed(ELSEWHERE, CHUNK + 1, ELSEWHERE[CHUNK]),
        changed(ELSEWHERE, CHUNK + 1, ELSEWHERE[0]),
        changed(changed(ELSEWHERE, CHUNK + 1, ELSEWHERE[0]), 1, -1),
        ELSEWHERE.astype(np.float64),
        ELSEWHERE[:-1],
    ],
    ids=["too high", "huge", "twice in a chunk", "twice in all", "twice and one left out", "float", "too few"],
)
def test_a_load_with_bad_slots_has_failed_and_nothing_is_written(rig: Rig, pinning: str, slots: Slots) -> None:
    rig.connect(pinning)
    rig.stored(TOKENS, SLOTS)
    before = np.array(rig.engine.kv)
    rig.device.go()
    transfer = rig.load(TOKENS, slots)
    assert transfer.wait(10) and list(transfer.failed_chunks()) == [0, 1, 2]
    assert not transfer.wait_layer(0, 10)
    assert np.array_equal(rig.engine.kv, before) and rig.leases == 0
    assert rig.load(TOKENS, ELSEWHERE, "again").wait(10)
    assert np.array_equal(rig.engine.rows(ELSEWHERE), rig.expected(TOKENS, ELSEWHERE))


@pytest.mark.parametrize("pinning", [*MODES, "host"])
@pytest.mark.parametrize(
    ("slots", "failed"),
    [
        (changed(SLOTS, CHUNK + 1, 32 * PAGE), [1]),
        (changed(SLOTS, CHUNK + 1, -1), [1]),
        (SLOTS.astype(np.float64), [0, 1, 2]),
    ],
    ids=["too high", "negative", "float"],
)
def test_of_a_store_with_bad_slots_no_such_chunk_is_published(
    rig: Rig, pinning: str, slots: Slots, failed: list[int]
) -> None:
    rig.connect(pinning)
    rig.engine.compute(TOKENS, SLOTS)
    free = rig.cache.stats().pool.free_bytes
    rig.device.go()
    transfer = rig.store(TOKENS, slots)
    assert transfer.wait(10) and list(transfer.failed_chunks()) == failed
    assert rig.found(TOKENS) == failed[0]
    assert (rig.cache.stats().pool.free_bytes == free) == (len(failed) == 3)


def test_copies_are_staged_while_a_segment_is_being_registered(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LMCACHE_SDK_PINNING", "auto")
    started, go_on = threading.Event(), threading.Event()
    register = rig.kernels._register

    def slow(address: int, nbytes: int) -> str:
        if nbytes == rig.memory.nbytes:
            started.set()
            assert go_on.wait(10)
        return register(address, nbytes)

    monkeypatch.setattr(rig.kernels, "_register", slow)
    rig.connect(None)
    rig.stored(TOKENS, SLOTS)
    assert started.wait(10)
    rig.device.go()
    assert rig.load(TOKENS, ELSEWHERE).wait(10)
    assert np.array_equal(rig.engine.rows(ELSEWHERE), rig.expected(TOKENS, ELSEWHERE))
    assert not rig.segments.are_direct(rig.memory)
    go_on.set()
    until(lambda: rig.segments.are_direct(rig.memory))
    rig.stored(OTHERS, SLOTS)
    rig.device.go()
    assert rig.load(OTHERS, ELSEWHERE).wait(10)
    assert np.array_equal(rig.engine.rows(ELSEWHERE), rig.expected(OTHERS, ELSEWHERE))


def test_memory_that_cannot_be_registered_is_staged_and_that_is_said(
    rig: Rig, caplog: pytest.LogCaptureFixture
) -> None:
    rig.kernels.refuses[rig.memory.nbytes] = "no room for locked memory"
    rig.connect("auto")
    rig.stored(TOKENS, SLOTS)
    until(lambda: "copies are staged: no room for locked memory" in caplog.text)
    rig.device.go()
    assert rig.load(TOKENS, ELSEWHERE).wait(10)
    assert np.array_equal(rig.engine.rows(ELSEWHERE), rig.expected(TOKENS, ELSEWHERE))


@pytest.mark.parametrize("pinning", ["auto", "staged"])
def test_no_pool_memory_is_registered_where_that_is_not_wanted(rig: Rig, pinning: str) -> None:
    rig.kernels.prefers_staging = "not reliable there" if pinning == "auto" else ""
    rig.connect(pinning)
    rig.stored(TOKENS, SLOTS)
    assert rig.connector._segments is None and rig.memory.nbytes not in rig.kernels.registered


def test_the_memory_of_an_earlier_life_is_unregistered(rig: Rig) -> None:
    rig.connect("direct")
    old = host_buffer(4096)
    rig.segments.add("earlier", [old])
    until(lambda: rig.segments.are_direct(old))
    rig.connector._loads.stream.broken = True  # copies of them may be under way for ever
    rig.stored(OTHERS, SLOTS)
    assert rig.segments.are_direct(old)
    rig.connector._loads.stream.broken = False
    rig.stored(TOKENS, SLOTS)
    assert not rig.segments.are_direct(old) and rig.segments.boots() == [rig.cache.store.boot]
    until(lambda: old.ctypes.data not in rig.kernels.pinned)


def test_the_memory_of_an_earlier_life_stays_registered_under_a_transfer_that_was_asked_for_meanwhile(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig.connect("direct")
    rig.stored(TOKENS, SLOTS)
    old = host_buffer(4096)
    rig.segments.add("earlier", [old])
    until(lambda: rig.segments.are_direct(old))
    segments, remove = rig.cache.segments, rig.segments.remove
    asked, under_way = list[CopyTransfer](), list[int]()

    def segments_while_another_asks(boot: str) -> Any:
        if boot == "earlier" and not asked:
            asked.append(rig.store(OTHERS, SLOTS))
        return segments(boot)

    def count_and_remove(boot: str) -> None:
        under_way.append(len(rig.connector._open))
        remove(boot)

    monkeypatch.setattr(rig.cache, "segments", segments_while_another_asks)
    monkeypatch.setattr(rig.segments, "remove", count_and_remove)
    rig.device.go()
    assert rig.load(TOKENS, ELSEWHERE).wait(10) and asked[0].wait(10)
    rig.stored(TOKENS, SLOTS)
    assert under_way == [1], "by the last of them, or the one after"


def test_closing_waits_for_a_registration_no_longer_than_it_is_told_to(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig.connect("direct")
    started, go_on = threading.Event(), threading.Event()
    register = rig.kernels._register

    def slow(address: int, nbytes: int) -> str:
        started.set()
        assert go_on.wait(10)
        return register(address, nbytes)

    monkeypatch.setattr(rig.kernels, "_register", slow)
    rig.segments.add("slow", [host_buffer(4096), host_buffer(8192)])
    assert started.wait(10)
    began = time.monotonic()
    assert not rig.segments.close(0.05) and not rig.connector.close(0.05)
    assert time.monotonic() - began < 5
    go_on.set()
    assert rig.segments.close(10)
    assert 8192 not in rig.kernels.registered, "what nobody wants any more is not registered"


def test_a_registration_that_fails_in_any_way_ends_no_other(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    register = rig.kernels._register

    def odd(address: int, nbytes: int) -> str:
        if nbytes == 12288:
            raise OSError("nobody has thought of this")
        return register(address, nbytes)

    monkeypatch.setattr(rig.kernels, "_register", odd)
    rig.connect("auto")
    good = host_buffer(8192)
    rig.segments.add("another", [host_buffer(12288), good])
    until(lambda: rig.segments.are_direct(good))
    assert "nobody has thought of this" in caplog.text


@pytest.mark.parametrize("rings", [0, 1])
def test_a_ring_that_cannot_be_pinned_is_an_error_at_the_start(rings: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the one before it is given back."""
    rig = Rig()
    register = rig.kernels._register

    def scarce(address: int, nbytes: int) -> str:
        if nbytes == 4 * LAYER_BYTES and rig.kernels.registered.count(nbytes) == rings:
            return "locked memory is used up"
        return register(address, nbytes)

    monkeypatch.setattr(rig.kernels, "_register", scarce)
    with pytest.raises(DeviceError, match="locked memory is used up"):
        rig.connect("auto")
    assert not rig.kernels.pinned - {b.buffer.ctypes.data for b in rig.kernels._bounces.values()}
    rig.cache.close()
    rig.device.close()


@pytest.mark.parametrize("pinning", MODES)
@pytest.mark.parametrize("seed", range(5))
def test_any_order_of_anything(pinning: str, seed: int) -> None:
    """Requests come and go: computed, stored, their slots given to others, loaded, read layer by layer."""
    chance = random.Random(seed)
    rig = Rig(seed)
    rig.connect(pinning, staging_bytes=chance.choice([2, 3, 16]) * LAYER_BYTES)
    prompts = [tokens_of(1000 + n, chance.randrange(1, 5) * CHUNK) for n in range(8)]
    checks: list[tuple[str, npt.NDArray[np.uint16], npt.NDArray[np.uint16]]] = []

    def read(what: str, tokens: Any, slots: Slots, layer: int) -> None:
        checks.append((what, rig.layer(layer, slots), rig.expected(tokens, slots)[2 * layer : 2 * layer + 2]))

    rig.device.go()
    for turn in range(40):
        tokens = chance.choice(prompts)
        slots = slots_of(chance.randrange(50), len(tokens))
        chain = Chain(tokens, CHUNK)
        rid = f"{seed}.{turn}"
        found = rig.cache.lookup(rid, chain).chunks
        ticket = rig.cache.claim(rid, found) if found else None
        rig.cache.forget(rid)
        rig.connector.fence(rig.forward)  # whatever these slots held is stored before they are written
        if ticket is not None:
            covered = found * CHUNK
            transfer = rig.connector.load(ticket, slots[:covered], after=rig.forward.record())
            for layer in range(LAYERS):
                transfer.ready_on(layer, rig.forward)
                rig.forward.run(partial(read, f"seed {seed}, turn {turn}", tokens[:covered], slots[:covered], layer))
        else:
            rig.forward.run(partial(rig.engine.compute, tokens, slots))
            rig.store(tokens, slots, after=rig.forward.record())
    assert rig.connector.drain(20)
    rig.forward.record().wait()
    assert len(checks) > LAYERS
    for what, found_rows, wanted in checks:
        assert np.array_equal(found_rows, wanted), what
    assert rig.leases == 0
    assert not [t for t in rig.connector.completed() if t.failed_chunks()]
    rig.close()
