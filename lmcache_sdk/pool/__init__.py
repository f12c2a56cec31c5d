"""The memory behind the pool: segments that extents lie in. Private to a process, or shared by a daemon.

``private`` is a process's own. ``shared`` is the daemon's: named files that outlive it, and a ``journal`` of what lies
in them. ``mapping`` is how daemon and clients map such files.
"""

from __future__ import annotations

from threading import Event
from typing import TYPE_CHECKING, Protocol

import numpy as np
import numpy.typing as npt

from lmcache_sdk.core.extents import ALIGNMENT
from lmcache_sdk.errors import ConfigError
from lmcache_sdk.pool.private import PrivatePool
from lmcache_sdk.records import HEADER_BYTES

if TYPE_CHECKING:
    from lmcache_sdk.pool.journal import Journal

__all__ = ["SEGMENT_LIMIT", "Pool", "PrivatePool", "extent_bytes", "segment_sizes"]

SEGMENT_LIMIT = 64 << 30


class Pool(Protocol):
    """What a store needs of its memory.

    Attributes:
        sizes: bytes of each segment.
        segments: uint8 [nbytes] each.
        journal: where it is written down what lies in the pool, if the pool can outlive its process.
    """

    sizes: list[int]
    segments: list[npt.NDArray[np.uint8]]

    @property
    def journal(self) -> Journal | None: ...

    def prefault(self, stop: Event) -> bool:
        """Have the kernel provide all of it; False if told to stop."""
        ...

    def record(self, address: int, nbytes: int) -> memoryview:
        """The first ``nbytes`` of an extent: header and payload."""
        ...


def extent_bytes(payload_bytes: int) -> int:
    """The size of an extent: room for a record's header, then the payload, 64-byte aligned."""
    assert HEADER_BYTES % ALIGNMENT == 0
    return HEADER_BYTES + payload_bytes


def segment_sizes(pool_bytes: int, segment_bytes: int = SEGMENT_LIMIT) -> list[int]:
    """A pool cut into segments of at most ``segment_bytes``; the last one may be smaller.

    Raises:
        ConfigError: there would be nothing in the pool.
    """
    if pool_bytes < ALIGNMENT:
        raise ConfigError(f"pool_bytes must be positive, got {pool_bytes}")
    full, rest = divmod(pool_bytes, segment_bytes)
    return [segment_bytes] * full + ([rest] if rest else [])
