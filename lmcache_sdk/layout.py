"""One stride table for every engine memory.

Engine memory is described, never guessed: a :class:`Plane` says where one layer's K (or V, or latent rows)
lies and how far apart pages, tokens, heads and elements are. Paged NHD and HND, fused K|V, transposed blocks,
token pools, host pages and dense caches are all rows of that table, so nothing downstream branches on a
format's name.

A *slot* is a token's place: ``slot = page * page_tokens + token``.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from lmcache_sdk.errors import LayoutError
from lmcache_sdk.spec import DTYPE_BYTES, KVSpec, Part

ROLES = ("k", "v", "latent")
AXES = ("page", "token", "head", "dim")

# Whether strided planes share a byte is a bounded Diophantine problem, hard only in theory: numpy's unit of
# work.
_MAX_WORK = 1_000_000


class Strides(NamedTuple):
    """Bytes from one page, token, head and element to the next; 0 where there is only one."""

    page: int
    token: int
    head: int
    dim: int


class Geometry(NamedTuple):
    """Everything of a plane but its place: planes of equal geometry are copied by one table of offsets."""

    pages: int
    page_tokens: int
    heads: int
    dim: int
    itemsize: int
    strides: Strides

    @property
    def slots(self) -> int:
        """Tokens that fit."""
        return self.pages * self.page_tokens


class _Memory:
    """Hands numpy an address; the array made from it keeps ``owner`` alive."""

    def __init__(
        self, base: int, shape: tuple[int, ...], strides: tuple[int, ...] | None, typestr: str, owner: object
    ) -> None:
        self.__array_interface__ = {
            "version": 3,
            "data": (base, False),
            "shape": shape,
            "strides": strides,
            "typestr": typestr,
        }
        self.owner = owner


def memory(
    base: int,
    shape: tuple[int, ...],
    typestr: str,
    *,
    strides: tuple[int, ...] | None = None,
    owner: object = None,
) -> npt.NDArray[Any]:
    """A writable numpy array over host memory at an address. Nothing is read; the caller vouches for the
    memory.

    Args:
        base: address in bytes.
        typestr: as in numpy's array interface: ``|u1``, ``<u2``, ``|V4096``.
        strides: bytes; None = C order.
        owner: kept alive by the array.
    """
    return np.asarray(_Memory(base, shape, strides, typestr, owner))


@dataclass(frozen=True, slots=True)
class Plane:
    """Where one role of one layer lies. Equal to another if all but ``owner`` is.

    Attributes:
        group: name of the KV group.
        layer: global layer number.
        role: ``k``, ``v`` or ``latent``.
        base: address of element [page 0, token 0, head 0, dim 0], in bytes.
        pages, page_tokens, heads, dim: how many there are. ``heads`` are those in this memory, a rank's.
        dtype: a key of :data:`~lmcache_sdk.spec.DTYPE_BYTES`.
        strides: bytes.
        owner: keeps the memory alive.
    """

    group: str
    layer: int
    role: str
    base: int
    pages: int
    page_tokens: int
    heads: int
    dim: int
    dtype: str
    strides: Strides
    owner: object = field(default=None, compare=False, repr=False)

    @classmethod
    def of(
        cls, array: Any, axes: Sequence[str], *, group: str, layer: int, role: str, dtype: str | None = None
    ) -> Plane:
        """Describe a numpy array or torch tensor; nothing is read or copied.

        Args:
            array: of any strides, also a slice of something larger.
            axes: the name of each of its dimensions, out of ``page``, ``token``, ``head``, ``dim``, in any
                order. A name that is missing has size 1.
            group, layer, role: what the plane holds.
            dtype: needed where the array's own is only a container of the same size (bf16 as uint16, fp8 as
                uint8).

        Raises:
            LayoutError: names that do not fit the dimensions, a dtype that is not served, an empty or
                read-only array.
        """
        shape = tuple(int(size) for size in array.shape)
        what = f"layer {layer} {role!r} of group {group!r} with shape {shape} and axes {tuple(axes)}"
        if role not in ROLES:
            raise LayoutError(f"{what}: a role is one of {', '.join(ROLES)}")
        if len(axes) != len(shape) or len(set(axes)) != len(axes) or not set(axes) <= set(AXES):
            raise LayoutError(f"{what}: the axes must name each dimension once, out of {', '.join(AXES)}")
        if 0 in shape:
            raise LayoutError(f"{what}: the memory is empty")
        if hasattr(array, "data_ptr"):
            itemsize = int(array.element_size())
            base = int(array.data_ptr())
            strides = [int(step) * itemsize for step in array.stride()]
        else:
            itemsize = int(array.itemsize)
            base, read_only = array.__array_interface__["data"]
            strides = [int(step) for step in array.strides]
            if read_only:
                raise LayoutError(f"{what}: the memory is read-only")
        name = dtype or str(array.dtype).removeprefix("torch.")
        if name not in DTYPE_BYTES:
            raise LayoutError(f"{what}: dtype {name!r} is not one of {', '.join(DTYPE_BYTES)}; pass dtype=")
        if DTYPE_BYTES[name] != itemsize:
            raise LayoutError(f"{what}: dtype {name!r} has {DTYPE_BYTES[name]} bytes, the elements have {itemsize}")
        sizes = dict(zip(axes, shape, strict=True))
        # The stride of a single page, token or head means nothing: 0, so that equal geometry compares equal.
        steps = {axis: step for axis, step in zip(axes, strides, strict=True) if sizes[axis] > 1}
        return cls(
            group=group,
            layer=layer,
            role=role,
            base=base,
            pages=sizes.get("page", 1),
            page_tokens=sizes.get("token", 1),
            heads=sizes.get("head", 1),
            dim=sizes.get("dim", 1),
            dtype=name,
            strides=Strides(*(steps.get(axis, 0) for axis in AXES)),
            owner=array,
        )

    @property
    def itemsize(self) -> int:
        """Bytes of an element."""
        return DTYPE_BYTES[self.dtype]

    @property
    def slots(self) -> int:
        """Tokens that fit."""
        return self.pages * self.page_tokens

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """``(pages, page_tokens, heads, dim)``."""
        return self.pages, self.page_tokens, self.heads, self.dim

    @property
    def geometry(self) -> Geometry:
        """Shape, element size and strides."""
        return Geometry(self.pages, self.page_tokens, self.heads, self.dim, self.itemsize, self.strides)

    @property
    def name(self) -> str:
        """For messages: what it is and its shape."""
        return (
            f"layer {self.layer} {self.role!r} of group {self.group!r} "
            f"(pages, page_tokens, heads, dim = {self.shape}, {self.dtype}, "
            f"strides {tuple(self.strides)} bytes)"
        )

    def view(self) -> npt.NDArray[Any]:
        """The memory as ``[pages, page_tokens, heads, dim]`` of unsigned integers of the element's size.

        Touching the answer needs memory that the host can reach.
        """
        return memory(self.base, self.shape, f"<u{self.itemsize}", strides=self.strides, owner=self.owner)


class Alike(NamedTuple):
    """Neighbouring planes of equal geometry.

    Attributes:
        first, end: their indices.
        low: the lowest base address.
        offsets: int64 [planes], bytes from there to each base.
        reach: bytes; the highest of the offsets.
        step: bytes; the largest number that divides all offsets, 0 if all are 0.
    """

    geometry: Geometry
    first: int
    end: int
    low: int
    offsets: npt.NDArray[np.int64]
    reach: int
    step: int


class Stack(NamedTuple):
    """Planes of equal geometry, at equal distances in memory and among the planes: one strided array.

    Attributes:
        first, step, size: their indices are ``first, first + step, …``, and how many they are.
        base, distance: bytes; the first one's address, and from each to the next.
    """

    geometry: Geometry
    first: int
    step: int
    size: int
    base: int
    distance: int


class Planes(tuple[Plane, ...]):  # noqa: SLOT001 - cached_property needs a dict
    """Planes of one copy, in canonical order. What is derived from them is kept here, and goes with them."""

    @cached_property
    def alike(self) -> tuple[Alike, ...]:
        """The planes in groups of neighbours that one table of offsets serves."""
        geometries = [plane.geometry for plane in self]
        cuts = [i for i in range(len(self)) if i == 0 or geometries[i] != geometries[i - 1]]
        groups = []
        for first, end in pairwise([*cuts, len(self)]):
            bases = np.array([plane.base for plane in self[first:end]], np.int64)
            low = int(bases.min())
            offsets = bases - low
            reach, step = int(offsets.max()), int(np.gcd.reduce(offsets))
            groups.append(Alike(geometries[first], first, end, low, offsets, reach, step))
        return tuple(groups)

    @cached_property
    def stacks(self) -> tuple[Stack, ...]:
        """The planes in as few stacks as a pass from the front finds."""
        places: dict[Geometry, list[int]] = {}
        for index, plane in enumerate(self):
            places.setdefault(plane.geometry, []).append(index)
        stacks = []
        for geometry, indices in places.items():
            at = 0
            while at < len(indices):
                first, second = indices[at], indices[min(at + 1, len(indices) - 1)]
                step, distance = second - first, self[second].base - self[first].base
                count = 1
                while (
                    at + count < len(indices)
                    and indices[at + count] - indices[at + count - 1] == step
                    and self[indices[at + count]].base - self[indices[at + count - 1]].base == distance
                ):
                    count += 1
                stacks.append(Stack(geometry, first, step or 1, count, self[first].base, distance))
                at += count
        return tuple(stacks)


@dataclass(frozen=True)
class KVLayout:
    """All planes of one engine memory.

    Attributes:
        planes: put into canonical order on construction: by group, layer, role.
        device: ``cpu``, ``cuda:0``, ``npu:0``.

    Raises:
        LayoutError: no planes, or two for one role of a layer.
    """

    planes: tuple[Plane, ...]
    device: str = "cpu"

    def __post_init__(self) -> None:
        if not self.planes:
            raise LayoutError("a KV layout needs at least one plane")
        ordered = sorted(self.planes, key=lambda plane: (plane.group, plane.layer, ROLES.index(plane.role)))
        for plane, following in pairwise(ordered):
            if (plane.group, plane.layer, plane.role) == (following.group, following.layer, following.role):
                raise LayoutError(f"two planes for one role: {plane.name} and {following.name}")
        object.__setattr__(self, "planes", tuple(ordered))

    @property
    def slots(self) -> int:
        """How many tokens the memory holds: those of its smallest plane."""
        return self._slots

    @cached_property
    def _slots(self) -> int:
        return min(plane.slots for plane in self.planes)

    @cached_property
    def _chosen(self) -> dict[tuple[str, tuple[int, ...]], Planes]:
        return {}

    def planes_of(self, group: str, layers: Iterable[int]) -> Planes:
        """The planes of some layers of a group, layer by layer, in each ``k`` then ``v``. The same object
        each time.

        Args:
            layers: global layer numbers.

        Raises:
            LayoutError: a layer is not in this memory.
        """
        wanted = tuple(layers)
        chosen = self._chosen.get((group, wanted))
        if chosen is None:
            have = {plane.layer for plane in self.planes if plane.group == group}
            for layer in wanted:
                if layer not in have:
                    raise LayoutError(
                        f"layer {layer} of group {group!r} is not in this memory, which has {sorted(have)}"
                    )
            chosen = Planes(p for n in wanted for p in self.planes if p.group == group and p.layer == n)
            self._chosen[group, wanted] = chosen
        return chosen

    def validate(self, spec: KVSpec, part: Part) -> None:
        """Check that this memory holds exactly what ``part`` of ``spec`` says, and that no byte has two
        meanings.

        Raises:
            LayoutError: a layer or role is missing or too many; heads, dim or dtype differ; an element is not
                aligned; strides are negative or overlap; two planes share bytes. The message has the shape.
        """
        expected = {}
        for group in spec.groups:
            if part.groups and group.name not in part.groups:
                continue
            first, end = part.heads[0], min(part.heads[1] or group.heads, group.heads)
            heads = 1 if group.roles == ("latent",) else end - first
            for layer in group.layers:
                if part.layers[0] <= layer and (not part.layers[1] or layer < part.layers[1]):
                    for role in group.roles:
                        expected[group.name, layer, role] = (heads, group.dim, group.dtype)
        found = {(plane.group, plane.layer, plane.role): plane for plane in self.planes}
        for group_name, layer, role in expected:
            if (group_name, layer, role) not in found:
                raise LayoutError(f"layer {layer} {role!r} of group {group_name!r} is missing from the engine's memory")
        for place, plane in found.items():
            if place not in expected:
                raise LayoutError(f"{plane.name} belongs to no group and layer of {part}")
            heads, dim, dtype = expected[place]
            for what, has, needs in (
                ("heads", plane.heads, heads),
                ("dim", plane.dim, dim),
                ("dtype", plane.dtype, dtype),
            ):
                if has != needs:
                    raise LayoutError(f"{plane.name} has {what} {has}, expected {needs}")
            _check_strides(plane)
        _check_apart(self.planes)


def _check_strides(plane: Plane) -> None:
    """Elements are aligned, and no two of them share bytes: each axis steps over all that is inside of it."""
    itemsize, steps = plane.itemsize, plane.strides
    if any(size > 1 and step < 0 for size, step in zip(plane.shape, steps, strict=True)):
        raise LayoutError(f"{plane.name} has a negative stride")
    if any(number % itemsize for number in (plane.base, *steps)):
        raise LayoutError(f"{plane.name} at address {plane.base:#x} is not aligned to its elements of {itemsize} bytes")
    extent = itemsize
    for step, size in sorted((step, size) for step, size in zip(steps, plane.shape, strict=True) if size > 1):
        if step < extent:
            raise LayoutError(f"{plane.name} overlaps itself: a stride of {step} bytes within {extent} bytes")
        extent += step * (size - 1)


def _extent(plane: Plane) -> int:
    return plane.itemsize + sum(step * (size - 1) for step, size in zip(plane.strides, plane.shape, strict=True))


def _check_apart(planes: Sequence[Plane]) -> None:
    """No two planes share bytes. They may interleave (fused K|V): where ranges meet, bytes are compared."""
    open_planes: list[Plane] = []
    for plane in sorted(planes, key=lambda plane: plane.base):
        open_planes = [other for other in open_planes if other.base + _extent(other) > plane.base]
        for other in open_planes:
            try:
                # numpy's stub knows only its two named limits.
                limit: Any = _MAX_WORK
                shared = np.shares_memory(plane.view(), other.view(), max_work=limit)
            except np.exceptions.TooHardError:
                shared = True  # no engine's memory is that entangled
            if shared:
                raise LayoutError(f"{plane.name} shares bytes with {other.name}")
        open_planes.append(plane)
