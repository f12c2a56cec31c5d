"""A pool of this process's own."""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from threading import Event

import numpy as np
import numpy.typing as npt

from lmcache_sdk.core.extents import offset_of, segment_of
from lmcache_sdk.pool.mapping import prefault

_HUGE_PAGE = 2 << 20


class PrivatePool:
    """Anonymous memory, mapped at once. ``prefault`` has the kernel provide it ahead of its use.

    Args:
        sizes: bytes of each segment, see :func:`lmcache_sdk.pool.segment_sizes`.

    Attributes:
        segments: uint8 [nbytes] each.
        journal: None: it ends with its process.
    """

    journal = None

    def __init__(self, sizes: Sequence[int]) -> None:
        self.sizes = list(sizes)
        self._maps: list[mmap.mmap] = []
        self.segments: list[npt.NDArray[np.uint8]] = []
        self._views: list[memoryview] = []
        for size in sizes:
            mapping = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            if size >= _HUGE_PAGE:
                mapping.madvise(mmap.MADV_HUGEPAGE)
            self._maps.append(mapping)
            self.segments.append(np.frombuffer(mapping, dtype=np.uint8))
            self._views.append(memoryview(mapping))

    def prefault(self, stop: Event) -> bool:
        """Touch all of it, in the background: the first load would otherwise wait for the kernel to clear pages."""
        return all(prefault(segment, stop) for segment in self.segments)

    def record(self, address: int, nbytes: int) -> memoryview:
        """The first ``nbytes`` of an extent: header and payload."""
        offset = offset_of(address)
        return self._views[segment_of(address)][offset : offset + nbytes]
