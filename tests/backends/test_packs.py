"""Several chunks in one record: found by readers who know no writer, whoever wrote what before."""

from __future__ import annotations

import random
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import obstore
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmcache_backends.memory import MemoryBackend
from lmcache_sdk import packs
from lmcache_sdk.backend import Buffer, Item, Miss, Range, open_backend
from lmcache_sdk.cli.inventory import damaged, misfits, survey
from lmcache_sdk.core import Limits
from lmcache_sdk.daemon import client
from lmcache_sdk.daemon.client import DaemonCache
from lmcache_sdk.daemon.server import Server, Settings
from lmcache_sdk.errors import BackendUnavailable, ConfigError
from lmcache_sdk.jobs import Tier
from lmcache_sdk.keys import Chain
from lmcache_sdk.open import LocalCache
from lmcache_sdk.packs import Block
from lmcache_sdk.pool import extent_bytes
from lmcache_sdk.pool.shared import SharedPool
from lmcache_sdk.records import HEADER_BYTES
from lmcache_sdk.spec import CellGrid
from lmcache_sdk.store import Store
from lmcache_sdk.tiers import open_tier
from tests.backends.seaweed import SeaweedFS
from tests.core.engine import CHUNK, PRODUCER, PagedEngine, load, namespace, slots_of, store, tokens_of

PAYLOAD = namespace().spec.chunk_bytes
RECORD = HEADER_BYTES + PAYLOAD


class TestBlocks:
    """The arithmetic alone."""

    positions = st.integers(0, 100)
    powers = st.sampled_from([1, 2, 4, 8, 16])

    @pytest.mark.parametrize(
        ("pack_bytes", "most"), [(0, 1), (999, 1), (1000, 1), (1999, 1), (2000, 2), (7999, 4), (8000, 8), (10**9, 16)]
    )
    def test_the_most(self, pack_bytes: int, most: int) -> None:
        assert packs.most_chunks(pack_bytes, 1000) == most

    def test_a_client_names_as_many_digests_at_a_time(self) -> None:
        assert client._FIRST_DIGESTS % packs.MOST == 0

    @given(st.text("ab0./x-", min_size=1, max_size=20), powers)
    def test_keys(self, key: str, size: int) -> None:
        if packs.split_key(key) == (key, 1):
            assert packs.split_key(packs.block_key(key, size)) == (key, size)

    @given(positions, positions, powers)
    def test_cutting(self, first: int, count: int, most: int) -> None:
        blocks = list(packs.cut(first, first + count, most))
        assert [at for block in blocks for at in range(block.first, block.end)] == list(range(first, first + count))
        assert all(block.first % block.size == 0 and block.size <= most for block in blocks)
        assert len(blocks) <= count / most + 2 * most.bit_length()

    @given(positions, positions, powers)
    def test_each_block_is_looked_for(self, first: int, count: int, most: int) -> None:
        end = first + count
        for block in packs.cut(first, end, most):
            for position in range(block.first, block.end):
                assert block in packs.holders(position, end, most)

    @given(positions, st.integers(1, 40), st.integers(0, 40), powers, st.randoms(use_true_random=False))
    def test_finding(self, first: int, count: int, more: int, most: int, rng: random.Random) -> None:
        end = first + more
        blocks = {b for at in range(end + most) for b in packs.holders(at, end + most, most) if rng.random() < 0.4}
        calls = []

        def has(asked: Sequence[Block]) -> list[bool]:
            assert len(asked) == len(set(asked))
            assert all(block.end <= end for block in asked)
            calls.append(asked)
            return [block in blocks for block in asked]

        found = packs.find(first, count, end, most, has)
        there = [any(b in blocks for b in packs.holders(at, end, most)) for at in range(first, min(end, first + count))]
        assert len(found) == [*there, False].index(False)
        for position, block in enumerate(found, start=first):
            assert block in blocks
            assert block.first <= position < block.end
        assert len(calls) <= (1 if count == 1 else 2)

    @given(positions, st.integers(0, 40), powers, st.randoms(use_true_random=False))
    def test_what_is_there_is_not_written_again(self, first: int, count: int, most: int, rng: random.Random) -> None:
        end = first + count
        there = {b for at in range(end) for b in packs.holders(at, end, most) if rng.random() < 0.4}
        asked: list[Block] = []

        def has(blocks: Sequence[Block]) -> list[bool]:
            asked.extend(blocks)
            return [block in there for block in blocks]

        blocks = packs.lacking(first, end, most, has)
        held = [any(block in there for block in packs.holders(at, end, most)) for at in range(first, end)]
        begin = first + [*held, False].index(False)
        assert blocks == list(packs.cut(begin, end, most))
        if begin == first:
            assert len(asked) <= most.bit_length()

    @given(st.integers(-1, 20), st.integers(1, 60), st.integers(1, 20), powers)
    def test_batches_end_where_blocks_do(self, first: int, count: int, size: int, block: int) -> None:
        positions = list(range(first, first + count)) if first >= 0 else [-1] * count
        parts = [positions[part] for part in packs.batches(positions, size, block)]
        assert [at for part in parts for at in part] == positions
        assert all(part for part in parts)
        if first >= 0:
            assert all(part[0] % block == 0 for part in parts[1:])


class RangedMemory(MemoryBackend):
    """Which reads parts of records, and is counted."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []
        self.ranges: list[Range] = []
        self.written: list[str] = []

    def get_ranges(self, ranges: Sequence[Range]) -> list[int | Miss]:
        answers: list[int | Miss] = []
        for part in ranges:
            self.ranges.append(part)
            data = self._records.get(part.key)
            if data is None:
                answers.append(Miss.ABSENT)
                continue
            at = part.offset
            for buffer in part.buffers:
                piece = data[at : at + len(buffer)]
                buffer[: len(piece)] = piece
                at += len(piece)
            answers.append(max(0, at - part.offset))
        return answers

    def get(self, keys: Sequence[str], buffers: Sequence[Buffer]) -> list[int | Miss]:
        raise AssertionError("records are read by ranges")

    def contains(self, keys: Sequence[str]) -> list[bool]:
        self.calls.append(f"contains {len(keys)}")
        return super().contains(keys)

    def put(self, items: Sequence[Item], *, if_absent: bool = True) -> list[bool]:
        self.written += [item.key for item in items if not item.key.endswith("manifest")]
        return super().put(items, if_absent=if_absent)

    def close(self, timeout_s: float) -> None:
        """Others use it, too."""

    def sizes(self) -> list[int]:
        """Of the blocks, sorted."""
        return sorted(packs.split_key(key)[1] for key in self._records if not key.endswith("manifest"))


def open_at(
    backend: RangedMemory, most: int = 4, pool_chunks: int = 16, grid: CellGrid | None = None, **limits: int
) -> LocalCache:
    cells = len(namespace(grid=grid).spec.cells)
    room = pool_chunks * cells * extent_bytes(PAYLOAD // cells)
    tier = Tier("t", backend, pack_bytes=most * (HEADER_BYTES + PAYLOAD // cells))
    return LocalCache(Store([tier], pool_bytes=room, limits=Limits(**limits)), namespace(grid=grid), PRODUCER)


def write(cache: LocalCache, tokens: np.ndarray) -> Chain:
    engine = PagedEngine()
    connector = engine.connect(cache)
    chain = store(cache, engine, connector, tokens)
    connector.close()
    assert cache.drain(10)
    return chain


def read(cache: LocalCache, tokens: np.ndarray) -> int:
    """The length of the prefix that was found; it has the right bytes."""
    engine, target = PagedEngine(), PagedEngine()
    connector = target.connect(cache)
    slots = slots_of(2, len(tokens))
    engine.compute(tokens, slots)
    chunks, _ = load(cache, connector, tokens, slots)
    used = slots[: chunks * CHUNK]
    assert np.array_equal(target.rows(used), engine.rows(used))
    connector.close()
    return chunks


def prompt(seed: int, chunks: int) -> np.ndarray:
    return tokens_of(seed, chunks * CHUNK)


@pytest.fixture
def memory() -> RangedMemory:
    return RangedMemory()


class TestStore:
    def test_a_prompt_is_a_few_records(self, memory: RangedMemory) -> None:
        cache = open_at(memory)
        write(cache, prompt(0, 11))
        cache.close()
        assert memory.sizes() == [1, 2, 4, 4]
        assert all(len(data) % RECORD == 0 for key, data in memory._records.items() if "manifest" not in key)
        cache = open_at(memory)
        memory.calls.clear()
        assert read(cache, prompt(0, 11)) == 11
        assert len(memory.ranges) == 4
        assert len(memory.calls) <= 1 + 2 * 2
        cache.close()

    def test_what_is_in_the_pool_is_not_read_again(self, memory: RangedMemory) -> None:
        cache = open_at(memory)
        write(cache, prompt(0, 8))
        cache.close()
        cache = open_at(memory)
        assert read(cache, prompt(0, 8)[: 5 * CHUNK]) == 4  # the fifth is in a block that a short prompt cannot name
        memory.ranges.clear()
        assert read(cache, prompt(0, 8)) == 8
        assert [(part.offset, len(part.buffers)) for part in memory.ranges] == [(0, 4)]
        cache.close()
        cache = open_at(memory)
        write(cache, prompt(0, 6))
        memory.ranges.clear()
        assert read(cache, prompt(0, 8)) == 8
        assert [(part.offset, len(part.buffers)) for part in memory.ranges] == [(2 * RECORD, 2)]
        cache.close()

    def test_a_prompt_that_grows(self, memory: RangedMemory) -> None:
        cache = open_at(memory)
        for chunks in (3, 5, 5, 11):
            write(cache, prompt(0, 11)[: chunks * CHUNK])
        cache.close()
        cache = open_at(memory)
        write(cache, prompt(0, 11))  # by another writer
        cache.close()
        assert sum(memory.sizes()) == 11
        assert len(memory.written) == len(set(memory.written)) == len(memory.sizes())

    def test_unknown_positions_are_not_packed(self, memory: RangedMemory) -> None:
        cache, engine = open_at(memory), PagedEngine()
        connector = engine.connect(cache)
        tokens, slots = prompt(0, 4), slots_of(1, 4 * CHUNK)
        engine.compute(tokens, slots)
        chain = Chain.from_digests(Chain(tokens, CHUNK).digests(), CHUNK)
        assert connector.store("store", chain, 0, slots).wait(10)
        assert cache.drain(10)
        cache.close()
        assert memory.sizes() == [1, 1, 1, 1]
        cache = open_at(memory)
        assert read(cache, tokens) == 4
        cache.lookup("r", chain)
        assert cache.wait("r", 10).chunks == 4
        connector.close()
        cache.close()

    def test_a_chunk_that_was_in_a_block_and_is_not_any_more(self, memory: RangedMemory) -> None:
        cache, tokens = open_at(memory, pool_chunks=4), prompt(0, 4)
        write(cache, tokens)
        write(cache, prompt(1, 4))  # which takes the room of the first
        (block,) = (key for key in memory._records if Chain(tokens, CHUNK).digests()[3].hex() in key)
        whole = memory._records.pop(block)
        for number, digest in enumerate(Chain(tokens, CHUNK).digests()):
            key = block.replace(Chain(tokens, CHUNK).digests()[3].hex(), digest.hex()).removesuffix(".x4")
            memory._records[key] = whole[number * RECORD : (number + 1) * RECORD]
        cache.lookup("r", Chain.from_digests(Chain(tokens, CHUNK).digests(), CHUNK))
        assert cache.wait("r", 10).sources == {"t": 4}
        cache.forget("r")
        assert read(cache, tokens) == 4
        cache.close()

    def test_cells(self, memory: RangedMemory) -> None:
        grid = CellGrid(heads_per_cell=2)
        cache = open_at(memory, grid=grid)
        write(cache, prompt(0, 7))
        cache.close()
        assert memory.sizes() == [1, 1, 2, 2, 4, 4]
        (key, *_) = (key for key in memory._records if key.endswith(".x4"))
        cache = open_at(memory, grid=grid)
        assert read(cache, prompt(0, 7)) == 7
        cache.close()
        memory.delete([key])
        cache = open_at(memory, grid=grid)
        assert read(cache, prompt(0, 7)) == 0
        cache.close()

    @pytest.mark.parametrize("damage", [lambda data: data[:-1], lambda data: data[: 2 * RECORD], None])
    def test_a_broken_record_is_a_miss_and_its_block_goes(
        self, memory: RangedMemory, damage: Callable[[bytes], bytes] | None
    ) -> None:
        cache = open_at(memory)
        write(cache, prompt(0, 8))
        cache.close()
        last = Chain(prompt(0, 8), CHUNK).digests()[7].hex()
        (key,) = (key for key in memory._records if last in key)
        data = bytearray(memory._records[key])
        data[2 * RECORD + 1000] ^= 1
        memory._records[key] = damage(memory._records[key]) if damage else bytes(data)
        cache = open_at(memory)
        found = read(cache, prompt(0, 8))
        assert found == (7 if damage and len(damage(bytes(data))) > 2 * RECORD else 6)
        failures = {name: n for name, n in cache.stats().counters.items() if "record_failures" in name}
        assert sum(failures.values()) >= 1
        assert key not in memory._records
        write(cache, prompt(0, 8))  # what is computed instead
        cache.close()
        cache = open_at(memory)
        assert read(cache, prompt(0, 8)) >= 4
        cache.close()

    def test_deleting(self, memory: RangedMemory) -> None:
        """Of a whole prompt nothing is left; of some chunks, no block that ends with them or was seen to hold them."""
        cache = open_at(memory)
        chain = write(cache, prompt(0, 11))
        cache.delete(chain)
        assert cache.drain(10)
        assert memory.sizes() == []
        write(cache, prompt(0, 11))
        cache.close()
        cache = open_at(memory)
        assert read(cache, prompt(0, 11)) == 11
        cache.delete(Chain(prompt(0, 11)[: 6 * CHUNK], CHUNK))
        assert cache.drain(10)
        assert memory.sizes() == [1, 2]
        cache.clear()
        assert cache.drain(10)
        assert memory.sizes() == []
        cache.close()

    def test_jobs_are_cut_where_a_block_ends(self, memory: RangedMemory) -> None:
        """Whatever their size; of a request that does not begin at one, too."""
        cache = open_at(memory, batch_bytes=3 * extent_bytes(PAYLOAD))
        write(cache, prompt(0, 3))
        write(cache, prompt(0, 14))
        cache.close()
        assert memory.sizes() == [1, 1, 2, 2, 4, 4]  # 0-1, 2, 3, 4-7, 8-11, 12-13

    def test_what_the_tools_see(self, memory: RangedMemory) -> None:
        cache = open_at(memory)
        chain = write(cache, prompt(0, 7))
        cache.close()
        plain = MemoryBackend()
        plain.put([Item(key, memoryview(data)) for key, data in memory._records.items()])
        found = survey(plain)
        (space,) = found.spaces.values()
        assert space.chunks == 7
        records = [record for record in found.records if not record.key.is_manifest]
        assert sorted(record.key.size for record in records) == [1, 2, 4]
        assert list(misfits(space)) == list(damaged(plain, found, records)) == found.foreign == []
        (key,) = (record.stat.key for record in records if chain.digests()[3].hex() in record.stat.key)
        for damage in (lambda data: data[:-1], lambda data: data[:5000] + bytes([data[5000] ^ 1]) + data[5001:]):
            plain.put([Item(key, memoryview(damage(memory._records[key])))], if_absent=False)
            assert [record.stat.key for record, _ in damaged(plain, found, records)] == [key]

    def test_who_cannot_pack_is_refused(self) -> None:
        with pytest.raises(ConfigError, match="tier t cannot pack: that needs a store that reads parts"):
            Store([Tier("t", MemoryBackend(), pack_bytes=1 << 20)], pool_bytes=1 << 20)

    @pytest.mark.parametrize("forgetful", [True, False])
    @pytest.mark.parametrize("seed", range(8))
    def test_any_writers_and_any_readers(self, memory: RangedMemory, seed: int, forgetful: bool) -> None:
        """Prompts that part at random places, caches that come and go, in any order.

        Less than a block is lost where requests part. And nothing where a prompt ended, if each is written by a cache
        that knows nothing: one that knows leaves it at the block in which its chunks already are.
        """
        print(f"seed {seed}")
        rng = random.Random(seed)
        most = rng.choice([2, 4, 8])
        prompts = [prompt(100 * seed, 14)]
        for number in range(1, 6):
            kept = rng.randrange(14)
            prompts.append(
                np.concatenate([rng.choice(prompts)[: kept * CHUNK], prompt(100 * seed + number, 14 - kept)])
            )
        written: list[list[bytes]] = []
        caches = [open_at(memory, most) for _ in range(2)]
        for _ in range(25):
            tokens = rng.choice(prompts)[: rng.randint(1, 14) * CHUNK]
            digests = Chain(tokens, CHUNK).digests()
            if forgetful or rng.random() < 0.2:
                old = caches.pop(0)
                old.store.check_integrity()
                old.close()
                caches.append(open_at(memory, most))
            cache = caches[-1] if forgetful else rng.choice(caches)
            if rng.random() < 0.4:
                write(cache, tokens)
                written.append(digests)
            else:
                stored = max((_common(digests, other) for other in written), default=0)
                ended = max((len(other) for other in written if digests[: len(other)] == other), default=0)
                found = read(cache, tokens)
                assert found <= stored
                assert stored - found < most
                assert found >= ended or not forgetful
        for cache in caches:
            cache.close()


def _common(one: list[bytes], other: list[bytes]) -> int:
    return [*(a == b for a, b in zip(one, other, strict=False)), False].index(False)


class BrokenMemory(RangedMemory):
    """Which loses, cuts off and flips what it reads, or fails, one time in three."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.random = random.Random(seed)

    def get_ranges(self, ranges: Sequence[Range]) -> list[int | Miss]:
        if self.random.random() < 0.1:
            raise BackendUnavailable("broken")
        answers = super().get_ranges(ranges)
        for number, part in enumerate(ranges):
            answer, kind = answers[number], self.random.randrange(9)
            if isinstance(answer, Miss) or kind > 2:
                continue
            if kind == 0:
                answers[number] = Miss.ABSENT
            elif kind == 1:
                answers[number] = self.random.randrange(answer)
            else:
                buffer = self.random.choice(part.buffers)
                buffer[self.random.randrange(len(buffer))] ^= 1 << self.random.randrange(8)
        return answers

    def contains(self, keys: Sequence[str]) -> list[bool]:
        if self.random.random() < 0.1:
            raise BackendUnavailable("broken")
        return super().contains(keys)


@pytest.mark.parametrize("seed", range(4))
def test_a_broken_tier_gives_the_right_bytes_or_none(seed: int) -> None:
    print(f"seed {seed}")
    memory, rng = BrokenMemory(seed), random.Random(seed)
    found: set[int] = set()
    for _ in range(30):
        cache = open_at(memory)
        if rng.random() < 0.4:
            write(cache, prompt(0, 11))
        else:
            found.add(read(cache, prompt(0, 11)))  # which looks at the bytes
        cache.store.check_integrity()
        cache.close()
    assert len(found) > 2


def test_daemons(memory: RangedMemory) -> None:
    """Whose clients name the digests of a long prompt part by part."""
    chain = Chain(tokens_of(0, 61 * CHUNK), CHUNK)

    @contextmanager
    def connected() -> Iterator[DaemonCache]:
        with tempfile.TemporaryDirectory(prefix="kv-", dir="/dev/shm") as name:
            folder = Path(name)
            pool = SharedPool.open(folder / "pool", 2 << 20)
            served = Store([Tier("t", memory, pack_bytes=1 << 20)], pool=pool)
            server = Server(served, pool, Settings(folder / "s"))
            thread = threading.Thread(target=server.serve)
            thread.start()
            cache = DaemonCache(folder / "s", namespace(), PRODUCER)
            try:
                yield cache
                assert cache.drain(10)
            finally:
                cache.close()
                server.stop()
                thread.join()
                server.close()
                served.close()
                pool.close(keep=False)

    with connected() as cache:
        reservation = cache.reserve("r", chain, 0, len(chain))
        assert reservation is not None
        cache.publish(reservation)
    assert memory.sizes() == [1, 4, 8, 16, 16, 16]
    with connected() as cache:
        cache.lookup("r", chain)
        assert cache.wait("r", 10).chunks == len(chain)


class TestS3:
    def open(self, seaweed: SeaweedFS, prefix: str) -> LocalCache:
        tier = Tier("s3", open_backend(seaweed.url(prefix)), pack_bytes=4 * RECORD)
        return LocalCache(Store([tier], pool_bytes=1 << 20), namespace(), PRODUCER)

    def test_tiers_on_s3_pack(self, seaweed: SeaweedFS) -> None:
        sizes = []
        for options in ("", "#pack=64MiB", "#pack=no"):
            tier = open_tier(seaweed.url() + options)
            sizes.append(tier.pack_bytes)
            tier.backend.close(5)
        assert sizes == [16 << 20, 64 << 20, 0]

    def test_written_here_and_read_there(self, seaweed: SeaweedFS) -> None:
        cache = self.open(seaweed, "packs/a")
        write(cache, prompt(0, 11))
        cache.close()
        names = [entry["path"] for page in obstore.list(seaweed.client("packs/a")) for entry in page]
        assert sorted(name.rpartition(".")[2] for name in names if "manifest" not in name)[-3:] == ["x2!", "x4!", "x4!"]
        cache = self.open(seaweed, "packs/a")
        assert read(cache, prompt(0, 11)) == 11
        other = np.concatenate([prompt(0, 7), prompt(1, 4)])
        cache.close()
        cache = self.open(seaweed, "packs/a")
        assert read(cache, other) == 4
        cache.close()

    def test_bit_rot(self, seaweed: SeaweedFS) -> None:
        cache = self.open(seaweed, "packs/b")
        chain = write(cache, prompt(0, 8))
        cache.close()
        raw = seaweed.client("packs/b")
        (name,) = (
            entry["path"] for page in obstore.list(raw) for entry in page if chain.digests()[7].hex() in entry["path"]
        )
        data = bytearray(obstore.get(raw, name).bytes())
        data[RECORD + 400] ^= 1
        obstore.put(raw, name, bytes(data))
        cache = self.open(seaweed, "packs/b")
        assert read(cache, prompt(0, 8)) == 5
        assert cache.stats().counters['lmcache_record_failures_total{tier="s3",reason="payload"}'] == 1
        with pytest.raises(FileNotFoundError):
            obstore.head(raw, name)
        cache.close()
