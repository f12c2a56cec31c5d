"""What an engine's KV is to the cache: namespace, producer; and what is refused, by name.

SGLang's page keys say which tokens, and in which namespace of a request (``extra_key``, ``cache_salt``). They say
nothing of model, weights, dtype, layout or rank: all of that is here.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

from lmcache_adapters.deployment import refuse_load_format, weights_directory, with_grid_of
from lmcache_sdk.errors import ConfigError, UnsupportedError
from lmcache_sdk.keys import DIGEST_BYTES
from lmcache_sdk.observe.logs import logger
from lmcache_sdk.spec import CellGrid, Namespace, Producer, namespace_of, weights_fingerprint

_log = logger("sglang")

# Their rotation depends on the longest context that the engine was started for.
_LENGTH_DEPENDENT_ROPE = ("dynamic", "longrope")
_KV_DTYPES = ("bfloat16", "float16", "float32")
# See refuse_load_format.
_LOAD_FORMATS = ("auto", "safetensors", "fastsafetensors", "instanttensor", "layered", "mistral", "bitsandbytes")


def digests_of(keys: list[str]) -> list[bytes]:
    """SGLang's page keys, hexadecimal text, as chunk digests.

    Raises:
        ConfigError: a key that is none.
    """
    try:
        digests = [bytes.fromhex(key) for key in keys]
    except (TypeError, ValueError):
        digests = [b""]
    if any(len(digest) != DIGEST_BYTES for digest in digests):
        raise ConfigError("SGLang's page keys are not SHA-256 in hexadecimal digits")
    return digests


@dataclass(frozen=True, slots=True)
class EngineFacts:
    """What SGLang has been started with, after it has settled all that was left open.

    Attributes:
        server: its arguments; any attribute may be asked for.
        model: its ``ModelConfig``.
        tp_size, tp_rank: among those who share the heads of one model.
    """

    server: Any
    model: Any
    tp_size: int
    tp_rank: int

    @classmethod
    def of_this_process(cls, tp_size: int, tp_rank: int) -> EngineFacts:
        """As SGLang's scheduler process knows them."""
        from sglang.srt.arg_groups.model_override_base import resolved_view
        from sglang.srt.configs.model_config import ModelConfig
        from sglang.srt.runtime_context import get_server_args

        given = get_server_args()
        return cls(resolved_view(given), ModelConfig.from_server_args(given), tp_size, tp_rank)


def refuse_unserved_engine(facts: EngineFacts) -> None:
    """Raise UnsupportedError for a way of running that is not served."""
    server, model = facts.server, facts.model
    for name, meaning in (
        ("pp_size", "pipeline parallelism"),
        ("attn_cp_size", "KV that is sharded by tokens"),
        ("dcp_size", "KV that is sharded by tokens"),
        ("attn_dp_size", "DP attention"),  # which is what SGLang makes of --enable-dp-attention
        ("nnodes", "an engine over several nodes"),
    ):
        if (getattr(server, name, 1) or 1) > 1:
            raise UnsupportedError(f"{meaning} is not served ({name}={getattr(server, name)}); use 1")
    if getattr(server, "enable_dp_attention", False):
        raise UnsupportedError("DP attention is not served; leave out --enable-dp-attention")
    if getattr(server, "speculative_algorithm", None):
        raise UnsupportedError(
            f"speculative decoding is not served (speculative_algorithm={server.speculative_algorithm}): the draft "
            "model has KV of its own, and EAGLE's keys are not those of tokens"
        )
    refuse_load_format(server.load_format, _LOAD_FORMATS)
    for name, meaning in (
        ("kt_weight_path", "experts with weights of their own"),
        ("modelopt_checkpoint_restore_path", "a model with weights from elsewhere"),
        ("forward_hooks", "a model that hooks change"),
        ("dllm_algorithm", "a diffusion model, whose KV is not that of the tokens before it alone"),
    ):
        if getattr(server, name, None):
            raise UnsupportedError(f"{meaning} is not served ({name}={getattr(server, name)})")
    if getattr(server, "lora_paths", None) and server.enable_lora is not False:
        raise UnsupportedError(
            "LoRA adapters by --lora-paths are not served: SGLang's keys name them by name and path, not by content, "
            "and would find another adapter's KV; load them by POST /load_lora_adapter"
        )
    if getattr(model, "is_multimodal", False):
        raise UnsupportedError(
            f"{model.hf_config.model_type} takes images or audio; served are models of text only: in SGLang's page "
            "keys an image is a number of 30 bits or so"
        )
    if getattr(model, "is_hybrid_swa", False):
        raise UnsupportedError(f"{model.hf_config.model_type} has sliding-window layers; only full attention is served")


def namespace_and_producer(
    facts: EngineFacts, page_size: int, dtype: str, grid: CellGrid
) -> tuple[Namespace, Producer]:
    """The same in every rank's process, and for both doors.

    Args:
        page_size: SGLang's, our ``chunk_tokens``.
        dtype: of the KV memory itself.

    Raises:
        ConfigError, UnsupportedError: see :func:`lmcache_sdk.spec.namespace_of`.
    """
    if dtype not in _KV_DTYPES:
        raise UnsupportedError(f"KV of dtype {dtype!r} is not served; use --kv-cache-dtype auto")
    server, model = facts.server, facts.model
    directory = weights_directory(model.model_path, server.revision, server.download_dir)
    namespace = namespace_of(
        model.hf_config.to_dict(),
        fingerprint=weights_fingerprint(directory),
        dtype=dtype,
        chunk_tokens=page_size,
        grid=grid,
        label=str(server.model_path),
        source=str(directory),
    )
    return with_grid_of(namespace, facts.tp_size, _log), _producer(facts)


def _producer(facts: EngineFacts) -> Producer:
    """All that decides the engine's arithmetic."""
    import sglang
    import torch

    server, model = facts.server, facts.model
    device = str(server.device)
    parts = [sglang.__version__, f"torch{torch.__version__}", str(model.dtype).removeprefix("torch.")]
    if device == "cpu":
        parts += [torch.backends.cpu.get_cpu_capability(), *(["AMX"] if torch.cpu._is_amx_tile_supported() else [])]
    backends = [server.prefill_attention_backend or server.attention_backend]
    backends += [server.decode_attention_backend or server.attention_backend]
    parts += [str(name) for name in dict.fromkeys(backends) if name]
    if model.quantization:
        parts.append(str(model.quantization))
    overrides = server.json_model_override_args
    if overrides and overrides != "{}":
        parts.append(f"overrides-{hashlib.sha256(str(overrides).encode()).hexdigest()[:8]}")
    rope = model.hf_text_config.to_dict()
    rope = rope.get("rope_parameters") or rope.get("rope_scaling") or {}
    if rope.get("rope_type", rope.get("type")) in _LENGTH_DEPENDENT_ROPE:
        parts.append(f"len{model.context_len}")
    kind = "rocm" if device == "cuda" and torch.version.hip else device
    return Producer("sglang", "-".join(parts), kind)
