"""The conformance suite of storage backends. How to use it: ``docs/writing-a-backend.md``."""

from __future__ import annotations

import itertools
import random
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import ClassVar

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from lmcache_sdk.backend import KEY_LIMIT, Backend, Item, Miss, Range, RangeGet, Scan, Touch, Usage
from lmcache_sdk.errors import BackendUnavailable

SIZES = (0, 1, 255, 4096, 65_537, 1 << 20)
CLOSE_TIMEOUT_S = 10.0


def some_bytes(nbytes: int, seed: int = 0) -> bytes:
    """Bytes that compress badly and are the same for the same seed."""
    return random.Random(f"{seed}/{nbytes}").randbytes(nbytes)  # noqa: S311


def item(key: str, data: bytes) -> Item:
    """A record to be put."""
    return Item(key, memoryview(data))


def read(backend: Backend, key: str, capacity: int = 2 << 20) -> bytes | Miss:
    """One record, through ``get``."""
    buffer = bytearray(capacity)
    (answer,) = backend.get([key], [memoryview(buffer)])
    return answer if isinstance(answer, Miss) else bytes(buffer[:answer])


def scanned(backend: Scan, prefix: str = "") -> list[tuple[str, int]]:
    """Key and length of every record, in order."""
    return sorted((stat.key, stat.nbytes) for stat in backend.scan(prefix))


#: What the protocol demands, as ``docs/writing-a-backend.md`` counts it, and the tests that hold a backend to it.
MUSTS = {
    "1: get returns the very bytes last put under that key, or a Miss": (
        "test_what_is_absent", "test_empty_batches", "test_storing_nothing", "test_put_stores_the_very_bytes",
        "test_get_returns_the_very_bytes", "test_get_does_not_hide_corruption", "test_misaligned_views",
        "test_a_buffer_of_the_exact_size", "test_keys_of_every_legal_form", "test_overwriting",
        "test_the_same_key_twice_in_a_batch", "test_batches_answer_in_order", "test_prefix_len_counts_leading_keys",
        "test_records_survive_closing", "test_scan", "test_ranges", "test_usage",
        "test_the_bound_holds_and_the_latest_stay",
    ),
    "2: a record becomes visible all at once": ("test_threads_see_whole_records",),
    "3: a buffer is not touched beyond the returned length, nor after the call": (
        "test_the_rest_of_a_buffer_is_untouched", "test_a_buffer_that_is_too_small",
        "test_a_read_buffer_is_left_alone_after_get",
    ),
    "4: what put was given is not kept": ("test_the_source_may_change_after_put",),
    "5: nothing is left of a key that was deleted": ("test_delete",),
    "6: it is used from several threads at once, and of several puts with if_absent one wins": (
        "test_is_a_backend", "test_if_absent_keeps_what_is_there", "test_of_racing_writers_one_wins",
    ),
    "8: closing is final and idempotent, and every later call raises BackendUnavailable": (
        "test_closing_under_load", "test_close_is_final_and_idempotent",
    ),
}  # fmt: skip


def must_of(test: str) -> str:
    """The demand that a test is about, by the test's name."""
    return next(must for must, tests in MUSTS.items() if test in tests)


class BackendTests:
    """Subclass it, say how to open a backend, and pytest holds it to the MUSTs of the protocol.

    The tests do not trust the backend to test itself: what ``put`` wrote is looked at by :meth:`raw_get`,
    and what ``get`` reads was written by :meth:`raw_set`.
    """

    stores: ClassVar[bool] = True  #: False for a backend that keeps nothing
    durable: ClassVar[bool] = False  #: opening the same place again finds the records
    longest_key: ClassVar[int] = KEY_LIMIT  #: less only where something is added to keys
    bound: ClassVar[int] = 0  #: open() limits the backend to so many bytes (at most 64 MiB); 0 = no limit

    # What a subclass provides

    def open(self, place: Path) -> Backend:
        """Open a backend on what belongs to ``place``, a directory of its own. May be called again."""
        raise NotImplementedError

    def raw_get(self, backend: Backend, key: str) -> bytes | None:
        """The stored bytes of a key, by another way than ``get``; None if there are none."""
        raise NotImplementedError

    def raw_set(self, backend: Backend, key: str, data: bytes) -> None:
        """Store bytes under a key by another way than ``put``, so that ``backend`` finds them."""
        raise NotImplementedError

    def raw_corrupt(self, backend: Backend, key: str) -> None:
        """Change a bit in the middle of the stored bytes."""
        data = bytearray(self.raw_get(backend, key) or b"")
        data[len(data) // 2] ^= 0x10
        self.raw_set(backend, key, bytes(data))

    # Fixtures

    @pytest.fixture
    def backend(self, tmp_path: Path) -> Iterator[Backend]:
        """An empty backend."""
        backend = self.open(tmp_path)
        yield backend
        backend.close(CLOSE_TIMEOUT_S)

    @pytest.fixture
    def storing(self, backend: Backend) -> Backend:
        """An empty backend that keeps what it is given."""
        if not self.stores:
            pytest.skip("stores nothing")
        return backend

    # The protocol itself

    def test_is_a_backend(self, backend: Backend) -> None:
        assert isinstance(backend, Backend)
        assert isinstance(type(backend).instant, bool)

    def test_what_is_absent(self, backend: Backend) -> None:
        assert read(backend, "absent") is Miss.ABSENT
        assert backend.contains(["absent", "absent/2"]) == [False, False]
        assert backend.prefix_len(["absent"]) == 0
        assert backend.delete(["absent"]) == 0

    def test_empty_batches(self, backend: Backend) -> None:
        assert backend.get([], []) == []
        assert backend.put([]) == []
        assert backend.contains([]) == []
        assert backend.prefix_len([]) == 0
        assert backend.delete([]) == 0

    def test_storing_nothing(self, backend: Backend) -> None:
        if self.stores:
            pytest.skip("stores")
        assert backend.put([item("a", b"1")]) == [True]
        assert read(backend, "a") is Miss.ABSENT
        assert backend.contains(["a"]) == [False]

    # Round trips

    @pytest.mark.parametrize("nbytes", SIZES)
    def test_put_stores_the_very_bytes(self, storing: Backend, nbytes: int) -> None:
        data = some_bytes(nbytes)
        assert storing.put([item("k", data)]) == [True]
        assert self.raw_get(storing, "k") == data

    @pytest.mark.parametrize("nbytes", SIZES)
    def test_get_returns_the_very_bytes(self, storing: Backend, nbytes: int) -> None:
        data = some_bytes(nbytes)
        self.raw_set(storing, "k", data)
        assert read(storing, "k") == data

    def test_get_does_not_hide_corruption(self, storing: Backend) -> None:
        """What is there is returned; the store's checksum finds that it is wrong. A miss will do, too."""
        data = some_bytes(10_000)
        storing.put([item("k", data)])
        self.raw_corrupt(storing, "k")
        assert read(storing, "k") in (self.raw_get(storing, "k"), Miss.ABSENT)

    def test_misaligned_views(self, storing: Backend) -> None:
        data = some_bytes(70_001)
        for offset in (1, 3, 7):
            source = memoryview(bytearray(offset) + data)[offset:]
            storing.put([Item(f"k{offset}", source)])
            target = memoryview(bytearray(len(data) + offset))[offset:]
            assert storing.get([f"k{offset}"], [target]) == [len(data)]
            assert target == data

    def test_the_rest_of_a_buffer_is_untouched(self, storing: Backend) -> None:
        data = some_bytes(5000)
        storing.put([item("k", data)])
        buffer = bytearray(b"\xa5" * 9000)
        assert storing.get(["k", "absent"], [memoryview(buffer)[:8000], memoryview(buffer)[8000:]]) == [
            5000,
            Miss.ABSENT,
        ]
        assert buffer == data + b"\xa5" * 4000

    def test_a_buffer_of_the_exact_size(self, storing: Backend) -> None:
        data = some_bytes(5000)
        storing.put([item("k", data)])
        assert read(storing, "k", 5000) == data

    @pytest.mark.parametrize("capacity", [0, 1, 4999])
    def test_a_buffer_that_is_too_small(self, storing: Backend, capacity: int) -> None:
        storing.put([item("k", some_bytes(5000))])
        surroundings = bytearray(b"\xa5" * 10_000)
        (answer,) = storing.get(["k"], [memoryview(surroundings)[:capacity]])
        assert answer is Miss.TOO_LARGE
        assert surroundings[capacity:] == b"\xa5" * (10_000 - capacity)

    def test_the_source_may_change_after_put(self, storing: Backend) -> None:
        data = bytearray(some_bytes(100_000))
        expected = bytes(data)
        storing.put([Item("k", memoryview(data))])
        data[:] = bytes(len(data))
        assert read(storing, "k") == expected

    def test_a_read_buffer_is_left_alone_after_get(self, storing: Backend) -> None:
        storing.put([item("k", some_bytes(50_000, 1))])
        buffer = bytearray(50_000)
        storing.get(["k"], [memoryview(buffer)])
        storing.put([item("k", some_bytes(50_000, 2))], if_absent=False)
        assert buffer == some_bytes(50_000, 1)

    def test_keys_of_every_legal_form(self, storing: Backend) -> None:
        keys = [
            "a",
            "A",
            "a/b",
            "a//b",
            "a.b",
            "..",
            "a-b",
            "a_b",
            "0",
            "k" * self.longest_key,
            "k" * (self.longest_key - 1) + "j",
        ]
        storing.put([item(key, key.encode()) for key in keys])
        assert [read(storing, key) for key in keys] == [key.encode() for key in keys]

    # Semantics

    def test_if_absent_keeps_what_is_there(self, storing: Backend) -> None:
        assert storing.put([item("k", b"first")]) == [True]
        assert storing.put([item("k", b"second"), item("new", b"third")]) == [False, True]
        assert read(storing, "k") == b"first"

    def test_overwriting(self, storing: Backend) -> None:
        for nbytes in (10, 5000, 3, 100_000, 0):
            assert storing.put([item("k", some_bytes(nbytes))], if_absent=False) == [True]
            assert read(storing, "k") == some_bytes(nbytes)

    def test_the_same_key_twice_in_a_batch(self, storing: Backend) -> None:
        assert storing.put([item("k", b"1"), item("k", b"2")]) == [True, False]
        assert read(storing, "k") == b"1"
        assert storing.put([item("k", b"3"), item("k", b"4")], if_absent=False) == [True, True]
        assert read(storing, "k") == b"4"

    def test_batches_answer_in_order(self, storing: Backend) -> None:
        keys = [f"k{i}" for i in range(20)]
        storing.put([item(key, some_bytes(100 + i, i)) for i, key in enumerate(keys) if i % 3])
        buffers = [memoryview(bytearray(200)) for _ in keys]
        answers = storing.get(keys[::-1], buffers)
        for i, answer, buffer in zip(reversed(range(20)), answers, buffers, strict=True):
            if i % 3:
                assert answer == 100 + i
                assert buffer[:answer] == some_bytes(100 + i, i)
            else:
                assert answer is Miss.ABSENT
        assert storing.contains(keys) == [bool(i % 3) for i in range(20)]

    def test_prefix_len_counts_leading_keys(self, storing: Backend) -> None:
        keys = [f"k{i}" for i in range(8)]
        storing.put([item(keys[i], b"x") for i in (0, 1, 2, 4, 5)])
        assert storing.prefix_len(keys) == 3
        assert storing.prefix_len(keys[3:]) == 0
        assert storing.prefix_len(keys[4:6]) == 2

    def test_delete(self, storing: Backend) -> None:
        storing.put([item("a", b"1"), item("b", some_bytes(100_000))])
        assert storing.delete(["a", "absent", "b", "b"]) == 2
        assert storing.contains(["a", "b"]) == [False, False]
        assert read(storing, "b") is Miss.ABSENT
        assert self.raw_get(storing, "b") is None
        assert storing.put([item("b", b"again")]) == [True]
        assert read(storing, "b") == b"again"

    # Threads

    def test_threads_see_whole_records(self, storing: Backend) -> None:
        """Writers overwrite keys with records of one repeated byte each; readers must never see a mixture."""
        keys = [f"k{i}" for i in range(4)]
        failures: list[str] = []
        start = threading.Barrier(6)

        def write(seed: int) -> None:
            rng = random.Random(seed)  # noqa: S311
            start.wait()
            for _ in range(60):
                data = bytes([rng.randrange(256)]) * rng.choice((100, 5000, 70_000))
                storing.put([item(rng.choice(keys), data)], if_absent=False)
                if rng.random() < 0.1:
                    storing.delete([rng.choice(keys)])

        def check(seed: int) -> None:
            rng = random.Random(seed)  # noqa: S311
            buffer = bytearray(100_000)
            start.wait()
            for _ in range(150):
                (answer,) = storing.get([rng.choice(keys)], [memoryview(buffer)])
                if not isinstance(answer, Miss) and (
                    answer not in (100, 5000, 70_000) or buffer[:answer].strip(buffer[:1])
                ):
                    failures.append(f"{answer} bytes, not all alike")

        with ThreadPoolExecutor(6) as pool:
            jobs = [pool.submit(write, i) for i in range(3)] + [pool.submit(check, i) for i in range(3, 6)]
            for job in jobs:
                job.result(timeout=60)
        assert failures == []

    def test_of_racing_writers_one_wins(self, storing: Backend) -> None:
        start = threading.Barrier(4)

        def write(number: int) -> list[bool]:
            start.wait()
            return [storing.put([item(f"k{i}", b"%d" % number)])[0] for i in range(20)]

        with ThreadPoolExecutor(4) as pool:
            wins = list(pool.map(write, range(4)))
        for i in range(20):
            winners = [number for number in range(4) if wins[number][i]]
            assert len(winners) == 1
            assert read(storing, f"k{i}") == b"%d" % winners[0]

    def test_closing_under_load(self, storing: Backend) -> None:
        """Calls that are inside when it closes end well, later ones raise BackendUnavailable."""
        data = some_bytes(200_000)
        begun, closed = threading.Semaphore(0), threading.Event()

        def work(number: int) -> None:
            buffer = bytearray(200_000)
            try:
                for i in itertools.count():
                    late = closed.is_set()
                    storing.put([item(f"k{number}/{i % 10}", data)], if_absent=False)
                    if storing.get([f"k{number}/{i % 10}"], [memoryview(buffer)]) == [len(data)]:
                        assert buffer == data
                    assert not late, "a call went through after close"
                    begun.release()
            except BackendUnavailable:
                return
            finally:
                begun.release(10)  # whoever works no more is not waited for

        with ThreadPoolExecutor(3) as pool:
            jobs = [pool.submit(work, i) for i in range(3)]
            for _ in range(10):
                assert begun.acquire(timeout=30)
            storing.close(CLOSE_TIMEOUT_S)
            closed.set()
            for job in jobs:
                job.result(timeout=30)

    # Closing

    def test_close_is_final_and_idempotent(self, backend: Backend) -> None:
        backend.close(CLOSE_TIMEOUT_S)
        backend.close(CLOSE_TIMEOUT_S)
        calls: list[Callable[[], object]] = [
            lambda: backend.get(["k"], [memoryview(bytearray(1))]),
            lambda: backend.put([item("k", b"1")]),
            lambda: backend.contains(["k"]),
            lambda: backend.prefix_len(["k"]),
            lambda: backend.delete(["k"]),
        ]
        if isinstance(backend, Scan):
            calls.append(lambda: list(backend.scan()))
        if isinstance(backend, Usage):
            calls.append(backend.usage)
        if isinstance(backend, Touch):
            calls.append(lambda: backend.touch(["k"]))
        for call in calls:
            with pytest.raises(BackendUnavailable):
                call()

    def test_records_survive_closing(self, storing: Backend, tmp_path: Path) -> None:
        if not self.durable:
            pytest.skip("not durable")
        expected = {f"k{nbytes}": some_bytes(nbytes) for nbytes in SIZES}
        storing.put([item(key, data) for key, data in expected.items()])
        storing.delete(["k1"])
        storing.close(CLOSE_TIMEOUT_S)
        again = self.open(tmp_path)
        try:
            assert read(again, "k1") is Miss.ABSENT
            del expected["k1"]
            assert {key: read(again, key) for key in expected} == expected
            assert again.contains(list(expected)) == [True] * len(expected)
        finally:
            again.close(CLOSE_TIMEOUT_S)

    # Capabilities

    def test_scan(self, storing: Backend) -> None:
        if not isinstance(storing, Scan):
            pytest.skip("cannot scan")
        assert list(storing.scan()) == []
        storing.put([item("a/1", b"1"), item("a/2", b"22"), item("ab", b"333"), item("b/1", b"")])
        assert scanned(storing) == [("a/1", 1), ("a/2", 2), ("ab", 3), ("b/1", 0)]
        assert scanned(storing, "a/") == [("a/1", 1), ("a/2", 2)]
        storing.delete(["a/1"])
        assert scanned(storing, "a/") == [("a/2", 2)]
        assert list(storing.scan("zzz")) == []

        if getattr(storing, "dated", False):
            storing.put([item("now", b"1")])
            (stat,) = storing.scan("now")
            assert abs(stat.modified - time.time()) < 60, "seconds since the epoch"

    def test_ranges(self, storing: Backend) -> None:
        if not isinstance(storing, RangeGet):
            pytest.skip("reads no parts of records")
        data = some_bytes(10_000)
        storing.put([item("k", data), item("empty", b"")])
        memory = memoryview(bytearray(b"\xa5" * 7000))
        ranges = [
            Range("k", 100, [memory[:1000], memory[1000:1000], memory[2000:4500]]),
            Range("k", 9900, [memory[4500:4550], memory[4550:5000]]),
            Range("absent", 0, [memory[6000:]]),
            Range("k", 10_000, [memory[6000:]]),
            Range("empty", 0, [memory[6000:]]),
            Range("k", 5, []),
            Range("absent", 5, []),
        ]
        assert storing.get_ranges(ranges) == [3500, 100, Miss.ABSENT, 0, 0, 0, Miss.ABSENT]
        assert memory[:1000] == data[100:1100]
        assert memory[2000:4500] == data[1100:3600]
        assert memory[4500:4600] == data[9900:]
        assert set(memory[1000:2000]) | set(memory[4600:]) == {0xA5}

    def test_usage(self, storing: Backend) -> None:
        if not isinstance(storing, Usage):
            pytest.skip("does not know its usage")
        empty = storing.usage()
        assert (empty.records, empty.used_bytes, empty.evictions) == (0, 0, 0)
        storing.put([item("a", some_bytes(10_000)), item("b", some_bytes(20_000))])
        storing.put([item("a", some_bytes(12_000))], if_absent=False)
        report = storing.usage()
        assert report.records == 2
        assert report.used_bytes >= 32_000
        if self.bound:
            assert 0 < report.capacity_bytes <= self.bound
        storing.delete(["a", "b"])
        assert storing.usage()[:2] == (0, 0)

    def test_the_bound_holds_and_the_latest_stay(self, storing: Backend) -> None:
        if not self.bound:
            pytest.skip("has no bound")
        nbytes = self.bound // 32
        for i in range(100):
            storing.put([item(f"k{i}", some_bytes(nbytes, i))])
            assert read(storing, f"k{i}") == some_bytes(nbytes, i)
            if isinstance(storing, Usage):
                assert storing.usage().used_bytes <= self.bound
        kept = [i for i in range(100) if storing.contains([f"k{i}"]) == [True]]
        assert len(kept) <= 32
        assert 99 in kept
        assert all(read(storing, f"k{i}") == some_bytes(nbytes, i) for i in kept)


class BackendStateMachine(RuleBasedStateMachine):
    """Drives a backend and a dict with the same random calls. Made by :func:`backend_state_machine`."""

    suite: ClassVar[BackendTests]

    keys = st.sampled_from([f"{group}/{i}" for group in "ab" for i in range(6)] + ["k" * 300])
    lengths = st.sampled_from([0, 1, 100, 1900, 2000, 4080, 4081, 30_000, 200_000])

    def __init__(self) -> None:
        super().__init__()
        self.model: dict[str, bytes] = {}

    @initialize()
    def begin(self) -> None:
        self.folder = tempfile.TemporaryDirectory()
        self.backend = self.suite.open(Path(self.folder.name))

    @rule(key=keys, nbytes=lengths, seed=st.integers(0, 3), if_absent=st.booleans())
    def put(self, key: str, nbytes: int, seed: int, if_absent: bool) -> None:
        data = some_bytes(nbytes, seed)
        (written,) = self.backend.put([item(key, data)], if_absent=if_absent)
        if written:
            # Where nothing is evicted, a put that should have kept the old record is an error.
            assert self.suite.bound or not (if_absent and key in self.model)
            self.model[key] = data
        else:
            assert if_absent
            assert key in self.model

    @rule(batch=st.lists(keys, max_size=6))
    def get(self, batch: list[str]) -> None:
        for key in batch:
            self.check(key, read(self.backend, key, 200_000))

    @rule(key=keys, capacity=lengths)
    def get_into(self, key: str, capacity: int) -> None:
        found = read(self.backend, key, capacity)
        if found is Miss.TOO_LARGE:
            assert len(self.model[key]) > capacity
        else:
            self.check(key, found)

    def check(self, key: str, found: bytes | Miss) -> None:
        """The very bytes, or a miss; a miss of what was put only from a backend that evicts."""
        if isinstance(found, Miss):
            assert found is Miss.ABSENT
            assert key not in self.model or self.suite.bound
            self.model.pop(key, None)
        else:
            assert found == self.model[key]

    @rule(batch=st.lists(keys, max_size=6))
    def look(self, batch: list[str]) -> None:
        present = self.backend.contains(batch)
        assert self.backend.prefix_len(batch) == [*present, False].index(False)
        for key, here in zip(batch, present, strict=True):
            assert here == (key in self.model) or (self.suite.bound and not here)

    @rule(batch=st.lists(keys, max_size=3))
    def delete(self, batch: list[str]) -> None:
        count = self.backend.delete(batch)
        expected = len({key for key in batch if self.model.pop(key, None) is not None})
        assert count == expected or (self.suite.bound and count < expected)
        assert not any(self.backend.contains(batch))

    @rule()
    def scan(self) -> None:
        if isinstance(self.backend, Scan):
            listed = dict(scanned(self.backend))
            for key, nbytes in listed.items():
                assert nbytes == len(self.model[key])
            assert self.suite.bound or listed.keys() == self.model.keys()
            if isinstance(self.backend, Usage):
                report = self.backend.usage()
                assert report.records == len(listed)
                assert not self.suite.bound or report.used_bytes <= self.suite.bound

    @precondition(lambda self: self.suite.durable)
    @rule()
    def reopen(self) -> None:
        self.backend.close(CLOSE_TIMEOUT_S)
        self.backend = self.suite.open(Path(self.folder.name))

    def teardown(self) -> None:
        """Close and remove."""
        if hasattr(self, "backend"):
            self.backend.close(CLOSE_TIMEOUT_S)
            self.folder.cleanup()


def backend_state_machine(suite: BackendTests) -> type[BackendStateMachine]:
    """A Hypothesis state machine for a backend: ``TestX = backend_state_machine(XTests()).TestCase``."""
    name = f"{type(suite).__name__}StateMachine"
    return type(name, (BackendStateMachine,), {"suite": suite})
