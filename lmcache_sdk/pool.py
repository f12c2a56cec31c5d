"""The memory behind the pool: segments that extents lie in. Private to the process here; the daemon shares its own."""

from __future__ import annotations

import mmap
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from lmcache_sdk.core.extents import ALIGNMENT, offset_of, segment_of
from lmcache_sdk.errors import ConfigError
from lmcache_sdk.records import HEADER_BYTES

SEGMENT_LIMIT = 64 << 30
_HUGE_PAGE = 2 << 20


def extent_bytes(payload_bytes: int) -> int:
    """The size of an extent: room for a record's header, then the payload, 64-byte aligned."""
    assert HEADER_BYTES % ALIGNMENT == 0
    return HEADER_BYTES + payload_bytes


def segment_sizes(pool_bytes: int) -> list[int]:
    """A pool cut into segments of at most 64 GiB."""
    if pool_bytes < ALIGNMENT:
        raise ConfigError(f"pool_bytes must be positive, got {pool_bytes}")
    full, rest = divmod(pool_bytes, SEGMENT_LIMIT)
    return [SEGMENT_LIMIT] * full + ([rest] if rest else [])


class PrivatePool:
    """Anonymous memory, mapped at once and touched as it is used.

    Args:
        sizes: bytes of each segment, see :func:`segment_sizes`.

    Attributes:
        segments: uint8 [nbytes] each.
    """

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

    def record(self, address: int, nbytes: int) -> memoryview:
        """The first ``nbytes`` of an extent: header and payload."""
        offset = offset_of(address)
        return self._views[segment_of(address)][offset : offset + nbytes]
