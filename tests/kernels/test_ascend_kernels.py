"""The public suite on the Ascend kernels, on a pretend NPU; what they ask of torch and of CANN."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from lmcache_kernels_ascend.acl import Acl
from lmcache_kernels_ascend.kernels import AscendKernels
from lmcache_sdk.errors import DeviceError, LayoutError
from lmcache_sdk.kernels import Bytes, DeviceKernels, Kernels, choose, host_buffer
from lmcache_sdk.layout import KVLayout, Plane
from lmcache_sdk.testing.kernels import KernelTests, Placed
from tests.kernels import pretend_npu
from tests.kernels.conftest import Build

library = pretend_npu.install()

# What a real NPU must offer: two operations, views, and a small table's copy to the device.
OPERATIONS = {
    "index_select.out", "index_copy_.default",
    "as_strided.default", "detach.default", "slice.Tensor", "unbind.int", "view.default", "view.dtype",
    "copy_.default",
}  # fmt: skip


@pytest.fixture(autouse=True)
def linux(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that can pin, whatever the tests run on."""
    monkeypatch.setattr("platform.release", lambda: "6.8.0")


@pytest.fixture(scope="module")
def ascend(build_stub: Build) -> AscendKernels:
    return AscendKernels(Acl(build_stub("acl").path), staging_bytes=1 << 20)


def place(data: Bytes) -> Placed:
    room = torch.empty(data.size + 64, dtype=torch.uint8, device="npu")
    start = -room.data_ptr() % 64
    owner = room[start : start + data.size]
    owner.raw.copy_(torch.from_numpy(data))
    return Placed(owner.data_ptr(), owner)


def fetch(placed: Placed) -> Bytes:
    whole: Bytes = placed.owner.raw.numpy()
    return whole


class TestAscendKernels(KernelTests):
    device = "npu:0"

    @pytest.fixture
    def kernels(self, ascend: AscendKernels) -> Iterator[Kernels]:
        """No layout may need another operation: where an NPU lacks one, torch_npu computes on the host in silence."""
        pretend_npu.operations.clear()
        yield ascend
        assert set(pretend_npu.operations) <= OPERATIONS

    def place(self, data: Bytes) -> Placed:
        return place(data)

    def fetch(self, placed: Placed) -> Bytes:
        return fetch(placed)


def cache(pages: int, dim: int) -> tuple[torch.Tensor, KVLayout]:
    """uint8 [2, pages, 4 tokens, 2 heads, dim] as an engine would hold it."""
    memory = torch.empty((2, pages, 4, 2, dim), dtype=torch.uint8, device="npu")
    memory.raw.random_(0, 256)
    axes = ("page", "token", "head", "dim")
    planes = (Plane.of(memory[at], axes, group="g", layer=0, role="kv"[at]) for at in range(2))
    return memory, KVLayout(tuple(planes), "npu:0")


@pytest.mark.parametrize(("dim", "large"), [(64, False), (16 << 10, True)])
def test_what_is_asked_of_the_device(build_stub: Build, dim: int, large: bool) -> None:
    stub = build_stub("acl")
    kernels = AscendKernels(Acl(stub.path))
    memory, layout = cache(8, dim)
    slots = np.array([4, 5, 6, 7, 20, 21, 22, 23])
    chunk = host_buffer(2 * slots.size * 2 * dim)
    assert kernels.pin(chunk)
    stream, plan, planes = kernels.stream("npu:0"), kernels.plan(layout, slots), layout.planes_of("g", [0])
    number = stream._stream.npu_stream
    pretend_npu.operations.clear()
    pretend_npu.streams.clear()
    stub.clear()
    stream.gather(planes, (0, 2), plan, chunk)
    assert pretend_npu.streams == (set() if large else {number}), "in order with the transfers"
    chosen = memory.raw.view(2, 32, 2 * dim)[:, slots]
    assert np.array_equal(chunk.reshape(2, 8, -1), chosen.numpy())
    transfers = [line for line in stub.lines() if "Memcpy" in line]
    assert transfers == ([f"MemcpyBatchAsync 4 1->0 {number}"] if large else [f"MemcpyAsync {chunk.size} 2 {number}"])
    chunk[:] = 7
    stub.clear()
    stream.scatter(planes, (0, 2), plan, chunk)
    assert (memory.raw.view(2, 32, 2 * dim)[:, slots] == 7).all()
    transfers = [line for line in stub.lines() if "Memcpy" in line]
    assert transfers == ([f"MemcpyBatchAsync 4 0->1 {number}"] if large else [f"MemcpyAsync {chunk.size} 1 {number}"])
    assert set(pretend_npu.operations) == (set() if large else OPERATIONS)


def test_the_pretend_device_refuses_what_a_real_one_would() -> None:
    memory, _ = cache(2, 16)
    with pytest.raises(RuntimeError, match="found one on cpu"):
        memory.view(-1, 16).index_select(0, torch.arange(3))
    with pytest.raises(RuntimeError, match="found one on cpu"):
        torch.index_select(torch.zeros(4, 16), 0, memory.new_zeros(2, dtype=torch.int64))


def test_an_older_cann_copies_one_by_one_and_pins_nothing(build_stub: Build) -> None:
    stub = build_stub("acl", 0)
    acl = Acl(stub.path)
    kernels = AscendKernels(acl)
    answer = kernels.pin(host_buffer(4096))
    assert not answer and "8.5 can" in answer.why
    _, layout = cache(2, 16)
    plan = kernels.plan(layout, [1])
    with pytest.raises(DeviceError, match="cannot be pinned: this CANN"):
        kernels.gather(layout.planes_of("g", [0]), (0, 2), plan, np.zeros(64, np.uint8))
    source, target = np.arange(96, dtype=np.uint8), np.zeros(96, np.uint8)
    rows, sizes = np.arange(2) * 48, np.array([48, 48])
    stub.clear()
    with acl.on(0):
        acl.copy(target.ctypes.data + rows, source.ctypes.data + rows, sizes, 5, device=0, to_host=True)
    assert stub.lines()[1:] == ["MemcpyAsync 48 2 5"] * 2 and np.array_equal(source, target)


def test_registration_and_errors(build_stub: Build) -> None:
    stub = build_stub("acl")
    acl = Acl(stub.path)
    with acl.on(3):
        assert acl.register(4096, 8192) == ""
    assert stub.lines() == ["SetDevice 3", "HostRegisterV2 0x1000 8192 0x10000002"]
    assert "107001" in acl.register(4096, 8192)
    acl.unregister(4096)
    with pytest.raises(DeviceError, match="aclrtHostUnregister failed: error 107000"):
        acl.unregister(4096)
    stub.fail("MemcpyBatchAsync", 507899)
    addresses = np.array([4096, 8192])
    with pytest.raises(DeviceError, match="aclrtMemcpyBatchAsync failed: error 507899"):
        acl.copy(addresses, addresses, np.array([1, 1]), 5, device=0, to_host=True)
    with pytest.raises(DeviceError, match=r"CANN's runtime cannot be used: .*set_env\.sh"):
        Acl("no-such-file.so")


def test_more_than_cann_can_take_is_several_calls(build_stub: Build) -> None:
    stub = build_stub("acl")
    acl = Acl(stub.path)
    source = np.random.default_rng(0).integers(0, 256, (5000, 16), np.uint8)
    target = np.zeros_like(source)
    rows = np.arange(5000) * 16
    with acl.on(0):
        acl.copy(target.ctypes.data + rows, source.ctypes.data + rows, np.full(5000, 16), 5, device=0, to_host=True)
    assert [line.split()[1] for line in stub.lines() if "Batch" in line] == ["4096", "904"]
    assert np.array_equal(source, target)


@pytest.mark.parametrize(
    ("release", "pins"), [("4.19.90", False), ("5.10.0-60.oe2203", False), ("5.11-rc1", True), ("6.8.0", True)]
)
def test_nothing_is_pinned_where_the_kernel_is_too_old_for_it(
    build_stub: Build, monkeypatch: pytest.MonkeyPatch, release: str, pins: bool
) -> None:
    stub = build_stub("acl")
    monkeypatch.setattr("platform.release", lambda: release)
    acl = Acl(stub.path)
    with acl.on(0):
        answer = acl.register(4096, 8192)
    assert answer == "" if pins else release in answer
    assert any("HostRegisterV2" in line for line in stub.lines()) == pins


def test_memory_is_registered_on_a_device_that_the_process_uses(
    build_stub: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    stub = build_stub("acl")
    kernels = AscendKernels(Acl(stub.path), staging_bytes=64)
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, dtype, device: empty(*size, dtype=dtype))
    kernels.stream("npu:3")
    assert kernels.pin(host_buffer(4096))
    before, registered = stub.lines()[-2:]
    assert before == "SetDevice 3" and registered.startswith("HostRegisterV2")


def test_a_thread_gets_its_own_device_back(build_stub: Build) -> None:
    stub = build_stub("acl")
    acl = Acl(stub.path)
    with acl.on(3), acl.on(1):
        assert stub.current() == 1 + 1
    assert stub.current() == 3 + 1, "and one that had none keeps it"
    assert stub.lines() == ["SetDevice 3", "SetDevice 1", "SetDevice 3"]


def test_what_torch_says_of_an_event_is_an_error_of_the_device(
    ascend: AscendKernels, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The only kind that the connector keeps from the engine's threads."""
    stream = ascend.stream("npu:0")
    event, engines = stream.record(), pretend_npu.Stream("npu:0")

    def fail(*arguments: Any) -> None:
        raise RuntimeError("the device is lost")

    monkeypatch.setattr(pretend_npu.Stream, "wait_event", fail)
    monkeypatch.setattr(pretend_npu.Event, "record", fail)
    for call in (stream.record, lambda: stream.wait(event), lambda: event.hold(engines)):
        with pytest.raises(DeviceError, match="the device is lost"):
            call()


def test_other_events_and_devices_without_a_number_are_refused_by_name(ascend: AscendKernels) -> None:
    with pytest.raises(LayoutError, match=r"not for torch\.Event"):
        ascend.stream("npu:0").wait(torch.Event("cpu"))
    for call in (ascend.stream, lambda device: ascend.allocate(device, 8)):
        with pytest.raises(DeviceError, match="'npu' does not say which device; npu:0"):
            call("npu")


def test_events_order_streams(ascend: AscendKernels) -> None:
    stream = ascend.stream("npu:0")
    number = stream._stream.npu_stream
    pretend_npu.log.clear()
    event = stream.record()
    engines: Any = pretend_npu.Stream("npu:0")
    event.hold(engines)
    stream.wait(event)
    theirs = pretend_npu.Event()
    stream.wait(theirs)
    event.wait()
    assert event.done()
    assert pretend_npu.log == [
        ("record", number, event.event),
        ("wait", engines.npu_stream, event.event),
        ("wait", number, event.event),
        ("wait", number, theirs),
        ("synchronize", 0, event.event),
    ]


def test_it_is_what_the_interface_asks_for(ascend: AscendKernels) -> None:
    assert isinstance(ascend, DeviceKernels)


def test_the_package_is_announced_and_imports_no_torch_npu() -> None:
    """Where there is no NPU it says so; a torch_npu that is installed without CANN must not be touched."""
    assert choose("npu", {}).package == "lmcache-kernels-ascend"
    assert importlib.util.find_spec("torch_npu") is None
    script = (
        "import sys; from lmcache_sdk.kernels import kernels_for\n"
        "sys.modules['torch_npu'] = None  # importing it would fail\n"
        "try: kernels_for('npu:0')\n"
        "except Exception as error: print(type(error).__name__, error)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("DeviceError torch_npu is not loaded"), done.stderr
