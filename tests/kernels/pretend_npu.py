"""A pretend NPU: torch's PrivateUse1 device, driven from Python, with its memory in CPU tensors.

An operation on tensors of two devices is an error, as on a real one, and which operations were dispatched is recorded.
Nothing is said about speed, nor about an NPU's numbers. It rests on a private function of torch (since 2.9).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Self

import torch
import torch.utils.backend_registration as registration
from torch.utils._pytree import tree_leaves, tree_map

operations: list[str] = []
streams: set[int] = set()  # on which they were


class Stream:
    count = 0

    def __init__(self, device: str) -> None:
        Stream.count += 1
        self.npu_stream = 0x1000 + Stream.count
        self.device = device

    def wait_event(self, event: Event) -> None:
        log.append(("wait", self.npu_stream, event))


class Event:
    def record(self, stream: Stream) -> None:
        log.append(("record", stream.npu_stream, self))

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        log.append(("synchronize", 0, self))


log: list[tuple[str, int, Any]] = []


class Module:
    """What is ``torch.npu``."""

    Stream, Event = Stream, Event
    current = 0

    @contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        before, Module.current = Module.current, stream.npu_stream
        yield
        Module.current = before

    def is_available(self) -> bool:
        return True

    def device_count(self) -> int:
        return 1

    def current_device(self) -> int:
        return 0

    def is_initialized(self) -> bool:
        return True

    def _is_in_bad_fork(self) -> bool:
        return False

    def manual_seed_all(self, seed: int) -> None:
        pass

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16]


class NpuTensor(torch.Tensor):
    @staticmethod
    def __new__(cls, raw: torch.Tensor) -> Self:
        self = torch.Tensor._make_wrapper_subclass(
            cls,
            raw.size(),
            strides=raw.stride(),
            storage_offset=raw.storage_offset(),
            dtype=raw.dtype,
            device="npu:0",
            dispatch_sizes_strides_policy=None,
        )
        self.raw = raw
        return self

    __torch_function__ = torch._C._disabled_torch_function_impl

    def data_ptr(self) -> int:
        return self.raw.data_ptr()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        device = kwargs.get("device")
        to_cpu = device is not None and torch.device(device).type == "cpu"
        to_host = to_cpu or (func is torch.ops.aten.copy_.default and not isinstance(args[0], NpuTensor))
        operations.append("a copy to the host" if to_host else str(func).removeprefix("aten."))
        streams.add(Module.current)
        if device is not None:
            kwargs["device"] = "cpu"
        if func not in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default):
            for leaf in tree_leaves((args, kwargs)):
                if isinstance(leaf, torch.Tensor) and not isinstance(leaf, NpuTensor):
                    raise RuntimeError(f"{func}: expected all tensors on npu:0, found one on cpu")
        out = func(*tree_map(_raw, args), **tree_map(_raw, kwargs))
        given = kwargs.get("out", args[0] if args else None)
        if func._schema.is_mutable and isinstance(given, NpuTensor) and out is given.raw:
            return given  # what was written to
        return out if to_cpu else tree_map(lambda x: NpuTensor(x) if isinstance(x, torch.Tensor) else x, out)


def _raw(value: Any) -> Any:
    return value.raw if isinstance(value, NpuTensor) else value


def _empty(
    size: Any,
    dtype: Any = None,
    layout: Any = None,
    device: Any = None,
    pin_memory: Any = None,
    memory_format: Any = None,
) -> NpuTensor:
    return NpuTensor(torch.empty(size, dtype=dtype))


def _empty_strided(
    size: Any, stride: Any, dtype: Any = None, layout: Any = None, device: Any = None, pin_memory: Any = None
) -> NpuTensor:
    return NpuTensor(torch.empty_strided(size, stride, dtype=dtype))


def install() -> torch.library.Library:
    """Once in a process. The answer must be kept alive."""
    registration._setup_privateuseone_for_python_backend("npu", backend_module=Module())
    library = torch.library.Library("aten", "IMPL")
    library.impl("empty.memory_format", _empty, "PrivateUse1")
    library.impl("empty_strided", _empty_strided, "PrivateUse1")
    return library
