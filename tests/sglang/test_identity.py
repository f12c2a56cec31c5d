"""What an engine is to the cache, and what is refused by name."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from lmcache_adapters.settings import on_error
from lmcache_adapters.sglang.identity import EngineFacts, namespace_and_producer, refuse_unserved_engine
from lmcache_adapters.sglang.settings import read_linker_settings, read_settings
from lmcache_sdk.errors import ConfigError, LayoutError, LMCacheSDKError, UnsupportedError
from lmcache_sdk.spec import CellGrid
from tests.core.served import Served
from tests.sglang.pools import Rank, digests


def test_the_namespace_is_that_of_the_other_engines(
    tiny_directory: Path, shared_daemon: Served, ranks: list[Rank]
) -> None:
    from transformers import AutoConfig

    from lmcache_sdk.spec import namespace_of, weights_fingerprint

    rank = Rank(tiny_directory, shared_daemon.url)
    ranks.append(rank)
    cache = rank.backend._cache
    assert cache is not None
    config = AutoConfig.from_pretrained(tiny_directory).to_dict()
    wanted = namespace_of(config, fingerprint=weights_fingerprint(tiny_directory), dtype="bfloat16", chunk_tokens=64)
    assert cache.namespace.id == wanted.id
    assert cache.producer.engine == "sglang"


def test_pages_of_another_size_are_refused(tiny_directory: Path, shared_daemon: Served) -> None:
    with pytest.raises(ConfigError, match="start it with --page-size 64, or set chunk_tokens to 16"):
        Rank(tiny_directory, shared_daemon.url, page=16, extra={"chunk_tokens": 64})


@pytest.mark.parametrize(
    ("extra", "error", "message"),
    [
        ({"uri": "memory://"}, ConfigError, "unknown setting 'uri'"),
        ({"share": "all"}, ConfigError, "share must be one of verified, any, own, got 'all'"),
        ({"heads_per_cell": 3, "tp_size": 2}, ConfigError, "unknown setting 'tp_size'"),
        ({"url": "unix://relative"}, ConfigError, "three slashes"),
    ],
)
def test_wrong_settings_are_named(
    tiny_directory: Path, shared_daemon: Served, extra: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        Rank(tiny_directory, shared_daemon.url, extra=extra)


class Changed:
    """Arguments of which one is otherwise."""

    def __init__(self, server: Any, name: str, value: Any) -> None:
        self.server, self.name, self.value = server, name, value

    def __getattr__(self, name: str) -> Any:
        return self.value if name == self.name else getattr(self.server, name)


@pytest.mark.parametrize(
    ("whose", "name", "value", "message"),
    [
        ("server", "load_format", "dummy", "random weights have no identity"),
        ("server", "load_format", "remote_instance", "need not be those of the model's directory"),
        ("server", "kt_weight_path", "/experts", r"weights of their own is not served \(kt_weight_path=/experts\)"),
        ("server", "forward_hooks", [{"name": "x"}], "that hooks change"),
        ("server", "dllm_algorithm", "LowConfidence", "a diffusion model"),
        ("server", "lora_paths", ["one"], "POST /load_lora_adapter"),
        ("server", "pp_size", 2, "pipeline parallelism is not served"),
        ("server", "attn_cp_size", 2, r"sharded by tokens is not served \(attn_cp_size=2\)"),
        ("server", "dcp_size", 2, "sharded by tokens"),
        ("server", "nnodes", 2, "several nodes"),
        ("server", "enable_dp_attention", True, "DP attention is not served"),
        ("server", "speculative_algorithm", "EAGLE", "speculative_algorithm=EAGLE"),
        ("model", "is_multimodal", True, "llama takes images or audio"),
        ("model", "is_hybrid_swa", True, "llama has sliding-window layers"),
    ],
)
def test_what_is_not_served_is_refused_by_name(
    tiny_directory: Path, shared_daemon: Served, ranks: list[Rank], whose: str, name: str, value: Any, message: str
) -> None:
    ranks.append(Rank(tiny_directory, shared_daemon.url))  # of which all is served
    facts = EngineFacts.of_this_process(1, 0)
    changed = dataclasses.replace(facts, **{whose: Changed(getattr(facts, whose), name, value)})
    with pytest.raises(UnsupportedError, match=message):
        refuse_unserved_engine(changed)


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "uint8"])
def test_kv_of_another_dtype_is_refused(
    tiny_directory: Path, shared_daemon: Served, ranks: list[Rank], dtype: str
) -> None:
    ranks.append(Rank(tiny_directory, shared_daemon.url))
    with pytest.raises(UnsupportedError, match=f"KV of dtype '{dtype}'"):
        namespace_and_producer(EngineFacts.of_this_process(1, 0), 64, dtype, CellGrid())


def test_models_with_other_kv_are_refused(tiny_directory: Path, shared_daemon: Served) -> None:
    with pytest.raises(UnsupportedError, match="KV of kind mamba, swa"):
        Rank(tiny_directory, shared_daemon.url, pools=("kv", "swa", "mamba"))


def test_a_model_with_other_layers_is_refused(tiny_directory: Path, shared_daemon: Served, tmp_path: Path) -> None:
    for file in tiny_directory.iterdir():
        (tmp_path / file.name).symlink_to(file)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").write_text(json.dumps({**config, "attention_chunk_size": 128}))
    with pytest.raises(UnsupportedError, match="chunked attention"):
        Rank(tmp_path, shared_daemon.url)


def test_unknown_memory_is_refused_by_name(tiny_directory: Path, shared_daemon: Served) -> None:
    def rename(rank: Rank) -> None:
        rank.host.layout = "page_unified"

    with pytest.raises(UnsupportedError, match=r"layout 'page_unified'; served are .* layer_first, page_first"):
        Rank(tiny_directory, shared_daemon.url, before=rename)


def test_memory_that_lies_otherwise_fails_its_proof(tiny_directory: Path, shared_daemon: Served) -> None:
    def swap(rank: Rank) -> None:
        rank.host.kv_buffer = rank.host.kv_buffer.flip(0).contiguous()
        backup = rank.host.backup_from_device_all_layer

        def swapped(*given: Any) -> None:  # K where V belongs
            backup(*given)
            rank.host.kv_buffer.copy_(rank.host.kv_buffer.flip(0))

        rank.host.backup_from_device_all_layer = swapped

    with pytest.raises(LayoutError, match="does not read what the engine wrote"):
        Rank(tiny_directory, shared_daemon.url, before=swap)


def test_ranks_need_a_daemon(tiny_directory: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="2 ranks cannot share a store"):
        Rank(tiny_directory, f"lmdb://{tmp_path}/kv?size=32MiB", tp_size=2)


def test_one_rank_may_have_a_store_of_its_own(tiny_directory: Path, tmp_path: Path) -> None:
    url, keys = f"lmdb://{tmp_path}/kv?size=32MiB", digests(200, 2)
    first = Rank(tiny_directory, url, extra={"pool_bytes": "8MiB"})
    wanted = first.fill([1, 2], seed=1)
    assert first.set(keys, [1, 2]) == [True] * 2
    first.close()
    second = Rank(tiny_directory, url, extra={"pool_bytes": "8MiB"})
    assert second.get(keys, [5, 6]) == [True] * 2
    assert torch.equal(second.content([5, 6]), wanted)
    second.close()


def test_degrades_unless_told_to_refuse(
    tiny_directory: Path, shared_daemon: Served, caplog: pytest.LogCaptureFixture
) -> None:
    rank = Rank(tiny_directory, shared_daemon.url, extra={"on_error": "degrade"}, pools=("kv", "draft"))
    assert "SGLang serves WITHOUT the cache: UnsupportedError: models with KV of kind draft" in caplog.text
    keys = digests(201, 2)
    assert rank.backend.batch_exists(keys) == 0
    assert rank.set(keys, [1, 2]) == rank.get(keys, [1, 2]) == [False] * 2
    assert rank.backend.batch_exists_v2(keys, []).kv_hit_pages == 0
    rank.backend.clear()


def test_a_draft_pool_that_comes_later_ends_the_cache(tiny_directory: Path, shared_daemon: Served) -> None:
    rank = Rank(tiny_directory, shared_daemon.url)
    keys = digests(202, 1)
    rank.fill([1], seed=1)
    assert rank.set(keys, [1]) == [True]
    rank.backend.register_mem_host_pool_v2(rank.host, "draft")
    assert rank.backend.batch_exists(keys) == 0


def test_settings() -> None:
    assert on_error({}) == "degrade"
    with pytest.raises(LMCacheSDKError, match="degrade or refuse, got 'panic'"):
        on_error({"on_error": "panic"})
    for share in ("verified", "any", "own"):
        assert read_settings({"share": share}, 64).config.share == share
        assert read_linker_settings({"share": share}, 64).config.share == share
    settings = read_settings({"backend_name": "x", "interface_v1": 1, "heads_per_cell": 1}, 64)
    assert settings.zero_copy and settings.grid.heads_per_cell == 1 and settings.url.startswith("unix://")
