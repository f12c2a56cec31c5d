"""vLLM's KV memory as planes, and vLLM's own operation that writes into it.

Two forms are described: K and V side by side in each token's row (all attention backends that order a block's memory
by strides, NHD and HND alike), the same in the CPU backend's blocks, whose K is transposed, and MLA's latent rows.
Whatever else is handed over is refused; and what is described is proven at registration.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from lmcache_sdk.errors import LayoutError
from lmcache_sdk.layout import KVLayout, Plane
from lmcache_sdk.spec import Group, GroupKind

Slots = npt.NDArray[np.int64]
Bytes = npt.NDArray[np.uint8]

# The packings of vLLM's CPU kernels that a stride table can say.
_TRANSPOSED = ("vec", "vec16")


class EngineMemory:
    """The KV memory of one rank.

    Args:
        kv_caches: as vLLM registers them, by layer name.
        layers: vLLM's attention layers by the same names.
        group: what the namespace says of them.

    Attributes:
        layout: the planes.

    Raises:
        LayoutError: memory of a form that is not described here.
    """

    def __init__(self, kv_caches: Mapping[str, torch.Tensor], layers: Mapping[str, Any], group: Group) -> None:
        self._layers: dict[int, tuple[Any, torch.Tensor]] = {}
        self._latent = group.kind == GroupKind.LATENT
        planes: list[Plane] = []
        for name, registered in kv_caches.items():
            if name not in layers:
                raise LayoutError(f"vLLM registers memory for {name}, and has no such attention layer")
            layer, number = layers[name], _number(name)
            memory = _kernel_view(layer, registered)
            planes += _latent(memory, number, group) if self._latent else _k_and_v(memory, number, group, layer)
            self._layers[number] = layer, memory
        devices = {str(memory.device) for _, memory in self._layers.values()}
        if len(devices) != 1:
            raise LayoutError(f"KV memory on {', '.join(sorted(devices)) or 'no device'}; served is one device a rank")
        self.layout = KVLayout(tuple(planes), device=devices.pop())
        self._device = torch.device(self.layout.device)

    def write(self, layer: int, slots: Slots, k: Bytes, v: Bytes | None) -> None:
        """Write rows as vLLM's forward pass does; see :class:`lmcache_sdk.proof.WriteOp`."""
        module, memory = self._layers[layer]
        places = torch.from_numpy(np.ascontiguousarray(slots)).to(memory.device)
        rows = [_numbers(side, memory) for side in (k, v) if side is not None]
        impl = module.impl
        with torch.inference_mode():
            if self._latent:
                width = impl.kv_lora_rank
                latent, rope = rows[0][:, 0, :width].contiguous(), rows[0][:, :, width:].contiguous()
                impl.do_kv_cache_update(latent, rope, memory, places, impl.kv_cache_dtype, module._k_scale)
            else:
                impl.do_kv_cache_update(module, rows[0], rows[1], memory, places)
        if self._device.type != "cpu":
            torch.get_device_module(self._device).synchronize(self._device)

    def now(self) -> Any:
        """An event behind all that vLLM has queued on its stream so far; None on the CPU, which has no streams."""
        if self._device.type == "cpu":
            return None
        return torch.get_device_module(self._device).current_stream(self._device).record_event()


def _number(name: str) -> int:
    """``model.layers.3.self_attn.attn`` -> 3."""
    numbers = [int(part) for part in name.split(".") if part.isdecimal()]
    if len(numbers) != 1:
        raise LayoutError(f"layer {name!r} has no number, or several; which one it is in the model cannot be told")
    return numbers[0]


def _kernel_view(layer: Any, registered: torch.Tensor) -> torch.Tensor:
    """As the layer's kernels see it. Their blocks may be smaller than the scheduler's; slots are the same."""
    bound = getattr(layer, "kv_cache", None)
    if isinstance(bound, list):
        bound = bound[0]
    return bound if isinstance(bound, torch.Tensor) and bound.data_ptr() == registered.data_ptr() else registered


def _k_and_v(memory: torch.Tensor, layer: int, group: Group, module: Any) -> list[Plane]:
    what = f"layer {layer}: memory of shape {tuple(memory.shape)}, strides {memory.stride()}, {memory.dtype}"
    if memory.dim() != 4 or memory.shape[3] != 2 * group.dim:
        raise LayoutError(f"{what}: described are [blocks, heads, tokens, {2 * group.dim}]")
    blocks, heads, tokens, _ = memory.shape
    dim = group.dim
    isa = getattr(module, "isa", None)
    if isa is None:
        axes = ("page", "head", "token", "dim")
        k, v, k_axes = memory[..., :dim], memory[..., dim:], axes
    elif isa in _TRANSPOSED and memory.stride()[2:] == (2 * dim, 1):
        # A head's block is K as [dim, tokens], then V as [tokens, dim], whatever the shape says.
        strides, start = memory.stride()[:2], memory.storage_offset()
        k = memory.as_strided((blocks, heads, dim, tokens), (*strides, tokens, 1), start)
        v = memory.as_strided((blocks, heads, tokens, dim), (*strides, dim, 1), start + tokens * dim)
        axes, k_axes = ("page", "head", "token", "dim"), ("page", "head", "dim", "token")
    else:
        raise LayoutError(
            f"{what}: vLLM's CPU kernels {isa!r} pack a block in a way that is not described; "
            f"described are: {', '.join(_TRANSPOSED)}"
        )
    return [
        Plane.of(k, k_axes, group=group.name, layer=layer, role="k"),
        Plane.of(v, axes, group=group.name, layer=layer, role="v"),
    ]


def _latent(memory: torch.Tensor, layer: int, group: Group) -> list[Plane]:
    if memory.dim() == 4 and memory.shape[1] == 1:
        memory = memory[:, 0]
    if memory.dim() != 3 or memory.shape[2] != group.dim:
        raise LayoutError(
            f"layer {layer}: memory of shape {tuple(memory.shape)}; described are [blocks, tokens, {group.dim}]"
        )
    return [Plane.of(memory, ("page", "token", "dim"), group=group.name, layer=layer, role="latent")]


def _numbers(rows: Bytes, memory: torch.Tensor) -> torch.Tensor:
    """uint8 [n, heads, dim * itemsize] -> [n, heads, dim] of the memory's dtype, on its device."""
    return torch.from_numpy(np.array(rows, order="C")).view(memory.dtype).to(memory.device)
