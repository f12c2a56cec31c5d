"""Records: what is written is read, and nothing else is."""

from __future__ import annotations

import json
import re
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from lmcache_sdk import records
from lmcache_sdk.backend import Item, open_backend
from lmcache_sdk.errors import RecordError
from lmcache_sdk.keys import Chain, Origin
from lmcache_sdk.records import (
    HEADER_BYTES,
    MAGIC,
    UNKNOWN_POSITION,
    Header,
    RecordKey,
    check_record,
    checksum,
    read_header,
    write_header,
)
from lmcache_sdk.spec import SCHEMA_VERSION
from tests.core.engine import CHUNK, PRODUCER, namespace
from tests.core.test_store import RECORD, TOKENS, fill, read, tamper

SPECIFICATION = Path(__file__).resolve().parents[2] / "docs" / "record-format.md"

KEY = RecordKey(Origin("0123456789abcdef" * 2, "fedcba9876543210"), bytes(range(32)), "full", "L0-32.H0-8")
PAYLOAD = np.random.default_rng(0).bytes(1000)

# The table of the specification, by hand: name -> offset, form.
FIELDS = {
    "magic": (0, "<8s"), "version": (8, "<H"), "header_bytes": (10, "<H"), "flags": (12, "<I"),
    "namespace": (16, "<16s"), "producer": (32, "<8s"), "digest": (40, "<32s"), "group": (72, "<16s"),
    "cell": (88, "<32s"), "token_count": (120, "<I"), "reserved": (124, "<I"), "first_position": (128, "<q"),
    "fidelity": (136, "<32s"), "codec": (168, "<16s"), "codec_parameter": (184, "<Q"), "logical_bytes": (192, "<Q"),
    "stored_bytes": (200, "<Q"), "payload_checksum": (208, "<Q"), "reserved_end": (216, "<32s"),
    "header_checksum": (248, "<Q"),
}  # fmt: skip


def header_of(payload: bytes = PAYLOAD, **changes: Any) -> Header:
    header = Header(KEY, 64, 128, "raw", 0, len(payload), len(payload), checksum(payload))
    return header._replace(**changes)


def record_of(payload: bytes = PAYLOAD, **changes: Any) -> bytearray:
    record = bytearray(HEADER_BYTES + len(payload))
    record[HEADER_BYTES:] = payload
    write_header(memoryview(record), header_of(payload, **changes))
    return record


def field(record: bytes | bytearray, name: str) -> Any:
    offset, form = FIELDS[name]
    return struct.unpack_from(form, record, offset)[0]


def forge(name: str, value: Any, payload: bytes = PAYLOAD) -> bytearray:
    """A record with one field replaced and the right header checksum: what only somebody else can have written."""
    record = record_of(payload)
    offset, form = FIELDS[name]
    struct.pack_into(form, record, offset, value)
    struct.pack_into("<Q", record, 248, xxhash.xxh3_64_intdigest(bytes(record[:248])))
    return record


def refused(record: bytes | bytearray, logical_bytes: int = len(PAYLOAD), key: RecordKey = KEY) -> str:
    """The reason why a record is refused."""
    with pytest.raises(RecordError) as caught:
        check_record(memoryview(record), key, logical_bytes)
    return caught.value.reason


# Round trips

texts = st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=1)


@given(
    st.builds(
        Header,
        key=st.builds(
            RecordKey,
            origin=st.builds(
                Origin,
                namespace=st.binary(min_size=16, max_size=16).map(bytes.hex),
                producer=st.binary(min_size=8, max_size=8).map(bytes.hex),
                fidelity=texts.map(lambda text: text[:32]),
            ),
            digest=st.binary(min_size=32, max_size=32),
            group=texts.map(lambda text: text[:16]),
            cell=texts.map(lambda text: text[:32]),
        ),
        token_count=st.integers(0, 2**32 - 1),
        first_position=st.integers(-(2**63), 2**63 - 1),
        codec=texts.map(lambda text: text[:16]),
        codec_parameter=st.integers(0, 2**64 - 1),
        logical_bytes=st.integers(0, 2**64 - 1),
        stored_bytes=st.integers(0, 2**64 - 1),
        payload_checksum=st.integers(0, 2**64 - 1),
    )
)
def test_every_header_is_read_as_it_was_written(header: Header) -> None:
    buffer = bytearray(b"\xa5" * (HEADER_BYTES + 10))
    write_header(memoryview(buffer), header)
    assert read_header(memoryview(buffer)) == header
    assert buffer[HEADER_BYTES:] == b"\xa5" * 10, "nothing behind the header is written"


@given(st.binary(max_size=3000))
def test_a_record_is_what_was_written(payload: bytes) -> None:
    found = check_record(memoryview(record_of(payload)), KEY, len(payload))
    assert found == header_of(payload)


def test_fields_lie_where_the_specification_says() -> None:
    record = record_of(first_position=UNKNOWN_POSITION, codec_parameter=7)
    assert {name: field(record, name) for name in FIELDS} == {
        "magic": MAGIC,
        "version": 1,
        "header_bytes": 256,
        "flags": 0,
        "namespace": bytes.fromhex(KEY.origin.namespace),
        "producer": bytes.fromhex(KEY.origin.producer),
        "digest": KEY.digest,
        "group": b"full" + bytes(12),
        "cell": b"L0-32.H0-8" + bytes(22),
        "token_count": 64,
        "reserved": 0,
        "first_position": -1,
        "fidelity": b"exact" + bytes(27),
        "codec": b"raw" + bytes(13),
        "codec_parameter": 7,
        "logical_bytes": len(PAYLOAD),
        "stored_bytes": len(PAYLOAD),
        "payload_checksum": xxhash.xxh3_64_intdigest(PAYLOAD),
        "reserved_end": bytes(32),
        "header_checksum": xxhash.xxh3_64_intdigest(bytes(record[:248])),
    }


def test_the_table_of_the_specification_is_the_one_tested() -> None:
    rows = re.findall(r"^\| (\d+) \| (\d+) \| ", SPECIFICATION.read_text(), re.MULTILINE)
    assert [(int(offset), int(size)) for offset, size in rows] == [
        (offset, struct.calcsize(form)) for offset, form in FIELDS.values()
    ]


def test_the_vector_of_the_specification() -> None:
    (found,) = re.findall(r"^```json record\n(.*?)^```$", SPECIFICATION.read_text(), re.DOTALL | re.MULTILINE)
    vector = json.loads(found)
    origin = Origin(vector["namespace"], vector["producer"], vector["fidelity"])
    payload = bytes(range(64))
    header = Header(
        RecordKey(origin, bytes.fromhex(vector["digest"]), vector["group"], vector["cell"]),
        *(vector[name] for name in ("token_count", "first_position", "codec", "codec_parameter", "logical_bytes")),
        vector["stored_bytes"],
        int(vector["payload_checksum"], 16),
    )
    written = bytearray(HEADER_BYTES)
    write_header(memoryview(written), header)
    assert written.hex() == "".join(vector["header"])
    record = bytes.fromhex("".join(vector["header"])) + payload
    assert check_record(memoryview(record), header.key, 64) == header


@pytest.mark.parametrize(
    "changes",
    [
        {"key": KEY._replace(group="g" * 17)},
        {"key": KEY._replace(cell="L" * 33)},
        {"key": KEY._replace(origin=Origin("0" * 32, "1" * 16, "f" * 33))},
        {"codec": "c" * 17},
        {"codec": "größe"},
    ],
    ids=["group", "cell", "fidelity", "codec", "not ASCII"],
)
def test_a_name_that_does_not_fit_is_not_cut_off(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"does not fit|ascii"):
        record_of(**changes)


# Damage


@pytest.mark.parametrize("mask", [0x01, 0x80, 0xFF])
def test_every_changed_byte_of_the_header_is_found(mask: int) -> None:
    reasons = []
    for at in range(HEADER_BYTES):
        record = record_of()
        record[at] ^= mask
        with pytest.raises(RecordError) as caught:
            read_header(memoryview(record))
        reasons.append(caught.value.reason)
    assert reasons == ["magic"] * 8 + ["version"] * 4 + ["header"] * 244


def test_every_changed_byte_of_the_payload_is_found() -> None:
    for at in range(HEADER_BYTES, HEADER_BYTES + len(PAYLOAD)):
        record = record_of()
        record[at] ^= 0x10
        assert refused(record) == "payload"


def test_every_length_but_the_right_one_is_refused() -> None:
    record = record_of(PAYLOAD[:300])
    for length in range(len(record)):
        assert refused(record[:length], 300) == "length"
    for more in (1, 64, 5000):
        assert refused(record + bytes(more), 300) == "length"


@pytest.mark.parametrize("length", range(HEADER_BYTES))
def test_a_header_that_is_cut_off_says_how_long_it_is(length: int) -> None:
    with pytest.raises(RecordError, match=f"this has {length}"):
        read_header(memoryview(record_of())[:length])


@given(st.binary(max_size=600))
def test_garbage_is_refused(garbage: bytes) -> None:
    assert refused(garbage, 100) in {"length", "magic", "version", "header"}
    assert refused(MAGIC + garbage, 100) in {"length", "version", "header"}


# Records that are whole but not what was asked for


@pytest.mark.parametrize(
    "key",
    [
        KEY._replace(origin=Origin("f" * 32, KEY.origin.producer)),
        KEY._replace(origin=Origin(KEY.origin.namespace, "f" * 16)),
        KEY._replace(origin=Origin(KEY.origin.namespace, KEY.origin.producer, "foreign")),
        KEY._replace(digest=bytes(32)),
        KEY._replace(group="latent"),
        KEY._replace(cell="L0-32.H0-4"),
    ],
    ids=["namespace", "producer", "fidelity", "digest", "group", "cell"],
)
def test_a_record_of_another_key_is_refused(key: RecordKey) -> None:
    assert refused(record_of(), key=key) == "key"


@pytest.mark.parametrize(("name", "text"), [("group", b"full\0junk"), ("cell", b"L0-32.H0-8\0x"), ("codec", b"raw\0x")])
def test_what_follows_the_end_of_a_text_counts(name: str, text: bytes) -> None:
    record = forge(name, text)
    if name == "codec":
        assert check_record(memoryview(record), KEY, len(PAYLOAD)).codec == "raw\0x"  # no codec has this name
    else:
        assert refused(record) == "key"


@pytest.mark.parametrize("name", ["group", "cell", "fidelity", "codec"])
def test_a_text_that_is_not_ascii_is_refused(name: str) -> None:
    assert refused(forge(name, b"\xc3\xa9")) == "header"


@pytest.mark.parametrize("version", [0, 2, 255, 0xFFFF])
def test_another_version_is_refused_before_anything_else_is_looked_at(version: int) -> None:
    record = forge("version", version)
    assert refused(record) == "version"
    record[12:] = bytes(len(record) - 12)
    assert refused(record) == "version"


@pytest.mark.parametrize("size", [0, 128, 257, 0xFFFF])
def test_another_size_of_header_is_another_version(size: int) -> None:
    assert refused(forge("header_bytes", size)) == "version"


@pytest.mark.parametrize("nbytes", [0, 1, 999, 1001, 2**32, 2**63, 2**64 - 1])
@pytest.mark.parametrize("name", ["logical_bytes", "stored_bytes"])
def test_hostile_lengths_are_refused(name: str, nbytes: int) -> None:
    assert refused(forge(name, nbytes)) == "length"


def test_a_short_payload_with_honest_lengths_is_not_taken_for_the_whole() -> None:
    """Right checksums, right key: but a raw record is used in place, so what it lacks would be other bytes."""
    record = record_of(PAYLOAD[:10], logical_bytes=len(PAYLOAD))
    assert refused(record) == "length"
    encoded = record_of(PAYLOAD[:10], logical_bytes=len(PAYLOAD), codec="zlib")
    assert check_record(memoryview(encoded), KEY, len(PAYLOAD)).stored_bytes == 10


def test_reserved_fields_are_ignored() -> None:
    for name, value in {"flags": 1, "reserved": 1, "reserved_end": b"x"}.items():
        check_record(memoryview(forge(name, value)), KEY, len(PAYLOAD))


# Through a store


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"lmdb://{tmp_path}/store?size=64MiB"


def reseal(change: Any) -> Any:
    """A change to a stored record, with the checksum of its header made right again."""

    def apply(record: bytearray) -> bytearray:
        changed = change(record)
        struct.pack_into("<Q", changed, 248, checksum(bytes(changed[:248])))
        return changed

    return apply


def future(record: bytearray) -> bytearray:
    struct.pack_into("<H", record, 8, 2)
    return record


def half(record: bytearray) -> bytearray:
    length = (len(record) - HEADER_BYTES) // 2
    struct.pack_into("<QQ", record, 200, length, checksum(bytes(record[HEADER_BYTES : HEADER_BYTES + length])))
    return record[: HEADER_BYTES + length]


def unknown_codec(record: bytearray) -> bytearray:
    record[168:184] = b"nosuch".ljust(16, b"\0")
    return record


@pytest.mark.parametrize(
    ("change", "reason"),
    [(future, "version"), (half, "length"), (unknown_codec, "codec")],
    ids=["version", "length", "codec"],
)
def test_a_forged_record_is_a_miss_and_is_replaced(url: str, change: Any, reason: str) -> None:
    rows = fill(url)
    tamper(url, 2, reseal(change))
    chunks, found, counters = read(url)
    assert chunks == 2
    assert np.array_equal(found, rows[:, : 2 * CHUNK])
    assert counters[f'lmcache_record_failures_total{{tier="lmdb",reason="{reason}"}}'] == 1
    assert np.array_equal(fill(url), rows)
    assert read(url)[0] == 5


def test_records_of_an_earlier_version_of_the_software_are_a_miss(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "RECORD_VERSION", 0)
    rows = fill(url)
    assert read(url)[0] == 5, "that version reads its own"
    monkeypatch.undo()
    chunks, _, counters = read(url)
    assert chunks == 0
    assert sum(v for name, v in counters.items() if 'reason="version"' in name) == len(TOKENS) // CHUNK
    assert np.array_equal(fill(url), rows)
    assert read(url)[0] == 5


def test_data_of_an_earlier_schema_is_not_even_looked_at(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lmcache_sdk.spec.SCHEMA_VERSION", SCHEMA_VERSION - 1)
    earlier = namespace().id
    fill(url)
    monkeypatch.undo()
    assert namespace().id != earlier
    chunks, _, counters = read(url)
    assert chunks == 0
    assert not [name for name in counters if name.startswith("lmcache_record_failures_total")]
    backend = open_backend(url)
    digests = Chain(TOKENS, CHUNK).digests()
    kept = [f"{earlier}/{PRODUCER.id}/exact/{digest.hex()}/full/L0-3.H0-4" for digest in digests]
    assert backend.contains(kept) == [True] * len(digests), "it stays until it is evicted or cleared"
    backend.close(5)


def test_a_whole_record_of_another_store_under_the_right_key_is_used(url: str, tmp_path: Path) -> None:
    """The control: records are portable, nothing but their bytes decides."""
    rows = fill(url)
    other = f"lmdb://{tmp_path}/other?size=64MiB"
    source, target = open_backend(url), open_backend(other)
    keys = [stat.key for stat in source.scan(namespace().id + "/" + PRODUCER.id + "/exact/")]  # type: ignore[attr-defined]
    buffers = [memoryview(bytearray(RECORD)) for _ in keys]
    assert source.get(keys, buffers) == [RECORD] * 5
    target.put([Item(key, buffer) for key, buffer in zip(keys, buffers, strict=True)])
    source.close(5)
    target.close(5)
    chunks, found, _ = read(other)
    assert chunks == 5 and np.array_equal(found, rows)
