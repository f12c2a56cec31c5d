"""The engine's own KV memory: preallocated rows, one per token, that attention reads in place.

Transformers' ``DynamicCache`` has no fixed memory (every token concatenates new tensors), so there is nothing that a
connector could be registered with. Here all layers live in one tensor for the whole life of the runner: a token's place
is a slot, registration happens once, and a decode step copies one row instead of the whole prefix.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from transformers.cache_utils import Cache, CacheLayerMixin

from lmcache_sdk.layout import KVLayout, Plane
from lmcache_sdk.spec import Group


class SlotLayer(CacheLayerMixin):
    """One layer's cache: rows ``[slot, head, dim]``, of which the first ``length`` are filled.

    Attention sees them as ``[1, head, slot, dim]`` views. Token-major rows are what the canonical chunk is
    made of, and are at least as fast on CPU as head-major ones (``docs/hf-runner.md``).
    """

    is_sliding = False

    def __init__(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        super().__init__()
        self.keys = keys.transpose(0, 1)[None]
        self.values = values.transpose(0, 1)[None]
        self.dtype, self.device = keys.dtype, keys.device
        self.capacity = keys.shape[0]
        self.length = 0
        self.is_initialized = True

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Nothing to do: the memory is there from the start."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append rows ``[1, head, n, dim]``; the answer is everything so far, as views."""
        end = self.length + key_states.shape[-2]
        self.keys[:, :, self.length : end] = key_states
        self.values[:, :, self.length : end] = value_states
        self.length = end
        return self.keys[:, :, :end], self.values[:, :, :end]

    def get_seq_length(self) -> int:
        """Filled slots; transformers' name for it."""
        return self.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Keys that a forward of ``query_length`` tokens attends to, and the position of the first."""
        return self.length + query_length, 0

    def get_max_length(self) -> int:
        """All slots."""
        return self.capacity

    def reset(self) -> None:
        """Forget the rows. They are overwritten, never read, so there is no need to zero them."""
        self.length = 0


class KVMemory:
    """All layers' rows, ``[layer, K|V, slot, head, dim]`` in one tensor.

    On CPU the operating system backs only what has been touched, so reserving the whole context costs nothing.

    Args:
        group: the model's KV geometry.
        slots: how many tokens it holds.
    """

    def __init__(self, group: Group, slots: int, device: torch.device) -> None:
        self.group = group
        self.slots = slots
        shape = (len(group.layers), 2, slots, group.heads, group.dim)
        self.rows = torch.empty(shape, dtype=getattr(torch, group.dtype), device=device)
        self.layers = [SlotLayer(layer[0], layer[1]) for layer in self.rows]
        self.cache = Cache(layers=list(self.layers))

    @property
    def length(self) -> int:
        """How many slots are filled."""
        return self.layers[0].length

    def rewind(self, length: int) -> None:
        """Say that the first ``length`` slots are filled: after a load, or to start over."""
        for layer in self.layers:
            layer.length = length

    def layout(self) -> KVLayout:
        """What the connector is registered with: one K and one V plane per layer."""
        return KVLayout(
            tuple(
                Plane.of(
                    self.rows[index, side],
                    ("token", "head", "dim"),
                    group=self.group.name,
                    layer=layer,
                    role=role,
                )
                for index, layer in enumerate(self.group.layers)
                for side, role in enumerate(self.group.roles)
            ),
            device=str(self.rows.device),
        )

    def write(
        self, layer: int, slots: npt.NDArray[np.int64], k: npt.NDArray[np.uint8], v: npt.NDArray[np.uint8] | None
    ) -> None:
        """Write rows the way a forward pass does; the connector proves its stride table against this.

        Args:
            layer: global layer number.
            slots: int64 [n].
            k, v: uint8 [n, heads, dim * itemsize].
        """
        assert v is not None  # only latent layers have none, and those are refused
        target = self.layers[self.group.layers.index(layer)]
        keys, values, before = self._states(k), self._states(v), target.length
        for at, slot in enumerate(slots.tolist()):
            target.length = slot
            target.update(keys[:, :, at : at + 1], values[:, :, at : at + 1])
        target.length = before

    def _states(self, rows: npt.NDArray[np.uint8]) -> torch.Tensor:
        """uint8 [n, heads, dim * itemsize] -> [1, heads, n, dim], the shape that attention layers hand over."""
        raw = torch.from_numpy(np.array(rows, order="C"))
        return raw.view(self.rows.dtype).transpose(0, 1)[None].to(self.rows.device)
