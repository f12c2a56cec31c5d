"""SGLang's own prefix cache over its own pools, without an engine; its linker is ours, made as SGLang makes it."""

from __future__ import annotations

import itertools
from array import array
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from sglang.srt.mem_cache.allocator.paged import PagedTokenToKVPoolAllocator
from sglang.srt.mem_cache.base_prefix_cache import EvictParams, InsertParams, MatchPrefixParams
from sglang.srt.mem_cache.cache_init_params import CacheInitParams
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool, MLATokenToKVPool, ReqToTokenPool
from sglang.srt.mem_cache.radix_cache import RadixKey
from sglang.srt.mem_cache.unified_cache.component_type import ComponentType
from sglang.srt.mem_cache.unified_cache.linker_factory import create_unified_cache_linker
from sglang.srt.mem_cache.unified_radix_cache import UnifiedRadixCache
from sglang.srt.runtime_context import publish
from sglang.srt.server_args import ServerArgs

from lmcache_adapters.sglang.linker import Linker
from tests.daemon.daemon_process import until
from tests.sglang.pools import LATENT, PAGE, ROPE
from tests.vllm.tiny import DIM, KV_HEADS, LAYERS, VOCABULARY

PAGES = 24
CONFIG = {"linker": "Linker", "linker_module_path": "lmcache_adapters.sglang"}


def prompt(number: int, pages: int) -> list[int]:
    """Token ids like those of no other number."""
    return [int(token) for token in np.random.default_rng([7, number]).integers(0, VOCABULARY, pages * PAGE)]


class Request(SimpleNamespace):
    """What the prefix cache reads and writes of SGLang's ``Req``."""

    def __init__(self, rid: str) -> None:
        super().__init__(rid=rid, extra_key=None, swa_branching_seqlen=None, session=None, last_node=None)


class Tree:
    """Args:
    extra: our part of the linker's config.
    before: called with the device pool before the linker is made.
    """

    def __init__(
        self,
        model: Path,
        url: str,
        *,
        latent: bool = False,
        extra: dict[str, Any] | None = None,
        components: tuple[ComponentType, ...] = (ComponentType.FULL,),
        before: Any = None,
        **server: Any,
    ) -> None:
        linker = {**CONFIG, "linker_extra_config": {"url": url, "on_error": "refuse", **(extra or {})}}
        arguments = ServerArgs(
            model_path=str(model),
            device="cpu",
            page_size=PAGE,
            enable_unified_cache_external_linker=True,
            unified_cache_external_linker_backend="dynamic",
            unified_cache_external_linker_config=linker,
            **server,
        )
        publish(arguments, role="scheduler")
        size = PAGES * PAGE
        common = {"size": size, "page_size": PAGE, "dtype": torch.bfloat16, "layer_num": LAYERS}
        common |= {"device": "cpu", "enable_memory_saver": False}
        if latent:
            self.pool: Any = MLATokenToKVPool(**common, kv_lora_rank=LATENT, qk_rope_head_dim=ROPE)
        else:
            self.pool = MHATokenToKVPool(**common, head_num=KV_HEADS, head_dim=DIM)
        if before is not None:
            before(self.pool)
        self.allocator = PagedTokenToKVPoolAllocator(size, PAGE, torch.bfloat16, "cpu", self.pool, need_sort=False)
        params = CacheInitParams(
            disable=False,
            req_to_token_pool=ReqToTokenPool(8, 4096, "cpu", enable_memory_saver=False),
            token_to_kv_pool_allocator=self.allocator,
            page_size=PAGE,
            tree_components=(ComponentType.FULL,),
            tree_core_backend="python",
        )
        self.cache: Any = UnifiedRadixCache(params)
        made = create_unified_cache_linker(
            arguments, params, backend="dynamic", config=linker, components=set(components)
        )
        assert isinstance(made, Linker)
        self.linker = made
        self.cache.init_cache_linker(made)
        self.pool.register_layer_transfer_counter(made.layer_done_counter)
        self._numbers = itertools.count(1)

    def buffers(self) -> list[torch.Tensor]:
        if hasattr(self.pool, "k_buffer"):
            return [*self.pool.k_buffer, *self.pool.v_buffer]
        return list(self.pool.kv_buffer)

    def content(self, slots: torch.Tensor) -> torch.Tensor:
        return torch.stack([buffer[slots].clone() for buffer in self.buffers()])

    def compute(self, ids: list[int], seed: int = 0) -> torch.Tensor:
        """What a request that is computed leaves behind: its KV in the tree, and on the way to the cache."""
        slots = self.allocator.alloc(len(ids))
        assert slots is not None
        torch.manual_seed(seed)
        for buffer in self.buffers():
            buffer[slots] = torch.randn(len(ids), *buffer.shape[1:]).to(buffer.dtype)
        content = self.content(slots)
        self.insert(ids, slots)
        return content

    def insert(self, ids: list[int], slots: torch.Tensor) -> None:
        self.cache.insert(InsertParams(key=self.key(ids), value=slots))

    def key(self, ids: list[int]) -> RadixKey:
        return RadixKey(array("q", ids))

    def match(self, ids: list[int], rid: str = "") -> tuple[Request, Any]:
        """SGLang looks for a request's prefix; all but its last token, as for a prompt."""
        request = Request(rid or f"r{next(self._numbers)}")
        result = self.cache.match_prefix(MatchPrefixParams(key=self.key(ids), req=request))
        request.last_node = result.last_device_node
        return request, result

    def load(self, request: Request) -> torch.Tensor | None:
        """SGLang gives a request what was found for it; the slots, or None: it computes."""
        loaded, _ = self.cache.linker.load_back(request)
        return self.cache.linker.private_load_indices[request.rid] if loaded else None

    def forward(self, requests: list[Request]) -> list[Request]:
        """A batch runs, layer by layer; those that are aborted."""
        self.linker.layer_done_counter.set_consumer(self.cache.ready_to_load_host_cache())
        for layer in range(LAYERS):
            self.pool.get_key_buffer(layer)
            self.pool.get_value_buffer(layer)
        return list(self.cache.finish_external_linker_loads(requests))

    def settle(self) -> None:
        """Until what is on its way to the cache has got there, or has not."""

        def ended() -> bool:
            self.cache.check_hicache_events()
            return not self.cache.linker.pending_offloads

        until(ended, 10.0, "the end of the offloads")

    def forget(self) -> None:
        """``flush_cache``."""
        self.cache.reset()
        self.allocator.clear()

    def evict(self) -> None:
        """Everything that nobody holds, to make room."""
        self.cache.evict(EvictParams(num_tokens=PAGES * PAGE))

    def close(self) -> None:
        self.linker.close()
