"""SGLang's device memory as a stride table: one plane for each layer's K and V, or latent rows.

Served are its two plain pools, by the name of their class, with one row a token. Whatever is not described here is
refused; and what is described is proven at registration.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from lmcache_sdk.errors import LayoutError, UnsupportedError
from lmcache_sdk.layout import KVLayout, Plane
from lmcache_sdk.spec import Group, GroupKind

Slots = npt.NDArray[np.int64]
Bytes = npt.NDArray[np.uint8]

_POOLS = {"MHATokenToKVPool": GroupKind.FULL, "MLATokenToKVPool": GroupKind.LATENT}


class DeviceMemory:
    """The device pool of one rank.

    Args:
        pool: SGLang's pool, in use by nobody yet.
        group: what the namespace says of it.

    Attributes:
        layout: the planes. A slot is a token's index, as SGLang counts them.

    Raises:
        UnsupportedError: a pool that is not described here, by name.
        LayoutError: memory of another shape than the namespace says.
    """

    def __init__(self, pool: Any, group: Group) -> None:
        kind = type(pool).__name__
        if _POOLS.get(kind) != group.kind:
            wanted = ", ".join(name for name, its in _POOLS.items() if its == group.kind)
            raise UnsupportedError(f"device memory of kind {kind} for {group.kind.value} KV; served is {wanted}")
        rows = getattr(pool, "kv_cache_layout", "nhd")
        if rows != "nhd":
            raise UnsupportedError(
                f"device memory of layout {rows!r}; served is 'nhd': leave SGLANG_USE_HND_KVCACHE and "
                "SGLANG_AITER_KV_CACHE_LAYOUT unset"
            )
        if pool.start_layer != 0 or pool.layer_num != len(group.layers):
            raise UnsupportedError(
                f"device memory of {pool.layer_num} layers from {pool.start_layer} on, for a model of "
                f"{len(group.layers)}; served is memory that holds exactly the model's own"
            )
        self._pool = pool
        latent = group.kind == GroupKind.LATENT
        sides = {"latent": pool.kv_buffer} if latent else {"k": pool.k_buffer, "v": pool.v_buffer}
        for role, buffers in sides.items():
            for buffer in buffers:
                if buffer.dim() != 3:
                    raise LayoutError(f"device memory {role!r} of shape {tuple(buffer.shape)}; expected 3 dimensions")
        self.layout = KVLayout(
            tuple(
                Plane.of(buffer, ("token", "head", "dim"), group=group.name, layer=layer, role=role)
                for role, buffers in sides.items()
                for layer, buffer in zip(group.layers, buffers, strict=True)
            )
        )

    def write(self, layer: int, slots: Slots, k: Bytes, v: Bytes | None) -> None:
        """Write rows as a forward pass does; see :class:`lmcache_sdk.proof.WriteOp`."""
        rows = [self._rows(side, len(slots)) if side is not None else None for side in (k, v)]
        places = torch.from_numpy(slots).to(self._pool.device)
        self._pool.set_kv_buffer(None, places, *rows, layer_id_override=layer)
        if places.device.type != "cpu":
            torch.get_device_module(places.device).synchronize(places.device)

    def _rows(self, side: Bytes, count: int) -> torch.Tensor:
        """[tokens, heads, dim], of the pool's dtype."""
        flat = torch.from_numpy(np.ascontiguousarray(side)).view(self._pool.dtype)
        return flat.view(count, side.shape[1], -1).to(self._pool.device)
