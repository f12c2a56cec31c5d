"""SGLang's copies between device and host pools, which are CUDA kernels, in torch; nothing where there is a GPU.

An SGLang plugin: see ``sglang_cpu-0.0.1.dist-info/entry_points.txt``.
"""

from __future__ import annotations

import os
from typing import Any

import torch


def install() -> None:
    """Replace the copies of SGLang's host pools in this process."""
    if os.environ.get("SGLANG_USE_CPU_ENGINE") != "1":
        return
    from sglang.srt.mem_cache.pool_host import base, common, mha, mla

    base.HICACHE_HOST_MEMORY_RESERVE_BYTES = 256 << 20  # it leaves 10 GiB free, which a small machine may not have

    for module in (common, mha, mla):  # there is no CUDA to register host memory with
        for name in ("_cuda_host_register", "_cuda_host_unregister"):
            if hasattr(module, name):
                setattr(module, name, lambda *_, **__: None)
    full, latent = mha.MHATokenToKVPoolHost, mla.MLATokenToKVPoolHost
    full.backup_from_device_all_layer, full.load_to_device_per_layer = _backup_full, _load_full
    latent.backup_from_device_all_layer, latent.load_to_device_per_layer = _backup_latent, _load_latent
    for kind in (full, latent):
        kind.get_dummy_flat_data_page = _dummy_page


def _dummy_page(pool: Any) -> torch.Tensor:
    """SGLang's own asks for pinned memory."""
    return torch.zeros_like(pool.get_data_page(0, flat=True))


def _at(pool: Any, layer: int, tokens: torch.Tensor) -> tuple[Any, ...]:
    """The index of tokens of a layer: what it chooses is [tokens, heads, dim]."""
    page, token = tokens // pool.page_size, tokens % pool.page_size
    indices = {
        "layer_first": (layer, tokens),
        "page_first": (tokens, layer),
        "page_first_direct": (page, layer, token),
        "page_head": (page, slice(None), token, layer),
    }
    return indices[pool.layout]


def _backup_full(pool: Any, device_pool: Any, host: torch.Tensor, device: torch.Tensor, io_backend: str) -> None:
    for layer in range(pool.layer_num):
        at, rows = _at(pool, layer, host.long()), device.long()
        pool.k_buffer[at] = pool.device_k_buffers[layer][rows]
        pool.v_buffer[at] = pool.device_v_buffers[layer][rows]


def _load_full(
    pool: Any,
    device_pool: Any,
    host: torch.Tensor,
    device: torch.Tensor,
    layer: int,
    io_backend: str,
    *,
    is_draft: bool = False,
) -> None:
    if is_draft or layer < pool.target_layer_num:
        at, rows = _at(pool, layer, host.long()), device.long()
        pool.device_k_buffers[layer][rows] = pool.k_buffer[at]
        pool.device_v_buffers[layer][rows] = pool.v_buffer[at]


def _backup_latent(pool: Any, device_pool: Any, host: torch.Tensor, device: torch.Tensor, io_backend: str) -> None:
    for layer in range(pool.layer_num):
        pool.kv_buffer[_at(pool, layer, host.long())] = pool.device_kv_buffers[layer][device.long()]


def _load_latent(
    pool: Any,
    device_pool: Any,
    host: torch.Tensor,
    device: torch.Tensor,
    layer: int,
    io_backend: str,
    *,
    is_draft: bool = False,
) -> None:
    if is_draft or layer < pool.target_layer_num:
        pool.device_kv_buffers[layer][device.long()] = pool.kv_buffer[_at(pool, layer, host.long())]
