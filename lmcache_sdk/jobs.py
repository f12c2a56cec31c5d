"""The work of jobs: bytes between the pool and the tiers, sealed on the way out and checked on the way in."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import msgspec

from lmcache_sdk.backend import Backend, Item, Miss, Touch
from lmcache_sdk.codecs import Codec, RawCodec, codec_by_name
from lmcache_sdk.core import Entry, EntryState, Job, Space
from lmcache_sdk.errors import ConfigError, RecordError
from lmcache_sdk.keys import manifest_key
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


class Tier(NamedTuple):
    """A backend in its place in the order of tiers.

    Attributes:
        name: in metrics and answers; unique in a store.
        codec: of the records written; what is read says itself how it was encoded.
    """

    name: str
    backend: Backend
    codec: Codec = RawCodec()


class OpenSpace:
    """A namespace and producer that a store serves: the core's space, and how its records are named.

    Attributes:
        manifests: descriptions for people, written beside the records.
    """

    def __init__(self, space: Space, namespace: Namespace, producer: Producer) -> None:
        self.space = space
        self.namespace = namespace
        self.producer = producer
        self.spec = namespace.spec
        self.manifests = [
            Item(manifest_key(namespace.id), memoryview(msgspec.json.encode(namespace))),
            Item(manifest_key(f"{namespace.id}/{producer.id}"), memoryview(msgspec.json.encode(producer))),
        ]
        self.payload_bytes = tuple(cell.nbytes for cell in self.spec.cells)
        self._prefix = space.origin.prefix()
        self._suffixes = [f"/{cell.group}/{cell.name}" for cell in self.spec.cells]

    def keys(self, digest: bytes) -> list[str]:
        """The key of every cell of a chunk."""
        stem = self._prefix + digest.hex()
        return [stem + suffix for suffix in self._suffixes]

    def record_key(self, digest: bytes, cell: int) -> RecordKey:
        described = self.spec.cells[cell]
        return RecordKey(self.space.origin, digest, described.group, described.name)


class Jobs:
    """What a store's threads do for a job. Each answers which of the job's entries came through; it raises what the
    backend raises. No lock is held: a job holds its entries, so that their extents stay.

    Args:
        spaces: the store's own, which grows.
    """

    def __init__(self, pool: Pool, tiers: Sequence[Tier], spaces: Mapping[Space, OpenSpace], metrics: Metrics) -> None:
        self._pool = pool
        self._tiers = tiers
        self._spaces = spaces
        self._metrics = metrics
        self._puts = 0

    def fetch(self, job: Job) -> list[bool]:
        """Read records into their extents and check them; a record that does not check out is removed from its tier."""
        tier = self._tiers[job.tier]
        wanted = [(entry, cell) for entry in job.entries for cell in range(len(entry.extents))]
        opened = self._spaces[job.entries[0].space]
        keys = [key for entry in job.entries for key in opened.keys(entry.digest)]
        records = [self._record(entry, cell, opened) for entry, cell in wanted]
        if tier.codec.identity:
            buffers = records
        else:
            buffers = [
                memoryview(bytearray(HEADER_BYTES + tier.codec.max_encoded(len(record) - HEADER_BYTES)))
                for record in records
            ]
        started = time.perf_counter()
        lengths = tier.backend.get(keys, buffers)
        broken, good, nbytes = [], [], 0
        for (entry, cell), key, record, buffer, length in zip(wanted, keys, records, buffers, lengths, strict=True):
            if isinstance(length, Miss):
                good.append(False)
                if length is Miss.TOO_LARGE:
                    broken.append((key, "length"))
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
            tier.backend.delete([key for key, _ in broken])
        cells = len(opened.payload_bytes)
        return [all(good[at : at + cells]) for at in range(0, len(good), cells)]

    def _accept(self, opened: OpenSpace, entry: Entry, cell: int, record: memoryview, received: memoryview) -> None:
        """Check what a tier gave; decode it into the extent if it is encoded."""
        key = opened.record_key(entry.digest, cell)
        header = check_record(received, key, opened.payload_bytes[cell])
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
        items = []
        for entry, wanted in zip(job.entries, alive, strict=True):
            if wanted:
                for cell, key in enumerate(opened.keys(entry.digest)):
                    record = self._record(entry, cell, opened)
                    items.append(Item(key, record if tier.codec.identity else self._encode(tier.codec, record)))
        started = time.perf_counter()
        tier.backend.put(items)
        self._observe(tier.name, "write", sum(len(item.data) for item in items), started)
        if isinstance(tier.backend, Touch):
            tier.backend.touch(self.keys_to_root(opened, job.entries[-1]))
        self._puts += 1
        if self._puts % _PUTS_PER_MANIFEST == 0:
            tier.backend.put(opened.manifests)  # its own eviction may have taken them: they are the least used
        return alive

    def keys_to_root(self, opened: OpenSpace, entry: Entry | None) -> list[str]:
        """The keys of a chunk and those before it, deepest first: a tier that evicts by use then shrinks a prefix from
        its end, as the pool does.
        """
        keys: list[str] = []
        for _ in range(len(opened.space.entries)):  # and no further, should somebody's digests go in a circle
            if entry is None:
                break
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
