"""What the adapter relies on in SGLang, against the SGLang that is installed. A failure names what has moved."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
from typing import Any

import pytest
from sglang.srt.managers.cache_controller import HiCacheController
from sglang.srt.managers.scheduler_components.weight_updater import SchedulerWeightUpdaterManager
from sglang.srt.mem_cache import hicache_storage
from sglang.srt.mem_cache.hicache_storage import HiCacheStorage, HiCacheStorageConfig, HiCacheStorageExtraInfo
from sglang.srt.mem_cache.hybrid_cache.hybrid_cache_controller import HybridCacheController
from sglang.srt.mem_cache.pool_host.mha import MHATokenToKVPoolHost
from sglang.srt.mem_cache.pool_host.mla import MLATokenToKVPoolHost
from sglang.srt.mem_cache.storage.backend_factory import StorageBackendFactory
from sglang.srt.plugins.hook_registry import HookRegistry, HookType
from sglang.srt.server_args import ServerArgs

from lmcache_adapters.sglang import weights
from lmcache_adapters.sglang.hicache import HiCacheBackend

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
SERVER = (
    "model_path revision download_dir load_format device page_size tp_size pp_size nnodes attn_cp_size attn_dp_size "
    "dcp_size enable_dp_attention speculative_algorithm attention_backend prefill_attention_backend "
    "decode_attention_backend json_model_override_args context_length"
)
POOL = "layout page_size layer_num dtype kv_buffer _transfer_device"


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


def test_fields() -> None:
    config = {field.name for field in dataclasses.fields(HiCacheStorageConfig)}
    assert {"tp_rank", "tp_size", "extra_config", "is_mla_model"} <= config
    assert "prefix_keys" in {field.name for field in dataclasses.fields(HiCacheStorageExtraInfo)}
    server = set(dir(ServerArgs(model_path="dummy")))
    missing = [name for name in SERVER.split() if name not in server]
    assert not missing, f"ServerArgs has lost {missing}"


@pytest.mark.parametrize("kind", [MHATokenToKVPoolHost, MLATokenToKVPoolHost], ids=lambda kind: kind.__name__)
def test_host_pools(kind: Any) -> None:
    """What is read of them is in their source: they cannot be made without memory."""
    source = "".join(inspect.getsource(base) for base in kind.__mro__ if base is not object)
    device = "device_k_buffers device_v_buffers" if kind is MHATokenToKVPoolHost else "device_kv_buffers"
    missing = [name for name in f"{POOL} {device}".split() if f"self.{name} " not in source and name not in source]
    assert not missing, f"{kind.__name__} has lost {missing}"
    for name, wanted in (("get_data_page", ["index", "flat"]), ("set_from_flat_data_page", ["index", "data_page"])):
        assert parameters(getattr(kind, name)) == wanted


def test_how_pages_are_asked_for() -> None:
    """In batches by the zero-copy interface, if the extra config says so; and through the factory's second argument."""
    attach = inspect.getsource(HiCacheController.attach_storage_backend)
    assert 'extra_config.get("interface_v1"' in attach and "_page_get_zero_copy" in attach
    assert "on_host_pools_registered()" in inspect.getsource(HybridCacheController.attach_storage_backend)
    assert "backend_class(storage_config, kwargs)" in inspect.getsource(StorageBackendFactory._create_dynamic_backend)
    parse = inspect.getsource(HybridCacheController.parse_storage_backend_extra_config)
    for name in ("prefetch_threshold", "hicache_storage_pass_prefix_keys"):
        assert f'"{name}"' in parse


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
    assert parameters(HookRegistry.register)[:3] == ["target", "hook", "hook_type"]
    assert HookType.BEFORE
    module, _, name = weights._OWNER.rpartition(".")
    assert getattr(importlib.import_module(module), name) is SchedulerWeightUpdaterManager
