"""What an engine's KV is to the cache: namespace and producer; and what is refused, by name."""

from __future__ import annotations

import hashlib
from typing import Any

from lmcache_adapters.deployment import refuse_load_format, weights_directory, with_grid_of
from lmcache_adapters.settings import Settings
from lmcache_sdk.errors import UnsupportedError
from lmcache_sdk.observe.logs import logger
from lmcache_sdk.spec import Namespace, Producer, namespace_of, weights_fingerprint

_log = logger("vllm")

_KV_DTYPES = ("auto", "bfloat16", "float16", "float32")
# See refuse_load_format.
_LOAD_FORMATS = ("auto", "hf", "safetensors", "fastsafetensors", "instanttensor", "mistral")
_SPECS = ("FullAttentionSpec", "MLAAttentionSpec")
# Their rotation depends on the longest context that the engine was started for.
_LENGTH_DEPENDENT_ROPE = ("dynamic", "longrope")


def refuse_unserved_engine(vllm_config: Any, kv_cache_config: Any) -> None:
    """Raise UnsupportedError for a way of running that is not served."""
    parallel, cache = vllm_config.parallel_config, vllm_config.cache_config
    for name, meaning in (
        ("pipeline_parallel_size", "pipeline parallelism"),
        ("decode_context_parallel_size", "KV that is sharded by tokens"),
        ("prefill_context_parallel_size", "KV that is sharded by tokens"),
        ("nnodes", "an engine over several nodes"),
    ):
        if getattr(parallel, name, 1) > 1:
            raise UnsupportedError(f"{meaning} is not served ({name}={getattr(parallel, name)}); use 1")
    if getattr(vllm_config, "speculative_config", None) is not None:
        raise UnsupportedError("speculative decoding is not served; leave out speculative_config")
    if getattr(vllm_config, "weight_transfer_config", None) is not None:
        raise UnsupportedError(
            "weights that are replaced while vLLM runs are not served; leave out weight_transfer_config: "
            "what is computed with the new ones would be kept under the old ones"
        )
    if not cache.enable_prefix_caching:
        # It does so for models that it cannot compute behind a prefix; loaded ones would then give wrong replies.
        raise UnsupportedError(
            "vLLM's prefix caching is off (enable_prefix_caching=False); if that was your choice take it back, "
            "else vLLM cannot continue prefixes of this model here (MLA on CPU, for one)"
        )
    if cache.cache_dtype not in _KV_DTYPES:
        raise UnsupportedError(f"KV of dtype {cache.cache_dtype!r} is not served; use kv_cache_dtype=auto")
    refuse_load_format(vllm_config.load_config.load_format, _LOAD_FORMATS)
    groups = kv_cache_config.kv_cache_groups
    specs = [type(group.kv_cache_spec).__name__ for group in groups]
    if len(groups) != 1 or specs[0] not in _SPECS:
        raise UnsupportedError(f"KV cache groups {', '.join(specs)}: served is one group of {' or '.join(_SPECS)}")
    for name in ("sliding_window", "attention_chunk_size"):
        if getattr(groups[0].kv_cache_spec, name, None) is not None:
            raise UnsupportedError(f"layers with {name}={getattr(groups[0].kv_cache_spec, name)} are not served")


def namespace_and_producer(vllm_config: Any, settings: Settings) -> tuple[Namespace, Producer]:
    """The same in the scheduler's process and in every worker's.

    Raises:
        ConfigError, UnsupportedError: see :func:`lmcache_sdk.spec.namespace_of`.
    """
    model = vllm_config.model_config
    dtype = str(model.dtype).removeprefix("torch.")
    cache_dtype = vllm_config.cache_config.cache_dtype
    directory = weights_directory(str(model.model), model.revision, vllm_config.load_config.download_dir)
    namespace = namespace_of(
        model.hf_config.to_dict(),
        fingerprint=weights_fingerprint(directory),
        dtype=dtype if cache_dtype == "auto" else cache_dtype,
        chunk_tokens=settings.config.chunk_tokens,
        grid=settings.grid,
        label=str(model.model),
        source=str(directory),
    )
    ranks = int(vllm_config.parallel_config.tensor_parallel_size)
    return with_grid_of(namespace, ranks, _log), _producer(vllm_config, dtype)


def _producer(vllm_config: Any, dtype: str) -> Producer:
    """All that decides the engine's arithmetic, as far as both processes know it."""
    import torch
    import vllm
    from vllm.platforms import current_platform

    model = vllm_config.model_config
    facts = [vllm.__version__, f"torch{torch.__version__}", dtype]
    if current_platform.device_type == "cpu":
        facts += [torch.backends.cpu.get_cpu_capability(), *(["AMX"] if torch.cpu._is_amx_tile_supported() else [])]
    backend = getattr(getattr(vllm_config, "attention_config", None), "backend", None)
    if backend is not None:
        facts.append(str(getattr(backend, "name", backend)))
    if model.quantization:
        facts.append(str(model.quantization))
    if getattr(model, "hf_overrides", None):
        facts.append(f"overrides-{_digest(repr(model.hf_overrides))}")
    rope = model.hf_text_config.to_dict()
    rope = rope.get("rope_parameters") or rope.get("rope_scaling") or {}
    if rope.get("rope_type", rope.get("type")) in _LENGTH_DEPENDENT_ROPE:
        facts.append(f"len{model.max_model_len}")
    kind = "rocm" if current_platform.is_rocm() else str(current_platform.device_type)
    return Producer("vllm", "-".join(facts), kind)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]
