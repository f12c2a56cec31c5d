"""The work of jobs: bytes between the pool and the tiers, sealed on the way out and checked on the way in."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import msgspec
import numpy as np

from lmcache_sdk import packs
from lmcache_sdk.backend import Backend, Item, Miss, Range, RangeGet, Touch
from lmcache_sdk.codecs import Codec, RawCodec, codec_by_name
from lmcache_sdk.core import Entry, EntryState, Job, Space
from lmcache_sdk.core.rules import TierRules
from lmcache_sdk.errors import ConfigError, RecordError
from lmcache_sdk.keys import Chain, manifest_key
from lmcache_sdk.observe.logs import logger
from lmcache_sdk.observe.metrics import Metrics
from lmcache_sdk.pool import Pool
from lmcache_sdk.records import (
    HEADER_BYTES,
    Header,
    RecordKey,
    check_record,
    checksum,
    read_header,
    write_header,
)
from lmcache_sdk.spec import Namespace, Producer

_log = logger("store")

_PUTS_PER_MANIFEST = 64
_PLACES = 1 << 16  # chunks of which it is remembered in which block they are


class Tier(NamedTuple):
    """A backend in its place in the order of tiers.

    Attributes:
        name: in metrics and answers; unique in a store.
        codec: of the records written; what is read says itself how it was encoded.
        rules: when it is written to and read from.
        size, ttl_s: what the store keeps it to, by deleting the oldest records; 0 = it does not.
        pack_bytes: the most for one record of several chunks; 0 = each has records of its own.
    """

    name: str
    backend: Backend
    codec: Codec = RawCodec()
    rules: TierRules = TierRules()
    size: int = 0
    ttl_s: float = 0.0
    pack_bytes: int = 0


def manifests(namespace: Namespace, producer: Producer, known: msgspec.Struct | None = None) -> list[Item]:
    """Descriptions of both, for people; and what stores tell each other of the namespace, in the first."""
    both = msgspec.to_builtins(namespace) | (msgspec.to_builtins(known) if known is not None else {})
    return [
        Item(manifest_key(namespace.id), memoryview(msgspec.json.encode(both))),
        Item(manifest_key(f"{namespace.id}/{producer.id}"), memoryview(msgspec.json.encode(producer))),
    ]


class OpenSpace:
    """A namespace and producer that a store serves: the core's space, and how its records are named.

    Attributes:
        manifests: descriptions for people, written beside the records.
        meet_at: when to look for other producers again.
    """

    def __init__(self, space: Space, namespace: Namespace, producer: Producer) -> None:
        self.space = space
        self.namespace = namespace
        self.producer = producer
        self.spec = namespace.spec
        self.meet_at = 0.0
        self.manifests = manifests(namespace, producer)
        self.payload_bytes = tuple(cell.nbytes for cell in self.spec.cells)
        self._prefix = space.origin.prefix()
        self._suffixes = [f"/{cell.group}/{cell.name}" for cell in self.spec.cells]

    def keys(self, digest: bytes) -> list[str]:
        """The key of every cell of a chunk."""
        stem = self._prefix + digest.hex()
        return [stem + suffix for suffix in self._suffixes]

    def block_keys(self, last: bytes, size: int) -> list[str]:
        """The key of every cell of a block, which is named for its last chunk."""
        return [packs.block_key(key, size) for key in self.keys(last)]

    def most_chunks(self, tier: Tier) -> int:
        """In one record of a tier."""
        return packs.most_chunks(tier.pack_bytes, HEADER_BYTES + max(self.payload_bytes))

    def position_of(self, entry: Entry) -> int:
        """Of a chunk in its request, in chunks; -1 where it is not known."""
        return entry.first_position // self.spec.chunk_tokens if entry.first_position >= 0 else -1

    def record_key(self, digest: bytes, cell: int) -> RecordKey:
        described = self.spec.cells[cell]
        return RecordKey(self.space.origin, digest, described.group, described.name)


class _Place(NamedTuple):
    """Where a chunk rests: the last chunk and the size of its block, and its number in it."""

    last: bytes
    size: int
    number: int


class _Places:
    """Of one tier: what was seen last. What has been forgotten counts as a block of one."""

    def __init__(self) -> None:
        self._known: OrderedDict[tuple[Space, bytes], _Place] = OrderedDict()
        self._lock = threading.Lock()

    def note(self, space: Space, digests: Sequence[bytes]) -> None:
        """These chunks are a block."""
        with self._lock:
            for number, digest in enumerate(digests):
                self._known[space, digest] = _Place(digests[-1], len(digests), number)
                self._known.move_to_end((space, digest))
            while len(self._known) > _PLACES:
                self._known.popitem(last=False)

    def of(self, space: Space, digest: bytes) -> _Place:
        with self._lock:
            return self._known.get((space, digest)) or _Place(digest, 1, 0)


class Jobs:
    """What a store's threads do for a job. Each answers which of the job's entries came through; it raises what the
    backend raises. No lock is held: a job holds its entries, so that their extents stay.

    Args:
        spaces: the store's own, which grows.

    Raises:
        ConfigError: a tier is to pack that cannot.
    """

    def __init__(self, pool: Pool, tiers: Sequence[Tier], spaces: Mapping[Space, OpenSpace], metrics: Metrics) -> None:
        self._pool = pool
        self._tiers = tiers
        self._spaces = spaces
        self._metrics = metrics
        self._puts = 0
        self._places = [_Places() for _ in tiers]
        for tier in tiers:
            if tier.pack_bytes and not (tier.codec.identity and isinstance(tier.backend, RangeGet)):
                lack = "a store that reads parts of records" if tier.codec.identity else "records that are not encoded"
                raise ConfigError(f"tier {tier.name} cannot pack: that needs {lack}; leave pack= out")

    def present(self, tier: int, opened: OpenSpace, chain: Chain, first: int, count: int) -> int:
        """How many chunks of a request, from ``first`` on and ``count`` at most, a tier has."""
        most = opened.most_chunks(self._tiers[tier])
        if most == 1 or not chain.positions_known:
            digests = chain.digests(first + count)[first:]
            keys = [key for digest in digests for key in opened.keys(digest)]
            found = self._tiers[tier].backend.prefix_len(keys) // len(opened.payload_bytes)
            for digest in digests[:found] if most > 1 else ():
                self._places[tier].note(opened.space, [digest])
            return found
        digests = chain.digests(first + count + most - 1)
        return len(packs.find(first, count, len(digests), most, self._has(tier, opened, digests, 0)))

    def _has(self, tier: int, opened: OpenSpace, digests: Sequence[bytes], first: int) -> packs.Has:
        """Asks which blocks are there with all their cells, and remembers them; the digests are those from the position
        ``first`` on.
        """
        cells = len(opened.payload_bytes)

        def has(blocks: Sequence[packs.Block]) -> list[bool]:
            keys = [key for block in blocks for key in opened.block_keys(digests[block.last - first], block.size)]
            here = self._tiers[tier].backend.contains(keys)
            present = [all(here[at : at + cells]) for at in range(0, len(here), cells)]
            for block, there in zip(blocks, present, strict=True):
                if there and block.first >= first:
                    self._places[tier].note(opened.space, digests[block.first - first : block.end - first])
            return present

        return has

    def delete(self, tier: int, opened: OpenSpace, digests: Sequence[bytes]) -> None:
        """Remove chunks, and with each the blocks that end with it, and the one in which it was seen last."""
        keys: dict[str, None] = {}
        for digest in digests:
            place = self._places[tier].of(opened.space, digest)
            for size in packs.sizes(opened.most_chunks(self._tiers[tier])):
                keys |= dict.fromkeys(opened.block_keys(digest, size))
            keys |= dict.fromkeys(opened.block_keys(place.last, place.size))
        self._tiers[tier].backend.delete(list(keys))

    def fetch(self, job: Job) -> list[bool]:
        """Read records into their extents and check them; a record that does not check out is removed from its tier."""
        tier = self._tiers[job.tier]
        wanted = [(entry, cell) for entry in job.entries for cell in range(len(entry.extents))]
        opened = self._spaces[job.entries[0].space]
        records = [self._record(entry, cell, opened) for entry, cell in wanted]
        keys = [key for entry in job.entries for key in opened.keys(entry.digest)]
        if tier.codec.identity:
            buffers = records
        else:
            buffers = [
                memoryview(bytearray(HEADER_BYTES + tier.codec.max_encoded(len(record) - HEADER_BYTES)))
                for record in records
            ]
        started = time.perf_counter()
        if opened.most_chunks(tier) == 1:
            lengths = tier.backend.get(keys, buffers)
        else:
            keys, lengths = self._read_blocks(job, opened, buffers)
        broken, good, nbytes = [], [], 0
        for (entry, cell), key, record, buffer, length in zip(wanted, keys, records, buffers, lengths, strict=True):
            if isinstance(length, Miss):
                good.append(False)
                if length is Miss.TOO_LARGE:
                    broken.append((key, "length"))
                elif length is Miss.UNREADABLE:
                    self._metrics.record_failures.labels(tier.name, length.value).inc()
                continue
            try:
                self._accept(opened, entry, cell, record, buffer[:length])
                good.append(True)
                nbytes += length
            except RecordError as error:
                _log.warning("%s: broken record %s: %s", tier.name, key, error)
                broken.append((key, error.reason))
                good.append(False)
        self._observe(tier.name, "read", nbytes, started)
        for _, reason in broken:
            self._metrics.record_failures.labels(tier.name, reason).inc()
        if broken:
            tier.backend.delete(list({key: None for key, _ in broken}))
        cells = len(opened.payload_bytes)
        return [all(good[at : at + cells]) for at in range(0, len(good), cells)]

    def _read_blocks(
        self, job: Job, opened: OpenSpace, buffers: Sequence[memoryview]
    ) -> tuple[list[str], list[int | Miss]]:
        """As ``get``, with the key of the block in which each record is; neighbours are read together."""
        backend, places = self._tiers[job.tier].backend, self._places[job.tier]
        assert isinstance(backend, RangeGet)
        cells = len(opened.payload_bytes)
        ranges: list[Range] = []
        numbers: list[list[int]] = []  # of the buffers of each range
        last: _Place | None = None
        for number, entry in enumerate(job.entries):
            place = places.of(entry.space, entry.digest)
            if last is not None and last == place._replace(number=place.number - 1):
                for cell in range(cells):
                    numbers[cell - cells].append(number * cells + cell)
            else:
                for cell, key in enumerate(opened.block_keys(place.last, place.size)):
                    nbytes = HEADER_BYTES + opened.payload_bytes[cell]
                    ranges.append(Range(key, place.number * nbytes, ()))
                    numbers.append([number * cells + cell])
            last = place
        ranges = [
            part._replace(buffers=[buffers[number] for number in each])
            for part, each in zip(ranges, numbers, strict=True)
        ]
        keys, lengths = [""] * len(buffers), list[int | Miss]([Miss.ABSENT] * len(buffers))
        for part, each, answer in zip(ranges, numbers, backend.get_ranges(ranges), strict=True):
            for number in each:
                keys[number] = part.key
                if not isinstance(answer, Miss):
                    lengths[number] = min(len(buffers[number]), answer)
                    answer -= min(len(buffers[number]), answer)
        return keys, lengths

    def _accept(self, opened: OpenSpace, entry: Entry, cell: int, record: memoryview, received: memoryview) -> None:
        """Check what a tier gave; decode it into the extent if it is encoded."""
        key = opened.record_key(entry.digest, cell)
        header = check_record(received, key, opened.payload_bytes[cell])
        if entry.first_position < 0:  # asked for by its digest alone
            entry.first_position = header.first_position
        if header.codec == RawCodec.name and received.obj is record.obj:
            return
        payload = record[HEADER_BYTES:]
        try:
            codec = codec_by_name(header.codec)
            if not codec.lossless:
                raise RecordError("codec", f"codec {codec.name!r} is lossy, the key says {key.origin.fidelity}")
            encoded = received[HEADER_BYTES:]
            codec.decode(encoded if received.obj is not record.obj else memoryview(bytes(encoded)), payload)
        except (ConfigError, ValueError) as error:
            raise RecordError("codec", f"cannot decode {header.codec!r}: {error}") from error
        self._write_header(opened, entry, cell, record)

    def verify(self, job: Job) -> list[bool]:
        """Check chunks that an earlier life left in the pool."""
        opened = self._spaces[job.entries[0].space]
        good = []
        for entry in job.entries:
            try:
                for cell in range(len(entry.extents)):
                    key, nbytes = opened.record_key(entry.digest, cell), opened.payload_bytes[cell]
                    header = check_record(self._record(entry, cell, opened), key, nbytes)
                    if header.codec != RawCodec.name:
                        raise RecordError("codec", f"{header.codec!r} in the pool")
                good.append(True)
            except RecordError as error:
                _log.warning("pool: broken record %s: %s", entry.digest.hex(), error)
                self._metrics.record_failures.labels("pool", error.reason).inc()
                good.append(False)
        return good

    def seal(self, job: Job) -> list[bool]:
        """Take the checksums: fill the room in front of every payload with its header."""
        opened = self._spaces[job.entries[0].space]
        for entry in job.entries:
            for cell in range(len(entry.extents)):
                self._write_header(opened, entry, cell, self._record(entry, cell, opened))
        return [True] * len(job.entries)

    def put(self, job: Job) -> list[bool]:
        tier = self._tiers[job.tier]
        opened = self._spaces[job.entries[0].space]
        alive = [entry.state is not EntryState.DEAD for entry in job.entries]
        entries = [entry for entry, wanted in zip(job.entries, alive, strict=True) if wanted]
        started = time.perf_counter()
        if opened.most_chunks(tier) == 1:
            items = [
                Item(key, record if tier.codec.identity else self._encode(tier.codec, record))
                for entry in entries
                for cell, key in enumerate(opened.keys(entry.digest))
                for record in [self._record(entry, cell, opened)]
            ]
        else:
            items, gone = self._blocks(job.tier, opened, entries)
            alive = [entry.digest not in gone and here for entry, here in zip(job.entries, alive, strict=True)]
        tier.backend.put(items)
        self._observe(tier.name, "write", sum(len(item.data) for item in items), started)
        if isinstance(tier.backend, Touch):
            tier.backend.touch(self.keys_to_root(opened, job.entries[-1]))
        self._puts += 1
        if self._puts % _PUTS_PER_MANIFEST == 0:
            tier.backend.put(opened.manifests)  # its own eviction may have taken them: they are the least used
        return alive

    def _blocks(self, tier: int, opened: OpenSpace, entries: Sequence[Entry]) -> tuple[list[Item], set[bytes]]:
        """The records in which chunks are to be written that are not there yet, or not where those who have just these
        digests find them: with the chunks right before them if those are in blocks of other requests only. And the
        digests of those that cannot be written, since one of their block has gone.
        """
        most = opened.most_chunks(self._tiers[tier])
        items: list[Item] = []
        gone: set[bytes] = set()
        at = 0
        while at < len(entries):
            end = at + 1
            while end < len(entries) and entries[end].parent is entries[end - 1]:
                end += 1
            run = [*self._before(entries[at], most, opened), *entries[at:end]]
            digests = [entry.digest for entry in run]
            first = opened.position_of(run[0])
            if first < 0:
                blocks = [packs.Block(number, 1) for number in range(len(run))]
            else:
                blocks = packs.lacking(first, first + len(run), most, self._has(tier, opened, digests, first))
            for block in blocks:
                part = slice(block.first - max(first, 0), block.end - max(first, 0))
                joined = [self._joined(run[part], cell, opened) for cell in range(len(opened.payload_bytes))]
                whole = [record for record in joined if record is not None]
                if len(whole) < len(joined):
                    gone.update(digests[part])
                    continue
                items += map(Item, opened.block_keys(digests[part][-1], block.size), whole)
                self._places[tier].note(opened.space, digests[part])
            at = end
        return items, gone

    def _before(self, entry: Entry, most: int, opened: OpenSpace) -> list[Entry]:
        """The chunks before this one, from where the largest block would begin that may hold it."""
        before: list[Entry] = []
        position = opened.position_of(entry)
        parent = entry.parent
        while position > 0 and position % most and parent is not None and parent.sealed:
            if parent.state is not EntryState.PUBLISHED:
                break
            before.append(parent)
            position, parent = position - 1, parent.parent
        return before[::-1]

    def _joined(self, entries: Sequence[Entry], cell: int, opened: OpenSpace) -> memoryview | None:
        """Their records, one behind the other; None if one is gone: not all of them are held by the job."""
        addresses = [address for entry in entries if (address := entry.extents[cell]) is not None]
        if len(addresses) < len(entries):
            return None
        nbytes = HEADER_BYTES + opened.payload_bytes[cell]
        joined = np.concatenate([self._pool.record(address, nbytes) for address in addresses])
        return None if any(entry.state is EntryState.DEAD for entry in entries) else joined.data

    def keys_to_root(self, opened: OpenSpace, entry: Entry | None) -> list[str]:
        """The keys of a chunk and those before it, deepest first: a tier that evicts by use then shrinks a prefix from
        its end, as the pool does.
        """
        keys: list[str] = []
        while entry is not None:
            keys += opened.keys(entry.digest)
            entry = entry.parent
        return keys

    def _encode(self, codec: Codec, record: memoryview) -> memoryview:
        """A record of its own with the payload encoded."""
        payload = record[HEADER_BYTES:]
        out = memoryview(bytearray(HEADER_BYTES + codec.max_encoded(len(payload))))
        length = codec.encode(payload, out[HEADER_BYTES:])
        encoded = out[: HEADER_BYTES + length]
        encoded[:HEADER_BYTES] = record[:HEADER_BYTES]
        header = read_header(encoded)
        write_header(
            encoded,
            header._replace(codec=codec.name, stored_bytes=length, payload_checksum=checksum(encoded[HEADER_BYTES:])),
        )
        return encoded

    def _record(self, entry: Entry, cell: int, opened: OpenSpace) -> memoryview:
        address = entry.extents[cell]
        assert address is not None
        return self._pool.record(address, HEADER_BYTES + opened.payload_bytes[cell])

    def _write_header(self, opened: OpenSpace, entry: Entry, cell: int, record: memoryview) -> None:
        nbytes = len(record) - HEADER_BYTES
        header = Header(
            key=opened.record_key(entry.digest, cell),
            token_count=opened.spec.chunk_tokens,
            first_position=entry.first_position,
            codec=RawCodec.name,
            codec_parameter=0,
            logical_bytes=nbytes,
            stored_bytes=nbytes,
            payload_checksum=checksum(record[HEADER_BYTES:]),
        )
        write_header(record, header)

    def _observe(self, tier: str, direction: str, nbytes: int, started: float) -> None:
        self._metrics.tier_bytes.labels(tier, direction).inc(nbytes)
        self._metrics.tier_seconds.labels(tier, direction).observe(time.perf_counter() - started)
