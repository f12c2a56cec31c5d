"""The host memory of SGLang's hierarchical cache as planes, and SGLang's own copy that fills it.

All layouts are rows of one stride table, so a page goes from the pool to its place, or back, in one pass. Whatever is
not described here is refused; and what is described is proven at registration.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from lmcache_sdk.errors import LayoutError, UnsupportedError
from lmcache_sdk.layout import KVLayout, Plane
from lmcache_sdk.spec import Group, GroupKind

Slots = npt.NDArray[np.int64]
Bytes = npt.NDArray[np.uint8]

# The axes of one layer of K or V, once the layer's own has been chosen: (where that is, the names of the others).
_LAYOUTS: dict[str, tuple[int, tuple[str, ...]]] = {
    "layer_first": (0, ("token", "head", "dim")),
    "page_first": (1, ("token", "head", "dim")),
    "page_first_direct": (1, ("page", "token", "head", "dim")),
    "page_head": (3, ("page", "head", "token", "dim")),
}
# Heads and latent rows lie differently in this one, and latent rows have no heads to put first.
_LATENT_LAYOUTS = ("layer_first", "page_first", "page_first_direct")
_POOLS = {"MHATokenToKVPoolHost": GroupKind.FULL, "MLATokenToKVPoolHost": GroupKind.LATENT}


class HostMemory:
    """The host pool of one rank.

    Args:
        pool: SGLang's host pool.
        group: what the namespace says of it.

    Attributes:
        layout: the planes. A slot is a token's index, as SGLang counts them.

    Raises:
        UnsupportedError: a pool or layout that is not described here, by name.
        LayoutError: memory of another shape than the layout says.
    """

    def __init__(self, pool: Any, group: Group) -> None:
        kind = type(pool).__name__
        if _POOLS.get(kind) != group.kind:
            wanted = ", ".join(name for name, its in _POOLS.items() if its == group.kind)
            raise UnsupportedError(f"host memory of kind {kind} for {group.kind.value} KV; served is {wanted}")
        latent = group.kind == GroupKind.LATENT
        served = tuple(_LATENT_LAYOUTS if latent else _LAYOUTS)
        if pool.layout not in served:
            raise UnsupportedError(
                f"host memory of layout {pool.layout!r}; served are --hicache-mem-layout {', '.join(served)}"
            )
        if pool.kv_buffer is None or pool.layer_num != len(group.layers):
            raise UnsupportedError(
                f"host memory of {pool.layer_num} layers for a model of {len(group.layers)}; served is memory that "
                "holds exactly the model's own"
            )
        self._pool = pool
        self._group = group
        self._kept: dict[int, torch.Tensor] = {}
        self.layout = self._layout_of(pool.kv_buffer)

    def _layout_of(self, buffer: torch.Tensor) -> KVLayout:
        """Of memory whose axes are those of the pool."""
        group, latent = self._group, self._group.kind == GroupKind.LATENT
        sides = {"latent": buffer} if latent else {"k": buffer[0], "v": buffer[1]}
        at, axes = _LAYOUTS[self._pool.layout]
        if any(side.dim() != len(axes) + 1 or side.shape[at] != len(group.layers) for side in sides.values()):
            raise LayoutError(f"host memory of layout {self._pool.layout!r} and shape {tuple(buffer.shape)}")
        return KVLayout(
            tuple(
                Plane.of(side.select(at, number), axes, group=group.name, layer=layer, role=role)
                for role, side in sides.items()
                for number, layer in enumerate(group.layers)
            )
        )

    @contextmanager
    def kept(self) -> Iterator[None]:
        """What ``write`` overwrites is as before when this ends: a backend may be attached to a pool in use."""
        self._synchronize()  # copies of earlier requests have ended
        try:
            yield
        finally:
            for first, content in self._kept.items():
                self._pool.set_from_flat_data_page(first, content)
            self._kept.clear()

    def write(self, layer: int, slots: Slots, k: Bytes, v: Bytes | None) -> None:
        """Write rows as SGLang's cache does, from its device memory; see :class:`lmcache_sdk.proof.WriteOp`.

        The device rows are those of page 0, which SGLang never gives to a request.
        """
        pool, width = self._pool, self._pool.page_size
        direct = pool.layout == "page_first_direct"
        for page in np.unique(slots // width):
            first = int(page) * width
            if first not in self._kept:
                self._kept[first] = pool.get_data_page(first, flat=True).clone()
            chosen = np.flatnonzero(slots // width == page)
            for side, memory in zip((k, v), self._device_rows(layer), strict=False):
                if side is not None:
                    rows = torch.from_numpy(np.ascontiguousarray(side[chosen])).view(memory.dtype)
                    places = torch.from_numpy(slots[chosen] % width).to(memory.device)
                    memory[places] = rows.view(len(chosen), *memory.shape[1:]).to(memory.device)
            where = "cpu" if direct else pool._transfer_device
            self._synchronize()
            pool.backup_from_device_all_layer(
                None,
                torch.arange(first, first + width, device=where),
                torch.arange(width, device=where),
                "direct" if direct else "kernel",
            )
            self._synchronize()

    def _device_rows(self, layer: int) -> tuple[torch.Tensor, ...]:
        """[tokens, heads, dim] of K and V, or of latent rows."""
        if _POOLS[type(self._pool).__name__] == GroupKind.LATENT:
            return (self._pool.device_kv_buffers[layer],)
        return self._pool.device_k_buffers[layer], self._pool.device_v_buffers[layer]

    def _synchronize(self) -> None:
        device = torch.device(self._pool._transfer_device)
        if device.type != "cpu":
            torch.get_device_module(device).synchronize(device)


class FlatPages:
    """Some pages of memory like the pool's, to and from tensors as SGLang makes them of a page: its second interface.

    Args:
        count: pages.

    Attributes:
        layout: the planes.
    """

    def __init__(self, memory: HostMemory, count: int) -> None:
        self._memory = memory
        self._pool = pool = memory._pool
        shape = list(pool.kv_buffer.shape)
        at, axes = _LAYOUTS[pool.layout]
        # The axis of pages, or of all tokens: before or behind that of layers, and behind that of K and V.
        self._axis = int(at == 0) + int(memory._group.kind != GroupKind.LATENT)
        self._width = 1 if "page" in axes else pool.page_size
        shape[self._axis] = count * self._width
        self._buffer = torch.zeros(shape, dtype=pool.dtype)
        self.layout = memory._layout_of(self._buffer)

    def page(self, number: int) -> torch.Tensor:
        """A view of one page."""
        return self._buffer.narrow(self._axis, number * self._width, self._width)

    def put(self, number: int, flat: torch.Tensor) -> None:
        """Fill a page from SGLang's tensor of it."""
        page = self.page(number)
        page.copy_(flat.view(self._buffer.dtype).reshape(page.shape))

    def write(self, layer: int, slots: Slots, k: Bytes, v: Bytes | None) -> None:
        """As :meth:`HostMemory.write`; the pool's pages are then taken out of it by SGLang's own means."""
        self._memory.write(layer, slots, k, v)
        for number in np.unique(slots // self._pool.page_size):
            self.put(int(number), self._pool.get_data_page(int(number) * self._pool.page_size, flat=True))
