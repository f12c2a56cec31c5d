"""The format of a stored record: a fixed header of 256 bytes, then the payload. Specified in ``docs/record-format.md``.

An extent of the pool keeps the header's room in front of its payload, so that a record is one contiguous buffer and
one put. Whatever does not check out is a :class:`RecordError`, which the store turns into a miss and a counter.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

import xxhash

from lmcache_sdk.codecs import RawCodec
from lmcache_sdk.errors import RecordError
from lmcache_sdk.keys import Origin, key_text

MAGIC = b"LMCSDKKV"
RECORD_VERSION = 1
HEADER_BYTES = 256
UNKNOWN_POSITION = -1

# magic, version, header bytes, flags | namespace, producer, digest | group, cell | tokens, reserved, first position |
# fidelity, codec, codec parameter | logical, stored length, payload checksum | reserved
_FIELDS = struct.Struct("<8sHHI16s8s32s16s32sIIq32s16sQQQQ32x")
_CHECKSUM = struct.Struct("<Q")
assert _FIELDS.size + _CHECKSUM.size == HEADER_BYTES

checksum = xxhash.xxh3_64_intdigest


class RecordKey(NamedTuple):
    """What a record must say of itself to be the one that was asked for."""

    origin: Origin
    digest: bytes
    group: str
    cell: str

    def __str__(self) -> str:
        return key_text(self.origin, self.digest, self.group, self.cell)


class Header(NamedTuple):
    """The fields of a header.

    Attributes:
        first_position: of the chunk's first token in its request, or :data:`UNKNOWN_POSITION`.
        codec_parameter: meaning is the codec's.
        logical_bytes: length of the decoded payload.
        stored_bytes: length of the payload in the record.
        payload_checksum: xxh3_64 of the payload in the record.
    """

    key: RecordKey
    token_count: int
    first_position: int
    codec: str
    codec_parameter: int
    logical_bytes: int
    stored_bytes: int
    payload_checksum: int


def _text(text: str, nbytes: int) -> bytes:
    encoded = text.encode("ascii")
    if len(encoded) > nbytes:  # struct would cut it off, and the record would never be found
        raise ValueError(f"{text!r} does not fit a field of {nbytes} bytes")
    return encoded


def write_header(into: memoryview, header: Header) -> None:
    """Fill the first 256 bytes of ``into``. Raises ValueError for a name that does not fit its field."""
    origin = header.key.origin
    _FIELDS.pack_into(
        into,
        0,
        MAGIC,
        RECORD_VERSION,
        HEADER_BYTES,
        0,
        bytes.fromhex(origin.namespace),
        bytes.fromhex(origin.producer),
        header.key.digest,
        _text(header.key.group, 16),
        _text(header.key.cell, 32),
        header.token_count,
        0,
        header.first_position,
        _text(origin.fidelity, 32),
        _text(header.codec, 16),
        header.codec_parameter,
        header.logical_bytes,
        header.stored_bytes,
        header.payload_checksum,
    )
    _CHECKSUM.pack_into(into, _FIELDS.size, checksum(into[: _FIELDS.size]))


def read_header(record: memoryview) -> Header:
    """Parse and check a header (not the payload).

    Raises:
        RecordError: ``length``, ``magic``, ``version`` or ``header`` (its checksum).
    """
    if len(record) < HEADER_BYTES:
        raise RecordError("length", f"a record has at least {HEADER_BYTES} bytes, this has {len(record)}")
    fields = _FIELDS.unpack_from(record)
    if fields[0] != MAGIC:
        raise RecordError("magic", f"magic is {fields[0]!r}, expected {MAGIC!r}")
    if fields[1] != RECORD_VERSION or fields[2] != HEADER_BYTES:
        raise RecordError(
            "version", f"record version {fields[1]} (header {fields[2]} bytes), known is {RECORD_VERSION}"
        )
    if _CHECKSUM.unpack_from(record, _FIELDS.size)[0] != checksum(record[: _FIELDS.size]):
        raise RecordError("header", "the header's checksum does not match")
    try:
        texts = [field.rstrip(b"\0").decode("ascii") for field in (fields[7], fields[8], fields[12], fields[13])]
    except UnicodeDecodeError as error:
        raise RecordError("header", f"a text field is not ASCII: {error}") from error
    group, cell, fidelity, codec = texts
    return Header(
        key=RecordKey(Origin(fields[4].hex(), fields[5].hex(), fidelity), fields[6], group, cell),
        token_count=fields[9],
        first_position=fields[11],
        codec=codec,
        codec_parameter=fields[14],
        logical_bytes=fields[15],
        stored_bytes=fields[16],
        payload_checksum=fields[17],
    )


def check_record(record: memoryview, key: RecordKey, logical_bytes: int) -> Header:
    """The header of a record that is what was asked for, whole and unchanged.

    Raises:
        RecordError: with the reason; see :func:`read_header`, and ``key``, ``length``, ``payload``.
    """
    header = read_header(record)
    if header.key != key:
        raise RecordError("key", f"the record says it is {header.key}")
    unencoded = header.codec == RawCodec.name
    if (
        header.logical_bytes != logical_bytes
        or len(record) != HEADER_BYTES + header.stored_bytes
        or (unencoded and header.stored_bytes != logical_bytes)  # it is used in place: every byte must be there
    ):
        raise RecordError(
            "length",
            f"record of {len(record)} bytes says {header.stored_bytes} stored, {header.logical_bytes} decoded; "
            f"expected {logical_bytes} decoded",
        )
    if checksum(record[HEADER_BYTES:]) != header.payload_checksum:
        raise RecordError("payload", "the payload's checksum does not match")
    return header
