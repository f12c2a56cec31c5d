"""What every kernel package refuses before it writes anything."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from lmcache_sdk.errors import LayoutError
from lmcache_sdk.kernels.interface import Bytes, Plan
from lmcache_sdk.layout import KVLayout, Plane, Planes


def plan_of(layout: KVLayout, slots: npt.ArrayLike, name: str, device_types: tuple[str, ...]) -> Plan:
    """What ``plan`` of a kernel package answers.

    Raises:
        LayoutError: see :meth:`lmcache_sdk.kernels.Kernels.plan`.
    """
    if layout.device.partition(":")[0] not in device_types:
        raise LayoutError(f"memory on {layout.device!r} cannot be reached by the {name} kernels")
    given = np.asarray(slots)
    if given.ndim != 1 or given.size == 0 or given.dtype.kind not in "iu":
        raise LayoutError(f"slots must be integers [tokens], got {given.dtype} {list(given.shape)}")
    low, high = int(given.min()), int(given.max())
    if low < 0 or high >= layout.slots:
        raise LayoutError(f"slot {low if low < 0 else high} is outside of 0 .. {layout.slots - 1}")
    return Plan(given.astype(np.int64), layout.device)


def check_gather(planes: Sequence[Plane], heads: tuple[int, int], plan: Plan, chunk: Bytes) -> Planes:
    """The planes of a gather that may begin.

    Raises:
        LayoutError: see :meth:`lmcache_sdk.kernels.Kernels.gather`; also for a read-only chunk.
    """
    chosen = _check(planes, heads, plan, chunk)
    if not chunk.flags.writeable:
        raise LayoutError("the chunk is read-only")
    return chosen


def check_scatter(planes: Sequence[Plane], heads: tuple[int, int], plan: Plan, chunk: Bytes) -> Planes:
    """The planes of a scatter that may begin.

    Raises:
        LayoutError: see :meth:`lmcache_sdk.kernels.Kernels.scatter`.
    """
    chosen = _check(planes, heads, plan, chunk)
    if not plan.distinct:
        raise LayoutError("a slot is given twice: what lands there would be undefined")
    return chosen


def _check(planes: Sequence[Plane], heads: tuple[int, int], plan: Plan, chunk: object) -> Planes:
    if not planes:
        raise LayoutError("no planes")
    chosen = planes if isinstance(planes, Planes) else Planes(planes)
    first, end = heads
    dim, itemsize = chosen[0].dim, chosen[0].itemsize
    for alike in chosen.alike:
        geometry, plane = alike.geometry, chosen[alike.first]
        if (geometry.dim, geometry.itemsize) != (dim, itemsize):
            raise LayoutError(f"planes of different rows in one copy: {chosen[0].name} and {plane.name}")
        if not 0 <= first < end <= geometry.heads:
            raise LayoutError(f"heads {first} .. {end - 1} are not in {plane.name}")
        if plan.highest >= geometry.slots:
            raise LayoutError(f"slot {plan.highest} is not in {plane.name}")
    if not isinstance(chunk, np.ndarray) or chunk.dtype != np.uint8 or not chunk.flags.c_contiguous:
        raise LayoutError(f"a chunk is a C-contiguous numpy array of uint8, not {_what(chunk)}")
    nbytes = len(chosen) * plan.tokens * (end - first) * dim * itemsize
    if chunk.nbytes != nbytes:
        raise LayoutError(f"the chunk has {chunk.nbytes} bytes, these planes, slots and heads need {nbytes}")
    return chosen


def _what(chunk: object) -> str:
    if isinstance(chunk, np.ndarray):
        return f"{chunk.dtype} {list(chunk.shape)} with strides {chunk.strides}"
    return type(chunk).__name__
