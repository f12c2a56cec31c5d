"""The public suite on the pretend device: kernels that are nothing but queues of copies."""

from __future__ import annotations

import weakref
from collections.abc import Iterator

import pytest

from lmcache_sdk.cli.measure import device_speeds
from lmcache_sdk.kernels import Kernels, host_buffer
from lmcache_sdk.testing.kernels import KernelTests
from tests.core.late_device import DEVICE, LateDevice, LateKernels


@pytest.fixture(scope="module")
def late_kernels() -> Iterator[LateKernels]:
    device = LateDevice(seed=1)
    device.go()
    yield LateKernels(device)
    device.close()


class TestLateKernels(KernelTests):
    device = DEVICE

    @pytest.fixture
    def kernels(self, late_kernels: LateKernels) -> Kernels:
        return late_kernels


def test_what_is_pinned_stays_mapped_though_its_owner_forgets_it(late_kernels: LateKernels) -> None:
    """Other memory at its address would count as registered."""
    buffer = host_buffer(4096)
    kept = weakref.ref(buffer)
    assert late_kernels.pin(buffer)
    address = buffer.ctypes.data
    del buffer
    assert kept() is not None and address in late_kernels.pinned
    late_kernels.unpin(kept())
    assert kept() is None and address not in late_kernels.pinned


def test_a_device_is_measured_beside_one_transfer(late_kernels: LateKernels) -> None:
    """What ``doctor`` shows."""
    gather, scatter = device_speeds(late_kernels, DEVICE)
    assert (gather.name, scatter.name) == (f"gather from {DEVICE}", f"scatter to {DEVICE}")
    assert 0.01 < gather.share < 100 and 0.01 < scatter.share < 100
    assert gather.ceiling_name == "one transfer"
