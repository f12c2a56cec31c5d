"""The public suite on the pretend device: kernels that are nothing but queues of copies."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from lmcache_sdk.cli.measure import device_speeds
from lmcache_sdk.kernels import Kernels
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


def test_a_device_is_measured_beside_one_transfer(late_kernels: LateKernels) -> None:
    """What ``doctor`` shows."""
    gather, scatter = device_speeds(late_kernels, DEVICE)
    assert (gather.name, scatter.name) == (f"gather from {DEVICE}", f"scatter to {DEVICE}")
    assert 0.01 < gather.share < 100 and 0.01 < scatter.share < 100
    assert gather.ceiling_name == "one transfer"
