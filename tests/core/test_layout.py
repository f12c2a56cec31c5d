"""Describing engine memory: what fits is described byte for byte, what does not is refused with its shape."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from lmcache_sdk.errors import LayoutError
from lmcache_sdk.layout import KVLayout, Plane, Planes, Strides
from lmcache_sdk.spec import WHOLE, Group, GroupKind, KVSpec, Part

NHD = ("page", "token", "head", "dim")
SPEC = KVSpec((Group("full", GroupKind.FULL, (0, 1), 4, 8, "bfloat16"),))
LATENT = KVSpec((Group("latent", GroupKind.LATENT, (0, 1), 1, 24, "bfloat16"),))


def plane(array, axes=NHD, *, layer=0, role="k", group="full", dtype="bfloat16"):
    return Plane.of(array, axes, group=group, layer=layer, role=role, dtype=dtype)


def pool(layers=2, pages=5, page=16, heads=4, dim=8):
    return np.zeros((layers, 2, pages, page, heads, dim), np.uint16)


def layout_of(memory, layers=(0, 1)):
    return KVLayout(
        tuple(plane(memory[n, r], layer=layer, role="kv"[r]) for n, layer in enumerate(layers) for r in (1, 0))
    )


def test_strides_come_from_the_array():
    memory = pool()
    described = plane(memory[1, 0])
    assert described.base == memory[1, 0].ctypes.data
    assert described.shape == (5, 16, 4, 8)
    assert described.strides == Strides(16 * 4 * 8 * 2, 4 * 8 * 2, 8 * 2, 2)
    assert (described.slots, described.itemsize) == (80, 2)


def test_axes_come_in_any_order_and_may_be_missing():
    memory = np.zeros((4, 100, 8), np.uint16)
    described = plane(memory, ("head", "token", "dim"))
    assert described.shape == (1, 100, 4, 8)
    assert described.strides == Strides(0, 16, 1600, 2)
    assert plane(np.zeros((1, 4, 100, 8), np.uint16), ("page", "head", "token", "dim")).strides[1:] == (
        16,
        1600,
        2,
    )


def test_a_view_is_the_memory_itself():
    memory = np.arange(3 * 2 * 4 * 5, dtype=np.uint16).reshape(3, 4, 5, 2)
    described = plane(memory, ("page", "head", "dim", "token"))
    assert np.array_equal(described.view(), memory.transpose(0, 3, 1, 2))
    described.view()[2, 1, 3, 4] = 9999
    assert memory[2, 3, 4, 1] == 9999


def test_a_view_and_a_plane_keep_the_memory_alive():
    described = plane(np.full((3, 4, 2, 8), 7, np.uint16))
    view = described.view()
    del described
    assert (view == 7).all()


def test_equal_geometry_is_equal_whatever_a_single_page_strides():
    memory = np.zeros((2, 1, 16, 4, 8), np.uint16)
    odd = np.lib.stride_tricks.as_strided(memory[1], strides=(12345, *memory.strides[2:]))
    assert plane(memory[0]).geometry == plane(odd).geometry


@pytest.mark.parametrize(
    ("array", "axes", "dtype", "message"),
    [
        (np.zeros((5, 16, 4, 8), np.uint16), ("page", "token", "head"), "bfloat16", "axes must name each"),
        (np.zeros((5, 16, 4, 8), np.uint16), ("page", "token", "token", "dim"), "bfloat16", "axes must name"),
        (
            np.zeros((5, 16, 4, 8), np.uint16),
            ("page", "token", "head", "width"),
            "bfloat16",
            "axes must name",
        ),
        (np.zeros((0, 16, 4, 8), np.uint16), NHD, "bfloat16", "empty"),
        (np.zeros((5, 16, 4, 8), np.uint16), NHD, None, "uint16"),
        (np.zeros((5, 16, 4, 8), np.int64), NHD, None, "int64"),
        (np.zeros((5, 16, 4, 8), np.uint16), NHD, "float32", "has 4 bytes, the elements have 2"),
        (np.broadcast_to(np.zeros(8, np.uint16), (5, 16, 4, 8)), NHD, "bfloat16", "read-only"),
    ],
    ids=["too few", "twice", "unknown", "empty", "container", "unserved", "size", "read-only"],
)
def test_what_cannot_be_described_is_refused_with_its_shape(array, axes, dtype, message):
    with pytest.raises(LayoutError, match=message) as error:
        plane(array, axes, dtype=dtype)
    assert str(array.shape) in str(error.value)


def test_a_role_must_be_known():
    with pytest.raises(LayoutError, match="'q'"):
        plane(pool()[0, 0], role="q")


def test_planes_are_in_canonical_order():
    memory = pool(3)
    layout = layout_of(memory, (5, 2, 9))
    assert [(p.layer, p.role) for p in layout.planes] == [(n, r) for n in (2, 5, 9) for r in "kv"]
    chosen = layout.planes_of("full", (2, 9))
    assert [(p.layer, p.role) for p in chosen] == [(2, "k"), (2, "v"), (9, "k"), (9, "v")]
    assert chosen is layout.planes_of("full", [2, 9])
    with pytest.raises(LayoutError, match=r"layer 3 .*\[2, 5, 9\]"):
        layout.planes_of("full", range(2, 4))
    with pytest.raises(LayoutError, match="'latent'"):
        layout.planes_of("latent", [2])


def test_a_layout_holds_as_many_slots_as_its_smallest_plane():
    memory = pool()
    small = np.zeros((2, 16, 4, 8), np.uint16)
    assert layout_of(memory).slots == 80
    assert KVLayout((plane(memory[0, 0]), plane(small, role="v"))).slots == 32


def test_no_planes_or_two_of_a_kind_are_no_layout():
    with pytest.raises(LayoutError, match="at least one"):
        KVLayout(())
    with pytest.raises(LayoutError, match="two planes"):
        KVLayout((plane(pool()[0, 0]), plane(pool()[0, 1])))


def test_neighbours_of_equal_geometry_are_found():
    memory, other = pool(), np.zeros((5, 4, 16, 8), np.uint16)
    planes = Planes(
        [
            plane(memory[0, 0]),
            plane(memory[0, 1]),
            plane(other, ("page", "head", "token", "dim")),
            plane(memory[1, 0]),
        ]
    )
    assert [(alike.first, alike.end) for alike in planes.alike] == [(0, 2), (2, 3), (3, 4)]
    assert planes.alike[0].low == memory[0, 0].ctypes.data
    assert planes.alike[0].offsets.tolist() == [0, 5 * 16 * 4 * 8 * 2]
    assert [alike.step for alike in planes.alike] == [5 * 16 * 4 * 8 * 2, 0, 0]


# What a rank holds.


@pytest.mark.parametrize(
    ("part", "heads", "layers"),
    [
        (WHOLE, 4, (0, 1)),
        (Part(heads=(0, 2)), 2, (0, 1)),
        (Part(heads=(2, 0)), 2, (0, 1)),
        (Part(layers=(1, 2)), 4, (1,)),
        (Part(layers=(1, 0), heads=(3, 4)), 1, (1,)),
        (Part(groups=("full",)), 4, (0, 1)),
    ],
    ids=str,
)
def test_a_part_that_fits_is_accepted(part, heads, layers):
    layout_of(pool(len(layers), heads=heads), layers).validate(SPEC, part)


def test_a_latent_group_has_one_head_on_every_rank():
    memory = np.zeros((2, 5, 16, 24), np.uint16)
    planes = tuple(plane(memory[n], ("page", "token", "dim"), layer=n, role="latent", group="latent") for n in (0, 1))
    KVLayout(planes).validate(LATENT, WHOLE)
    KVLayout(planes).validate(LATENT, Part(heads=(2, 4)))


@pytest.mark.parametrize(
    ("memory", "layers", "part", "message"),
    [
        (pool(1), (0,), WHOLE, "layer 1 'k' of group 'full' is missing"),
        (pool(2), (0, 2), WHOLE, "layer 1 'k' of group 'full' is missing"),
        (pool(2), (0, 1), Part(layers=(0, 1)), "belongs to no group and layer"),
        (pool(2), (0, 1), Part(groups=("other",)), "belongs to no group and layer"),
        (pool(2, heads=3), (0, 1), WHOLE, "has heads 3, expected 4"),
        (pool(2), (0, 1), Part(heads=(0, 2)), "has heads 4, expected 2"),
        (pool(2, dim=16), (0, 1), WHOLE, "has dim 16, expected 8"),
    ],
    ids=["layer missing", "other layer", "layer too many", "other group", "heads", "part", "dim"],
)
def test_what_differs_from_the_part_is_named(memory, layers, part, message):
    with pytest.raises(LayoutError, match=message):
        layout_of(memory, layers).validate(SPEC, part)


def test_a_missing_role_is_named():
    memory = pool()
    layout = KVLayout(tuple(p for p in layout_of(memory).planes if (p.layer, p.role) != (1, "v")))
    with pytest.raises(LayoutError, match="layer 1 'v' of group 'full' is missing"):
        layout.validate(SPEC, WHOLE)


def test_another_dtype_is_named_with_the_shape():
    memory = pool()
    planes = [plane(memory[n, r], layer=n, role="kv"[r], dtype="float16") for n in (0, 1) for r in (0, 1)]
    with pytest.raises(LayoutError, match=r"\(5, 16, 4, 8\).*has dtype float16, expected bfloat16"):
        KVLayout(tuple(planes)).validate(SPEC, WHOLE)


def changed(**changes):
    """A good layout but for layer 1's K."""
    planes = layout_of(pool()).planes
    return KVLayout((*planes[:2], dataclasses.replace(planes[2], **changes), planes[3]))


@pytest.mark.parametrize(
    ("strides", "message"),
    [
        (Strides(1024, -64, 16, 2), "negative"),
        (Strides(1024, 0, 16, 2), "overlaps itself: a stride of 0 bytes"),
        (Strides(1024, 64, 14, 2), "overlaps itself: a stride of 14 bytes within 16 bytes"),
        (Strides(960, 64, 16, 2), "overlaps itself: a stride of 960 bytes within 1024 bytes"),
        (Strides(1024, 64, 16, 3), "not aligned"),
    ],
    ids=["negative", "zero", "heads", "pages", "odd"],
)
def test_strides_that_make_no_sense_are_refused(strides, message):
    with pytest.raises(LayoutError, match=message):
        changed(strides=strides).validate(SPEC, WHOLE)


def test_a_misaligned_base_is_refused():
    good = layout_of(pool()).planes[2].base
    with pytest.raises(LayoutError, match="not aligned to its elements of 2 bytes"):
        changed(base=good + 1).validate(SPEC, WHOLE)


def test_reversed_memory_is_refused():
    memory = pool()
    planes = [plane(memory[n, r, ::-1], layer=n, role="kv"[r]) for n in (0, 1) for r in (0, 1)]
    with pytest.raises(LayoutError, match="negative"):
        KVLayout(tuple(planes)).validate(SPEC, WHOLE)


@pytest.mark.parametrize("shift", [0, 2, 1024, 5 * 1024 - 2, -2])
def test_planes_that_share_bytes_are_refused(shift):
    first, second, third, fourth = layout_of(pool()).planes
    moved = dataclasses.replace(third, base=second.base + shift)
    with pytest.raises(LayoutError, match="shares bytes"):
        KVLayout((first, second, moved, fourth)).validate(SPEC, WHOLE)


def test_interleaved_planes_are_apart():
    memory = np.zeros((5, 2, 2, 16, 4, 8), np.uint16)
    KVLayout(tuple(plane(memory[:, n, r], layer=n, role="kv"[r]) for n in (0, 1) for r in (0, 1))).validate(SPEC, WHOLE)
    fused = np.zeros((2, 5, 16, 4, 16), np.uint16)
    halves = (slice(0, 8), slice(8, 16))
    KVLayout(tuple(plane(fused[n, ..., halves[r]], layer=n, role="kv"[r]) for n in (0, 1) for r in (0, 1))).validate(
        SPEC, WHOLE
    )
    halves = (slice(0, 8), slice(7, 15))
    with pytest.raises(LayoutError, match="shares bytes"):
        KVLayout(
            tuple(plane(fused[n, ..., halves[r]], layer=n, role="kv"[r]) for n in (0, 1) for r in (0, 1))
        ).validate(SPEC, WHOLE)


def test_transposed_blocks_are_apart():
    blocks = np.zeros((2, 5, 4, 2, 16 * 8), np.uint16)
    planes = []
    for n in (0, 1):
        keys = blocks[n, :, :, 0].reshape(5, 4, 8, 16, copy=False)
        values = blocks[n, :, :, 1].reshape(5, 4, 16, 8, copy=False)
        planes.append(plane(keys, ("page", "head", "dim", "token"), layer=n))
        planes.append(plane(values, ("page", "head", "token", "dim"), layer=n, role="v"))
    KVLayout(tuple(planes)).validate(SPEC, WHOLE)
    closer = dataclasses.replace(planes[1], base=planes[1].base - 2)
    with pytest.raises(LayoutError, match="shares bytes"):
        KVLayout((planes[0], closer, *planes[2:])).validate(SPEC, WHOLE)


def test_a_large_interleaved_pool_is_validated_quickly():
    """64 planes in one pool of device memory, whose addresses cannot be read here."""
    layers, pages, page, heads, dim = 32, 100_000, 16, 8, 128
    unit = page * heads * dim * 2
    planes = tuple(
        Plane(
            "full",
            n,
            "kv"[r],
            0x7F00_0000_0000 + (2 * n + r) * unit,
            pages,
            page,
            heads,
            dim,
            "bfloat16",
            Strides(2 * layers * unit, heads * dim * 2, dim * 2, 2),
        )
        for n in range(layers)
        for r in (0, 1)
    )
    spec = KVSpec((Group("full", GroupKind.FULL, tuple(range(layers)), heads, dim, "bfloat16"),))
    KVLayout(planes, "cuda:0").validate(spec, WHOLE)
