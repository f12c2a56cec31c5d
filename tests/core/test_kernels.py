"""The CPU kernels pass the public suite; paths that small memory does not reach."""

from __future__ import annotations

import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmcache_sdk.kernels import CPUKernels, Kernels, kernels_for
from lmcache_sdk.layout import KVLayout, Plane, Strides
from lmcache_sdk.testing.kernels import KernelTests, pairwise_cases


class TestCPUKernels(KernelTests):
    @pytest.fixture
    def kernels(self) -> Kernels:
        return kernels_for("cpu")


def test_the_pairwise_plan_is_repeatable_and_small():
    assert pairwise_cases(3) == pairwise_cases(3)
    assert len(pairwise_cases()) < 400


@st.composite
def stride_tables(draw):
    """Any nesting of the four axes, with room anywhere."""
    itemsize = draw(st.sampled_from([1, 2, 4]))
    sizes = [draw(st.integers(1, limit)) for limit in (4, 5, 4, 9)]
    strides, extent = [0] * 4, itemsize
    for axis in draw(st.permutations(range(4))):
        strides[axis] = extent + itemsize * draw(st.sampled_from([0, 0, 1, 7, 64]))
        extent = strides[axis] * sizes[axis]
    return itemsize, sizes, strides, extent


@settings(max_examples=150)
@given(stride_tables(), st.integers(1, 5), st.data())
def test_any_stride_table(tabled, count, data):
    itemsize, (pages, page, heads, dim), strides, extent = tabled
    rng = np.random.default_rng(0)
    gap = data.draw(st.sampled_from([0, 64, 4096])) // itemsize * itemsize
    memory = rng.integers(0, 256, count * (extent + gap) + 8, np.uint8)
    start = -memory.ctypes.data % 8
    views, planes = [], []
    for n in range(count):
        view = np.ndarray((pages, page, heads, dim), f"u{itemsize}", memory, start + n * (extent + gap), tuple(strides))
        views.append(view)
        dtype = {1: "uint8", 2: "bfloat16", 4: "float32"}[itemsize]
        axes = ("page", "token", "head", "dim")
        planes.append(Plane.of(view, axes, group="g", layer=n, role="latent", dtype=dtype))
    layout = KVLayout(tuple(planes))
    slots = np.array(data.draw(st.lists(st.integers(0, pages * page - 1), min_size=1, max_size=20, unique=True)))
    first = data.draw(st.integers(0, heads - 1))
    end = data.draw(st.integers(first + 1, heads))
    chunk = np.zeros(count * slots.size * (end - first) * dim * itemsize, np.uint8)
    kernels = CPUKernels()
    plan = kernels.plan(layout, slots)
    kernels.gather(layout.planes_of("g", range(count)), (first, end), plan, chunk)
    got = chunk.view(f"u{itemsize}").reshape(count, slots.size, end - first, dim)
    for view, plane in zip(views, got, strict=True):
        assert np.array_equal(plane, view[slots // page, slots % page, first:end])
    expected = memory.copy()
    chunk[:] = rng.integers(0, 256, chunk.size, np.uint8)
    for n, plane in enumerate(got):
        view = np.ndarray(
            (pages, page, heads, dim), f"u{itemsize}", expected, start + n * (extent + gap), tuple(strides)
        )
        # `expected` may lie at another alignment; only its offsets matter.
        view[slots // page, slots % page, first:end] = plane
    kernels.scatter(layout.planes_of("g", range(count)), (first, end), plan, chunk)
    assert np.array_equal(memory, expected)


@pytest.mark.parametrize("shape", [(20, 16, 8, 128), (40, 16, 8, 16)], ids=["one call", "plane by plane"])
@pytest.mark.parametrize("axes", [("page", "token", "head", "dim"), ("page", "head", "token", "dim")])
def test_many_planes(shape, axes):
    """Enough units for both ways to walk over planes."""
    pages, page, heads, dim = shape
    rng = np.random.default_rng(1)
    sizes = {"page": pages, "token": page, "head": heads, "dim": dim}
    arrays = [rng.integers(0, 2**16, [sizes[a] for a in axes], np.uint16) for _ in range(40)]
    layout = KVLayout(
        tuple(
            Plane.of(a, axes, group="g", layer=n // 2, role="kv"[n % 2], dtype="float16") for n, a in enumerate(arrays)
        )
    )
    slots = np.add.outer(rng.permutation(pages)[:16] * page, np.arange(page)).reshape(-1)
    views = [a.transpose([axes.index(x) for x in ("page", "token", "head", "dim")]) for a in arrays]
    expected = np.stack([v[slots // page, slots % page] for v in views])
    chunk = np.zeros(expected.nbytes, np.uint8)
    kernels, planes = CPUKernels(), layout.planes_of("g", range(20))
    plan = kernels.plan(layout, slots)
    kernels.gather(planes, (0, heads), plan, chunk)
    assert np.array_equal(chunk.view(np.uint16).reshape(expected.shape), expected)
    before = [a.copy() for a in arrays]
    for view in views:
        view[slots // page, slots % page] = 0
    kernels.scatter(planes, (0, heads), plan, chunk)
    assert all(np.array_equal(a, b) for a, b in zip(arrays, before, strict=True))


def test_threads_share_one_plan():
    rng = np.random.default_rng(2)
    array = rng.integers(0, 2**16, (2, 64, 16, 2, 32), np.uint16)
    axes = ("page", "token", "head", "dim")
    layout = KVLayout(
        tuple(Plane.of(array[n], axes, group="g", layer=0, role=r, dtype="bfloat16") for n, r in enumerate("kv"))
    )
    kernels, slots = CPUKernels(), rng.permutation(1024)
    plan = kernels.plan(layout, slots)
    expected = array.reshape(2, 1024, 2, 32)[:, slots].reshape(-1).view(np.uint8)
    wrong = []

    def run() -> None:
        chunk = np.zeros(expected.size, np.uint8)
        for _ in range(20):
            chunk[:] = 0
            kernels.gather(layout.planes_of("g", [0]), (0, 2), plan, chunk)
            if not np.array_equal(chunk, expected):
                wrong.append(1)

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert not wrong


def test_a_misaligned_base_is_copied_right_all_the_same():
    """Validation refuses it; the kernels do not depend on that."""
    memory = np.arange(200, dtype=np.uint8)
    base = memory.ctypes.data + 1
    plane = Plane("g", 0, "latent", base, 3, 4, 1, 4, "float32", Strides(64, 16, 0, 4), memory)
    chunk = np.zeros(32, np.uint8)
    layout = KVLayout((plane,))
    kernels = CPUKernels()
    kernels.gather(layout.planes, (0, 1), kernels.plan(layout, [1, 5]), chunk)
    assert np.array_equal(chunk, np.r_[memory[17:33], memory[81:97]])


@pytest.mark.parametrize("inside", ["chunk", "nothing"])
def test_what_lies_between_planes_is_never_written(inside):
    """Planes are seen as one span, and a process's other objects may lie within it: others write there meanwhile."""
    row, tokens = 4096, 8
    memory = np.zeros((3, 2048, row), np.uint8)  # a plane, anything, a plane
    planes = tuple(
        Plane.of(memory[part], ("token", "dim"), group="full", layer=layer, role="latent", dtype="uint8")
        for layer, part in enumerate((0, 2))
    )
    layout, kernels = KVLayout(planes), CPUKernels()
    plan = kernels.plan(layout, np.arange(0, 2 * tokens, 2))
    nbytes = 2 * tokens * row
    chunk = memory[1, :16].reshape(-1)[:nbytes] if inside == "chunk" else np.zeros(nbytes, np.uint8)
    chunk[:] = 7
    witness = memory[1, 40, :8].view(np.int64)
    stop, lost = threading.Event(), []

    def write() -> None:
        count = 0
        while not stop.is_set():
            count += 1
            witness[0] = count
            if any(witness[0] != count for _ in range(100)):
                lost.append(count)

    writer = threading.Thread(target=write)
    writer.start()
    for _ in range(30):
        kernels.scatter(layout.planes_of("full", (0, 1)), (0, 1), plan, chunk)
    stop.set()
    writer.join()
    assert not lost, "an old byte was written back over a new one"
    assert (memory[0, :16:2] == 7).all() and not memory[0, 1:16:2].any()


def test_transposed_planes_with_everything_else_between_them(monkeypatch):
    """numpy must not see an overlap where there is none: it then copies by way of arrays that it makes, without end."""

    def copy(into, given):
        assert not np.may_share_memory(into, given)
        original(into, given)

    original = np.copyto
    monkeypatch.setattr(np, "copyto", copy)
    rng = np.random.default_rng(3)
    count, heads, dim, page = 2, 2, 32, 32
    nbytes = count * heads * dim * page * 2
    room = rng.integers(0, 256, 5 * nbytes, np.uint8)  # plane, chunk, plane, chunk, plane
    views = [room[at * nbytes :][:nbytes].view(np.uint16).reshape(count, heads, dim, page) for at in (0, 2, 4)]
    axes = ("page", "head", "dim", "token")
    planes = [
        Plane.of(view, axes, group="g", layer=layer, role="latent", dtype="bfloat16")
        for layer, view in enumerate(views)
    ]
    slots = np.array([40, 3, 4, 5])
    rows = np.stack([view.transpose(0, 3, 1, 2).reshape(-1, heads, dim)[slots] for view in views])
    chunk = room[nbytes:][: rows.nbytes]
    kernels = CPUKernels()
    plan = kernels.plan(KVLayout(tuple(planes)), slots)
    kernels.gather(planes, (0, heads), plan, chunk)
    assert chunk.tobytes() == rows.tobytes()
    given = room[3 * nbytes :][: rows.nbytes]
    kernels.scatter(planes, (0, heads), plan, given)
    again = np.stack([view.transpose(0, 3, 1, 2).reshape(-1, heads, dim)[slots] for view in views])
    assert given.tobytes() == again.tobytes()
