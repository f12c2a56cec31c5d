"""CUDA kernels without a device: Triton's interpreter and a stub driver work on host memory."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from lmcache_kernels_cuda.driver import Driver
from lmcache_kernels_cuda.kernels import CUDAKernels
from lmcache_kernels_cuda.routes import Routes
from lmcache_kernels_cuda.streams import Device

DIRECT, STAGED = Routes(0, 0), Routes(1 << 62, 1 << 62)


class HostDevice(Device):
    # The interpreter's time goes by the number of programs and tiles, not by their size.
    tile_words = 1 << 14
    programs = 3

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.torch = torch.device("cpu")

    def on(self, stream: int) -> AbstractContextManager[Any]:
        return nullcontext()

    def empty(self, nbytes: int) -> torch.Tensor:
        return torch.empty(nbytes, dtype=torch.uint8)


class InterpretedKernels(CUDAKernels):
    def __init__(self, driver: Driver, **arguments: Any) -> None:
        super().__init__(driver, **{"staging_bytes": 1 << 20, **arguments})

    def _device(self, name: str) -> Device:
        if name != "cuda:0":
            raise RuntimeError("invalid device ordinal")
        return HostDevice(name)
