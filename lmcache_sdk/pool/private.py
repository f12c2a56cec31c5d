"""A pool of this process's own."""

from __future__ import annotations

import mmap
import time
from collections.abc import Sequence
from threading import Event

import numpy as np
import numpy.typing as npt

from lmcache_sdk.core.extents import offset_of, segment_of
from lmcache_sdk.errors import ConfigError
from lmcache_sdk.pool.mapping import prefault

_HUGE_PAGE = 2 << 20
_SLICE_BYTES = 8 << 20


class PrivatePool:
    """Anonymous memory, mapped at once. ``prefault`` has the kernel provide it ahead of its use.

    Args:
        sizes: bytes of each segment, see :func:`lmcache_sdk.pool.segment_sizes`.

    Attributes:
        segments: uint8 [nbytes] each.
        journal: None: it ends with its process.

    Raises:
        ConfigError: there is not so much memory.
    """

    journal = None

    def __init__(self, sizes: Sequence[int]) -> None:
        self.sizes = list(sizes)
        self._maps: list[mmap.mmap] = []
        self.segments: list[npt.NDArray[np.uint8]] = []
        self._views: list[memoryview] = []
        for size in sizes:
            try:
                mapping = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            except OSError as error:
                raise ConfigError(f"a pool of {sum(sizes)} bytes cannot be had ({error}); lower pool_bytes") from error
            if size >= _HUGE_PAGE:
                mapping.madvise(mmap.MADV_HUGEPAGE)
            self._maps.append(mapping)
            self.segments.append(np.frombuffer(mapping, dtype=np.uint8))
            self._views.append(memoryview(mapping))

    def prefault(self, stop: Event) -> bool:
        """Touch all of it, in the background: the first load would otherwise wait for the kernel to clear pages.

        Half of the time at most: the engine starts meanwhile, and needs memory of its own.
        """
        for segment in self.segments:
            for start in range(0, len(segment), _SLICE_BYTES):
                began = time.monotonic()
                if not prefault(segment[start : start + _SLICE_BYTES], stop):
                    return False
                stop.wait(time.monotonic() - began)
        return True

    def record(self, address: int, nbytes: int) -> memoryview:
        """The first ``nbytes`` of an extent: header and payload."""
        offset = offset_of(address)
        return self._views[segment_of(address)][offset : offset + nbytes]
