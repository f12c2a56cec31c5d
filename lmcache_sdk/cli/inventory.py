"""What is in a store: records by namespace, whose they are, and whether anyone can still use them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from enum import StrEnum
from pathlib import Path
from typing import NamedTuple

import msgspec

from lmcache_sdk.backend import Miss, Stat
from lmcache_sdk.cli.target import Listed
from lmcache_sdk.errors import ConfigError, RecordError
from lmcache_sdk.keys import Origin
from lmcache_sdk.listing import Key, parse_key
from lmcache_sdk.records import HEADER_BYTES, RecordKey, check_record, read_header
from lmcache_sdk.spec import Namespace, Producer, weights_fingerprint

_OTHER_SCHEMA = "its description is of another schema version"


class Record(NamedTuple):
    """A record as the store lists it."""

    stat: Stat
    key: Key


class Broken(NamedTuple):
    """A record that is of no use, and why."""

    stat: Stat
    why: str


class Standing(StrEnum):
    """Whether a namespace is of use: it may be; nobody can hit it again; that cannot be told."""

    CURRENT = "current"
    STALE = "stale"
    UNKNOWN = "unknown"


class Space:
    """What a store holds of one namespace.

    Attributes:
        id: 32 hex digits.
        manifest: its description, if it has one that this release understands.
        fault: why it has not, unless the description is merely missing.
        producers: by id; None where the description is missing.
        records: all of them, manifests included.
        unreadable: manifests that are none.
    """

    def __init__(self, identifier: str) -> None:
        self.id = identifier
        self.manifest: Namespace | None = None
        self.fault = ""
        self.producers: dict[str, Producer | None] = {}
        self.records: list[Record] = []
        self.unreadable: list[Stat] = []

    @property
    def label(self) -> str:
        return self.manifest.label if self.manifest else ""

    @property
    def nbytes(self) -> int:
        """The sum of the records' lengths."""
        return sum(record.stat.nbytes for record in self.records)

    @property
    def chunks(self) -> int:
        """Chunks of which at least one cell is there; each producer's counts."""
        return sum(k[-1] for k in {(k.producer, k.fidelity, k.digest, k.size) for _, k in self.records if k.digest})

    @property
    def is_dark(self) -> bool:
        """Whether it has descriptions, and none of them could be read."""
        described = self.manifest or self.fault or any(self.producers.values())
        return not described and any(key.is_manifest for _, key in self.records)

    def cells(self) -> dict[tuple[str, str], int]:
        """Decoded bytes by group and name of a cell; empty if the manifest is missing."""
        spec = self.manifest.spec if self.manifest else None
        return {(cell.group, cell.name): cell.nbytes for cell in spec.cells} if spec else {}

    def standing(self, *, shared: bool) -> tuple[Standing, str]:
        """Whether the namespace is of use, and why not. ``shared``: other machines, with other weights, may use it."""
        if self.manifest:
            standing, why = _weights_standing(self.manifest)
            if shared and standing is Standing.STALE:
                return Standing.UNKNOWN, f"on this machine {why}"
            return standing, why
        if self.fault:
            return Standing.STALE, self.fault
        # It is a record like others, and may be evicted before the chunks it describes, which are as good as
        # ever: whoever uses the namespace next writes it again.
        return Standing.UNKNOWN, "its description is missing"


def _weights_standing(namespace: Namespace) -> tuple[Standing, str]:
    source = namespace.source
    if not source:
        return Standing.CURRENT, ""
    try:
        if not Path(source).exists():
            return Standing.STALE, f"{source} is gone"
        if weights_fingerprint(source) != namespace.fingerprint:
            return Standing.STALE, f"the weights in {source} have changed"
    except ConfigError as error:
        return Standing.STALE, str(error)
    except (OSError, ValueError) as error:
        return Standing.UNKNOWN, f"{source} cannot be read: {error}"
    return Standing.CURRENT, ""


class Survey(NamedTuple):
    """All records of a store.

    Attributes:
        spaces: by namespace.
        records: in the store's own order.
        foreign: those whose keys are none of ours. Nobody here touches them.
    """

    spaces: dict[str, Space]
    records: list[Record]
    foreign: list[Stat]


def survey(backend: Listed) -> Survey:
    """List a store and read its manifests."""
    found = Survey({}, [], [])
    for stat in backend.scan():
        key = parse_key(stat.key)
        if key is None:
            found.foreign.append(stat)
            continue
        record = Record(stat, key)
        found.records.append(record)
        space = found.spaces.setdefault(key.namespace, Space(key.namespace))
        space.records.append(record)
        if key.producer:
            space.producers.setdefault(key.producer, None)
    manifests = [record for record in found.records if record.key.is_manifest]
    for record, content in _contents(backend, manifests):
        _describe(found.spaces[record.key.namespace], record, content)
    if manifests and all(space.is_dark for space in found.spaces.values()):
        raise ConfigError(
            "no description in this store can be read: if it is encrypted, name its key in the URL, as the daemon has "
            "it (#encrypt_key_file=… or #encrypt_key_env=…)"
        )
    return found


def _contents(backend: Listed, records: Iterable[Record]) -> Iterator[tuple[Record, memoryview]]:
    """Read records whole, one at a time into one buffer; what is gone since the scan is left out."""
    buffer = memoryview(bytearray())
    for record in records:
        if record.stat.nbytes > len(buffer):
            buffer = memoryview(bytearray(record.stat.nbytes))
        (length,) = backend.get([record.stat.key], [buffer])
        if not isinstance(length, Miss):
            yield record, buffer[:length]


def _describe(space: Space, record: Record, content: memoryview) -> None:
    """Take over a manifest if it describes what its key names: another schema makes another id of it."""
    try:
        if record.key.producer:
            producer = msgspec.json.decode(content, type=Producer)
            if producer.id == record.key.producer:
                space.producers[record.key.producer] = producer
        else:
            namespace = msgspec.json.decode(content, type=Namespace)
            if namespace.id == space.id:
                space.manifest = namespace
            else:
                space.fault = _OTHER_SCHEMA
    except msgspec.ValidationError:
        if not record.key.producer:
            space.fault = _OTHER_SCHEMA
    except msgspec.DecodeError:
        space.unreadable.append(record.stat)


def misfits(space: Space) -> Iterator[Broken]:
    """Records that cannot be what their keys say, as far as that shows without reading them."""
    for stat in space.unreadable:
        yield Broken(stat, "unreadable description")
    cells = space.cells()
    for stat, key in space.records:
        if key.is_manifest:
            continue
        if cells and (key.group, key.cell) not in cells:
            yield Broken(stat, "no such cell in this namespace")
        elif stat.nbytes < HEADER_BYTES * key.size:
            yield Broken(stat, "too short for a record")


def damaged(backend: Listed, found: Survey, records: Iterable[Record]) -> Iterator[tuple[Record, str]]:
    """Read records whole; yield those whose header or payload does not check out, and why."""
    cells = {name: space.cells() for name, space in found.spaces.items()}
    for record, content in _contents(backend, records):
        key = record.key
        expected = RecordKey(
            Origin(key.namespace, key.producer, key.fidelity), bytes.fromhex(key.digest), key.group, key.cell
        )
        try:
            # Without a manifest, the header is taken at its word about the size.
            nbytes = cells[key.namespace].get((key.group, key.cell)) or read_header(content).logical_bytes
            *others, last = _parts(content, key.size, nbytes)
            for part in others:  # which is named for the last one only
                check_record(part, expected._replace(digest=read_header(part).key.digest), nbytes)
            check_record(last, expected, nbytes)
        except RecordError as error:
            yield record, f"bad {error.reason}"


def _parts(content: memoryview, size: int, nbytes: int) -> list[memoryview]:
    """The records of a block, see ``packs.py``. Raises RecordError."""
    if size == 1:
        return [content]
    each = HEADER_BYTES + nbytes
    if len(content) != size * each:
        raise RecordError("length", f"{size} records of {each} bytes are not {len(content)}")
    return [content[at : at + each] for at in range(0, len(content), each)]
