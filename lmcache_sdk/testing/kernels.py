"""The conformance suite of kernel packages: subclass :class:`KernelTests` for a device.

    class TestMyKernels(KernelTests):
        device = "cuda:0"

        @pytest.fixture
        def kernels(self):
            return MyKernels()

        def place(self, data): ...
        def fetch(self, placed): ...

What a copy should do is worked out here row by row, by indexing arrays of the engines' own shapes
(:func:`elements_of`); the strides that the kernels go by are not looked at. All memory has guard bytes around it and
is compared as a whole.
"""

from __future__ import annotations

import itertools
import mmap
import os
import random
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pytest

from lmcache_sdk.errors import LayoutError
from lmcache_sdk.kernels import CopyStream, DeviceKernels, Kernels, host_buffer
from lmcache_sdk.layout import KVLayout, Plane, Planes
from lmcache_sdk.spec import DTYPE_BYTES

SEED = int(os.environ.get("LMCACHE_SDK_TEST_SEED", "0"))
LAYERS = (0, 1, 2)
GUARD = 256

Array = npt.NDArray[Any]
Bytes = npt.NDArray[np.uint8]
Index = tuple[int | slice, ...]
KV = ("k", "v")


class Sizes(NamedTuple):
    """Of an engine's memory."""

    pages: int
    page: int
    heads: int
    dim: int

    @property
    def slots(self) -> int:
        """Tokens that fit."""
        return self.pages * self.page


@dataclass(frozen=True)
class Form:
    """A way in which an engine lays out its KV.

    Attributes:
        arrays: the engine's arrays by name, as shapes.
        row: where the ``dim`` elements of one (layer, role, page, token, head) are: array name and index.
        plane: (array name, the index that cuts the plane out of it, axes of what is left, their shape or
            None).
        roles: of each layer.
    """

    arrays: Callable[[Sizes], dict[str, tuple[int, ...]]]
    row: Callable[[Sizes, int, int, int, int, int], tuple[str, Index]]
    plane: Callable[[Sizes, int, int], tuple[str, Index, tuple[str, ...], tuple[int, ...] | None]]
    roles: tuple[str, ...] = KV

    def sizes(self, page: int, heads: int, dim: int) -> Sizes:
        """Of a memory for tests: few pages; latent rows have one head."""
        return Sizes(40 if page == 1 else 4, page, 1 if self.roles == ("latent",) else heads, dim)


_ALL = slice(None)
_NHD = ("page", "token", "head", "dim")
_HND = ("page", "head", "token", "dim")


def _per_layer(shape: Callable[[Sizes], tuple[int, ...]]) -> Callable[[Sizes], dict[str, tuple[int, ...]]]:
    return lambda s: {f"layer {n}": shape(s) for n in LAYERS}


def _half(s: Sizes, role: int) -> slice:
    return slice(role * s.dim, (role + 1) * s.dim)


def _padded(extra: Callable[[Sizes], int]) -> Form:
    """Pages with room after each."""
    return Form(
        _per_layer(lambda s: (2, s.pages, s.page * s.heads * s.dim + extra(s))),
        lambda s, n, r, p, t, h: (
            f"layer {n}",
            (r, p, slice((t * s.heads + h) * s.dim, (t * s.heads + h + 1) * s.dim)),
        ),
        lambda s, n, r: (
            f"layer {n}",
            (r, _ALL, slice(s.page * s.heads * s.dim)),
            _NHD,
            (s.pages, s.page, s.heads, s.dim),
        ),
    )


FORMS: dict[str, Form] = {
    "one array each, NHD": Form(
        lambda s: {f"layer {n} {r}": (s.pages, s.page, s.heads, s.dim) for n in LAYERS for r in range(2)},
        lambda s, n, r, p, t, h: (f"layer {n} {r}", (p, t, h)),
        lambda s, n, r: (f"layer {n} {r}", (), _NHD, None),
    ),
    "NHD": Form(
        _per_layer(lambda s: (2, s.pages, s.page, s.heads, s.dim)),
        lambda s, n, r, p, t, h: (f"layer {n}", (r, p, t, h)),
        lambda s, n, r: (f"layer {n}", (r,), _NHD, None),
    ),
    "NHD, pages first": Form(
        _per_layer(lambda s: (s.pages, 2, s.page, s.heads, s.dim)),
        lambda s, n, r, p, t, h: (f"layer {n}", (p, r, t, h)),
        lambda s, n, r: (f"layer {n}", (_ALL, r), _NHD, None),
    ),
    "NHD, all layers in a page": Form(
        lambda s: {"all": (s.pages, len(LAYERS), 2, s.page, s.heads, s.dim)},
        lambda s, n, r, p, t, h: ("all", (p, n, r, t, h)),
        lambda s, n, r: ("all", (_ALL, n, r), _NHD, None),
    ),
    "NHD, fused K|V": Form(
        _per_layer(lambda s: (s.pages, s.page, s.heads, 2 * s.dim)),
        lambda s, n, r, p, t, h: (f"layer {n}", (p, t, h, _half(s, r))),
        lambda s, n, r: (f"layer {n}", (_ALL, _ALL, _ALL, _half(s, r)), _NHD, None),
    ),
    "NHD, padded pages": _padded(lambda s: s.heads * s.dim),
    "NHD, pages padded by an element": _padded(lambda s: 1),
    "HND": Form(
        _per_layer(lambda s: (2, s.pages, s.heads, s.page, s.dim)),
        lambda s, n, r, p, t, h: (f"layer {n}", (r, p, h, t)),
        lambda s, n, r: (f"layer {n}", (r,), _HND, None),
    ),
    "HND, fused K|V": Form(
        _per_layer(lambda s: (s.pages, s.heads, s.page, 2 * s.dim)),
        lambda s, n, r, p, t, h: (f"layer {n}", (p, h, t, _half(s, r))),
        lambda s, n, r: (f"layer {n}", (_ALL, _ALL, _ALL, _half(s, r)), _HND, None),
    ),
    # In each block and head K as [dim, token], then V as [token, dim].
    "vLLM CPU blocks": Form(
        _per_layer(lambda s: (s.pages, s.heads, 2, s.page * s.dim)),
        lambda s, n, r, p, t, h: (
            f"layer {n}",
            (p, h, r, slice(t * s.dim, (t + 1) * s.dim) if r else slice(t, s.dim * s.page, s.page)),
        ),
        lambda s, n, r: (
            f"layer {n}",
            (_ALL, _ALL, r),
            _HND if r else ("page", "head", "dim", "token"),
            (s.pages, s.heads, s.page, s.dim) if r else (s.pages, s.heads, s.dim, s.page),
        ),
    ),
    "SGLang token pool": Form(
        lambda s: {f"layer {n} {r}": (s.slots, s.heads, s.dim) for n in LAYERS for r in range(2)},
        lambda s, n, r, p, t, h: (f"layer {n} {r}", (p * s.page + t, h)),
        lambda s, n, r: (f"layer {n} {r}", (), ("page", "head", "dim"), None),
    ),
    "SGLang host layer_first": Form(
        lambda s: {"host": (2, len(LAYERS), s.slots, s.heads, s.dim)},
        lambda s, n, r, p, t, h: ("host", (r, n, p * s.page + t, h)),
        lambda s, n, r: ("host", (r, n), ("page", "head", "dim"), None),
    ),
    "SGLang host page_first": Form(
        lambda s: {"host": (2, s.slots, len(LAYERS), s.heads, s.dim)},
        lambda s, n, r, p, t, h: ("host", (r, p * s.page + t, n, h)),
        lambda s, n, r: ("host", (r, _ALL, n), ("page", "head", "dim"), None),
    ),
    "SGLang host page_first_direct": Form(
        lambda s: {"host": (2, s.pages, len(LAYERS), s.page, s.heads, s.dim)},
        lambda s, n, r, p, t, h: ("host", (r, p, n, t, h)),
        lambda s, n, r: ("host", (r, _ALL, n), _NHD, None),
    ),
    "SGLang host page_head": Form(
        lambda s: {"host": (2, s.pages, s.heads, s.page, len(LAYERS), s.dim)},
        lambda s, n, r, p, t, h: ("host", (r, p, h, t, n)),
        lambda s, n, r: ("host", (r, _ALL, _ALL, _ALL, n), _HND, None),
    ),
    "HF [head, token, dim]": Form(
        lambda s: {f"layer {n} {r}": (s.heads, s.slots, s.dim) for n in LAYERS for r in range(2)},
        lambda s, n, r, p, t, h: (f"layer {n} {r}", (h, p * s.page + t)),
        lambda s, n, r: (f"layer {n} {r}", (), ("head", "token", "dim"), None),
    ),
    "HF [token, head, dim]": Form(
        lambda s: {f"layer {n} {r}": (s.slots, s.heads, s.dim) for n in LAYERS for r in range(2)},
        lambda s, n, r, p, t, h: (f"layer {n} {r}", (p * s.page + t, h)),
        lambda s, n, r: (f"layer {n} {r}", (), ("token", "head", "dim"), None),
    ),
    "latent": Form(
        _per_layer(lambda s: (s.pages, s.page, s.dim)),
        lambda s, n, r, p, t, h: (f"layer {n}", (p, t)),
        lambda s, n, r: (f"layer {n}", (), ("page", "token", "dim"), None),
        ("latent",),
    ),
    "latent, SGLang host page_first": Form(
        lambda s: {"host": (s.slots, len(LAYERS), 1, s.dim)},
        lambda s, n, r, p, t, h: ("host", (p * s.page + t, n, 0)),
        lambda s, n, r: ("host", (_ALL, n), ("page", "head", "dim"), None),
        ("latent",),
    ),
}


@lru_cache(maxsize=64)
def elements_of(form: Form, sizes: Sizes, layer: int, role: int) -> tuple[str, Array]:
    """Where a plane's elements are: the array's name, and int64 [slot, head, dim], their indices in it, flattened."""
    numbers = {name: np.arange(int(np.prod(shape))).reshape(shape) for name, shape in form.arrays(sizes).items()}
    places = np.empty((sizes.slots, sizes.heads, sizes.dim), np.int64)
    name = ""
    for slot, head in np.ndindex(places.shape[:2]):
        page, token = divmod(slot, sizes.page)
        name, index = form.row(sizes, layer, role, page, token, head)
        places[slot, head] = numbers[name][index]
    return name, places


def _permuted_pages(s: Sizes, rng: np.random.Generator) -> npt.NDArray[np.int64]:
    pages = rng.permutation(s.pages)[: max(1, s.pages - 1)]
    return np.add.outer(pages * s.page, np.arange(s.page)).reshape(-1)


SLOTS: dict[str, Callable[[Sizes, np.random.Generator], npt.NDArray[np.int64]]] = {
    "one slot": lambda s, rng: rng.integers(0, s.slots, 1),
    "all slots": lambda s, rng: np.arange(s.slots),
    "a merged run": lambda s, rng: np.arange(s.slots // 5, s.slots - s.slots // 4),
    "permuted pages": _permuted_pages,
    "ragged": lambda s, rng: _permuted_pages(s, rng)[s.page // 3 : -(s.page // 4) or None],
    "scattered": lambda s, rng: rng.permutation(s.slots)[: s.slots * 2 // 3],
    "descending": lambda s, rng: np.arange(s.slots - 1, s.slots // 2, -1),
}
HEADS: dict[str, Callable[[int], tuple[int, int]]] = {
    "all heads": lambda heads: (0, heads),
    "first heads": lambda heads: (0, (heads + 1) // 2),
    "last head": lambda heads: (heads - 1, heads),
}


class Case(NamedTuple):
    """One combination of everything that matters to a copy."""

    form: str
    dtype: str
    page: int
    heads: int
    dim: int
    slots: str
    part: str
    layers: tuple[int, ...]

    def __str__(self) -> str:
        layers = "".join(map(str, self.layers))
        return (
            f"{self.form}; {self.dtype}; page {self.page}; {self.heads}x{self.dim}; "
            f"{self.slots}; {self.part}; layers {layers}"
        )


VALUES: tuple[Sequence[Any], ...] = (
    tuple(FORMS),
    ("bfloat16", "float32", "float8_e4m3fn"),
    (1, 16, 64),
    (1, 3, 8),
    (6, 32),
    tuple(SLOTS),
    tuple(HEADS),
    (LAYERS, (1,), (0, 2)),
)


def pairwise_cases(seed: int = SEED) -> list[Case]:
    """Few cases in which every two values of different parameters meet. The same for the same seed."""
    rng = random.Random(seed)  # noqa: S311 - a test plan, no secret
    places = range(len(VALUES))
    # Values by their index: a pair is (parameter, value, later parameter, value).
    missing = {
        (i, a, j, b)
        for i, j in itertools.combinations(places, 2)
        for a in range(len(VALUES[i]))
        for b in range(len(VALUES[j]))
    }

    def pairs(chosen: dict[int, int], at: int, value: int) -> set[tuple[int, int, int, int]]:
        return {
            (at, value, other, chosen[other]) if at < other else (other, chosen[other], at, value) for other in chosen
        }

    cases: list[Case] = []
    while missing:
        i, a, j, b = rng.choice(sorted(missing))
        chosen = {i: a, j: b}
        missing.discard((i, a, j, b))
        for at in rng.sample(places, len(places)):
            if at not in chosen:
                values = rng.sample(range(len(VALUES[at])), len(VALUES[at]))
                gains = [len(pairs(chosen, at, value) & missing) for value in values]
                value = values[gains.index(max(gains))]
                missing -= pairs(chosen, at, value)
                chosen[at] = value
        cases.append(Case(*(VALUES[at][chosen[at]] for at in places)))
    return cases


@dataclass(frozen=True)
class Placed:
    """Memory on a device: its address, and what keeps it alive."""

    base: int
    owner: Any


class Engine:
    """An engine's memory in one form: on the host as the reference sees it, and on the device."""

    def __init__(self, tests: KernelTests, form: Form, sizes: Sizes, dtype: str, rng: np.random.Generator) -> None:
        self.tests, self.form, self.sizes = tests, form, sizes
        kind = np.dtype(f"u{DTYPE_BYTES[dtype]}")
        self.host: dict[str, Bytes] = {}
        self.arrays: dict[str, Array] = {}
        self.placed: dict[str, Placed] = {}
        for name, shape in form.arrays(sizes).items():
            nbytes = int(np.prod(shape)) * kind.itemsize
            whole = rng.integers(0, 256, GUARD + nbytes + GUARD, np.uint8)
            self.host[name] = whole
            self.arrays[name] = whole[GUARD : GUARD + nbytes].view(kind).reshape(shape)
            self.placed[name] = tests.place(whole)
        planes = []
        for layer in LAYERS:
            for role, role_name in enumerate(form.roles):
                name, index, axes, shape_left = form.plane(sizes, layer, role)
                cut = self.arrays[name][index]
                if shape_left:
                    # In place, or not at all: what is described has to be the array's own memory.
                    cut = _split_last(cut, shape_left)
                plane = Plane.of(cut, axes, group="g", layer=layer, role=role_name, dtype=dtype)
                offset = plane.base - self.host[name].__array_interface__["data"][0]
                placed = self.placed[name]
                planes.append(replace(plane, base=placed.base + offset, owner=placed.owner))
        self.layout = KVLayout(tuple(planes), tests.device)

    def read(self, layers: Sequence[int], heads: tuple[int, int], slots: Sequence[int] | Array) -> Array:
        """What a gather of the host's memory answers: [plane, token, head, dim]."""
        return np.stack([flat[places] for flat, places in self._places(layers, heads, slots)])

    def write(self, layers: Sequence[int], heads: tuple[int, int], slots: Sequence[int] | Array, values: Array) -> None:
        """What a scatter makes of the host's memory."""
        for (flat, places), rows in zip(self._places(layers, heads, slots), values, strict=True):
            flat[places] = rows

    def _places(
        self, layers: Sequence[int], heads: tuple[int, int], slots: Sequence[int] | Array
    ) -> Iterator[tuple[Array, Array]]:
        """For each plane its flattened array, and the elements in it."""
        for layer, role in itertools.product(layers, range(len(self.form.roles))):
            name, places = elements_of(self.form, self.sizes, layer, role)
            yield self.arrays[name].reshape(-1), places[slots, slice(*heads)]

    def assert_device_equals_host(self) -> None:
        """Every byte on the device, guards included, is what the reference has."""
        for name, whole in self.host.items():
            assert np.array_equal(self.tests.fetch(self.placed[name]), whole), f"bytes of {name!r} differ"


def _split_last(array: Array, shape: tuple[int, ...]) -> Array:
    """View the last axis of an array as the last axes of ``shape``."""
    kept = array.ndim - 1
    strides = [array.itemsize]
    for size in shape[:kept:-1]:
        strides.insert(0, strides[0] * size)
    return np.lib.stride_tricks.as_strided(array, shape, (*array.strides[:kept], *strides))


class GuardedChunk:
    """A chunk with guard bytes around it."""

    def __init__(self, nbytes: int, rng: np.random.Generator) -> None:
        self.whole = host_buffer(GUARD + nbytes + GUARD)
        self.whole[:] = rng.integers(0, 256, self.whole.size, np.uint8)
        self.before = self.whole.copy()
        self.bytes: Bytes = self.whole[GUARD : GUARD + nbytes]

    def assert_guards(self) -> None:
        """Nothing around the chunk was written."""
        assert np.array_equal(self.whole[:GUARD], self.before[:GUARD])
        assert np.array_equal(self.whole[-GUARD:], self.before[-GUARD:])

    def assert_unchanged(self) -> None:
        """Nothing was written at all."""
        assert np.array_equal(self.whole, self.before)


_FLAWS = [
    *itertools.product(
        ("gather", "scatter"),
        (
            "chunk too small",
            "chunk too large",
            "chunk of another dtype",
            "chunk not contiguous",
            "chunk no array",
            "heads too high",
            "heads negative",
            "heads empty",
            "heads reversed",
            "no planes",
            "planes of other width",
            "planes of other element size",
            "slot outside of a plane",
        ),
    ),
    ("gather", "chunk read-only"),
    ("scatter", "slot twice"),
]


class KernelTests:
    """What every kernel package must do.

    A subclass gives the kernels and, for another device than the host, ``place``, ``fetch`` and ``device``.
    """

    device = "cpu"

    @pytest.fixture
    def kernels(self) -> Kernels:
        """The kernels under test."""
        raise NotImplementedError("a subclass says which kernels are tested")

    def place(self, data: Bytes) -> Placed:
        """Copy bytes to new memory of the device, at a multiple of 16; there on return. By default the host's."""
        room = np.empty(data.size + 64, np.uint8)
        start = -room.__array_interface__["data"][0] % 64
        owner = room[start : start + data.size]
        owner[:] = data
        return Placed(owner.__array_interface__["data"][0], owner)

    def fetch(self, placed: Placed) -> Bytes:
        """All bytes of such memory, once every copy has ended."""
        whole: Bytes = placed.owner
        return whole

    def check(self, kernels: Kernels, case: Case, engine: Engine, rng: np.random.Generator) -> None:
        """Gather, then scatter other bytes, and compare all memory with the reference."""
        slots, part = SLOTS[case.slots](engine.sizes, rng), HEADS[case.part](engine.sizes.heads)
        planes, plan = engine.layout.planes_of("g", case.layers), kernels.plan(engine.layout, slots)
        wanted = engine.read(case.layers, part, slots)
        chunk = GuardedChunk(wanted.nbytes, rng)
        kernels.gather(planes, part, plan, chunk.bytes)
        values = chunk.bytes.view(wanted.dtype).reshape(wanted.shape)
        wrong = np.argwhere(values != wanted)
        assert not wrong.size, f"gather of {case}, seed {SEED}: [plane, token, head, dim] {wrong[0]}"
        chunk.assert_guards()
        engine.assert_device_equals_host()

        chunk.bytes[:] = rng.integers(0, 256, chunk.bytes.size, np.uint8)
        chunk.before = chunk.whole.copy()
        kernels.scatter(planes, part, plan, chunk.bytes)
        engine.write(case.layers, part, slots, values)
        engine.assert_device_equals_host()
        chunk.assert_unchanged()

    @pytest.mark.parametrize("case", pairwise_cases(), ids=str)
    def test_every_two_values_together(self, kernels: Kernels, case: Case) -> None:
        """Each pair of a form, dtype, page size, head count, width, slot pattern, head slice, layer range."""
        rng = np.random.default_rng(SEED)
        form = FORMS[case.form]
        self.check(kernels, case, Engine(self, form, form.sizes(case.page, case.heads, case.dim), case.dtype, rng), rng)

    @pytest.mark.slow
    @pytest.mark.timeout(900)
    @pytest.mark.parametrize("dtype", VALUES[1])
    @pytest.mark.parametrize("form", FORMS)
    def test_everything_together(self, kernels: Kernels, form: str, dtype: str) -> None:
        """The full product; where there is one head, all slices of heads are one."""
        rng = np.random.default_rng(SEED)
        for sizes in dict.fromkeys(FORMS[form].sizes(*three) for three in itertools.product(*VALUES[2:5])):
            engine = Engine(self, FORMS[form], sizes, dtype, rng)
            parts = {part(sizes.heads): name for name, part in HEADS.items()}
            for slots, part, layers in itertools.product(SLOTS, parts.values(), VALUES[7]):
                case = Case(form, dtype, sizes.page, sizes.heads, sizes.dim, slots, part, layers)
                self.check(kernels, case, engine, rng)

    def test_planes_of_other_page_geometry_in_one_copy(self, kernels: Kernels) -> None:
        """One plan serves planes whose pages differ."""
        rng = np.random.default_rng(SEED)
        small = Engine(self, FORMS["NHD"], Sizes(8, 4, 2, 8), "bfloat16", rng)
        large = Engine(self, FORMS["HND"], Sizes(3, 16, 2, 8), "bfloat16", rng)
        slots = np.array([3, 4, 5, 31, 0, 17, 16])
        planes = [*small.layout.planes_of("g", [0]), *large.layout.planes_of("g", [1])]
        chunk = GuardedChunk(4 * slots.size * 2 * 8 * 2, rng)
        kernels.gather(planes, (0, 2), kernels.plan(small.layout, slots), chunk.bytes)
        wanted = [small.read([0], (0, 2), slots), large.read([1], (0, 2), slots)]
        assert np.array_equal(chunk.bytes.view(np.uint16), np.ravel(wanted))
        chunk.assert_guards()

    @pytest.mark.parametrize("form", ["NHD", "HND"])
    def test_a_plan_is_used_again(self, kernels: Kernels, form: str) -> None:
        """One plan serves all layers, all heads, both directions, and outlives the caller's slots."""
        rng = np.random.default_rng(SEED)
        engine = Engine(self, FORMS[form], Sizes(4, 16, 3, 32), "bfloat16", rng)
        slots = SLOTS["ragged"](engine.sizes, rng)
        plan = kernels.plan(engine.layout, given := slots.copy())
        given[:] = 0
        for layer, heads in itertools.product(LAYERS, [(0, 3), (1, 3), (2, 3)]):
            planes = engine.layout.planes_of("g", [layer])
            wanted = engine.read([layer], heads, slots)
            chunk = GuardedChunk(wanted.nbytes, rng)
            kernels.gather(planes, heads, plan, chunk.bytes)
            assert np.array_equal(chunk.bytes.view(np.uint16), wanted.reshape(-1))
            kernels.scatter(planes, heads, plan, chunk.bytes)
        engine.assert_device_equals_host()

    @pytest.mark.parametrize("form", ["NHD, all layers in a page", "HND, fused K|V", "vLLM CPU blocks"])
    def test_memory_that_is_not_contiguous_is_served_through_its_strides(self, kernels: Kernels, form: str) -> None:
        """Not refused: pages far apart, half of every row, elements of a row apart."""
        rng = np.random.default_rng(SEED)
        engine = Engine(self, FORMS[form], Sizes(4, 16, 3, 32), "bfloat16", rng)
        name, index, _, _ = FORMS[form].plane(engine.sizes, 1, 0)
        assert not engine.arrays[name][index].flags.contiguous
        self.check(kernels, Case(form, "bfloat16", 16, 3, 32, "ragged", "all heads", LAYERS), engine, rng)

    def test_threads_copy_at_the_same_time(self, kernels: Kernels) -> None:
        """Each its own slots, and each reads what it has written."""
        rng = np.random.default_rng(SEED)
        engine = Engine(self, FORMS["NHD"], Sizes(8, 16, 3, 32), "bfloat16", rng)
        planes, parts = engine.layout.planes_of("g", LAYERS), rng.permutation(engine.sizes.slots).reshape(2, -1)
        values = rng.integers(0, 1 << 16, (2, len(planes), parts.shape[1], 3, 32), np.uint16)
        together = threading.Barrier(2)

        def copy(slots: Array, rows: Array) -> bool:
            given = rows.reshape(-1).view(np.uint8)
            taken = np.empty_like(given)

            def there_and_back() -> bool:
                plan = kernels.plan(engine.layout, slots)
                kernels.scatter(planes, (0, 3), plan, given)
                taken[:] = 0
                kernels.gather(planes, (0, 3), plan, taken)
                return np.array_equal(given, taken)

            together.wait(30)
            return all(there_and_back() for _ in range(20))

        with ThreadPoolExecutor(2) as threads:
            assert all(threads.map(copy, parts, values))
        for slots, rows in zip(parts, values, strict=True):
            engine.write(LAYERS, (0, 3), slots, rows)
        engine.assert_device_equals_host()

    @pytest.mark.parametrize(
        "slots",
        [
            np.array([0, 64]),
            np.array([-1, 3]),
            np.array([2**62]),
            np.array([], np.int64),
            np.array([[1, 2]]),
            np.array([1.0, 2.0]),
        ],
        ids=["too high", "negative", "huge", "none", "two dimensions", "float"],
    )
    def test_bad_slots_are_refused(self, kernels: Kernels, slots: Array) -> None:
        """By ``plan``."""
        engine = Engine(self, FORMS["NHD"], Sizes(4, 16, 3, 8), "bfloat16", np.random.default_rng(SEED))
        with pytest.raises(LayoutError):
            kernels.plan(engine.layout, slots)

    def test_memory_of_another_device_is_refused(self, kernels: Kernels) -> None:
        """Its addresses mean nothing here."""
        engine = Engine(self, FORMS["NHD"], Sizes(4, 16, 3, 8), "bfloat16", np.random.default_rng(SEED))
        with pytest.raises(LayoutError, match="elsewhere:0"):
            kernels.plan(replace(engine.layout, device="elsewhere:0"), np.arange(3))

    @pytest.mark.parametrize(("verb", "flaw"), _FLAWS)
    def test_bad_input_is_refused_before_anything_is_written(self, kernels: Kernels, verb: str, flaw: str) -> None:
        """LayoutError, all memory as before."""
        rng = np.random.default_rng(SEED)
        engine = Engine(self, FORMS["NHD"], Sizes(4, 16, 3, 8), "bfloat16", rng)
        other = {
            "planes of other width": (Sizes(4, 16, 3, 6), "bfloat16"),
            "planes of other element size": (Sizes(4, 16, 3, 8), "float32"),
            "slot outside of a plane": (Sizes(1, 16, 3, 8), "bfloat16"),
        }.get(flaw)
        engines = [engine, *([Engine(self, FORMS["NHD"], *other, rng)] if other else [])]
        planes = Planes(
            itertools.chain.from_iterable(e.layout.planes_of("g", [layer]) for layer, e in enumerate(engines))
        )
        slots = np.array([5, 6, 7, 5] if flaw == "slot twice" else [5, 6, 7, 40])
        heads = {
            "heads too high": (0, 4),
            "heads negative": (-1, 2),
            "heads empty": (1, 1),
            "heads reversed": (2, 0),
        }.get(flaw, (0, 3))
        nbytes = sum(plane.dim * plane.itemsize for plane in planes) * slots.size * 3
        guarded = GuardedChunk(2 * nbytes, rng)
        chunk: Any = guarded.bytes[:nbytes]
        if flaw == "chunk too small":
            chunk = guarded.bytes[: nbytes - 1]
        elif flaw == "chunk too large":
            chunk = guarded.bytes[: nbytes + 1]
        elif flaw == "chunk of another dtype":
            chunk = chunk.view(np.uint16)
        elif flaw == "chunk not contiguous":
            chunk = guarded.bytes[::2]
        elif flaw == "chunk no array":
            chunk = memoryview(chunk)
        elif flaw == "chunk read-only":
            chunk.flags.writeable = False
        elif flaw == "no planes":
            planes = Planes()
        plan = kernels.plan(engine.layout, slots)
        queues = [kernels.stream(self.device)] if isinstance(kernels, DeviceKernels) else []
        assert kernels.pin(guarded.whole) or not queues
        tried: list[Kernels | CopyStream] = [kernels, *queues]
        for copies in tried:
            with pytest.raises(LayoutError):
                (copies.gather if verb == "gather" else copies.scatter)(planes, heads, plan, chunk)
        for queue in queues:
            queue.record().wait()
        kernels.unpin(guarded.whole)
        guarded.assert_unchanged()
        for touched in engines:
            touched.assert_device_equals_host()

    def test_a_gather_may_read_a_slot_twice(self, kernels: Kernels) -> None:
        """Only a scatter would be undefined."""
        rng = np.random.default_rng(SEED)
        engine = Engine(self, FORMS["NHD"], Sizes(4, 16, 3, 8), "bfloat16", rng)
        slots = np.array([5, 6, 5])
        chunk = GuardedChunk(2 * 3 * 3 * 8 * 2, rng)
        kernels.gather(engine.layout.planes_of("g", [1]), (0, 3), kernels.plan(engine.layout, slots), chunk.bytes)
        assert np.array_equal(chunk.bytes.view(np.uint16), engine.read([1], (0, 3), slots).reshape(-1))

    def test_a_scatter_reads_a_read_only_chunk(self, kernels: Kernels) -> None:
        """Pool memory may be mapped read-only."""
        rng = np.random.default_rng(SEED)
        engine = Engine(self, FORMS["NHD"], Sizes(4, 16, 3, 8), "bfloat16", rng)
        chunk = GuardedChunk(2 * 2 * 3 * 8 * 2, rng)
        chunk.bytes.flags.writeable = False
        planes, plan = engine.layout.planes_of("g", [1]), kernels.plan(engine.layout, np.array([9, 8]))
        kernels.scatter(planes, (0, 3), plan, chunk.bytes)
        engine.write([1], (0, 3), [9, 8], chunk.bytes.view(np.uint16).reshape(2, 2, 3, 8))
        engine.assert_device_equals_host()

    def test_pin_answers(self, kernels: Kernels) -> None:
        """True, or False with the reason; unpin may be called either way, and twice."""
        buffer = np.zeros(1 << 16, np.uint8)
        answer = kernels.pin(buffer)
        assert bool(answer) or answer.why
        kernels.unpin(buffer)
        kernels.unpin(buffer)
        refused = kernels.pin(buffer[::2])  # a device sees nothing of strides
        assert not refused and refused.why

    @pytest.fixture
    def queue(self, kernels: Kernels) -> CopyStream:
        """A queue of copies; only kernels for a device have one."""
        if not isinstance(kernels, DeviceKernels):
            pytest.skip("these kernels queue nothing")
        return kernels.stream(self.device)

    def test_queued_copies_happen_in_order(self, kernels: Kernels, queue: CopyStream) -> None:
        """What a scatter writes is what the gather behind it reads, and that is there when the event is."""
        rng = np.random.default_rng(SEED)
        engine = Engine(self, FORMS["NHD"], Sizes(4, 16, 3, 8), "bfloat16", rng)
        slots = np.array([5, 6, 7, 40, 41, 3])
        planes, plan = engine.layout.planes_of("g", LAYERS), kernels.plan(engine.layout, slots)
        nbytes = len(planes) * slots.size * 3 * 8 * 2
        pinned = host_buffer(2 * nbytes)
        assert kernels.pin(pinned)
        given, taken = pinned[:nbytes], pinned[nbytes:]
        given[:] = rng.integers(0, 256, nbytes, np.uint8)
        queue.scatter(planes, (0, 3), plan, given)
        between = queue.record()
        queue.gather(planes, (0, 3), plan, taken)
        queue.record().wait()
        assert between.done()
        assert np.array_equal(given, taken)
        engine.write(LAYERS, (0, 3), slots, given.view(np.uint16).reshape(len(planes), slots.size, 3, 8))
        engine.assert_device_equals_host()
        kernels.unpin(pinned)

    def test_a_queue_waits_for_another(self, kernels: Kernels, queue: CopyStream) -> None:
        """Where an event says so."""
        assert isinstance(kernels, DeviceKernels)
        rng = np.random.default_rng(SEED)
        engine = Engine(self, FORMS["NHD"], Sizes(64, 16, 3, 8), "bfloat16", rng)
        slots = rng.permutation(64 * 16)
        planes, plan = engine.layout.planes_of("g", LAYERS), kernels.plan(engine.layout, slots)
        nbytes = len(planes) * slots.size * 3 * 8 * 2
        pinned = host_buffer(2 * nbytes)
        assert kernels.pin(pinned)
        other = kernels.stream(self.device)
        given, taken = pinned[:nbytes], pinned[nbytes:]
        for _ in range(5):
            given[:] = rng.integers(0, 256, nbytes, np.uint8)
            queue.scatter(planes, (0, 3), plan, given)
            other.wait(queue.record())
            other.gather(planes, (0, 3), plan, taken)
            other.record().wait()
            assert np.array_equal(given, taken)
        kernels.unpin(pinned)

    @pytest.mark.parametrize("verb", ["gather", "scatter"])
    def test_only_pinned_memory_is_queued(self, kernels: Kernels, queue: CopyStream, verb: str) -> None:
        """A copy of any other would be slow in silence, or fail half way."""
        rng = np.random.default_rng(SEED)
        engine = Engine(self, FORMS["NHD"], Sizes(4, 16, 3, 8), "bfloat16", rng)
        planes, plan = engine.layout.planes_of("g", [1]), kernels.plan(engine.layout, [9, 8])
        nbytes = 2 * 2 * 3 * 8 * 2
        pages = host_buffer(2 * mmap.PAGESIZE)
        halves = pages[: mmap.PAGESIZE], pages[mmap.PAGESIZE :]
        assert all(kernels.pin(half) for half in halves)
        across = pages[mmap.PAGESIZE - 8 : mmap.PAGESIZE - 8 + nbytes]
        for chunk in (np.zeros(nbytes, np.uint8), across):
            with pytest.raises(LayoutError):
                (queue.gather if verb == "gather" else queue.scatter)(planes, (0, 3), plan, chunk)
        assert not pages.any()
        for half in halves:
            kernels.unpin(half)
        with pytest.raises(LayoutError):
            queue.gather(planes, (0, 3), plan, pages[:nbytes])
        engine.assert_device_equals_host()

    def test_it_says_what_it_is(self, kernels: Kernels) -> None:
        """Its name, and the device types that it serves."""
        assert kernels.name
        assert self.device.partition(":")[0] in kernels.device_types
