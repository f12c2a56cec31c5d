"""The command line: what it says about stores, what it deletes, and how it ends."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import msgspec
import pytest
import typer
from typer.testing import CliRunner, Result

from lmcache_sdk import ConfigError, LMCacheSDKError, __version__, open_cache, weights_fingerprint
from lmcache_sdk.backend import Item, Miss, Scan, open_backend
from lmcache_sdk.cli import app, commands, doctor
from lmcache_sdk.cli.measure import Speed
from lmcache_sdk.keys import manifest_key
from lmcache_sdk.listing import Key, parse_key
from lmcache_sdk.spec import Namespace
from tests.core.engine import CHUNK, PRODUCER, PagedEngine, namespace, store, tokens_of

CHUNKS = 5
MANIFESTS = 2
UNKNOWN_NAMESPACE = "ab" * 16


def call(*arguments: object, **options: Any) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], **options)


def answer(*arguments: object) -> Any:
    """What a command that succeeds prints as JSON."""
    result = call(*arguments, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def fill(url: str, space: Namespace, *, seed: int = 0) -> None:
    """Store a prompt of five chunks, as an engine does."""
    cache, engine = open_cache(url, namespace=space, producer=PRODUCER, pool_bytes=1 << 20), PagedEngine()
    connector = engine.connect(cache)
    store(cache, engine, connector, tokens_of(seed, CHUNKS * CHUNK))
    assert cache.drain(10)
    connector.close()
    cache.close()


def put(url: str, records: dict[str, bytes]) -> None:
    backend = open_backend(url)
    backend.put([Item(key, memoryview(data)) for key, data in records.items()], if_absent=False)
    backend.close(10)


def keys_in(url: str) -> list[str]:
    backend = open_backend(url)
    assert isinstance(backend, Scan)
    keys = sorted(stat.key for stat in backend.scan())
    backend.close(10)
    return keys


def get(url: str, key: str) -> bytes:
    backend = open_backend(url)
    buffer = memoryview(bytearray(1 << 20))
    (length,) = backend.get([key], [buffer])
    backend.close(10)
    assert not isinstance(length, Miss)
    return bytes(buffer[:length])


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"lmdb://{tmp_path}/store"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return make_model(tmp_path / "model")


def make_model(directory: Path, **config: object) -> Path:
    directory.mkdir()
    facts = {"model_type": "llama", "num_hidden_layers": 3, "num_attention_heads": 4, "head_dim": 8}
    (directory / "config.json").write_text(json.dumps(facts | {"dtype": "bfloat16"} | config))
    write_weights(directory, b"\1" * 64)
    return directory


def write_weights(directory: Path, data: bytes) -> None:
    header = json.dumps({"w": {"dtype": "U8", "shape": [len(data)], "data_offsets": [0, len(data)]}}).encode()
    content = len(header).to_bytes(8, "little") + header + data
    (directory / "model.safetensors").write_bytes(content)


def of_model(directory: Path) -> Namespace:
    fingerprint = weights_fingerprint(directory)
    return msgspec.structs.replace(namespace(fingerprint=fingerprint), source=str(directory), label=directory.name)


# Keys


def test_keys_are_taken_apart() -> None:
    space, producer, digest = "0" * 32, "1" * 16, "2" * 64
    record = f"{space}/{producer}/exact/{digest}/full/L0-3.H0-4"
    assert parse_key(record) == Key(space, producer, "exact", digest, "full", "L0-3.H0-4")
    assert parse_key(f"{space}/manifest") == Key(space, "", "", "", "", "")
    assert parse_key(f"{space}/{producer}/manifest") == Key(space, producer, "", "", "", "")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "manifest",
        "0" * 32,
        "0" * 31 + "/manifest",
        "G" * 32 + "/manifest",
        "0" * 32 + "/exact/x",
        "0" * 32 + "/manifest\n",
    ],
)
def test_what_is_no_key_is_none(text: str) -> None:
    assert parse_key(text) is None


# ls


def test_ls_describes_each_namespace(url: str, model: Path) -> None:
    fill(url, of_model(model))
    fill(url, namespace(chunk_tokens=CHUNK, fingerprint="other"), seed=1)
    rows = {row["label"]: row for row in answer("ls", url)}
    assert set(rows) == {"model", "numpy"}
    row = rows["model"]
    assert row["namespace"] == of_model(model).id
    assert row["source"] == str(model)
    assert (row["dtype"], row["chunk_tokens"]) == ("bfloat16", CHUNK)
    assert row["producers"] == [{"id": PRODUCER.id, "name": PRODUCER.name}]
    assert (row["chunks"], row["records"]) == (CHUNKS, CHUNKS + MANIFESTS)
    assert row["bytes"] > CHUNKS * of_model(model).spec.chunk_bytes
    assert [row["status"] for row in rows.values()] == ["current", "current"]
    text = call("ls", url).stdout
    assert "model, bfloat16, chunks of 8 tokens" in text
    assert f"{CHUNKS} chunks, {CHUNKS + MANIFESTS} records" in text


def test_ls_of_an_empty_store(url: str) -> None:
    put(url, {})
    assert answer("ls", url) == []
    assert "no namespaces" in call("ls", url).stdout


def test_a_namespace_is_stale_when_its_weights_changed(url: str, model: Path) -> None:
    fill(url, of_model(model))
    write_weights(model, b"\2" * 64)
    (row,) = answer("ls", url)
    assert (row["status"], row["why"]) == ("stale", f"the weights in {model} have changed")


def test_a_namespace_is_stale_when_its_model_is_gone(url: str, model: Path) -> None:
    fill(url, of_model(model))
    model.rename(model.with_name("elsewhere"))
    (row,) = answer("ls", url)
    assert (row["status"], row["why"]) == ("stale", f"{model} is gone")
    assert "stale: " in call("ls", url).stdout


def test_a_namespace_is_stale_when_its_directory_holds_no_model(url: str, model: Path) -> None:
    fill(url, of_model(model))
    (model / "model.safetensors").unlink()
    (row,) = answer("ls", url)
    assert row["status"] == "stale" and "has no weights" in row["why"]


@pytest.mark.parametrize("content", [b'{"fingerprint": "f", "spec": {"layers": 3}}', None])
def test_a_namespace_is_stale_when_another_schema_wrote_it(url: str, content: bytes | None) -> None:
    other = msgspec.json.encode(namespace())  # a good description, of another id
    put(url, {manifest_key(UNKNOWN_NAMESPACE): content or other})
    (row,) = answer("ls", url)
    assert (row["status"], row["why"]) == ("stale", "its description is of another schema version")


@pytest.mark.parametrize("content", [None, b"\0\1\2"])
def test_without_a_description_a_namespace_may_still_be_used(url: str, content: bytes | None) -> None:
    fill(url, namespace())
    backend = open_backend(url)
    backend.delete([manifest_key(namespace().id)])
    backend.close(10)
    if content:
        put(url, {manifest_key(namespace().id): content})
    (row,) = answer("ls", url)
    assert (row["status"], row["why"]) == ("unknown", "its description is missing")
    assert row["chunks"] == CHUNKS
    answer("gc", url)
    assert answer("ls", url)[0]["chunks"] == CHUNKS
    answer("gc", url, "--unknown")
    assert answer("ls", url) == []


# du


def test_du_counts_by_namespace_and_producer(url: str, model: Path) -> None:
    fill(url, of_model(model))
    put(url, {"what/is/this": b"x" * 10})
    shares = answer("du", url)
    assert [(row["producer"], row["fidelity"], row["records"]) for row in shares["shares"]] == [
        (PRODUCER.name, "exact", CHUNKS),
        ("", "", MANIFESTS),
        ("", "", 1),
    ]
    total = shares["total"]
    assert total["records"] == CHUNKS + MANIFESTS + 1
    assert total["bytes"] == sum(row["bytes"] for row in shares["shares"])
    assert total["used_bytes"] >= total["bytes"]
    assert (total["capacity_bytes"], total["evictions"]) == (10 << 30, 0)
    text = call("du", url).stdout
    assert "(foreign)" in text and "of 10.0 GiB in use, 0 evictions" in text


# clear


def test_clear_one_namespace(url: str, model: Path) -> None:
    fill(url, of_model(model))
    fill(url, namespace(), seed=1)
    done = answer("clear", url, "--namespace", of_model(model).id[:6], "--yes")
    assert (done["namespaces"], done["records"]) == ([of_model(model).id], CHUNKS + MANIFESTS)
    assert [row["namespace"] for row in answer("ls", url)] == [namespace().id]


def test_clear_everything(url: str) -> None:
    fill(url, namespace())
    put(url, {"what/is/this": b"x"})
    result = call("clear", url, "--yes")
    assert result.exit_code == 0
    assert result.stdout.startswith(f"deleted {CHUNKS + MANIFESTS} records, ")
    assert keys_in(url) == ["what/is/this"], "what others keep there is theirs"
    assert call("clear", url).exit_code == 0  # nothing to ask about


def test_clear_does_not_delete_unasked(url: str) -> None:
    fill(url, namespace())
    result = call("clear", url)
    assert result.exit_code == 2
    assert "--yes" in result.stderr
    assert len(keys_in(url)) == CHUNKS + MANIFESTS


@pytest.mark.parametrize(("said", "code", "left"), [("y\n", 0, 0), ("n\n", 1, CHUNKS + MANIFESTS)])
def test_clear_asks_at_a_terminal(url: str, said: str, code: int, left: int, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(url, namespace())
    monkeypatch.setattr("lmcache_sdk.cli.stores._is_terminal", lambda: True)
    assert call("clear", url, input=said).exit_code == code
    assert len(keys_in(url)) == left


def test_clear_names_the_namespaces_that_there_are(url: str) -> None:
    fill(url, namespace())
    fill(url, namespace(fingerprint="other"))
    for prefix, message in [("zz", "no namespace starts with 'zz'"), ("", "no namespace starts")]:
        result = call("clear", url, "--yes", "--namespace", prefix)
        assert result.exit_code == 2
        assert message in result.stderr and namespace().id[:12] in result.stderr
    put(url, {manifest_key(namespace().id[:31] + other): b"{}" for other in "0123456789abcdef"})
    result = call("clear", url, "--yes", "--namespace", namespace().id[:31])
    assert result.exit_code == 2 and "16 namespaces start with" in result.stderr


# gc


def test_gc_drops_what_is_stale_and_keeps_what_is_not(url: str, model: Path) -> None:
    fill(url, of_model(model))
    fill(url, namespace(), seed=1)
    write_weights(model, b"\2" * 64)
    before = keys_in(url)
    planned = answer("gc", url, "--dry-run")
    assert keys_in(url) == before
    done = answer("gc", url)
    assert planned == done | {"dry_run": True}
    assert (done["records"], done["dropped"][0]["what"]) == (CHUNKS + MANIFESTS, "namespace")
    assert "have changed" in done["dropped"][0]["why"]
    assert [row["namespace"] for row in answer("ls", url)] == [namespace().id]
    assert call("gc", url).stdout == "nothing to drop\n"


def test_gc_says_what_it_drops(url: str, model: Path) -> None:
    fill(url, of_model(model))
    write_weights(model, b"\2" * 64)
    identifier = answer("ls", url)[0]["namespace"]
    first, last = call("gc", url).stdout.splitlines()
    assert first.startswith(f"namespace {identifier[:12]} model: 7 records, ")
    assert last.startswith("dropped 7 records, ")


def test_gc_drops_records_that_are_none(url: str) -> None:
    fill(url, namespace())
    good = keys_in(url)
    record = next(key for key in good if "/exact/" in key)
    put(
        url,
        {
            "what/is/this": b"x",  # somebody else's
            record.replace("/full/", "/half/"): b"x" * 300,
            record.replace("/exact/", "/foreign/"): b"too short",
        },
    )
    whys = {drop["why"]: drop["records"] for drop in answer("gc", url)["dropped"]}
    assert whys == {
        "broken: no such cell in this namespace": 1,
        "broken: too short for a record": 1,
    }
    assert keys_in(url) == sorted([*good, "what/is/this"])


def test_gc_of_a_store_that_others_may_use(tmp_path: Path, model: Path) -> None:
    """Another machine may well have the weights that are gone here."""
    shared = f"file://{tmp_path}/shared?size=64MiB"
    fill(shared, of_model(model))
    write_weights(model, b"\2" * 64)
    before = keys_in(shared)
    assert "on this machine" in answer("ls", shared)[0]["why"]
    assert call("gc", shared).stdout == "nothing to drop\n"
    assert keys_in(shared) == before
    assert answer("gc", shared, "--unknown")["records"] == CHUNKS + MANIFESTS


def test_gc_verify_finds_flipped_bytes(url: str) -> None:
    fill(url, namespace())
    good = keys_in(url)
    header, payload, moved, cut = [key for key in good if "/exact/" in key][:4]
    content = get(url, header)
    damage = {
        header: content[:20] + bytes([content[20] ^ 1]) + content[21:],
        payload: get(url, payload)[:-1] + b"\xee",
        moved: content,
        cut: get(url, cut)[:-8],
    }
    put(url, damage)
    assert answer("gc", url)["dropped"] == []
    done = answer("gc", url, "--verify")
    assert {drop["why"] for drop in done["dropped"]} == {
        "broken: bad header",
        "broken: bad payload",
        "broken: bad key",
        "broken: bad length",
    }
    assert keys_in(url) == [key for key in good if key not in damage]
    assert answer("gc", url, "--verify")["dropped"] == []


def test_gc_verify_works_without_a_description(url: str) -> None:
    fill(url, namespace())
    backend = open_backend(url)
    backend.delete([manifest_key(namespace().id)])
    backend.close(10)
    assert answer("gc", url, "--verify")["dropped"] == []


# Which store, and whether it is there


@pytest.mark.parametrize("command", ["ls", "du", "gc", "clear"])
def test_looking_creates_no_store(command: str, tmp_path: Path) -> None:
    for place in (tmp_path / "none", tmp_path / "no" / "parent"):
        result = call(command, f"lmdb://{place}")
        assert result.exit_code == 2
        assert f"there is no store in {place}" in result.stderr
        assert result.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_looking_does_not_shrink_a_store(url: str) -> None:
    """Only a size that is named is a bound: the default must not evict from a larger store."""
    put(f"{url}?size=20GiB", {"a": b"x"})
    assert answer("du", url)["total"]["capacity_bytes"] == 20 << 30
    put(f"{url}?size=2MiB", {"a": b"x"})
    assert answer("du", url)["total"]["capacity_bytes"] == 2 << 20


def test_a_store_whose_size_is_forgotten_keeps_its_records(url: str, tmp_path: Path) -> None:
    put(f"{url}?size=64MiB", {f"key/{number}": bytes(100_000) for number in range(40)})
    (tmp_path / "store" / "STATE").write_bytes(b"torn")
    assert answer("du", url)["total"]["records"] == 40


def test_a_store_in_use_is_said_to_be(url: str) -> None:
    backend = open_backend(url)
    result = call("ls", url)
    backend.close(10)
    assert result.exit_code == 1
    assert "is open already" in result.stderr


@pytest.mark.parametrize(
    ("url", "code", "message"),
    [
        ("/var/lib/kv", 2, "is not a URL"),
        ("nosuch:///var/lib/kv", 2, "unknown scheme 'nosuch'"),
        ("nosuch://host", 2, "unknown scheme 'nosuch'"),
        ("noop://", 2, "noop:// cannot list its records"),
    ],
)
def test_bad_urls(url: str, code: int, message: str) -> None:
    result = call("ls", url)
    assert (result.exit_code, message in result.stderr) == (code, True), result.stderr


def test_what_is_not_a_store_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    result = call("gc", f"lmdb://{tmp_path}")
    assert result.exit_code == 1 and "not a store" in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_the_configured_store_is_the_default(url: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fill(url, namespace())
    monkeypatch.setenv("LMCACHE_SDK_URL", url)
    assert len(answer("ls")) == 1
    monkeypatch.delenv("LMCACHE_SDK_URL")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    assert str(tmp_path / "caches" / "lmcache-sdk" / "store") in call("ls").stderr


# doctor


def findings(*arguments: object, code: int = 0) -> dict[tuple[str, str], dict[str, Any]]:
    result = call("doctor", "--no-measure", "--json", *arguments)
    assert result.exit_code == code, result.output
    report = json.loads(result.stdout)
    assert report["ok"] is (code == 0)
    return {(finding["topic"], finding["name"]): finding for finding in report["findings"]}


def test_doctor_says_where_each_setting_comes_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("wait_s: 10\nchunk_tokens: 128\n")
    monkeypatch.setenv("LMCACHE_SDK_CONFIG", str(file))
    monkeypatch.setenv("LMCACHE_SDK_CHUNK_TOKENS", "32")
    found = findings("--url", url, "--pool", "64MiB")
    settings = {name: finding["text"] for (topic, name), finding in found.items() if topic == "settings"}
    assert settings["url"] == f"{url}  (flag)"
    assert settings["pool_bytes"] == "64.0 MiB  (flag)"
    assert settings["chunk_tokens"] == "32  (LMCACHE_SDK_CHUNK_TOKENS)"
    assert settings["wait_s"] == f"10.0  ({file})"
    assert settings["log_level"] == "INFO  (default)"


def test_doctor_reports_a_wrong_setting_and_goes_on(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    monkeypatch.setenv("LMCACHE_SDK_POOL_BYTES", "much")
    found = findings(code=1)
    assert "'much' is not a size" in found["settings", "configuration"]["text"]
    assert ("installed", "kernels cpu") in found


def test_doctor_makes_no_store(tmp_path: Path) -> None:
    found = findings("--url", f"lmdb://{tmp_path}/store")
    assert found["store", "none yet"]["status"] == "ok"
    found = findings("--url", f"lmdb://{tmp_path}/no/store")
    assert found["store", "none yet"]["fix"] == f"mkdir -p {tmp_path}/no"
    assert list(tmp_path.iterdir()) == []


def test_doctor_looks_into_a_store(url: str, model: Path) -> None:
    fill(url, of_model(model))
    found = findings("--url", url)
    assert found["store", "opens"]["facts"]["records"] == CHUNKS + MANIFESTS
    assert found["store", "namespaces"]["status"] == "ok"
    write_weights(model, b"\2" * 64)
    stale = findings("--url", url)["store", "namespaces"]
    assert stale["status"] == "warn" and stale["fix"] == f"lmcache-sdk gc '{url}'"


def test_doctor_knows_that_a_store_in_use_is_no_defect(url: str) -> None:
    backend = open_backend(url)
    found = findings("--url", url)
    backend.close(10)
    assert "is open already" in found["store", "in use"]["text"]


@pytest.mark.parametrize("bad", ["lmdb://relative", "nosuch:///path", "lmdb:///{place}?sise=1GiB"])
def test_doctor_fails_for_a_store_that_cannot_be_opened(bad: str, url: str, tmp_path: Path) -> None:
    put(url, {})
    found = findings("--url", bad.format(place=f"{tmp_path}/store"), code=1)
    assert found["store", "store"]["status"] == "bad"


def test_doctor_opens_a_store_that_cannot_be_listed() -> None:
    assert findings("--url", "noop://")["store", "opens"]["status"] == "ok"


def test_doctor_warns_where_it_cannot_measure(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lmcache_sdk.cli.measure._SECONDS", 0.0)
    put(url, {})
    monkeypatch.setattr(os, "access", lambda *_: False)
    report = answer("doctor", "--url", url)
    assert report["findings"][-1]["status"] == "warn"
    assert "not writable" in report["findings"][-1]["text"]


def test_doctor_warns_of_a_pool_that_is_larger_than_memory(url: str) -> None:
    assert findings("--url", url, "--pool", "1000TiB")["machine", "memory"]["status"] == "warn"


def test_doctor_counts_how_much_of_a_model_fits(url: str, model: Path) -> None:
    put(f"{url}?size=64MiB", {})
    found = findings("--url", url, "--model", model, "--pool", "64MiB")
    assert found["model", "namespace"]["text"] != ""
    assert found["model", "KV"]["facts"] == {"token_bytes": 384, "chunk_bytes": 384 * 64}
    assert found["model", "pool holds"]["facts"]["tokens"] == (64 << 20) // (384 * 64 + 256) * 64
    assert found["model", "store holds"]["facts"]["tokens"] > 100_000
    small = findings("--url", url, "--model", model, "--pool", "1MiB")["model", "pool holds"]
    assert small["status"] == "warn" and small["fix"] == "raise pool_bytes to at least 2MiB"
    enough = findings("--url", url, "--model", model, "--pool", "2MiB")["model", "pool holds"]
    assert enough["status"] == "ok"
    assert findings("--url", url, "--model", model, "--pool", "1KiB", code=1)["model", "pool holds"]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"layer_types": ["sliding_attention"] * 3}, "sliding_attention"),
        ({"dtype": "int4"}, "int4"),
        ({"num_hidden_layers": 0}, "num_hidden_layers"),
    ],
)
def test_doctor_refuses_a_model_by_name(config: dict[str, object], message: str, url: str, tmp_path: Path) -> None:
    directory = make_model(tmp_path / "model", **config)
    assert message in findings("--url", url, "--model", directory, code=1)["model", "model"]["text"]


def test_doctor_names_a_directory_without_a_model(url: str, tmp_path: Path) -> None:
    found = findings("--url", url, "--model", tmp_path, code=1)
    assert "is not a model directory" in found["model", "model"]["text"]


def test_doctor_measures_beside_the_store(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lmcache_sdk.cli.measure._SECONDS", 0.0)
    report = answer("doctor", "--url", f"{url}?size=256MiB")
    speeds = [msgspec.convert(f["facts"], Speed) for f in report["findings"] if f["topic"] == "speed"]
    assert [speed.name for speed in speeds] == [
        "gather from pages",
        "scatter to pages",
        "checksum (xxh3)",
        "keys of chunks",
        "put into the store",
        "get from the store",
        "written to the disk",
    ]
    assert all(speed.measured > 0 and speed.share > 0 for speed in speeds)
    assert list(tmp_path.iterdir()) == []


def test_doctor_prints_a_report(url: str) -> None:
    result = call("doctor", "--no-measure", "--url", url)
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("versions\n  ok    lmcache-sdk")
    assert "\nstore\n" in result.stdout
    assert "0 problems, " in result.stdout


# Commands of other packages


def announce(monkeypatch: pytest.MonkeyPatch, *entries: EntryPoint) -> None:
    def found(*, group: str, name: str | None = None) -> list[EntryPoint]:
        return [entry for entry in entries if group == entry.group and name in (None, entry.name)]

    for module in (commands, doctor):
        monkeypatch.setattr(module, "entry_points", found)


def entry(name: str, value: str) -> EntryPoint:
    return EntryPoint(name, value, "lmcache_sdk.commands")


def greet(name: str) -> None:
    """Say hello."""
    typer.echo(f"hello {name}")


def fail(how: str) -> None:
    """Fail in some way."""
    errors = {"config": ConfigError("a\nb"), "other": LMCacheSDKError("c"), "interrupt": KeyboardInterrupt()}
    raise errors[how]


group = typer.Typer()
group.command()(greet)
group.command()(fail)


def test_commands_are_contributed_by_entry_points(monkeypatch: pytest.MonkeyPatch) -> None:
    announce(monkeypatch, entry("greet", f"{__name__}:greet"), entry("more", f"{__name__}:group"))
    assert "Say hello." in call("--help").stdout
    assert call("greet", "you").stdout == "hello you\n"
    assert call("more", "greet", "them").stdout == "hello them\n"


def test_a_contributed_command_never_replaces_a_built_in_one(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    announce(monkeypatch, entry("ls", f"{__name__}:greet"))
    put(url, {})
    assert "no namespaces" in call("ls", url).stdout


@pytest.mark.parametrize(
    ("value", "status"),
    [("no_such_module:x", "warn"), (f"{__name__}:no_such_name", "bad"), (f"{__name__}:CHUNKS", "ok")],
)
def test_a_broken_command_breaks_no_other(value: str, status: str, monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    announce(monkeypatch, entry("broken", value), entry("greet", f"{__name__}:greet"))
    listed = call("--help")
    assert listed.exit_code == 0
    assert "(unavailable: " in listed.stdout and "Say hello." in listed.stdout
    result = call("broken", "--whatever", "x")
    assert result.exit_code == 1
    assert result.stderr.startswith("lmcache-sdk: the command 'broken' is unavailable: ")
    assert call("greet", "you").exit_code == 0
    # Doctor loads it, but does not make a command of it.
    found = findings("--url", url, code=1 if status == "bad" else 0)
    assert found["installed", "command broken"]["status"] == status


@pytest.mark.parametrize(
    ("how", "code", "said"),
    [("config", 2, "lmcache-sdk: a b\n"), ("other", 1, "lmcache-sdk: c\n"), ("interrupt", 130, "")],
)
def test_errors_become_a_line_and_an_exit_code(how: str, code: int, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    announce(monkeypatch, entry("fail", f"{__name__}:fail"))
    result = call("fail", how)
    assert (result.exit_code, result.stderr.strip("\n")) == (code, said.strip("\n"))


def test_a_defect_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    announce(monkeypatch, entry("fail", f"{__name__}:fail"))
    assert isinstance(call("fail", "unforeseen").exception, KeyError)


# As a process


def lmcache_sdk(*arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    command = [Path(sys.executable).with_name("lmcache-sdk"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, **options)


def test_the_installed_command() -> None:
    done = lmcache_sdk("--version")
    assert (done.returncode, done.stdout) == (0, f"lmcache-sdk {__version__}\n")
    assert lmcache_sdk().returncode == 2
    assert lmcache_sdk("nosuch").returncode == 2
    assert lmcache_sdk("ls", "--nosuch").returncode == 2


def test_errors_of_a_process_have_no_traceback(tmp_path: Path) -> None:
    done = lmcache_sdk("ls", f"lmdb://{tmp_path}/none")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("lmcache-sdk: there is no store in ")
    assert done.stderr.count("\n") == 1


def test_a_closed_pipe_is_no_defect(url: str) -> None:
    fill(url, namespace())
    program = Path(sys.executable).with_name("lmcache-sdk")
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "wb") as closed:
        done = subprocess.run([program, "ls", url], stdout=closed, stderr=subprocess.PIPE, check=False)
    assert done.stderr == b""


def test_the_command_line_is_light() -> None:
    script = """
import json, sys, time
start = time.perf_counter()
import lmcache_sdk.cli
seconds = time.perf_counter() - start
try:
    lmcache_sdk.cli.app(["--help"])
except SystemExit:
    pass
print(json.dumps([seconds, sorted(sys.modules)]), file=sys.stderr)
"""
    best, modules = 9.0, set()
    for _ in range(3):
        started = time.perf_counter()
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, check=True)
        seconds, names = json.loads(done.stderr)
        best, modules = min(best, seconds), set(names)
        assert time.perf_counter() - started < 30
    assert not modules & {"torch", "transformers", "lmdb", "matplotlib"}
    assert best < 0.5
