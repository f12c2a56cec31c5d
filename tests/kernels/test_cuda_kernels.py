"""The public suite on the Triton kernels under the interpreter, and on transfers run by run; cuts; calibration."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from lmcache_kernels_cuda import blocks
from lmcache_kernels_cuda.driver import CUDADriver, Driver, HIPDriver
from lmcache_kernels_cuda.kernels import CUDAKernels
from lmcache_kernels_cuda.streams import Device
from lmcache_sdk.errors import DeviceError, LayoutError
from lmcache_sdk.kernels import DeviceKernels, Kernels, host_buffer, kernels_for
from lmcache_sdk.layout import KVLayout, Plane
from lmcache_sdk.testing.kernels import KernelTests
from tests.kernels.conftest import HAS_GPU, Build
from tests.kernels.interpreted import DIRECT, STAGED, HostDevice, InterpretedKernels

pytestmark = pytest.mark.skipif(HAS_GPU, reason="there is a GPU, so Triton's interpreter is off: see test_gpu.py")

DRIVERS: dict[str, type[Driver]] = {"cuda": CUDADriver, "hip": HIPDriver}  # torch calls both devices "cuda"


@pytest.fixture(scope="module")
def staged_kernels(build_stub: Build) -> Kernels:
    return InterpretedKernels(CUDADriver(build_stub("cuda").path), routes=STAGED)


@pytest.fixture(scope="module")
def direct_kernels(build_stub: Build) -> Kernels:
    return InterpretedKernels(CUDADriver(build_stub("cuda").path), routes=DIRECT)


class TestTritonKernels(KernelTests):
    """All through the staging buffer."""

    device = "cuda:0"

    @pytest.fixture
    def kernels(self, staged_kernels: Kernels) -> Kernels:
        return staged_kernels


class TestRunByRun(KernelTests):
    """All by copy engine."""

    device = "cuda:0"

    @pytest.fixture
    def kernels(self, direct_kernels: Kernels) -> Kernels:
        return direct_kernels


def pool(pages: int = 8, page: int = 4, heads: int = 2, dim: int = 32, layers: int = 3) -> tuple[Any, KVLayout]:
    """bf16 memory, NHD: [layer, k or v, page, token, head, dim]."""
    memory = np.random.default_rng(1).integers(0, 1 << 16, (layers, 2, pages, page, heads, dim), np.uint16)
    axes = ("page", "token", "head", "dim")
    planes = tuple(
        Plane.of(memory[layer, at], axes, group="g", layer=layer, role="kv"[at], dtype="bfloat16")
        for layer in range(layers)
        for at in range(2)
    )
    return memory, KVLayout(planes, "cuda:0")


@pytest.mark.parametrize("staging_bytes", [100, 64 * 4, 1000, 4096])
@pytest.mark.parametrize("verb", ["gather", "scatter"])
@pytest.mark.parametrize("vendor", DRIVERS)
def test_a_small_staging_buffer_is_used_again_and_again(
    build_stub: Build, vendor: str, staging_bytes: int, verb: str
) -> None:
    """Less than a row, so that it is not used; than a plane; not a multiple of anything; more than a plane."""
    driver = DRIVERS[vendor](build_stub(vendor).path)
    kernels = InterpretedKernels(driver, routes=STAGED, staging_bytes=staging_bytes)
    memory, layout = pool()
    slots = np.array([5, 1, 9, 30, 17, 3, 2, 8, 31])
    plan, planes = kernels.plan(layout, slots), layout.planes_of("g", range(3))
    chunk = np.zeros(3 * 2 * slots.size * 2 * 32 * 2, np.uint8)
    chosen = memory.reshape(6, 32, 2, 32)
    if verb == "gather":
        kernels.gather(planes, (0, 2), plan, chunk)
        assert np.array_equal(chunk.view(np.uint16).reshape(6, slots.size, 2, 32), chosen[:, slots])
    else:
        before = memory.copy()
        chunk[:] = np.arange(chunk.size) % 251
        kernels.scatter(planes, (0, 2), plan, chunk)
        assert np.array_equal(chosen[:, slots], chunk.view(np.uint16).reshape(6, slots.size, 2, 32))
        others = np.setdiff1d(np.arange(32), slots)
        assert np.array_equal(chosen[:, others], before.reshape(6, 32, 2, 32)[:, others])


def test_copies_that_are_done_on_return_go_through_a_bounded_buffer(
    build_stub: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole planes at a time, or some tokens where a plane does not fit."""
    memory, layout = pool()
    slots = np.array([5, 1, 9, 30, 17])
    for limit in (3 * 5 * 128, 2 * 128 + 5):
        monkeypatch.setattr("lmcache_sdk.kernels.device._BOUNCE_BYTES", limit)
        kernels = InterpretedKernels(CUDADriver(build_stub("cuda").path), routes=DIRECT)
        chunk = np.zeros(6 * 5 * 128, np.uint8)
        plan, planes = kernels.plan(layout, slots), layout.planes_of("g", range(3))
        kernels.gather(planes, (0, 2), plan, chunk)
        wanted = memory.reshape(6, 32, 64)[:, slots]
        assert np.array_equal(chunk.view(np.uint16).reshape(6, 5, 64), wanted)
        memory[:] = 0
        kernels.scatter(planes, (0, 2), plan, chunk)
        assert np.array_equal(memory.reshape(6, 32, 64)[:, slots], chunk.view(np.uint16).reshape(6, 5, 64))
        assert not memory.reshape(6, 32, 64)[:, np.setdiff1d(np.arange(32), slots)].any()


@pytest.mark.parametrize("vendor", DRIVERS)
def test_neighbours_are_merged_before_they_are_queued(build_stub: Build, vendor: str) -> None:
    """Runs of different lengths, one descriptor each, all planes in one call."""
    stub = build_stub(vendor)
    kernels = InterpretedKernels(DRIVERS[vendor](stub.path), routes=DIRECT)
    memory, layout = pool()
    slots = np.array([4, 5, 6, 7, 8, 20, 21, 3])  # across pages; then two more runs
    chunk = host_buffer(6 * 8 * 128)
    assert kernels.pin(chunk)
    stream = kernels.stream("cuda:0")
    stub.clear()
    stream.gather(layout.planes_of("g", range(3)), (0, 2), kernels.plan(layout, slots), chunk)
    (line,) = [line for line in stub.lines() if "Memcpy" in line]
    assert line.split()[:2] == [{"cuda": "MemcpyBatchAsync_v2", "hip": "MemcpyBatchAsync"}[vendor], str(3 * 6)]
    assert np.array_equal(chunk.view(np.uint16).reshape(6, 8, 64), memory.reshape(6, 32, 64)[:, slots])


def test_what_is_not_pinned_is_never_queued(build_stub: Build) -> None:
    stub = build_stub("cuda")
    kernels = InterpretedKernels(CUDADriver(stub.path), routes=DIRECT)
    memory, layout = pool()
    plan, planes = kernels.plan(layout, [1, 2]), layout.planes_of("g", [0])
    stream, nbytes = kernels.stream("cuda:0"), 2 * 2 * 128
    buffers = host_buffer(8192)
    first, second = buffers[:4096], buffers[4096:]
    assert kernels.pin(first) and kernels.pin(second)
    before = memory.copy()
    stub.clear()
    for chunk in (np.zeros(nbytes, np.uint8), buffers[4096 - 8 : 4096 - 8 + nbytes]):  # nor across two registrations
        for copy in (stream.gather, stream.scatter):
            with pytest.raises(LayoutError, match="pinned buffer"):
                copy(planes, (0, 2), plan, chunk)
    stream.gather(planes, (0, 2), plan, first[:nbytes])
    kernels.unpin(first)
    with pytest.raises(LayoutError, match="pinned buffer"):
        stream.gather(planes, (0, 2), plan, first[:nbytes])
    assert np.array_equal(memory, before)
    assert sum("Memcpy" in line for line in stub.lines()) == 1


def test_a_plan_for_another_device_is_refused(build_stub: Build) -> None:
    kernels = InterpretedKernels(CUDADriver(build_stub("cuda").path), routes=DIRECT)
    _, layout = pool()
    chunk = host_buffer(4096)
    assert kernels.pin(chunk)
    plan = kernels.plan(KVLayout(layout.planes, "cuda:1"), [0])
    with pytest.raises(LayoutError, match="cuda:1"):
        kernels.stream("cuda:0").gather(layout.planes_of("g", [0]), (0, 2), plan, chunk[:256])
    with pytest.raises(DeviceError, match="'cuda:1' cannot be used: invalid device ordinal"):
        kernels.gather(layout.planes_of("g", [0]), (0, 2), plan, chunk[:256])


def test_pinning_is_counted_and_answers_with_the_drivers_reason(build_stub: Build) -> None:
    stub = build_stub("cuda")
    kernels = InterpretedKernels(CUDADriver(stub.path), routes=DIRECT)
    buffer = host_buffer(4096)
    assert kernels.pin(buffer) and kernels.pin(buffer)
    assert stub.names().count("Register") == 1
    kernels.unpin(buffer)
    assert "Unregister" not in stub.names()
    kernels.unpin(buffer)
    kernels.unpin(buffer)
    assert stub.names().count("Unregister") == 1
    stub.fail("Register", 2)
    answer = kernels.pin(buffer)
    assert not answer and answer.why == "CUDA_ERROR_OUT_OF_MEMORY"
    stub.fail("CtxPushCurrent", 2)
    answer = kernels.pin(buffer)
    assert not answer and answer.why == "cuCtxPushCurrent_v2 failed: CUDA_ERROR_OUT_OF_MEMORY"


def test_the_first_queue_of_a_device_measures_it(build_stub: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lmcache_kernels_cuda.kernels._CALIBRATION_BYTES", 1 << 20)
    kernels = InterpretedKernels(CUDADriver(build_stub("cuda").path))
    first = kernels.stream("cuda:0")
    assert first.routes.gather == first.routes.scatter == 8 << 10  # nothing is slower than the interpreter
    assert kernels.stream("cuda:0").routes is first.routes


@pytest.mark.parametrize("vendor", DRIVERS)
def test_an_event_is_for_any_thread(build_stub: Build, vendor: str) -> None:
    """Also for one that has never had to do with the device, and it leaves none behind there."""
    stub = build_stub(vendor)
    event = InterpretedKernels(DRIVERS[vendor](stub.path), routes=DIRECT).stream("cuda:0").record()
    seen: list[Any] = []

    def engine() -> None:
        event.wait()
        event.hold(SimpleNamespace(cuda_stream=77))
        seen.extend([event.done(), stub.current()])

    thread = threading.Thread(target=engine)
    thread.start()
    thread.join()
    assert seen == [True, 0]
    assert f"StreamWaitEvent 77 {event.handle} 0" in stub.lines()


def test_layers_that_are_aligned_differently_have_one_plan(build_stub: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    """And what the kernel is promised of addresses is true of each, which the interpreter does not check."""
    launch, promised = blocks.launch, list[int]()

    def check(
        bases: torch.Tensor, offsets: torch.Tensor, staging: Any, block: int, alignment: int, **rest: Any
    ) -> None:
        word = blocks.word_bytes(alignment)
        assert not (bases % alignment).any() and not (offsets * word % alignment).any() and not block % alignment
        promised.append(alignment)
        launch(bases, offsets, staging, block, alignment, **rest)

    monkeypatch.setattr(blocks, "launch", check)
    kernels = InterpretedKernels(CUDADriver(build_stub("cuda").path), routes=STAGED)
    room = np.random.default_rng(1).integers(0, 256, 3 * 4096, np.uint8)
    start = -room.ctypes.data % 16
    views = [room[start + at :][:2048].view(np.uint16).reshape(8, 4, 32) for at in (0, 4098, 8200)]
    axes = ("page", "token", "dim")
    planes = tuple(
        Plane.of(view, axes, group="g", layer=layer, role="latent", dtype="bfloat16")
        for layer, view in enumerate(views)
    )
    slots = np.array([5, 30, 6])
    layout = KVLayout(planes, "cuda:0")
    plan, chunk = kernels.plan(layout, slots), np.zeros(3 * 64, np.uint8)
    for layer, view in enumerate(views):
        kernels.gather(layout.planes_of("g", [layer]), (0, 1), plan, chunk)
        assert np.array_equal(chunk.view(np.uint16).reshape(3, 32), view.reshape(32, 32)[slots])
    assert promised == [16, 2, 8]


@pytest.mark.parametrize("vendor", DRIVERS)
def test_memory_is_registered_on_a_device_that_the_process_uses(
    build_stub: Build, monkeypatch: pytest.MonkeyPatch, vendor: str
) -> None:
    """The first one may be another rank's, and would hold a context of this process for it."""
    monkeypatch.setattr(InterpretedKernels, "_device", lambda kernels, name: HostDevice(name))
    stub = build_stub(vendor)
    kernels = InterpretedKernels(DRIVERS[vendor](stub.path), routes=DIRECT)
    kernels.stream("cuda:1")
    assert kernels.pin(host_buffer(4096))
    entered = [line for line in stub.lines() if line.startswith(("CtxPush", "SetDevice", "Register"))]
    register = next(number for number, line in enumerate(entered) if line.startswith("Register"))
    assert entered[register - 1] == {"cuda": "CtxPushCurrent 101", "hip": "SetDevice 1"}[vendor]


@pytest.mark.parametrize("vendor", DRIVERS)
def test_events_order_queues(build_stub: Build, monkeypatch: pytest.MonkeyPatch, vendor: str) -> None:
    """The engine's events, and ours of another queue; a stand-in copies at once, so its lines must show it."""
    monkeypatch.setattr("torch.cuda.Event", SimpleNamespace)
    stub = build_stub(vendor)
    kernels = InterpretedKernels(DRIVERS[vendor](stub.path), routes=DIRECT)
    stream, other = kernels.stream("cuda:0"), kernels.stream("cuda:0")
    stub.clear()
    event = other.record()
    stream.wait(event)
    stream.wait(SimpleNamespace(cuda_event=77))
    assert [line for line in stub.lines() if "Event" in line] == [
        f"Event {2 | 1}",
        f"EventRecord {event.handle} {other._handle}",
        f"StreamWaitEvent {stream._handle} {event.handle} 0",
        f"StreamWaitEvent {stream._handle} 77 0",
    ]


@pytest.mark.parametrize("vendor", DRIVERS)
def test_a_queue_waits_for_no_other_by_itself(build_stub: Build, vendor: str) -> None:
    """Nor does torch's default stream for it."""
    stub = build_stub(vendor)
    InterpretedKernels(DRIVERS[vendor](stub.path), routes=DIRECT).stream("cuda:0")
    assert [line for line in stub.lines() if line.startswith("Stream")] == ["Stream 1"]


@pytest.mark.parametrize("vendor", DRIVERS)
def test_queues_and_events_that_nobody_has_any_more_are_used_again(build_stub: Build, vendor: str) -> None:
    """A connector takes two queues, and a process may live through many connectors."""
    stub = build_stub(vendor)
    kernels = InterpretedKernels(DRIVERS[vendor](stub.path), routes=DIRECT)
    first, second = kernels.stream("cuda:0"), kernels.stream("cuda:0")
    kept = first.record()
    handle = first._handle
    assert handle != second._handle
    del first
    third = kernels.stream("cuda:0")
    assert third._handle == handle and kernels.stream("cuda:0")._handle not in (handle, second._handle)
    others = [third.record() for _ in range(3)]
    assert len({kept.handle, *(event.handle for event in others)}) == 4, "an event outlives its queue"
    stub.clear()
    for _ in range(5):
        others = []
        others = [second.record(), third.record(), second.record()]
    assert not [name for name in stub.names() if name in ("Stream", "Event")] and kept.done()
    assert len({kept.handle, *(event.handle for event in others)}) == 4


def test_memory_to_measure_with_spoils_no_graph(build_stub: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    stub = build_stub("cuda")
    modes: list[int] = []
    monkeypatch.setattr(HostDevice, "empty", lambda device, nbytes: modes.append(stub.mode) or torch.empty(nbytes))
    InterpretedKernels(CUDADriver(stub.path)).allocate("cuda:0", 8)
    assert modes == [2]


class Torch:
    """What ``torch.cuda`` does with the current device, as far as it matters: of two devices, and a new thread."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.current, self.contexts, self.synchronized = 0, set[int](), 0
        self.on = 0  # the current stream
        for name in ("device", "stream", "ExternalStream", "current_stream"):
            monkeypatch.setattr(f"torch.cuda.{name}", getattr(self, name))

    def _set(self, number: int) -> None:
        self.current = number
        self.contexts.add(number)

    @contextmanager
    def device(self, device: torch.device) -> Iterator[None]:
        before = self.current
        self._set(device.index)
        yield
        self.current = before  # makes no context

    def ExternalStream(self, handle: int, device: torch.device) -> tuple[int, torch.device]:  # noqa: N802 - torch's name
        return handle, device

    @contextmanager
    def stream(self, stream: tuple[int, torch.device]) -> Iterator[None]:
        before = self.current
        self._set(stream[1].index)
        self.on = stream[0]
        yield
        self.on = 0
        self._set(before)

    def current_stream(self, device: torch.device) -> SimpleNamespace:
        return SimpleNamespace(synchronize=lambda: setattr(self, "synchronized", self.synchronized + 1))


def test_no_context_is_made_on_a_device_that_is_another_process_s(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = Torch(monkeypatch)
    with Device("cuda:1").on(5):
        assert fake.current == 1 and fake.on == 5
    assert fake.current == fake.on == 0 and fake.contexts == {1}


def test_new_memory_has_no_earlier_use(monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine's stream may not be done with what torch hands out again, and copies do not wait for that stream."""
    fake = Torch(monkeypatch)
    device = Device("cuda:0")
    device.torch = torch.device("cpu")
    assert device.empty(8).numel() == 8 and fake.synchronized == 1


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), AssertionError("not compiled with CUDA"), OSError("no cc")]
)
@pytest.mark.parametrize("where", ["empty", "upload"])  # of staging buffers; when the device is measured
def test_what_torch_and_triton_say_is_an_error_of_the_device(
    build_stub: Build, monkeypatch: pytest.MonkeyPatch, where: str, error: Exception
) -> None:
    kernels = InterpretedKernels(CUDADriver(build_stub("cuda").path))

    def fail(*arguments: Any) -> None:
        raise error

    monkeypatch.setattr(HostDevice, where, fail)
    with pytest.raises(DeviceError, match=f"'cuda:0' cannot be used: {error}"):
        kernels.stream("cuda:0")
    if where == "empty":
        with pytest.raises(DeviceError, match=f"'cuda:0' cannot be used: {error}"):
            kernels.allocate("cuda:0", 8)


def test_other_events_and_devices_without_a_number_are_refused_by_name(build_stub: Build) -> None:
    stream = InterpretedKernels(CUDADriver(build_stub("cuda").path), routes=DIRECT).stream("cuda:0")
    with pytest.raises(LayoutError, match=r"not for torch\.Event"):
        stream.wait(torch.Event("cpu"))
    with pytest.raises(DeviceError, match="'cuda' does not say which device; cuda:0"):
        Device("cuda")


def test_it_is_what_the_interface_asks_for(build_stub: Build) -> None:
    assert isinstance(InterpretedKernels(CUDADriver(build_stub("cuda").path)), DeviceKernels)


@pytest.mark.parametrize(("vendor", "hip"), [("cuda", None), ("hip", "7.2.1")])
def test_the_driver_is_that_of_torchs_vendor_and_rocm_stages(
    build_stub: Build, monkeypatch: pytest.MonkeyPatch, vendor: str, hip: str | None
) -> None:
    """A large registration is not reliable on ROCm, so pool memory is by default not registered there."""
    path = build_stub(vendor).path
    monkeypatch.setattr(f"lmcache_kernels_cuda.kernels.{DRIVERS[vendor].__name__}", partial(DRIVERS[vendor], path))
    monkeypatch.setattr(torch.version, "hip", hip)
    assert bool(CUDAKernels().prefers_staging) == (vendor == "hip")


def test_without_a_device_the_installed_package_says_so() -> None:
    with pytest.raises(DeviceError, match="the CUDA driver cannot be used"):
        kernels_for("cuda:0")
