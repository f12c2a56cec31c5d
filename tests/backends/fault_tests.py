"""What every remote backend must do when its network or its server breaks: subclass :class:`RemoteFaultTests`.

A call ends in time, with the right bytes, a miss or a BackendError; and the backend works again, without being opened
anew, once what it talks to does. Only where replies are garbled may a backend return other bytes: the checksum of the
record is there to find it, so that is tried through a store.
"""

from __future__ import annotations

import random
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from typing import Any, ClassVar, NamedTuple

import numpy as np
import pytest

from lmcache_sdk.backend import Backend, Item, Miss
from lmcache_sdk.core import Limits
from lmcache_sdk.errors import BackendError
from lmcache_sdk.open import LocalCache
from lmcache_sdk.store import Store, Tier
from lmcache_sdk.testing.proxy import Proxy
from tests.core.engine import CHUNK, PRODUCER, PagedEngine, load, namespace, slots_of, store, tokens_of

MODES: dict[str, Callable[[Proxy], None]] = {
    "latency": lambda proxy: proxy.latency(0.05),
    "endless latency": lambda proxy: proxy.latency(60),
    "reset": Proxy.reset,
    "half-open": Proxy.half_open,
    "truncated at once": lambda proxy: proxy.truncate(0),
    "truncated in a header": lambda proxy: proxy.truncate(3),
    "truncated in a value": lambda proxy: proxy.truncate(100_000),
    "blackhole": Proxy.blackhole,
    "garbage": Proxy.garbage,
    "nothing but garbage": lambda proxy: proxy.garbage(every=2),
}
HARMLESS = {"latency"}
GARBAGE = {"garbage", "nothing but garbage"}
SIZES = (1, 5_000, 300_000, 1 << 20)
TOKENS = tokens_of(3, 5 * CHUNK + 3)


class Outcome(NamedTuple):
    value: Any
    error: BackendError | None
    seconds: float


class RemoteFaultTests:
    """Subclass it, say where the server is and how to open a backend on it; :meth:`kill_server` and
    :meth:`start_server` too if the server can be restarted.
    """

    timeout_s: ClassVar[float] = 1.0  #: one call of a backend that :meth:`open` has opened ends within this
    grace_s: ClassVar[float] = 1.0  #: and this much more
    recovery_s: ClassVar[float] = 10.0  #: it works again so long after the fault has gone
    seed: ClassVar[int] = 0

    def target(self) -> tuple[str, int]:
        """Host and port of the server."""
        raise NotImplementedError

    def open(self, port: int) -> Backend:
        """A backend that reaches the server at this port of 127.0.0.1 only, with a timeout of ``timeout_s``."""
        raise NotImplementedError

    def kill_server(self) -> None:
        """End the server with no regard for its clients."""
        pytest.skip("the server is not restarted")

    def start_server(self) -> None:
        """Start it again at the same port; it may have forgotten its records."""
        raise NotImplementedError

    # Fixtures and helpers

    @pytest.fixture
    def proxy(self) -> Iterator[Proxy]:
        print(f"seed of the garbage: {self.seed}")
        with Proxy(*self.target(), seed=self.seed) as proxy:
            yield proxy

    @pytest.fixture
    def backend(self, proxy: Proxy) -> Iterator[Backend]:
        backend = self.open(proxy.port)
        yield backend
        proxy.pass_through()
        backend.close(self.timeout_s)

    @pytest.fixture
    def records(self, backend: Backend) -> Iterator[dict[str, bytes]]:
        """Stored before anything breaks."""
        prefix = f"fault/{uuid.uuid4().hex}"
        records = {f"{prefix}/{n}": random.Random(f"{prefix}/{n}").randbytes(n) for n in SIZES}
        assert backend.put([Item(key, memoryview(data)) for key, data in records.items()]) == [True] * len(records)
        yield records
        self.recovered(lambda: backend.delete([*records, *(f"{key}/new" for key in records)]) >= 0)

    def timed(self, call: Callable[..., object], *arguments: object) -> Outcome:
        """How a call ends; that it does, in time, and with no other error than a BackendError."""
        ended: list[tuple[object, BaseException | None, float]] = []

        def run() -> None:
            start = time.monotonic()
            try:
                ended.append((call(*arguments), None, time.monotonic() - start))
            except BaseException as error:
                ended.append((None, error, time.monotonic() - start))

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        thread.join(self.timeout_s + self.grace_s)
        assert ended, f"a call is still under way after {self.timeout_s + self.grace_s} s"
        value, error, seconds = ended[0]
        if error is not None and not isinstance(error, BackendError):
            raise AssertionError(f"{type(error).__name__}, which is no BackendError") from error
        return Outcome(value, error, seconds)

    def recovered(self, works: Callable[[], bool]) -> None:
        """Within the time for it; errors until then are no matter."""
        deadline = time.monotonic() + self.recovery_s
        while True:
            outcome = self.timed(works)
            if outcome.value:
                return
            assert time.monotonic() < deadline, f"it does not work again: {outcome.error or 'wrong answers'}"
            time.sleep(0.05)

    def check_each_call(self, backend: Backend, records: dict[str, bytes], *, garbled: bool = False) -> int:
        """Make each call once; the answer is how many failed."""
        keys, absent = list(records), [f"{key}/absent" for key in records]
        buffers = [bytearray(max(SIZES)) for _ in keys]
        got = self.timed(backend.get, [*keys, *absent], [memoryview(b) for b in [*buffers, *buffers]])
        seen = self.timed(backend.contains, [*keys, *absent])
        prefix = self.timed(backend.prefix_len, [*keys, *absent])
        new = [Item(f"{key}/new", memoryview(data)) for key, data in records.items()]
        put = self.timed(backend.put, new)
        deleted = self.timed(backend.delete, [item.key for item in new])
        if got.error is None and not garbled:
            assert got.value == [*map(len, records.values()), *[Miss.ABSENT] * len(absent)]
        if seen.error is None:
            assert len(seen.value) == 2 * len(keys)
            assert garbled or seen.value == [True] * len(keys) + [False] * len(absent)
        if prefix.error is None:
            assert 0 <= prefix.value <= 2 * len(keys)
            assert garbled or prefix.value == len(keys)
        if put.error is None:
            assert len(put.value) == len(new)
        if deleted.error is None:
            assert garbled or 0 <= deleted.value <= len(new)
        if not garbled and got.error is None:
            self.check_bytes(backend, records)
        return sum(outcome.error is not None for outcome in (got, seen, prefix, put, deleted))

    def check_bytes(self, backend: Backend, records: dict[str, bytes]) -> int:
        """Every record, one by one, is as it was stored, missing, or fails; the answer is how many were there."""
        there = 0
        for key, data in records.items():
            buffer = bytearray(len(data))
            outcome = self.timed(backend.get, [key], [memoryview(buffer)])
            if outcome.error is None and outcome.value != [Miss.ABSENT]:
                assert outcome.value == [len(data)], key
                assert buffer == data, f"other bytes under {key}"
                there += 1
        return there

    def check_recovery(self, backend: Backend, records: dict[str, bytes]) -> None:
        """All calls answer as if nothing had been, and with the right bytes: no reply is taken for another's."""
        keys = list(records)
        self.recovered(lambda: backend.contains(keys) == [True] * len(keys))
        self.recovered(lambda: self.check_bytes(backend, records) == len(records))
        assert self.check_each_call(backend, records) == 0

    # Backend

    @pytest.mark.parametrize("mode", MODES)
    def test_each_call_ends_in_time_and_it_recovers(
        self, proxy: Proxy, backend: Backend, records: dict[str, bytes], mode: str
    ) -> None:
        MODES[mode](proxy)
        failed = self.check_each_call(backend, records, garbled=mode in GARBAGE)
        if mode in HARMLESS:
            assert failed == 0
        elif mode not in {"garbage", "truncated in a value"}:  # which leave short replies alone
            assert failed == 5
        proxy.pass_through()
        self.check_recovery(backend, records)

    def test_a_late_reply_is_not_taken_for_another(self, proxy: Proxy, backend: Backend) -> None:
        """What answers a call that was given up comes when the next one waits for its own answer."""
        late, other = keys = [f"fault/{uuid.uuid4().hex}" for _ in range(2)]
        records = {key: random.Random(key).randbytes(20_000) for key in keys}
        backend.put([Item(key, memoryview(data)) for key, data in records.items()])
        try:
            proxy.blackhole()
            assert self.timed(backend.get, [late], [memoryview(bytearray(20_000))]).error is not None
            proxy.pass_through()
            self.check_bytes(backend, {other: records[other]})
            proxy.blackhole()
            assert self.timed(backend.contains, [late, "absent"]).error is not None
            proxy.pass_through()
            seen = self.timed(backend.contains, ["absent", other])
            assert seen.error is not None or seen.value == [False, True]
            self.check_recovery(backend, records)
        finally:
            proxy.pass_through()
            self.recovered(lambda: backend.delete([*keys, *(f"{key}/new" for key in keys)]) >= 0)

    @pytest.mark.parametrize("mode", [mode for mode in MODES if mode not in GARBAGE])
    def test_struck_under_load(self, proxy: Proxy, backend: Backend, records: dict[str, bytes], mode: str) -> None:
        """Three threads read and write while it breaks and is mended, twice."""
        ended, read = threading.Event(), threading.Semaphore(0)
        failures: list[BaseException] = []

        def work(number: int) -> None:
            try:
                while not ended.is_set():
                    if self.check_bytes(backend, records):
                        read.release()
                    key, data = list(records.items())[number]
                    self.timed(backend.put, [Item(f"{key}/new", memoryview(data))])
            except BaseException as error:
                failures.append(error)
                read.release()

        threads = [threading.Thread(target=work, args=(number,)) for number in range(3)]
        for thread in threads:
            thread.start()
        try:
            for _ in range(2):
                assert read.acquire(timeout=self.recovery_s)
                MODES[mode](proxy)
                ended.wait(0.3)  # how long it is broken; any length will do
                proxy.pass_through()
                while read.acquire(blocking=False):
                    pass
        finally:
            recovered = read.acquire(timeout=self.recovery_s)
            ended.set()
            for thread in threads:
                thread.join(30)
        assert not failures, failures
        assert recovered
        self.check_recovery(backend, records)

    def test_the_server_is_killed_and_started_again(
        self, proxy: Proxy, backend: Backend, records: dict[str, bytes]
    ) -> None:
        self.kill_server()
        try:
            assert self.check_each_call(backend, records) == 5
        finally:
            self.start_server()
        self.recovered(lambda: backend.contains(["absent"]) == [False])
        self.check_bytes(backend, records)
        items = [Item(key, memoryview(data)) for key, data in records.items()]
        self.recovered(lambda: len(backend.put(items)) == len(items))
        self.check_recovery(backend, records)

    # Store

    @pytest.mark.parametrize("mode", MODES)
    def test_a_store_loads_the_stored_bytes_or_misses(self, proxy: Proxy, mode: str) -> None:
        space = namespace(fingerprint=uuid.uuid4().hex)

        def open_cache() -> LocalCache:
            limits = Limits(fetch_s=self.timeout_s + self.grace_s)
            tier = Tier("remote", self.open(proxy.port))
            return LocalCache(Store([tier], pool_bytes=1 << 20, limits=limits), space, PRODUCER)

        writer, engine = open_cache(), PagedEngine()
        connector = engine.connect(writer)
        chain = store(writer, engine, connector, TOKENS)
        rows = engine.rows(slots_of(1, len(chain) * CHUNK))
        connector.close()
        writer.close()

        reader, target = open_cache(), PagedEngine()
        connector = target.connect(reader)
        slots = slots_of(2, len(TOKENS))

        def read(rid: str) -> int:
            chunks, transfer = load(reader, connector, TOKENS, slots, rid)
            assert transfer is None or not transfer.failed_chunks()
            assert np.array_equal(target.rows(slots[: chunks * CHUNK]), rows[:, : chunks * CHUNK])
            return chunks

        MODES[mode](proxy)
        start = time.monotonic()
        chunks = read("broken")
        assert time.monotonic() - start < 10
        counters = reader.stats().counters
        told = sum(n for name, n in counters.items() if name.startswith(("lmcache_tier_err", "lmcache_record_fail")))
        if mode in HARMLESS:
            assert (chunks, told) == (5, 0)
        elif mode not in {"garbage", "truncated in a value"}:
            assert chunks == 0
            assert told >= 1
        proxy.pass_through()
        # A record that looked broken was deleted: it is stored again, and then all of it is there.
        writer = open_cache()
        engine_connector = engine.connect(writer)
        store(writer, engine, engine_connector, TOKENS)
        engine_connector.close()
        writer.close()
        deadline = time.monotonic() + 20
        for attempt in range(10_000):
            if (chunks := read(f"again{attempt}")) == 5:
                break
            assert time.monotonic() < deadline, f"{chunks} of 5 chunks; {reader.stats().counters}"
            time.sleep(0.1)
        reader.store.check_integrity()
        connector.close()
        reader.clear()
        reader.close()
