"""Planes of vLLM's memory, proven: by vLLM's own operations where the CPU has them."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from vllm.platforms import current_platform
from vllm.v1.attention.backend import AttentionType
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackendImpl, _get_attn_isa
from vllm.v1.attention.backends.mla.cpu_mla import CPUMLAImpl

from lmcache_adapters.vllm.layout import EngineMemory
from lmcache_sdk import Group, KVSpec, LayoutError
from lmcache_sdk.kernels import CPUKernels
from lmcache_sdk.proof import prove
from lmcache_sdk.spec import WHOLE, GroupKind

current_platform.import_kernels()

BLOCKS, HEADS, LAYERS = 6, 3, 2
RANK, ROPE = 48, 16


def _prove(memory: EngineMemory, group: Group) -> None:
    memory.layout.validate(KVSpec((group,)), WHOLE)
    prove(memory.layout, KVSpec((group,)), CPUKernels(), memory.write)


def _named(tensors: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    return {f"model.layers.{layer}.self_attn.attn": tensor for layer, tensor in enumerate(tensors)}


def _full(dim: int, dtype: torch.dtype) -> Group:
    name = str(dtype).removeprefix("torch.")
    return Group("full", GroupKind.FULL, tuple(range(LAYERS)), HEADS, dim, name)


def _cpu_layer(memory: torch.Tensor, isa: str) -> Any:
    impl = SimpleNamespace(attn_type=AttentionType.DECODER, kv_cache_dtype="auto")
    impl.do_kv_cache_update = lambda *args: CPUAttentionBackendImpl.do_kv_cache_update(impl, *args)
    return SimpleNamespace(kv_cache=memory, isa=isa, _k_scale_float=1.0, _v_scale_float=1.0, impl=impl)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("tokens", "dim"), [(32, 64), (64, 32), (128, 128), (16, 64), (32, 80)])
def test_blocks_of_the_cpu_backend(tokens: int, dim: int, dtype: torch.dtype) -> None:
    isa = _get_attn_isa(dtype, tokens, dim)
    if isa not in ("vec", "vec16"):
        pytest.skip(f"this CPU's kernels are {isa!r}, which are refused")
    tensors = [torch.zeros(BLOCKS, HEADS, tokens, 2 * dim, dtype=dtype) for _ in range(LAYERS)]
    layers = {name: _cpu_layer(tensor, isa) for name, tensor in _named(tensors).items()}
    _prove(EngineMemory(_named(tensors), layers, _full(dim, dtype)), _full(dim, dtype))


def test_a_wrong_idea_of_the_cpu_backends_blocks_fails_its_proof() -> None:
    tensors = [torch.zeros(BLOCKS, HEADS, 32, 128, dtype=torch.bfloat16) for _ in range(LAYERS)]
    layers = {name: _cpu_layer(tensor, "vec") for name, tensor in _named(tensors).items()}
    group = _full(64, torch.bfloat16)
    for layer in layers.values():  # as memory of any other backend would be described
        layer.impl.do_kv_cache_update = lambda _, k, v, kv, slots, layer=layer: (
            CPUAttentionBackendImpl.do_kv_cache_update(layer.impl, _with_isa(layer), k, v, kv, slots)
        )
        del layer.isa
    with pytest.raises(LayoutError, match="does not read what the engine wrote"):
        _prove(EngineMemory(_named(tensors), layers, group), group)


def _with_isa(layer: Any) -> Any:
    return SimpleNamespace(**{**vars(layer), "isa": "vec"})


def _paged_layer(memory: torch.Tensor) -> Any:
    """A backend whose kernels need a GPU; the operation stands in for theirs, by indices of the logical shape."""

    def update(layer: Any, k: torch.Tensor, v: torch.Tensor, kv: torch.Tensor, slots: torch.Tensor) -> None:
        width = kv.shape[2]
        kv[slots // width, :, slots % width] = torch.cat([k, v], -1)

    return SimpleNamespace(kv_cache=memory, impl=SimpleNamespace(do_kv_cache_update=update))


FORMS: dict[str, Callable[[], list[torch.Tensor]]] = {
    "HND": lambda: [torch.zeros(BLOCKS, HEADS, 16, 128, dtype=torch.bfloat16) for _ in range(LAYERS)],
    "NHD": lambda: [torch.zeros(BLOCKS, 16, HEADS, 128, dtype=torch.bfloat16).transpose(1, 2) for _ in range(LAYERS)],
    "blocks outermost": lambda: list(
        torch.zeros(BLOCKS, LAYERS, HEADS, 16, 128, dtype=torch.bfloat16).transpose(0, 1).unbind()
    ),
    "one storage": lambda: list(torch.zeros(LAYERS, BLOCKS, HEADS, 16, 128, dtype=torch.bfloat16).unbind()),
}


@pytest.mark.parametrize("form", FORMS)
def test_memory_that_strides_describe(form: str) -> None:
    tensors = FORMS[form]()
    layers = {name: _paged_layer(tensor) for name, tensor in _named(tensors).items()}
    group = _full(64, torch.bfloat16)
    _prove(EngineMemory(_named(tensors), layers, group), group)


def test_kernels_with_smaller_blocks_than_the_schedulers() -> None:
    """Slots are the same, the place within a block is not: what counts is what the layer's kernels see."""
    tensors = [torch.zeros(BLOCKS, HEADS, 64, 128, dtype=torch.bfloat16) for _ in range(LAYERS)]
    views = [tensor.view(2 * BLOCKS, HEADS, 32, 128) for tensor in tensors]
    layers = {name: _paged_layer(view) for name, view in _named(views).items()}
    group = _full(64, torch.bfloat16)
    memory = EngineMemory(_named(tensors), layers, group)
    assert {plane.page_tokens for plane in memory.layout.planes} == {32}
    _prove(memory, group)


def test_latent_rows() -> None:
    """MLA, by vLLM's own operation, on memory of three dimensions."""
    width = RANK + ROPE
    tensors = [torch.zeros(BLOCKS, 16, width, dtype=torch.bfloat16) for _ in range(LAYERS)]
    impl = SimpleNamespace(kv_lora_rank=RANK, kv_cache_dtype="auto")
    impl.do_kv_cache_update = lambda *args: CPUMLAImpl.do_kv_cache_update(impl, *args)
    layers = {
        name: SimpleNamespace(kv_cache=tensor, impl=impl, _k_scale=torch.tensor(1.0))
        for name, tensor in _named(tensors).items()
    }
    group = Group("latent", GroupKind.LATENT, tuple(range(LAYERS)), 1, width, "bfloat16")
    _prove(EngineMemory(_named(tensors), layers, group), group)


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (torch.zeros(2, BLOCKS, 16, HEADS, 64), r"shape \(2, 6, 16, 3, 64\).*described are"),
        (torch.zeros(BLOCKS, HEADS, 16, 64), r"shape \(6, 3, 16, 64\).*128\]"),
    ],
)
def test_other_shapes_are_refused(tensor: torch.Tensor, message: str) -> None:
    tensors = _named([tensor] * LAYERS)
    layers = {name: _paged_layer(tensor) for name in tensors}
    with pytest.raises(LayoutError, match=message):
        EngineMemory(tensors, layers, _full(64, torch.float32))


def test_names_and_layers_that_do_not_fit_are_refused() -> None:
    tensor = torch.zeros(BLOCKS, HEADS, 16, 128)
    group = _full(64, torch.float32)
    with pytest.raises(LayoutError, match="no such attention layer"):
        EngineMemory(_named([tensor]), {}, group)
    with pytest.raises(LayoutError, match="has no number, or several"):
        EngineMemory({"model.1.layers.2": tensor}, {"model.1.layers.2": _paged_layer(tensor)}, group)


def test_the_proof_writes_no_more_than_a_few_slots() -> None:
    tensors = [torch.zeros(BLOCKS, HEADS, 64, 128, dtype=torch.bfloat16) for _ in range(LAYERS)]
    layers = {name: _cpu_layer(tensor, "vec") for name, tensor in _named(tensors).items()}
    group = _full(64, torch.bfloat16)
    _prove(EngineMemory(_named(tensors), layers, group), group)
    written = np.mean([float((tensor != 0).float().mean()) for tensor in tensors])
    assert 0 < written < 20 / (BLOCKS * 64)
