"""``mooncake://`` against the bare client's batch calls, over TCP to a node in another process of this machine."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Iterator
from pathlib import Path

from benchmarks.harness import Row, at_least, paired
from benchmarks.memory import buffer
from lmcache_backends.mooncake import MooncakeBackend
from lmcache_sdk.backend import Item, Url
from tests.backends.mooncake_master import MooncakeMaster, bare_client

MIB = 1 << 20
BATCH = 64 * MIB
ROOM = 8 * BATCH


def moving(master: MooncakeMaster, record: int, repeats: int) -> Iterator[Row]:
    """Each side has a client of its own, and the same registered memory."""
    count = BATCH // record
    bare = bare_client(master.address)
    backend = MooncakeBackend.from_url(Url(f"mooncake://{master.address}"))
    source, target = buffer(BATCH, seed=1), buffer(BATCH)
    for memory in (source, target):
        assert bare.register_buffer(memory.ctypes.data, BATCH) == 0
        backend.register_memory(memoryview(memory))
    sizes = [record] * count
    addresses = {id(memory): [memory.ctypes.data + i * record for i in range(count)] for memory in (source, target)}
    sources, targets = (
        [memoryview(memory)[i * record : (i + 1) * record] for i in range(count)] for memory in (source, target)
    )
    numbers = itertools.count()
    kept = [f"kept/{i}" for i in range(count)]

    def fresh() -> list[str]:
        return [f"{next(numbers)}/{i}" for i in range(count)]

    def load() -> None:
        assert backend.get(kept, targets) == sizes

    def bare_load() -> None:
        assert bare.batch_get_into(kept, addresses[id(target)], sizes) == sizes

    def store() -> None:
        keys = fresh()
        assert backend.put([Item(key, data) for key, data in zip(keys, sources, strict=True)]) == [True] * count

    def bare_store() -> None:
        assert bare.batch_put_from(fresh(), addresses[id(source)], sizes) == [0] * count

    try:
        for _ in range(3):  # the node has touched its memory
            store()
            bare_store()
        bare.remove_all(True)
        bare.batch_put_from(kept, addresses[id(source)], sizes)
        result = paired(load, bare_load, BATCH, repeats)
        assert (source == target).all()
        yield at_least(f"mooncake://, load, records of {record // MIB} MiB / batch_get_into", result, 0.85)

        def settle() -> None:
            bare.remove_by_regex("^[0-9]", True)

        result = paired(store, bare_store, BATCH, repeats, settle)
        yield at_least(f"mooncake://, store, records of {record // MIB} MiB / batch_put_from", result, 0.85)
    finally:
        bare.remove_all(True)
        backend.close(10)
        bare.close()


def rows(repeats: int = 9) -> Iterator[Row]:
    with (
        tempfile.TemporaryDirectory(prefix="lmcache-sdk-bench-") as folder,
        MooncakeMaster(Path(folder)) as master,
    ):
        master.add_node(ROOM)
        for record in (1, 4, 8):
            yield from moving(master, record * MIB, 3 * repeats)
