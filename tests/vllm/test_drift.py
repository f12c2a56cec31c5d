"""What the adapter relies on in vLLM, against the vLLM that is installed. A failure names what has moved."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

import pytest
import vllm.config as config
from vllm import SamplingParams
from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
from vllm.distributed.kv_transfer.kv_connector.v1 import base, metrics
from vllm.lora.request import LoRARequest
from vllm.multimodal.inputs import MultiModalFeatureSpec, PlaceholderRange
from vllm.v1.attention.backend import MLAAttentionImpl
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackendImpl, _get_attn_isa
from vllm.v1.core.kv_cache_manager import KVCacheBlocks
from vllm.v1.core.sched.output import CachedRequestData, NewRequestData, SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec, MLAAttentionSpec
from vllm.v1.outputs import KVConnectorOutput
from vllm.v1.request import Request
from vllm.v1.worker.kv_connector_model_runner_mixin import KVConnectorModelRunnerMixin

from lmcache_adapters.vllm import LMCacheSDKConnector

# Of the base class: what vLLM calls. All that take part in a load or a store, with their parameters.
CALLED = {
    "__init__": ["vllm_config", "role", "kv_cache_config"],
    "register_kv_caches": ["kv_caches"],
    "handle_preemptions": ["kv_connector_metadata"],
    "bind_connector_metadata": ["connector_metadata"],
    "clear_connector_metadata": [],
    "start_load_kv": ["forward_context", "kwargs"],
    "wait_for_layer_load": ["layer_name"],
    "save_kv_layer": ["layer_name", "kv_layer", "attn_metadata", "kwargs"],
    "wait_for_save": [],
    "get_finished": ["finished_req_ids"],
    "get_block_ids_with_load_errors": [],
    "build_connector_worker_meta": [],
    "get_kv_connector_stats": [],
    "get_num_new_matched_tokens": ["request", "num_computed_tokens"],
    "update_state_after_alloc": ["request", "blocks", "num_external_tokens"],
    "build_connector_meta": ["scheduler_output"],
    "update_connector_output": ["connector_output"],
    "request_finished": ["request", "block_ids"],
    "has_pending_block_frees": [],
    "reset_cache": [],
    "set_xfer_handshake_metadata_pp_aware": ["metadata"],
    "build_kv_connector_stats": ["data"],
    "build_prom_metrics": ["vllm_config", "metric_types", "labelnames", "per_engine_labelvalues"],
    "shutdown": [],
}
FIELDS = {
    config.VllmConfig: "model_config cache_config parallel_config scheduler_config speculative_config load_config "
    "kv_transfer_config compilation_config attention_config",
    config.CacheConfig: "block_size cache_dtype enable_prefix_caching",
    config.ParallelConfig: "pipeline_parallel_size tensor_parallel_size decode_context_parallel_size "
    "prefill_context_parallel_size nnodes worker_extension_cls",
    config.ModelConfig: "model revision dtype quantization hf_overrides max_model_len",
    config.LoadConfig: "load_format download_dir",
    config.CompilationConfig: "static_forward_context",
    config.KVTransferConfig: "engine_id kv_connector_extra_config kv_load_failure_policy kv_role",
    KVCacheConfig: "kv_cache_groups",
    KVCacheGroupSpec: "kv_cache_spec layer_names",
    FullAttentionSpec: "sliding_window attention_chunk_size block_size num_kv_heads head_size",
    MLAAttentionSpec: "block_size head_size",
    SchedulerOutput: "scheduled_new_reqs scheduled_cached_reqs num_scheduled_tokens preempted_req_ids "
    "has_sync_kv_loads",
    NewRequestData: "req_id block_ids num_computed_tokens",
    CachedRequestData: "req_ids new_block_ids num_computed_tokens resumed_req_ids",
    KVConnectorOutput: "finished_sending finished_recving invalid_block_ids kv_connector_worker_meta",
    MultiModalFeatureSpec: "identifier modality mm_position",
    PlaceholderRange: "offset length",
}


def parameters(function: Any) -> list[str]:
    return [name for name in inspect.signature(function).parameters if name not in ("self", "cls")]


@pytest.mark.parametrize("name", CALLED)
def test_what_vllm_calls(name: str) -> None:
    theirs = getattr(base.KVConnectorBase_V1, name)
    assert parameters(theirs) == CALLED[name], f"KVConnectorBase_V1.{name} has changed"
    ours = parameters(getattr(LMCacheSDKConnector, name))
    assert ours == CALLED[name], f"{name} is not what vLLM calls"


def test_nothing_is_abstract_or_new() -> None:
    assert not inspect.isabstract(LMCacheSDKConnector)
    assert base.supports_hma(LMCacheSDKConnector)
    assert isinstance(base.KVConnectorBase_V1.requires_kv_delivery, property)
    assert parameters(base.SupportsHMA.request_finished_all_groups) == ["request", "block_ids"]
    assert {role.name for role in base.KVConnectorRole} == {"SCHEDULER", "WORKER"}


@pytest.mark.parametrize("kind", FIELDS, ids=lambda kind: kind.__name__)
def test_fields(kind: Any) -> None:
    has = {field.name for field in dataclasses.fields(kind)}
    missing = [name for name in FIELDS[kind].split() if name not in has]
    assert not missing, f"{kind.__name__} has lost {missing}"


def test_the_rest_that_is_read() -> None:
    request = Request("r", [1, 2, 3], SamplingParams(max_tokens=1), None)
    read = (
        "request_id",
        "all_token_ids",
        "num_tokens",
        "num_computed_tokens",
        "num_in_flight_tokens",
        "cache_salt",
        "lora_request",
        "mm_features",
        "prompt_embeds",
        "kv_transfer_params",
        "skip_reading_prefix_cache",
        "resumable",
    )
    missing = [name for name in read if not hasattr(request, name)]
    assert not missing, f"Request has lost {missing}"
    assert list(request.all_token_ids[1:3]) == [2, 3]
    assert {"is_kv_producer", "is_kv_consumer"} <= set(dir(config.KVTransferConfig))
    assert hasattr(config.ModelConfig, "hf_text_config") or "hf_text_config" in config.ModelConfig.__annotations__
    assert "lora_path" in LoRARequest.__struct_fields__
    assert hasattr(KVCacheBlocks, "get_block_ids")
    assert hasattr(KVConnectorFactory, "_registry")


def test_hit_sources() -> None:
    sources = pytest.importorskip("vllm.v1.metrics.cache_hit_source", reason="older than hit sources")
    assert {"HOST", "DISK", "EXTERNAL_UNSPECIFIED"} <= set(sources.CacheHitSource.__members__)
    assert parameters(base.KVConnectorBase_V1.get_external_cache_hit_sources) == ["request", "num_external_tokens"]


def test_operations_that_write_kv() -> None:
    assert parameters(CPUAttentionBackendImpl.do_kv_cache_update) == [
        "layer",
        "key",
        "value",
        "kv_cache",
        "slot_mapping",
    ]
    assert parameters(MLAAttentionImpl.do_kv_cache_update) == [
        "kv_c_normed",
        "k_pe",
        "kv_cache",
        "slot_mapping",
        "kv_cache_dtype",
        "k_scale",
    ]
    assert parameters(_get_attn_isa)[:3] == ["dtype", "block_size", "head_size"]


def test_metrics() -> None:
    assert parameters(metrics.KVConnectorPromMetrics.observe) == [
        "transfer_stats_data",
        "engine_idx",
    ]
    assert {"reset", "aggregate", "reduce", "is_empty"} <= set(dir(metrics.KVConnectorStats))


def test_the_order_of_a_step() -> None:
    """Loads that nobody waits for begin after the forward pass, stores after them, and reports come last."""
    text = inspect.getsource(KVConnectorModelRunnerMixin._get_kv_connector_output)
    calls = [
        "bind_connector_metadata(",
        "yield output",
        "start_load_kv(get_forward_context())",
        "wait_for_save()",
        "get_transfer_results(",
        "get_block_ids_with_load_errors()",
        "build_connector_worker_meta()",
        "clear_connector_metadata()",
    ]
    places = [text.rfind(call) for call in calls]
    assert -1 not in places and places == sorted(places), dict(zip(calls, places, strict=True))
    after = inspect.getsource(Scheduler._update_from_kv_xfer_finished)
    assert after.index("update_connector_output") < after.index("kv_connector_output.finished_recving")


def test_it_is_found_by_its_name_alone() -> None:
    from lmcache_adapters.vllm import register

    register()
    register()
    assert KVConnectorFactory.get_connector_class_by_name("LMCacheSDKConnector") is LMCacheSDKConnector
