"""One rank of SGLang without its engine: real device and host pools, and our backend registered as SGLang does it."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from sglang.srt.managers.cache_controller import HiCacheController
from sglang.srt.mem_cache.hicache_storage import HiCacheStorageConfig, HiCacheStorageExtraInfo
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool, MLATokenToKVPool
from sglang.srt.mem_cache.pool_host.mha import MHATokenToKVPoolHost
from sglang.srt.mem_cache.pool_host.mla import MLATokenToKVPoolHost
from sglang.srt.runtime_context import publish
from sglang.srt.server_args import ServerArgs

from lmcache_adapters.sglang.hicache import HiCacheBackend
from lmcache_sdk.keys import Chain
from tests.vllm.tiny import LAYERS, VOCABULARY

PAGE = 64
PAGES = 24
LATENT, ROPE = 32, 8
LAYOUTS = ("layer_first", "page_first", "page_first_direct", "page_head")
LATENT_LAYOUTS = LAYOUTS[:3]


def make_latent_model(directory: Path) -> Path:
    directory.mkdir()
    facts = {
        "architectures": ["DeepseekV2ForCausalLM"],
        "model_type": "deepseek_v2",
        "num_hidden_layers": LAYERS,
        "hidden_size": 64,
        "intermediate_size": 64,
        "moe_intermediate_size": 32,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "kv_lora_rank": LATENT,
        "q_lora_rank": 16,
        "qk_rope_head_dim": ROPE,
        "qk_nope_head_dim": 16,
        "v_head_dim": 16,
        "n_routed_experts": 4,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 4096,
        "torch_dtype": "bfloat16",
    }
    (directory / "config.json").write_text(json.dumps(facts))
    save_file({"model.norm.weight": torch.arange(64, dtype=torch.float32)}, directory / "model.safetensors")
    return directory


def digests(prompt: int, pages: int) -> list[str]:
    """Page keys of a prompt that is like no other of another number."""
    tokens = np.random.default_rng(prompt).integers(0, VOCABULARY, pages * PAGE, dtype=np.uint32)
    return [digest.hex() for digest in Chain(tokens, PAGE).digests()]


class Rank:
    """Args:
    layout: of the host pool.
    extra: the backend's extra config, beside SGLang's own part of it.
    server: changed arguments of SGLang.
    """

    def __init__(
        self,
        model: Path,
        url: str,
        *,
        layout: str = "page_first_direct",
        latent: bool = False,
        tp_size: int = 1,
        tp_rank: int = 0,
        page: int = PAGE,
        pages: int = PAGES,
        extra: dict[str, Any] | None = None,
        before: Any = None,
        pools: tuple[str, ...] = ("kv",),
        **server: Any,
    ) -> None:
        arguments = ServerArgs(model_path=str(model), device="cpu", page_size=page, tp_size=tp_size, **server)
        publish(arguments, role="scheduler")
        self.page = page
        shape = json.loads((model / "config.json").read_text())
        self.layers = int(shape["num_hidden_layers"])
        common = {"size": pages * page, "page_size": page, "dtype": torch.bfloat16, "layer_num": self.layers}
        common |= {"device": "cpu", "enable_memory_saver": False}
        if latent:
            rows = {name: shape[name] for name in ("kv_lora_rank", "qk_rope_head_dim")}
            self.device: Any = MLATokenToKVPool(**common, **rows)
            info = self.device._mla_buffer_info()
            kind, more = MLATokenToKVPoolHost, {"target_layer_num": self.layers}
        else:
            heads = max(1, shape["num_key_value_heads"] // tp_size)
            dim = shape.get("head_dim") or shape["hidden_size"] // shape["num_attention_heads"]
            self.device = MHATokenToKVPool(**common, head_num=heads, head_dim=dim)
            info = self.device._mha_buffer_info()
            kind, more = MHATokenToKVPoolHost, {}
        self.host: Any = kind(
            info,
            1.0,
            0,
            page,
            layout,
            pin_memory=False,
            device_capacity_tokens=pages * page,
            start_layer=0,
            end_layer=self.layers,
            **more,
        )
        fields = {"url": url, "interface_v1": 1, "on_error": "refuse", "chunk_tokens": page, **(extra or {})}
        self.config = config = HiCacheStorageConfig(
            tp_rank=tp_rank,
            tp_size=tp_size,
            pp_rank=0,
            pp_size=1,
            attn_cp_rank=0,
            attn_cp_size=1,
            is_mla_model=latent,
            enable_storage_metrics=False,
            is_page_first_layout=layout == "page_first",
            model_name=str(model),
            extra_config=fields,
        )
        if before is not None:
            before(self)
        self.backend = HiCacheBackend(config, {})
        self.backend.register_mem_pool_host(self.host)
        for name in pools:
            self.backend.register_mem_host_pool_v2(self.host, name)
        self.backend.on_host_pools_registered()

    def fill(self, pages: list[int], seed: int) -> torch.Tensor:
        """Random numbers in the device's pages, copied to the host's as SGLang does; the answer is all of them."""
        rows = self.places(pages)
        torch.manual_seed(seed)
        for buffer in self.buffers():
            buffer[rows] = torch.randn(len(rows), *buffer.shape[1:]).to(buffer.dtype)
        self.host.backup_from_device_all_layer(None, rows, rows, "kernel")
        return self.content(pages)

    def content(self, pages: list[int]) -> torch.Tensor:
        """Of pages of the host's memory, brought to the device by SGLang's own copy: [buffers, tokens, ...]."""
        rows = self.places(pages)
        for buffer in self.buffers():
            buffer[rows] = 0
        for layer in range(self.layers):
            self.host.load_to_device_per_layer(None, rows, rows, layer, "kernel")
        return torch.stack([buffer[rows].clone() for buffer in self.buffers()])

    def buffers(self) -> list[torch.Tensor]:
        if hasattr(self.device, "k_buffer"):
            return [*self.device.k_buffer, *self.device.v_buffer]
        return list(self.device.kv_buffer)

    def places(self, pages: list[int]) -> torch.Tensor:
        return torch.cat([torch.arange(page * self.page, (page + 1) * self.page) for page in pages])

    def set(self, keys: list[str], pages: list[int], before: list[str] | None = None) -> list[bool]:
        return self.backend.batch_set_v1(keys, self.places(pages), HiCacheStorageExtraInfo(prefix_keys=before))

    def get(self, keys: list[str], pages: list[int]) -> list[bool]:
        return self.backend.batch_get_v1(keys, self.places(pages), HiCacheStorageExtraInfo())

    def set_generic(self, keys: list[str], pages: list[int]) -> bool:
        """As SGLang does without ``interface_v1``: a tensor a page."""
        return bool(HiCacheController._generic_page_set(self._controller, keys, self.places(pages)))

    def get_generic(self, keys: list[str], pages: list[int]) -> int:
        """How many pages from the front have come."""
        operation = SimpleNamespace(request_id="", is_terminated=lambda: False)
        return int(HiCacheController._generic_page_get(self._controller, operation, keys, self.places(pages)))

    @property
    def _controller(self) -> Any:
        return SimpleNamespace(storage_host_pool=self.host, storage_backend=self.backend, page_size=self.page)

    def close(self) -> None:
        self.backend.close()
