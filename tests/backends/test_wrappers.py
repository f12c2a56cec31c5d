"""Namespaced and Encrypted around memory://: the conformance suite, secrecy, and what an attacker of the store does."""

from __future__ import annotations

import base64
import os
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from lmcache_backends.memory import MemoryBackend
from lmcache_backends.noop import NoopBackend
from lmcache_sdk.backend import (
    Backend,
    Miss,
    Range,
    RangeGet,
    RegisterMemory,
    Scan,
    Touch,
    Url,
    Usage,
    open_backend,
)
from lmcache_sdk.cli import app
from lmcache_sdk.errors import ConfigError
from lmcache_sdk.keys import Chain, Origin, key_text
from lmcache_sdk.open import LocalCache
from lmcache_sdk.store import Store, Tier
from lmcache_sdk.testing.backends import BackendTests, backend_state_machine, item, read, scanned
from lmcache_sdk.wrappers import OVERHEAD_BYTES, Encrypted, Namespaced, wrapping
from tests.core.engine import CHUNK, PRODUCER, PagedEngine, load, namespace, slots_of, store, tokens_of

KEY = bytes(range(32))
TOKENS = tokens_of(5, 5 * CHUNK + 3)


class TestNamespaced(BackendTests):
    longest_key = 300

    def open(self, place: Path) -> Namespaced:
        return Namespaced(MemoryBackend(self.bound), "team/a")

    def raw_get(self, backend: Namespaced, key: str) -> bytes | None:
        return backend.inner._records.get(f"team/a/{key}")

    def raw_set(self, backend: Namespaced, key: str, data: bytes) -> None:
        backend.inner._records[f"team/a/{key}"] = data


class TestEncrypted(BackendTests):
    def open(self, place: Path) -> Encrypted:
        return Encrypted(MemoryBackend(), KEY)

    def raw_get(self, backend: Encrypted, key: str) -> bytes | None:
        """By another way: the cipher itself, as the page describes the format."""
        from cryptography.hazmat.primitives.ciphers.aead import AESGCM

        record = backend.inner._records.get(key)
        return None if record is None else AESGCM(KEY).decrypt(record[1:13], record[13:], key.encode())

    def raw_set(self, backend: Encrypted, key: str, data: bytes) -> None:
        from cryptography.hazmat.primitives.ciphers.aead import AESGCM

        nonce = os.urandom(12)
        backend.inner._records[key] = b"\x01" + nonce + AESGCM(KEY).encrypt(nonce, data, key.encode())

    def test_get_does_not_hide_corruption(self, storing: Encrypted) -> None:
        data = bytes(10_000)
        storing.put([item("k", data)])
        record = bytearray(storing.inner._records["k"])
        record[5000] ^= 0x10
        storing.inner._records["k"] = bytes(record)
        assert read(storing, "k") is Miss.UNREADABLE


class TestBoth(TestEncrypted):
    """As a tier has them: what is authenticated is the key with its prefix."""

    longest_key = 300

    def open(self, place: Path) -> Backend:
        (place / "key").write_bytes(KEY)
        return wrapping(prefix="a", encrypt_key_file=str(place / "key"))(MemoryBackend())

    def raw_get(self, backend: Namespaced, key: str) -> bytes | None:
        return super().raw_get(backend.inner, f"a/{key}")

    def raw_set(self, backend: Namespaced, key: str, data: bytes) -> None:
        super().raw_set(backend.inner, f"a/{key}", data)

    def test_get_does_not_hide_corruption(self, storing: Namespaced) -> None:
        storing.put([item("k", b"data")])
        storing.inner.inner._records["a/k"] += b"\0"
        assert read(storing, "k") is Miss.UNREADABLE


TestNamespacedRandomly = backend_state_machine(TestNamespaced()).TestCase
TestEncryptedRandomly = backend_state_machine(TestEncrypted()).TestCase
for case in (TestNamespacedRandomly, TestEncryptedRandomly):
    case.settings = settings(
        max_examples=40,
        stateful_step_count=40,
        deadline=None,
        derandomize=True,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )
del case  # pytest would collect it


class Everything(MemoryBackend):
    """With all that only some can do."""

    def get_ranges(self, ranges):  # type: ignore[no-untyped-def]
        return [self.get([part.key], part.buffers)[0] for part in ranges]

    def register_memory(self, segment: memoryview) -> None:
        self.registered = segment

    def unregister_memory(self, segment: memoryview) -> None:
        del self.registered


def test_a_wrapper_can_what_its_backend_can() -> None:
    able, unable = Everything(), NoopBackend()
    for capability in (Scan, Usage, Touch, RangeGet, RegisterMemory):
        assert isinstance(Namespaced(able, "a"), capability)
        assert not isinstance(Namespaced(unable, "a"), capability)
        assert not isinstance(Encrypted(unable, KEY), capability)
        assert isinstance(Encrypted(able, KEY), capability) == (capability in (Scan, Usage, Touch))
    named = Namespaced(able, "a")
    named.put([item("k", b"12345")])
    buffer = bytearray(9)
    assert named.get_ranges([Range("k", 0, [memoryview(buffer)])]) == [5]
    segment = memoryview(buffer)
    named.register_memory(segment)
    assert able.registered is segment
    named.unregister_memory(segment)
    assert named.instant is True
    able.instant = False
    assert Namespaced(able, "a").instant is False


def test_prefixes_are_apart() -> None:
    records = MemoryBackend()
    a, ab = Namespaced(records, "a"), Namespaced(records, "a/b")
    a.put([item("k", b"1"), item("b", b"2")])
    ab.put([item("k", b"3")])
    assert read(ab, "k") == b"3" and read(a, "k") == b"1"
    assert scanned(ab) == [("k", 1)]
    assert scanned(a) == [("b", 1), ("b/k", 1), ("k", 1)]
    assert ab.delete(["k", "b"]) == 1
    assert scanned(records) == [("a/b", 1), ("a/k", 1)]


def test_touch_goes_to_the_prefixed_keys() -> None:
    records = MemoryBackend(30)
    named = Namespaced(records, "a")
    named.put([item(key, bytes(10)) for key in "xyz"])
    named.touch(["x"])
    named.put([item("new", bytes(10))])
    assert named.contains(["x", "y"]) == [True, False]


# Encrypted


def encrypted_pair() -> tuple[Encrypted, dict[str, bytes]]:
    backend = Encrypted(MemoryBackend(), KEY)
    return backend, backend.inner._records


def test_nothing_of_a_record_is_seen_and_no_two_are_alike() -> None:
    backend, stored = encrypted_pair()
    data = b"a secret of sixteen bytes" * 40
    backend.put([item("k", data)])
    first = stored["k"]
    backend.put([item("k", data)], if_absent=False)
    assert len(first) == len(data) + OVERHEAD_BYTES
    assert b"secret" not in first
    assert first[0] == stored["k"][0] == 1
    assert first[1:13] != stored["k"][1:13]
    assert first[13:] != stored["k"][13:]
    assert scanned(backend) == [("k", len(data))]


@settings(max_examples=300, deadline=None)
@given(st.integers(0, 5000), st.integers(0, (1 << 40) - 1), st.booleans())
def test_any_bit_that_flips_is_a_miss(nbytes: int, at: int, batched: bool) -> None:
    backend, stored = encrypted_pair()
    backend.put([item("k", bytes(nbytes)), item("other", b"other")])
    record = bytearray(stored["k"])
    bit = at % (len(record) * 8)
    record[bit // 8] ^= 1 << bit % 8
    stored["k"] = bytes(record)
    buffer = bytearray(nbytes + 100)
    other = bytearray(5)
    keys, buffers = (["k", "other"], [buffer, other]) if batched else (["k"], [buffer])
    answers = backend.get(keys, [memoryview(b) for b in buffers])
    assert answers[0] is Miss.UNREADABLE
    assert not batched or (answers[1] == 5 and other == b"other")
    assert buffer[nbytes:] == bytes(100)


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 5000), st.integers(0, 6000), st.binary(max_size=40))
def test_any_other_length_is_a_miss(nbytes: int, length: int, more: bytes) -> None:
    backend, stored = encrypted_pair()
    backend.put([item("k", bytes(nbytes))])
    changed = stored["k"][:length] + more
    if changed == stored["k"]:
        return
    stored["k"] = changed
    assert read(backend, "k") is Miss.UNREADABLE


def test_a_record_is_of_no_use_under_another_key(tmp_path: Path) -> None:
    backend, stored = encrypted_pair()
    backend.put([item("a", b"1111"), item("b", b"2222")])
    stored["a"], stored["b"] = stored["b"], stored["a"]
    assert read(backend, "a") is read(backend, "b") is Miss.UNREADABLE
    records = MemoryBackend()
    (tmp_path / "key").write_bytes(KEY)
    ours, theirs = (wrapping(prefix=name, encrypt_key_file=f"{tmp_path}/key")(records) for name in ("ours", "theirs"))
    ours.put([item("k", b"mine")])
    records._records["theirs/k"] = records._records["ours/k"]
    assert read(theirs, "k") is Miss.UNREADABLE


@pytest.mark.parametrize("former", ["another key", "none"])
def test_what_was_written_otherwise_is_replaced(former: str, caplog: pytest.LogCaptureFixture) -> None:
    backend, _ = encrypted_pair()
    writer = Encrypted(backend.inner, bytes(32)) if former == "another key" else backend.inner
    writer.put([item(f"k{i}", b"old" * 100) for i in range(4)])
    assert backend.contains(["k0", "k1"]) == [True, True]
    assert read(backend, "k1") is read(backend, "k2") is Miss.UNREADABLE
    assert len([record for record in caplog.records if "does not decrypt" in record.message]) == 1
    # What get said is what the others say, so that nobody waits for it, and putting it is no waste.
    assert backend.contains(["k0", "k1", "k2"]) == [True, False, False]
    assert backend.prefix_len(["k0", "k1", "k2"]) == 1
    assert backend.put([item("k0", b"new"), item("k1", b"new"), item("k1", b"newer")]) == [False, True, False]
    assert read(backend, "k1") == b"new"
    assert backend.contains(["k1"]) == [True]
    backend.delete(["k2"])
    assert backend.put([item("k2", b"2")]) == [True]
    assert backend.contains(["k2"]) == [True]


def test_a_store_on_a_tampered_tier_misses_and_heals(tmp_path: Path) -> None:
    url = f"lmdb://{tmp_path}/store?size=64MiB"

    def life() -> tuple[int, np.ndarray, int]:
        """Load what is there, store the rest; how much that was, the rows, and how many records did not decrypt."""
        served = Store([Tier("t", Encrypted(open_backend(url), KEY))], pool_bytes=1 << 20)
        cache, engine = LocalCache(served, namespace(), PRODUCER), PagedEngine()
        connector = engine.connect(cache)
        slots = slots_of(2, len(TOKENS))
        chunks, _ = load(cache, connector, TOKENS, slots)
        rows = engine.rows(slots[: chunks * CHUNK])
        store(cache, engine, connector, TOKENS)
        connector.close()
        cache.close()
        return chunks, rows, int(served.metrics.record_failures.labels("t", "unreadable")._value.get())

    assert life()[0] == 0
    chunks, expected, _ = life()
    assert chunks == 5
    backend = open_backend(url)
    key = key_text(Origin(namespace().id, PRODUCER.id), Chain(TOKENS, CHUNK).digests()[3], "full", "L0-3.H0-4")
    record = bytearray(read(backend, key))
    record[len(record) // 2] ^= 1
    backend.put([item(key, record)], if_absent=False)
    backend.close(5)
    chunks, rows, undecryptable = life()
    assert (chunks, undecryptable) == (3, 1)
    assert np.array_equal(rows, expected[:, : 3 * CHUNK])
    chunks, rows, undecryptable = life()
    assert (chunks, undecryptable) == (5, 0)
    assert np.array_equal(rows, expected)


def test_an_encrypted_store_is_not_taken_for_a_broken_one(tmp_path: Path) -> None:
    """The commands for stores say that the key is missing, and delete nothing."""
    for name in ("ours", "another"):
        (tmp_path / name).write_bytes(name.ljust(32).encode())
    url = f"lmdb://{tmp_path}/store?size=64MiB"
    tier = Tier("t", Encrypted(open_backend(url), b"ours".ljust(32)))
    cache, engine = LocalCache(Store([tier], pool_bytes=1 << 20), namespace(), PRODUCER), PagedEngine()
    connector = engine.connect(cache)
    store(cache, engine, connector, TOKENS)
    connector.close()
    cache.close()

    def keys() -> list[str]:
        backend = open_backend(url)
        assert isinstance(backend, Scan)
        found = sorted(stat.key for stat in backend.scan())
        backend.close(5)
        return found

    before = keys()
    for options in ("", f"#encrypt_key_file={tmp_path}/another"):
        for command in (["gc", "--verify"], ["gc", "--unknown"], ["ls"]):
            result = CliRunner().invoke(app, [*command, url + options])
            assert result.exit_code == 2 and "name its key in the URL" in " ".join(result.stderr.split())
    assert keys() == before
    result = CliRunner().invoke(app, ["gc", "--verify", f"{url}#encrypt_key_file={tmp_path}/ours"])
    assert result.stdout == "nothing to drop\n"


# What a user gives


def test_keys_of_every_form(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = base64.b64encode(KEY)
    records = MemoryBackend()
    Encrypted(records, KEY).put([item("k", b"data")])
    (tmp_path / "raw").write_bytes(KEY)
    (tmp_path / "base64").write_bytes(text + b"\n")
    (tmp_path / "lines").write_bytes(text[:20] + b"\n" + text[20:] + b"\r\n")
    monkeypatch.setenv("KV_KEY", text.decode())
    for options in (*({"encrypt_key_file": str(file)} for file in tmp_path.iterdir()), {"encrypt_key_env": "KV_KEY"}):
        assert read(wrapping(**options)(records), "k") == b"data"


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"prefix": "a b"}, "'a b' is no prefix"),
        ({"prefix": "a/"}, "no / at the end"),
        ({"prefix": "ä"}, "is no prefix"),
        ({"prefix": "a" * 65}, "1 to 64"),
        ({"prefix": "a\n"}, "is no prefix"),
        ({"encrypt_key_file": "DIR/absent"}, "No such file or directory; make one: .*head -c 32 /dev/urandom"),
        ({"encrypt_key_file": "DIR"}, "Is a directory"),
        ({"encrypt_key_file": "DIR/short"}, "holds no key of 32 bytes"),
        ({"encrypt_key_file": "DIR/text"}, "holds no key of 32 bytes"),
        ({"encrypt_key_env": "KV_ABSENT"}, "KV_ABSENT, which should hold an encryption key, is not set"),
        ({"encrypt_key_env": "KV_SHORT"}, "KV_SHORT holds no key of 32 bytes"),
        ({"encrypt_key_env": "KV_SHORT", "encrypt_key_file": "DIR/short"}, "not both"),
    ],
)
def test_bad_options(options: dict[str, str], named: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    secret = base64.b64encode(b"only sixteen byt")
    (tmp_path / "short").write_bytes(secret)
    (tmp_path / "text").write_text("not base64, and a secret")
    monkeypatch.setenv("KV_SHORT", secret.decode())
    monkeypatch.delenv("KV_ABSENT", raising=False)
    with pytest.raises(ConfigError, match=named) as refused:
        wrapping(**{name: value.replace("DIR", str(tmp_path)) for name, value in options.items()})
    assert secret.decode() not in str(refused.value)
    assert "a secret" not in str(refused.value)


def test_without_the_package_it_is_told_which(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cryptography.hazmat.primitives.ciphers.aead", None)
    with pytest.raises(ConfigError, match=r"'cryptography': pip install 'lmcache-sdk\[encryption\]'"):
        Encrypted(MemoryBackend(), KEY)
    assert wrapping(prefix="a")(MemoryBackend()).contains(["k"]) == [False]


def test_they_have_no_url() -> None:
    for wrapper in (Namespaced, Encrypted):
        with pytest.raises(ConfigError):
            wrapper.from_url(Url("namespaced://"))
