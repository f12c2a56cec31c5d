"""``redis://`` beside ``redis-benchmark``, and what it takes to ask for a prefix."""

from __future__ import annotations

import random
import statistics
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

from benchmarks.harness import Paired, Row, at_least, measure, table, timed
from lmcache_sdk.backend import Backend, Item, open_backend
from tests.backends.programs import program
from tests.backends.redis_server import Server

CONNECTIONS = 2
NBYTES = 128 << 20  # a run
RECORDS_BYTES = 64 << 20
BATCH = 4
CHUNKS = 500


class Records:
    """Records of one size on a server, under the keys that ``redis-benchmark -r`` takes."""

    def __init__(self, server: Server, backend: Backend, nbytes: int) -> None:
        self._server = server
        self._backend = backend
        self._nbytes = nbytes
        self.count = NBYTES // nbytes
        self._different = RECORDS_BYTES // nbytes
        self._data = memoryview(random.Random(nbytes).randbytes(nbytes))  # one value, as the reference sends it
        self._buffers = [[memoryview(bytearray(nbytes)) for _ in range(BATCH)] for _ in range(CONNECTIONS)]
        self._threads = ThreadPoolExecutor(CONNECTIONS)

    def _each(self, work: Callable[[int, list[str]], object]) -> Callable[[], object]:
        """All records, in batches, with as many threads as connections."""
        keys = [f"key:{number % self._different:012}" for number in range(self.count)]
        parts = [keys[thread::CONNECTIONS] for thread in range(CONNECTIONS)]

        def one(thread: int) -> None:
            part = parts[thread]
            for start in range(0, len(part), BATCH):
                work(thread, part[start : start + BATCH])

        return lambda: list(self._threads.map(one, range(CONNECTIONS)))

    def store(self) -> Callable[[], object]:
        def work(_: int, keys: list[str]) -> None:
            assert all(self._backend.put([Item(key, self._data) for key in keys], if_absent=False))

        return self._each(work)

    def load(self) -> Callable[[], object]:
        def work(thread: int, keys: list[str]) -> None:
            assert self._backend.get(keys, self._buffers[thread]) == [self._nbytes] * BATCH

        return self._each(work)

    def reference(self, command: str) -> float:
        """Seconds that ``redis-benchmark`` takes for as many, as it tells itself: without its start."""
        options = {"-t": command, "-d": self._nbytes, "-c": CONNECTIONS, "-P": 1, "-n": self.count}
        options |= {"-r": self._different, "-h": "127.0.0.1", "-p": self._server.port}
        words = [str(word) for option in options.items() for word in option]
        done = subprocess.run([program("redis-benchmark"), *words, "--csv"], capture_output=True, text=True, check=True)
        per_second = float(done.stdout.splitlines()[1].split(",")[1].strip('"'))
        return self.count / per_second

    def close(self) -> None:
        self._threads.shutdown()


def beside(function: Callable[[], object], reference: Callable[[], float], repeats: int) -> Paired:
    """As ``harness.paired``, where the reference measures itself."""
    function()
    reference()
    seconds, reference_seconds = [], []
    for _ in range(repeats):
        seconds.append(timed(function))
        reference_seconds.append(reference())
    ratio = statistics.median(r / s for r, s in zip(reference_seconds, seconds, strict=True))
    return Paired(ratio, seconds, reference_seconds, NBYTES)


def rows(repeats: int = 9) -> Iterator[Row]:
    """Loads and stores with two connections on each side, at depth 1 in ``redis-benchmark``; both use the same 64 MiB
    of records. Then ``prefix_len`` of 500 chunks that are all there.
    """
    with Server({"maxmemory": "1gb"}) as server:
        backend = open_backend(server.url(parameters=f"connections={CONNECTIONS}"))
        for mib in (1, 4, 8):
            records = Records(server, backend, mib << 20)
            records.store()()
            for name, function, command, bar in (
                ("load", records.load(), "get", 0.8),
                ("store", records.store(), "set", 0.8),
            ):
                result = beside(function, lambda command=command, r=records: r.reference(command), repeats)
                yield at_least(f"redis {name}, {mib} MiB records / redis-benchmark {command.upper()}", result, bar)
            records.close()
            server.flush()
        keys = [f"kv/{number:064x}/{number:032x}" for number in range(CHUNKS)]
        backend.put([Item(key, memoryview(b"here")) for key in keys])
        assert backend.prefix_len([*keys, "absent"]) == CHUNKS
        seconds = sorted(timed(lambda: backend.prefix_len(keys)) for _ in range(300))
        median = 1e3 * statistics.median(seconds)
        yield measure(
            f"redis prefix of {CHUNKS} chunks, ms", median, 2.0, p99_ms=1e3 * seconds[-4], min_ms=1e3 * seconds[0]
        )
        backend.close(1)


if __name__ == "__main__":
    for row in rows():
        print(table([row]), flush=True)
