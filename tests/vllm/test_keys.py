"""What enters a request's keys, and what a deployment is to the cache."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from concurrent.futures import wait
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.lora.request import LoRARequest
from vllm.multimodal.inputs import MultiModalFeatureSpec, PlaceholderRange

from lmcache_adapters.deployment import part_of
from lmcache_adapters.settings import on_error
from lmcache_adapters.vllm.chains import chain_of
from lmcache_adapters.vllm.lora import LoraKeys
from lmcache_adapters.vllm.settings import Wishes, read_settings, read_wishes
from lmcache_sdk import BackendFormatError, Chain, ConfigError, LayoutError, UnsupportedError
from lmcache_sdk.spec import WHOLE, Group, GroupKind, Part
from tests.core.served import Served
from tests.vllm.pretend import PretendEngine, until

IDS = list(range(10, 210))


def request(**changes: Any) -> Any:
    facts = {"all_token_ids": IDS, "cache_salt": None, "lora_request": None, "mm_features": [], "prompt_embeds": None}
    return SimpleNamespace(**{**facts, **changes})


def chain(**changes: Any) -> Chain | None:
    asking, keys = request(**changes), LoraKeys()
    lora = keys.ask(asking.lora_request)
    wait([lora], 10)
    keys.close()
    return chain_of(asking, 64, lora=lora)


def digests(**changes: Any) -> list[bytes]:
    found = chain(**changes)
    assert found is not None
    return found.digests()


def adapter(folder: Path, content: bytes) -> LoRARequest:
    folder.mkdir()
    (folder / "adapter_config.json").write_text("{}")
    (folder / "adapter_model.safetensors").write_bytes(content)
    return LoRARequest(folder.name, 1, str(folder))


def test_a_plain_request_has_the_keys_of_its_tokens() -> None:
    assert digests() == Chain(IDS, 64).digests()
    assert digests(cache_salt="s") == Chain(IDS, 64, cache_salt="s").digests()


def test_a_lora_adapter_is_its_files(tmp_path: Path) -> None:
    one, same, other = (adapter(tmp_path / name, content) for name, content in (("a", b"1"), ("b", b"1"), ("c", b"2")))
    assert digests(lora_request=one) == digests(lora_request=same)
    assert len({digests(lora_request=lora)[0] for lora in (None, one, other)}) == 3
    (tmp_path / "a" / "adapter_model.safetensors").write_bytes(b"22")
    assert digests(lora_request=one) != digests(lora_request=same)


def test_an_adapter_is_read_once_for_each_version_of_its_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, keys, reads = adapter(tmp_path / "a", b"1"), LoraKeys(), []
    monkeypatch.setattr("lmcache_adapters.vllm.lora._digest", lambda path, files: reads.append(path) or len(reads))
    assert [keys.ask(one).result(10) for _ in range(3)] == [1, 1, 1]
    (tmp_path / "a" / "adapter_model.safetensors").write_bytes(b"22")
    changed = LoRARequest("a again", 2, one.lora_path)
    assert [keys.ask(changed).result(10) for _ in range(3)] == [2, 2, 2]
    keys.close()


def test_an_adapter_whose_files_have_changed_under_vllm_is_not_kept(tmp_path: Path) -> None:
    """What vLLM computes with is in its memory, not in the files."""
    one, keys = adapter(tmp_path / "a", b"1"), LoraKeys()
    first = keys.ask(one).result(10)
    (tmp_path / "a" / "adapter_model.safetensors").write_bytes(b"22")
    with pytest.raises(ConfigError, match="load them under another name"):
        keys.ask(one).result(10)
    assert keys.ask(LoRARequest("a again", 2, one.lora_path)).result(10) != first
    keys.close()


def test_an_adapter_that_was_loaded_again_from_changed_files_is_not_kept(tmp_path: Path) -> None:
    """vLLM gives it another number, and the KV that its prefix cache has by that name and path."""
    one, keys = adapter(tmp_path / "a", b"1"), LoraKeys()
    first = keys.ask(one).result(10)
    assert keys.ask(LoRARequest(one.lora_name, 2, one.lora_path)).result(10) == first
    (tmp_path / "a" / "adapter_model.safetensors").write_bytes(b"22")
    for number in (3, 3, 4):
        with pytest.raises(ConfigError, match="load them under another name"):
            keys.ask(LoRARequest(one.lora_name, number, one.lora_path)).result(10)
    keys.close()


def test_an_adapter_in_use_is_not_forgotten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lmcache_adapters.vllm.lora._MOST", 4)
    used, other, keys = adapter(tmp_path / "a", b"1"), adapter(tmp_path / "b", b"2"), LoraKeys()
    for number in range(2, 12):
        keys.ask(LoRARequest(f"b{number}", number, other.lora_path)).result(10)
        keys.ask(used).result(10)
    (tmp_path / "a" / "adapter_model.safetensors").write_bytes(b"22")
    with pytest.raises(ConfigError, match="load them under another name"):
        keys.ask(used).result(10)
    keys.close()


def test_an_adapter_that_could_not_be_read_is_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, keys = adapter(tmp_path / "a", b"1"), LoraKeys()

    def broken(*_: Any) -> Any:
        raise OSError("a disk")

    with monkeypatch.context() as patch:
        patch.setattr("lmcache_adapters.vllm.lora._digest", broken)
        with pytest.raises(OSError, match="a disk"):
            keys.ask(one).result(10)
    assert keys.ask(one).result(10).startswith("lora:")
    keys.close()


def test_an_image_enters_the_chunks_that_it_overlaps() -> None:
    def image(identifier: str) -> MultiModalFeatureSpec:
        return MultiModalFeatureSpec(None, "image", identifier, PlaceholderRange(offset=70, length=20))

    plain, cat, dog = digests(), digests(mm_features=[image("cat")]), digests(mm_features=[image("dog")])
    assert plain[0] == cat[0] == dog[0]
    assert len({plain[1], cat[1], dog[1]}) == len({plain[2], cat[2], dog[2]}) == 3


@pytest.mark.parametrize(
    "changes", [{"prompt_embeds": object()}, {"lora_request": LoRARequest("x", 1, "/no/such/adapter")}]
)
def test_what_cannot_be_named_is_not_kept(changes: dict[str, Any]) -> None:
    assert chain(**changes) is None


def test_why_an_adapters_requests_are_not_kept_is_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(3):
        assert chain(lora_request=LoRARequest("x", 1, str(tmp_path))) is None
    assert [record.getMessage() for record in caplog.records] == [
        f"requests are served without the cache: ConfigError: {tmp_path} is not a directory with a LoRA adapter"
    ]


def test_wishes() -> None:
    assert read_wishes(None) == read_wishes({"do_remote_decode": True}) == Wishes()
    assert read_wishes({"no_load": True, "pin": 5, "tenant": "t"}) == Wishes(load=False, pin_s=5.0, tenant="t")
    odd = {"no_store": "yes", "no_load": 1, "pin": float("nan"), "tenant": None}
    assert read_wishes(odd) == Wishes(load=False, store=False)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"uri": "memory://"}, "unknown setting 'uri'"),
        ({"share": "all"}, "share must be one of verified, any, own, got 'all'"),
        ({"chunk_tokens": 0}, "chunk_tokens must be at least 1, got 0"),
        ({"pool_bytes": "much"}, "'much' is not a size"),
    ],
)
def test_wrong_settings_are_named(extra: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_settings(extra)


def test_settings() -> None:
    assert on_error({}) == "degrade"
    with pytest.raises(ConfigError, match="degrade or refuse, got 'panic'"):
        on_error({"on_error": "panic"})
    assert read_settings({"url": "lmdb:///kv", "on_error": "refuse"}).has_own_daemon
    assert not read_settings({}).has_own_daemon


def test_parts_of_ranks() -> None:
    full, latent = (
        Group("full", GroupKind.FULL, (0,), 4, 8, "bfloat16"),
        Group("latent", GroupKind.LATENT, (0,), 1, 8, "bfloat16"),
    )
    assert part_of(full, 1, 0) == part_of(latent, 8, 3) == WHOLE
    assert [part_of(full, 2, rank) for rank in range(2)] == [Part(heads=(0, 2)), Part(heads=(2, 4))]
    assert [part_of(full, 8, rank).heads[0] for rank in range(8)] == [0, 0, 1, 1, 2, 2, 3, 3]


@pytest.fixture
def start(tiny_directory: Path, shared_daemon: Served) -> Iterator[Any]:
    engines = []

    def begin(**options: Any) -> PretendEngine:
        options.setdefault("model", tiny_directory)
        options.setdefault("url", shared_daemon.url)
        engines.append(PretendEngine(**options))
        return engines[-1]

    yield begin
    for engine in engines:
        engine.close()


def _set(path: str, value: Any) -> Any:
    *owners, name = path.split(".")

    def change(config: Any) -> None:
        owner = config
        for step in owners:
            owner = getattr(owner, step)
        object.__setattr__(owner, name, value)

    return change


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("parallel_config.pipeline_parallel_size", 2, "pipeline parallelism is not served"),
        ("parallel_config.decode_context_parallel_size", 2, "decode_context_parallel_size=2"),
        ("parallel_config.nnodes", 2, "several nodes"),
        ("speculative_config", SimpleNamespace(), "speculative decoding is not served"),
        ("weight_transfer_config", SimpleNamespace(), "weights that are replaced while vLLM runs are not served"),
        ("cache_config.enable_prefix_caching", False, "vLLM's prefix caching is off"),
        ("cache_config.cache_dtype", "fp8", "KV of dtype 'fp8'"),
        ("load_config.load_format", "dummy", "random weights have no identity"),
        ("load_config.load_format", "tensorizer", "load_format=tensorizer: .* served are auto, hf"),
    ],
)
def test_what_is_not_served_is_refused_by_name(start: Any, path: str, value: Any, message: str) -> None:
    with pytest.raises(UnsupportedError, match=message):
        start(change=_set(path, value))


def test_a_model_with_other_layers_is_refused(start: Any, tiny_directory: Path, tmp_path: Path) -> None:
    for file in tiny_directory.iterdir():
        (tmp_path / file.name).symlink_to(file)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").write_text(json.dumps({**config, "attention_chunk_size": 128}))
    with pytest.raises(UnsupportedError, match="chunked attention"):
        start(model=tmp_path)


def test_memory_of_another_form_is_refused_with_its_shape(start: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.vllm.pretend._get_attn_isa", lambda *_: "amx")
    with pytest.raises(LayoutError, match="kernels 'amx' pack a block in a way that is not described"):
        start()


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"url": "unix://relative"}, "write unix:///path/of/socket with three slashes"),
        ({"url": "nothing://here"}, "unknown scheme 'nothing' .* may also be a daemon, unix:///path/of/socket"),
        ({"colour": "red"}, "unknown setting 'colour'"),
        ({"share": "all"}, "share must be one of verified, any, own, got 'all'"),
        ({"heads_per_cell": 3, "ranks": 2}, "heads_per_cell"),
    ],
)
def test_on_error_refuses_or_degrades(
    start: Any, extra: dict[str, Any], message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ConfigError, match=message):
        start(**extra)
    engine = start(**extra, on_error="degrade")
    assert "vLLM serves WITHOUT the cache" in capfd.readouterr().err
    assert engine.run("a", IDS) == 0
    assert str(engine.finished["a"]) == "length"
    engine.settle()


def test_trouble_that_nobody_has_thought_of_does_not_end_vllm(
    start: Any, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: Any) -> Any:
        raise KeyError("rope_parameters")

    monkeypatch.setattr("lmcache_adapters.vllm.connector.namespace_and_producer", broken)
    with pytest.raises(KeyError):
        start()
    engine = start(on_error="degrade")
    said = capfd.readouterr().err
    assert "vLLM serves WITHOUT the cache: KeyError: 'rope_parameters'" in said and "Traceback" in said
    assert engine.run("a", IDS) == 0


@pytest.mark.parametrize(
    ("options", "said"),
    [({}, True), ({"share": "own"}, False), ({"block_tokens": 64}, False), ({"chunk_tokens": 16}, False)],
)
def test_blocks_that_split_chunks_are_named_at_start(
    start: Any, options: dict[str, Any], said: bool, capfd: pytest.CaptureFixture[str]
) -> None:
    start(**options)
    assert ("a block of 32 tokens is no multiple of a chunk, 64" in capfd.readouterr().err) is said


@pytest.fixture
def later_daemon(monkeypatch: pytest.MonkeyPatch, served: Served) -> Iterator[Served]:
    """In the place of one of this release, one that speaks another version of the protocol."""
    served.stop()
    program = (
        "import lmcache_sdk.daemon.protocol as p; p.PROTOCOL_VERSION = 99; from lmcache_sdk.cli import main; main()"
    )
    with monkeypatch.context() as patch:
        patch.setattr("tests.core.served.COMMAND", [sys.executable, "-c", program])
        served.start()
        yield served


def test_a_daemon_of_another_version_is_refused_or_done_without(
    start: Any, later_daemon: Served, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(BackendFormatError, match="99"):
        start(url=later_daemon.url)
    engine = start(url=later_daemon.url, on_error="degrade")
    assert "vLLM serves WITHOUT the cache: BackendFormatError" in capfd.readouterr().err
    assert engine.run("a", IDS) == 0


def test_a_worker_that_cannot_be_served_ends_the_cache_for_all(
    start: Any, served: Served, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """What it was told to load before it could say so is computed."""

    def strange(*_: Any) -> Any:
        raise LayoutError("strange memory")

    assert start(url=served.url).run("stored", IDS) == 0
    with monkeypatch.context() as patch:
        patch.setattr("lmcache_adapters.vllm.connector.EngineMemory", strange)
        engine = start(url=served.url, on_error="degrade")
    assert "vLLM serves WITHOUT the cache: LayoutError: strange memory" in capfd.readouterr().err
    assert engine.run("a", IDS) == 192
    assert str(engine.finished["a"]) == "length"
    assert "since a worker cannot use it: LayoutError: strange memory" in capfd.readouterr().err
    assert engine.scheduler.reset_prefix_cache()
    assert engine.run("b", [*IDS, *IDS]) == 0
    assert served.status()["stats"]["chunks"] == 3


def test_under_the_policy_fail_nothing_is_promised_before_the_workers_have_said_that_they_can(
    start: Any, served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    def strange(*_: Any) -> Any:
        raise LayoutError("strange memory")

    assert start(url=served.url).run("stored", IDS) == 0
    with monkeypatch.context() as patch:
        patch.setattr("lmcache_adapters.vllm.connector.EngineMemory", strange)
        engine = start(url=served.url, on_error="degrade", policy="fail")
    assert engine.run("a", IDS) == 0
    assert str(engine.finished["a"]) == "length"
    good = start(url=served.url, on_error="degrade", policy="fail")
    assert good.run("first", IDS) == 0
    good.flush()
    assert good.run("then", IDS) == 192
    assert start(url=served.url, policy="fail").run("refuses", IDS) == 192  # it would not have started


def test_a_store_url_gets_a_daemon_of_the_engines_own(
    start: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    engine = start(url=f"lmdb://{tmp_path}/kv?size=64MiB", pool_bytes="16MiB")
    assert "no daemon" not in capfd.readouterr().err
    until(lambda: engine.ranks[0].connector._worker_cache.connected)  # it was there before the daemon
    engine.run("cold", IDS)
    engine.flush()
    assert engine.run("warm", IDS) == 192
