"""The calls that leave for the driver: names, arguments, order, errors, and versions that lack a call."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import numpy as np
import pytest

from lmcache_kernels_cuda.driver import CUDADriver, Driver, HIPDriver, _mapped
from lmcache_sdk.errors import DeviceError
from tests.kernels.conftest import Build, Stub

VENDORS = {"cuda": CUDADriver, "hip": HIPDriver}
FORMS = [("cuda", 2), ("cuda", 1), ("cuda", 0), ("hip", 1), ("hip", 0)]


Open = Callable[..., tuple[Stub, Driver]]


@pytest.fixture
def opened(build_stub: Build) -> Iterator[Open]:
    """A stub of a vendor, and a driver that is on a device."""
    with ExitStack() as stack:

        def opened(vendor: str, batch: int = 2, device: int = 0) -> tuple[Stub, Driver]:
            stub = build_stub(vendor, batch)
            driver: Driver = VENDORS[vendor](stub.path)
            stack.enter_context(driver.on(device))
            return stub, driver

        yield opened


def batched(vendor: str, batch: int) -> str:
    """The call for many copies, if there is one."""
    return f"MemcpyBatchAsync{'_v2' if (vendor, batch) == ('cuda', 2) else ''}" if batch else ""


def copies(count: int, size: int = 48) -> tuple[list[np.ndarray], np.ndarray, np.ndarray]:
    """Addresses and sizes of rows to be copied to other rows in reverse."""
    source = np.random.default_rng(0).integers(0, 256, (count, size), np.uint8)
    target = np.zeros_like(source)
    rows = np.arange(count) * size
    arrays = [target.ctypes.data + rows[::-1], source.ctypes.data + rows, np.full(count, size)]
    return arrays, source, target


@pytest.mark.parametrize(("vendor", "batch"), FORMS)
def test_many_copies_are_one_call_where_the_driver_has_it(opened: Open, vendor: str, batch: int) -> None:
    stub, driver = opened(vendor, batch)
    stream = driver.new_stream()
    arrays, source, target = copies(5)
    stub.clear()
    driver.copy(*arrays, stream)
    assert np.array_equal(target, source[::-1])
    if batch:
        assert stub.lines() == [f"{batched(vendor, batch)} 5 {stream}"]
    else:
        assert stub.names() == ["MemcpyAsync"] * 5
        assert stub.lines()[0].endswith(f" 48 {stream}")


@pytest.mark.parametrize(("vendor", "batch"), [("cuda", 2), ("cuda", 1), ("hip", 1)])
def test_more_than_a_driver_can_take_is_several_calls(opened: Open, vendor: str, batch: int) -> None:
    stub, driver = opened(vendor, batch)
    arrays, source, target = copies(10_000, 16)
    driver.copy(*arrays, driver.new_stream())
    assert np.array_equal(target, source[::-1])
    assert [line.split()[1] for line in stub.lines() if "Batch" in line] == ["4096", "4096", "1808"]


def test_hip_is_told_the_device(opened: Open) -> None:
    stub, _ = opened("hip", device=3)
    assert stub.lines() == ["GetDevice 0", "SetDevice 3"]


@pytest.mark.parametrize(("vendor", "batch"), [("cuda", 2), ("hip", 1)])
def test_one_copy_is_no_batch(opened: Open, vendor: str, batch: int) -> None:
    stub, driver = opened(vendor, batch)
    arrays, source, target = copies(1)
    driver.copy(*arrays, driver.new_stream())
    assert stub.names()[-1] == "MemcpyAsync" and np.array_equal(target, source)


@pytest.mark.parametrize("vendor", VENDORS)
def test_events_and_streams(opened: Open, vendor: str) -> None:
    stub, driver = opened(vendor)
    stream, other = driver.new_stream(), driver.new_stream()
    event = driver.new_event()
    stub.clear()
    driver.record(event, stream)
    driver.hold(other, event)
    assert driver.done(event)
    stub.fail("EventQuery", 600)
    assert not driver.done(event)
    driver.wait(event)
    assert stub.lines() == [
        f"EventRecord {event} {stream}",
        f"StreamWaitEvent {other} {event} 0",
        f"EventQuery {event}",
        f"EventQuery {event}",
        f"EventSynchronize {event}",
    ]
    assert len({stream, other, event}) == 3


def test_the_primary_context_is_retained_once_and_entered_each_time(build_stub: Build) -> None:
    stub = build_stub("cuda")
    driver = CUDADriver(stub.path)
    for device in (1, 1, 0, 1):
        with driver.on(device):
            assert stub.current() == 100 + device
    names = stub.names()
    assert names.count("DevicePrimaryCtxRetain") == 2
    assert names.count("CtxPushCurrent") == names.count("CtxPopCurrent") == 4


@pytest.mark.parametrize("vendor", VENDORS)
def test_a_thread_is_on_the_device_only_meanwhile(build_stub: Build, vendor: str) -> None:
    """An engine's thread that asks for an event of another device must not be moved there, also where that fails."""
    stub = build_stub(vendor)
    driver: Driver = VENDORS[vendor](stub.path)
    seen: list[int] = []

    def engine() -> None:
        with driver.on(1):
            seen.append(stub.current())
            with driver.on(2):
                seen.append(stub.current())
            seen.append(stub.current())
            stub.fail("EventQuery", 1)
            with pytest.raises(DeviceError), driver.on(2):
                driver.done(5)
            seen.append(stub.current())

    thread = threading.Thread(target=engine)
    thread.start()
    thread.join()
    one, two = (101, 102) if vendor == "cuda" else (1, 2)
    assert seen == [one, two, one, one]


@pytest.mark.parametrize("vendor", VENDORS)
def test_a_graph_that_another_thread_captures_is_not_spoiled(build_stub: Build, vendor: str) -> None:
    """Segments are registered in the background, and the engine may come to capture a graph meanwhile."""
    stub = build_stub(vendor)
    driver: Driver = VENDORS[vendor](stub.path)
    stub.capture()
    with driver.on(0):
        stream, event = driver.new_stream(), driver.new_event()
        assert driver.register(4096, 8192) == ""
        arrays, source, target = copies(2)
        driver.copy(*arrays, stream)
        driver.record(event, stream)
        driver.hold(stream, event)
        driver.wait(event)
        assert driver.done(event) and np.array_equal(target, source[::-1])
        with driver.on(1):
            pass
        driver.unregister(4096)
    assert not stub.spoiled and stub.mode == 0
    stub.fail("EventQuery", 1)
    with pytest.raises(DeviceError), driver.on(0):
        driver.done(event)
    stub.fail("SetDevice" if vendor == "hip" else "CtxPushCurrent", 1)
    with pytest.raises(DeviceError), driver.on(0):
        pass
    assert stub.mode == 0, "an engine's thread is to capture as before"


@pytest.mark.parametrize("vendor", VENDORS)
@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("Stream", lambda driver: driver.new_stream()),
        ("Event", lambda driver: driver.new_event()),
        ("EventRecord", lambda driver: driver.record(1, 2)),
        ("EventQuery", lambda driver: driver.done(1)),
        ("EventSynchronize", lambda driver: driver.wait(1)),
        ("StreamWaitEvent", lambda driver: driver.hold(2, 1)),
    ],
)
def test_an_error_is_named(opened: Open, vendor: str, name: str, call: Callable[[Driver], object]) -> None:
    stub, driver = opened(vendor)
    stub.fail(name, 2)  # out of memory, with both
    with pytest.raises(DeviceError, match=rf"{name}\w* failed: \w*(OutOfMemory|OUT_OF_MEMORY)"):
        call(driver)


@pytest.mark.parametrize(("vendor", "batch"), FORMS)
def test_a_copy_that_fails_is_an_error(opened: Open, vendor: str, batch: int) -> None:
    stub, driver = opened(vendor, batch)
    arrays, _, target = copies(3)
    stub.fail(batched(vendor, batch) or "MemcpyAsync", 2)
    with pytest.raises(DeviceError, match=r"emcpy\w* failed: \w*(OutOfMemory|OUT_OF_MEMORY)"):
        driver.copy(*arrays, driver.new_stream())
    assert not target.any()


@pytest.mark.parametrize("vendor", VENDORS)
def test_registration(opened: Open, vendor: str) -> None:
    stub, driver = opened(vendor)
    assert driver.register(4096, 8192) == ""
    assert stub.lines()[-1] == "Register 0x1000 8192 1"
    assert driver.register(4096, 8192)  # somebody has done it already
    driver.unregister(4096)
    with pytest.raises(DeviceError):
        driver.unregister(4096)


def test_a_driver_that_is_not_there_or_too_old_is_named(build_stub: Build) -> None:
    with pytest.raises(DeviceError, match=r"the CUDA driver cannot be used: .*no-such-file"):
        CUDADriver("no-such-file.so")
    driver = HIPDriver(build_stub("cuda").path)
    with (
        pytest.raises(DeviceError, match="the HIP driver has no hipThreadExchangeStreamCaptureMode; update it"),
        driver.on(0),
    ):
        pass


def test_hip_is_the_one_that_torch_has_loaded() -> None:
    maps = ["7f00-7f01 r-xp 00000000 00:01 5      /venv/torch/lib/libamdhip64.so", "7f02-7f03 rw-p 0 0:0 0 [heap]"]
    assert _mapped("libamdhip64.so", maps) == "/venv/torch/lib/libamdhip64.so"
    assert _mapped("libamdhip64.so", maps[1:]) == "libamdhip64.so"
    assert _mapped("libc.so").endswith(("libc.so.6", "libc.so"))
