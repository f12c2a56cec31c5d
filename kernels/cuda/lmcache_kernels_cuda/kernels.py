"""The entry point: CUDAKernels."""

from __future__ import annotations

import threading
import time
from functools import partial
from typing import ClassVar

import numpy as np
import torch

from lmcache_kernels_cuda.driver import CUDADriver, Driver, HIPDriver
from lmcache_kernels_cuda.routes import Routes, calibrate
from lmcache_kernels_cuda.streams import CUDAStream, Device, Spare, using
from lmcache_sdk.errors import DeviceError
from lmcache_sdk.kernels import Bytes, QueuedKernels, Room, host_buffer
from lmcache_sdk.layout import KVLayout, Plane, Strides

_STAGING_BYTES = 32 << 20
_CALIBRATION_BYTES = 8 << 20
_CALIBRATION_REPEATS = 3
_ROW_BYTES = 4096  # one kernel is compiled for all run sizes
_DIRECT, _STAGED = Routes(0, 0), Routes(1 << 62, 1 << 62)


class CUDAKernels(QueuedKernels):
    """See :class:`lmcache_sdk.kernels.DeviceKernels`. NVIDIA's and AMD's devices; torch calls both ``cuda``.

    Args:
        driver: by default that of the vendor that this torch was built for.
        routes: from which run size on the copy engines are used; by default measured at a device's first use.
        staging_bytes: memory of the device for small runs, of each queue.

    Raises:
        DeviceError: no driver, or none that can be used.
    """

    name: ClassVar[str] = "cuda"
    device_types: ClassVar[tuple[str, ...]] = ("cuda",)

    def __init__(
        self, driver: Driver | None = None, *, routes: Routes | None = None, staging_bytes: int = _STAGING_BYTES
    ) -> None:
        super().__init__()
        self._driver = driver or (HIPDriver() if torch.version.hip else CUDADriver())
        self.prefers_staging = self._driver.prefers_staging
        self._routes = routes
        self._staging_bytes = staging_bytes
        self._opening = threading.Lock()
        self._measured: dict[str, Routes] = {}  # by device
        self._spare: dict[str, Spare] = {}  # by device
        self._home = 0  # a device that this process uses

    def stream(self, device: str) -> CUDAStream:
        """See :class:`DeviceKernels`. The first one of a device measures it, for a fraction of a second."""
        made = self._stream(device, self._routes or _DIRECT)
        if self._routes is None:
            with self._opening:
                if device not in self._measured:
                    self._measured[device] = self._calibrated(device, made)
            made.routes = self._measured[device]
        return made

    def allocate(self, device: str, nbytes: int) -> Room:
        with using(device):
            opened = self._device(device)
            with self._driver.on(opened.index):
                memory = opened.empty(nbytes)
        return Room(memory.data_ptr(), memory)

    def _device(self, name: str) -> Device:
        return Device(name)

    def _stream(self, device: str, routes: Routes) -> CUDAStream:
        with using(device):
            opened = self._device(device)
            spare = self._spare.setdefault(device, Spare([], []))
            stream = CUDAStream(opened, self._driver, self.check_queued, routes, self._staging_bytes, spare)
        self._home = opened.index
        return stream

    def _register(self, address: int, nbytes: int) -> str:
        with self._driver.on(self._home):  # any device will do, but no new one: each takes memory of its own
            return self._driver.register(address, nbytes)

    def _unregister(self, address: int) -> None:
        with self._driver.on(self._home):
            self._driver.unregister(address)

    def _calibrated(self, device: str, stream: CUDAStream) -> Routes:
        chunk = host_buffer(_CALIBRATION_BYTES)
        if not (pinned := self.pin(chunk)):
            raise DeviceError(f"{chunk.nbytes} bytes of host memory cannot be pinned: {pinned.why}")
        try:
            return calibrate(partial(self._seconds, stream, self.allocate(device, 2 * chunk.nbytes), device, chunk))
        finally:
            self.unpin(chunk)

    def _seconds(
        self, stream: CUDAStream, room: Room, device: str, chunk: Bytes, run: int, to_host: bool, direct: bool
    ) -> float:
        """The best of a few copies of every second run of that size, the first one not counted."""
        tokens = run // _ROW_BYTES
        strides = Strides(2 * run, _ROW_BYTES, 0, 1)
        plane = Plane(
            "g", 0, "latent", room.base, chunk.nbytes // run, tokens, 1, _ROW_BYTES, "uint8", strides, room.owner
        )
        plan = self.plan(KVLayout((plane,), device), np.arange(chunk.nbytes // _ROW_BYTES))
        stream.routes = _DIRECT if direct else _STAGED
        took = []
        for _ in range(1 + _CALIBRATION_REPEATS):
            start = time.perf_counter()
            (stream.gather if to_host else stream.scatter)((plane,), (0, 1), plan, chunk)
            stream.record().wait()
            took.append(time.perf_counter() - start)
        return min(took[1:])
