"""``file://`` against reading the same files bare, page cache warm. Set ``TMPDIR`` to measure another file system."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from benchmarks.harness import Row, at_least, paired
from benchmarks.memory import buffer
from lmcache_backends.file import FileBackend
from lmcache_sdk.backend import Item

MIB = 1 << 20
BATCH = 64 * MIB


def loading(record: int, repeats: int) -> Row:
    count = BATCH // record
    source, target = memoryview(buffer(BATCH, seed=1)), memoryview(buffer(BATCH))
    keys = [f"bench/{'0' * 64}/{i}" for i in range(count)]
    buffers = [target[i * record : (i + 1) * record] for i in range(count)]
    with tempfile.TemporaryDirectory(prefix="lmcache-sdk-bench-") as folder:
        backend = FileBackend(Path(folder) / "kv", 4 * BATCH)
        backend.put([Item(key, source[i * record : (i + 1) * record]) for i, key in enumerate(keys)])
        paths = [str(backend.path_of(key)) for key in keys]

        def load() -> None:
            assert backend.get(keys, buffers) == [record] * count

        def bare() -> None:
            for path, place in zip(paths, buffers, strict=True):
                file = os.open(path, os.O_RDONLY)
                assert os.preadv(file, [place], 0) == record
                os.close(file)

        result = paired(load, bare, BATCH, repeats)
        assert target == source
        backend.close(1.0)
    return at_least(f"file://, load, records of {record // MIB} MiB / open and preadv", result, 0.8)


def rows(repeats: int = 9) -> Iterator[Row]:
    for record in (1, 4, 8):
        yield loading(record * MIB, 3 * repeats)
