"""What the adapter relies on in SGLang, against the SGLang that is installed. A failure names what has moved."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from sglang.srt import plugins
from sglang.srt.configs.model_config import ModelConfig
from sglang.srt.lora.lora_registry import LoRARef
from sglang.srt.managers.cache_controller import HiCacheController
from sglang.srt.managers.schedule_batch import Req
from sglang.srt.managers.scheduler_components.weight_updater import SchedulerWeightUpdaterManager
from sglang.srt.mem_cache import hicache_storage
from sglang.srt.mem_cache.allocator.paged import PagedTokenToKVPoolAllocator
from sglang.srt.mem_cache.cache_init_params import CacheInitParams
from sglang.srt.mem_cache.hicache_storage import (
    HiCacheStorage,
    HiCacheStorageConfig,
    HiCacheStorageExtraInfo,
    PoolName,
    PoolTransfer,
    PoolTransferResult,
)
from sglang.srt.mem_cache.hybrid_cache.hybrid_cache_controller import HybridCacheController
from sglang.srt.mem_cache.pool_host.base import HostKVCache
from sglang.srt.mem_cache.storage.backend_factory import StorageBackendFactory
from sglang.srt.mem_cache.unified_cache import unified_cache_linker
from sglang.srt.mem_cache.unified_cache.component_type import ComponentType
from sglang.srt.mem_cache.unified_cache.linker_factory import create_unified_cache_linker
from sglang.srt.plugins.hook_registry import HookRegistry, HookType
from sglang.srt.server_args import ServerArgs
from sglang.srt.utils.weight_checker import WeightChecker

from lmcache_adapters.sglang import device, hicache, host, identity, linker, weights
from lmcache_adapters.sglang.hicache import HiCacheBackend
from lmcache_adapters.sglang.linker import Linker
from lmcache_adapters.sglang.loads import LayerLoads
from tests.sglang.pools import Rank

CALLED = {
    "register_mem_pool_host": ["mem_pool_host"],
    "register_mem_host_pool_v2": ["host_pool", "host_pool_name"],
    "on_host_pools_registered": [],
    "batch_exists_v2": ["keys", "pool_transfers", "extra_info"],
    "batch_get_v2": ["transfers", "extra_info"],
    "batch_set_v2": ["transfers", "extra_info"],
    "batch_get_v1": ["keys", "host_indices", "extra_info"],
    "batch_set_v1": ["keys", "host_indices", "extra_info"],
    "get": ["key", "target_location", "target_sizes"],
    "batch_get": ["keys", "target_locations", "target_sizes"],
    "set": ["key", "value", "target_location", "target_sizes"],
    "batch_set": ["keys", "values", "target_locations", "target_sizes"],
    "exists": ["key"],
    "batch_exists": ["keys", "extra_info"],
    "clear": [],
    "get_stats": [],
}
# Read of SGLang's objects. Some are asked for with ``getattr`` and a default: gone they would be missed by nobody else.
SERVER = (
    "model_path revision download_dir load_format device page_size tp_size pp_size nnodes attn_cp_size attn_dp_size "
    "dcp_size enable_dp_attention speculative_algorithm attention_backend prefill_attention_backend "
    "decode_attention_backend json_model_override_args context_length disaggregation_mode kt_weight_path "
    "modelopt_checkpoint_restore_path forward_hooks dllm_algorithm lora_paths enable_lora"
)
MODEL = "model_path hf_config hf_text_config dtype quantization context_len is_multimodal is_hybrid_swa"
CONFIG = "extra_config tp_size tp_rank"
PARAMS = (
    "token_to_kv_pool_allocator page_size tp_cache_group attn_tp_cache_group mtp_draft_device_pools "
    "sidecar_draft_device_pools"
)
HOST = (
    "layout page_size page_num layer_num dtype kv_buffer _transfer_device get_data_page set_from_flat_data_page "
    "backup_from_device_all_layer"
)
DEVICE = "layer_num start_layer dtype device set_kv_buffer kv_cache_layout"
KV = {
    "host": "device_k_buffers device_v_buffers",
    "latent host": "device_kv_buffers",
    "device": "k_buffer v_buffer",
    "latent device": "kv_buffer",
}
# By which names the adapter has them, and what is listed of each.
READ: list[tuple[ModuleType, str, str]] = [
    (identity, "server", SERVER),
    (identity, "model", MODEL),
    (linker, "facts.server", SERVER),
    (linker, "params", PARAMS),
    (linker, "pages", "keys device_indices"),
    (linker, "pool", DEVICE),
    (device, "pool", f"{DEVICE} {KV['device']} {KV['latent device']}"),
    (device, "self._pool", DEVICE),
    (hicache, "storage_config", CONFIG),
    (hicache, "config", CONFIG),
    (hicache, "self._config", CONFIG),
    (hicache, "pool", HOST),
    (hicache, "self.mem_pool_host", HOST),
    (hicache, "extra_info", "prefix_keys"),
    (hicache, "transfer", "name keys wait failed_chunks"),  # the last two are those of our own
    (host, "pool", HOST),
    (host, "self._pool", f"{HOST} {KV['host']} {KV['latent host']}"),
]


def parameters(function: Any) -> list[str]:
    return [name for name in inspect.signature(function).parameters if name not in ("self", "cls")]


@pytest.mark.parametrize("name", CALLED)
def test_what_sglang_calls(name: str) -> None:
    assert parameters(getattr(HiCacheStorage, name)) == CALLED[name], f"HiCacheStorage.{name} has changed"
    assert parameters(getattr(HiCacheBackend, name)) == CALLED[name], f"{name} is not what SGLang calls"


def test_nothing_is_abstract_or_new() -> None:
    assert not inspect.isabstract(HiCacheBackend)
    public = {name for name in vars(HiCacheStorage) if not name.startswith("_")}
    assert public == set(CALLED), f"HiCacheStorage has gained or lost {public ^ set(CALLED)}"
    assert hicache_storage.STORAGE_BATCH_SIZE <= 128


def of_fields(owner: Any) -> set[str]:
    return {field.name for field in dataclasses.fields(owner)}


@pytest.mark.parametrize(("module", "name", "listed"), READ, ids=lambda value: getattr(value, "__name__", value)[:40])
def test_nothing_is_read_that_is_not_listed(module: ModuleType, name: str, listed: str) -> None:
    """So that the lists are whole, which the tests below hold against SGLang."""
    used = set()
    for node in ast.walk(ast.parse(inspect.getsource(module))):
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) == name:
            used.add(node.attr)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) == "getattr" and ast.unparse(node.args[0]) == name:
            used |= {node.args[1].value} if isinstance(node.args[1], ast.Constant) else set()
    assert used, f"{name} is not read any more"
    assert not used - set(listed.split())


def test_fields(tiny_directory: Path) -> None:
    def missing(there: set[str], names: str) -> set[str]:
        return set(names.split()) - there

    assert not missing(of_fields(HiCacheStorageConfig), f"{CONFIG} is_mla_model")
    assert not missing(of_fields(HiCacheStorageExtraInfo), "prefix_keys")
    assert not missing(of_fields(PoolTransfer), "name keys device_indices")
    assert not missing(of_fields(CacheInitParams), PARAMS)
    server = ServerArgs(model_path=str(tiny_directory), device="cpu")
    assert not missing(set(dir(server)), SERVER)
    assert not missing(set(dir(ModelConfig.from_server_args(server))), MODEL)
    assert PoolTransferResult.empty().kv_hit_pages == 0
    assert (PoolName.KV, str(PoolName.KV), ComponentType.FULL.name) == ("kv", "kv", "FULL")
    assert hasattr(PagedTokenToKVPoolAllocator, "get_kvcache")
    assert "self.mem_pool_host = mem_pool_host" in inspect.getsource(HiCacheStorage.register_mem_pool_host)


@pytest.mark.parametrize("latent", [False, True], ids=["heads", "latent"])
def test_pools(latent: bool, tiny_directory: Path, latent_directory: Path, tmp_path: Path, ranks: list[Rank]) -> None:
    ranks.append(rank := Rank(latent_directory if latent else tiny_directory, f"unix://{tmp_path}/none", latent=latent))
    kind = "latent " if latent else ""
    for pool, names in ((rank.host, f"{HOST} {KV[kind + 'host']}"), (rank.device, f"{DEVICE} {KV[kind + 'device']}")):
        missing = [name for name in names.split() if not hasattr(pool, name)]
        # Latent memory has one layout, and no word for it.
        assert missing == (["kv_cache_layout"] if latent and pool is rank.device else []), type(pool).__name__
    assert parameters(rank.host.get_data_page) == ["index", "flat"]
    assert parameters(rank.host.set_from_flat_data_page) == ["index", "data_page"]
    wanted = ["device_pool", "host_indices", "device_indices", "io_backend"]
    assert parameters(HostKVCache.backup_from_device_all_layer) == wanted  # the pool's own is a stand-in here
    write = parameters(rank.device.set_kv_buffer)
    assert write[:4] == ["layer", "loc_info", "cache_k", "cache_v"] and "layer_id_override" in write
    wait = "self.layer_transfer_counter.wait_until(layer_id - self.start_layer)"
    assert wait in inspect.getsource(rank.device.get_key_buffer)


def test_how_the_linker_is_made_and_used() -> None:
    """What SGLang reads of a linker, and of the counter that it has from it."""
    made = inspect.getsource(create_unified_cache_linker)
    assert set(parameters(Linker)) >= {"server_args", "params", "components", "extra_config", "forward_stream"}
    assert not [name for name in ("components=", "extra_config=", "forward_stream=") if name not in made]
    source = inspect.getsource(unified_cache_linker.UnifiedCacheLinkerWrapper)
    attributes = {
        node.attr
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) in ("cache_linker", "self.cache_linker")
    }
    assert attributes - set(dir(Linker)) == {"pools", "layer_done_counter"}  # which are made at its start
    theirs = {"num_layers", "consumer_index", *vars(unified_cache_linker.LayerWiseLoadCounter)}
    ours = set(dir(LayerLoads(4, 1.0)))
    assert {"num_layers", "consumer_index", "set_consumer", "wait_until"} <= theirs & ours


def test_adapters_have_ids_of_their_own() -> None:
    """Of a LoRA adapter SGLang's page keys have its id: another one each time that it is loaded, but for those of
    ``--lora-paths``, which are refused.
    """
    assert LoRARef(lora_name="a", lora_path="p").lora_id != LoRARef(lora_name="a", lora_path="p").lora_id
    assert LoRARef.deterministic_id("a", "p") == LoRARef.deterministic_id("a", "p")
    assert ") + lora_id" in inspect.getsource(Req.__init__)


def test_how_pages_are_asked_for() -> None:
    """In batches by the zero-copy interface, if the extra config says so; and through the factory's second argument."""
    attach = inspect.getsource(HiCacheController.attach_storage_backend)
    assert 'extra_config.get("interface_v1"' in attach and "_page_get_zero_copy" in attach
    assert "on_host_pools_registered()" in inspect.getsource(HybridCacheController.attach_storage_backend)
    assert "backend_class(storage_config, kwargs)" in inspect.getsource(StorageBackendFactory._create_dynamic_backend)
    parse = inspect.getsource(HybridCacheController.parse_storage_backend_extra_config)
    for name in ("prefetch_threshold", "hicache_storage_pass_prefix_keys"):
        assert f'"{name}"' in parse
    assert "self.storage_backend.close()" in inspect.getsource(HiCacheController)


def test_all_ways_to_replace_weights_are_watched() -> None:
    public = {name for name in vars(SchedulerWeightUpdaterManager) if "update" in name and not name.startswith("_")}
    known = {
        "init_weights_update_group",
        "destroy_weights_update_group",
        "end_weight_update",
        "flush_cache_after_weight_update",
        "record_weight_version_after_update",
    }
    assert public - known == set(weights.UPDATES)
    assert parameters(SchedulerWeightUpdaterManager.check_weights) == ["recv_req"]
    assert 'action == "reset_tensors"' in inspect.getsource(WeightChecker)
    assert parameters(HookRegistry.register)[:3] == ["target", "hook", "hook_type"]
    assert HookType.BEFORE
    module, _, name = weights._OWNER.rpartition(".")
    assert getattr(importlib.import_module(module), name) is SchedulerWeightUpdaterManager
    assert "lmcache_sdk" in metadata.entry_points(group=plugins.GENERAL_PLUGINS_GROUP).names
