"""The few calls of the CUDA driver and of the HIP runtime that torch does not offer, through ctypes.

Both are spoken to by their C interface, so that nothing is compiled and one wheel serves all versions. Streams, events
and addresses are plain integers.
"""

from __future__ import annotations

import ctypes
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from ctypes import c_int, c_size_t, c_uint, c_void_p
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from lmcache_sdk.errors import DeviceError

Addresses = npt.NDArray[np.int64]

_NOT_READY = 600
_STREAM_NON_BLOCKING = 1  # not ordered with the legacy default stream
_EVENT_BLOCKING_SYNC = 1  # who waits sleeps
_EVENT_DISABLE_TIMING = 2
_REGISTER_PORTABLE = 1  # for all devices of the process
_SOURCE_IN_STREAM_ORDER = 1  # any other order lets a copy read engine memory before the forward pass has written it
_CAPTURE_RELAXED = 2
_MOST_IN_A_BATCH = 4096  # HIP faults beyond 8,192; of CUDA a fault is reported at 51,828


class _Location(ctypes.Structure):
    _fields_: ClassVar = [("type", c_int), ("id", c_int)]


class _Attributes(ctypes.Structure):
    """CUmemcpyAttributes."""

    _fields_: ClassVar = [("order", c_int), ("source", _Location), ("target", _Location), ("flags", c_uint)]


class Driver(ABC):
    """What both vendors have, in the same words. Every call is made inside of ``on``.

    Every method raises DeviceError if the driver reports an error.

    Args:
        library: the shared library; by default the vendor's.
    """

    vendor: ClassVar[str]
    prefers_staging: ClassVar[str] = ""
    _prefix: ClassVar[str]
    _batch = ""  # the batched copy's name, where there is one
    _names: ClassVar[dict[str, str]] = {}  # where a call is not named like the other vendor's

    def __init__(self, library: str) -> None:
        try:
            self._library = ctypes.CDLL(library)
        except OSError as error:
            raise DeviceError(f"the {self.vendor} driver cannot be used: {error}") from error

    @contextmanager
    def on(self, device: int) -> Iterator[None]:
        """The device is the calling thread's meanwhile. A new thread has none, and an engine's gets its own back.

        A graph that another thread captures is not spoiled by what is called meanwhile, nor is the call refused for it:
        the driver does both with calls that may be unsafe, unless their thread says that they are no part of the graph.
        """
        mode = c_int(_CAPTURE_RELAXED)
        self._call("ThreadExchangeStreamCaptureMode", ctypes.byref(mode))
        try:
            with self._entered(device):
                yield
        finally:
            self._call("ThreadExchangeStreamCaptureMode", ctypes.byref(mode))

    @abstractmethod
    def _entered(self, device: int) -> AbstractContextManager[None]: ...

    def new_stream(self) -> int:
        """A stream that waits for no other by itself."""
        stream = c_void_p()
        self._call(self._names["stream"], ctypes.byref(stream), c_uint(_STREAM_NON_BLOCKING))
        return stream.value or 0

    def new_event(self) -> int:
        """An event; waiting for it sleeps."""
        event = c_void_p()
        flags = c_uint(_EVENT_BLOCKING_SYNC | _EVENT_DISABLE_TIMING)
        self._call(self._names["event"], ctypes.byref(event), flags)
        return event.value or 0

    def record(self, event: int, stream: int) -> None:
        """Let the event be the end of what the stream has been given so far."""
        self._call("EventRecord", c_void_p(event), c_void_p(stream))

    def done(self, event: int) -> bool:
        """Whether an event has been reached."""
        return self._call("EventQuery", c_void_p(event), but=_NOT_READY) == 0

    def wait(self, event: int) -> None:
        """Block until an event has been reached."""
        self._call("EventSynchronize", c_void_p(event))

    def hold(self, stream: int, event: int) -> None:
        """Have a stream wait for an event."""
        self._call("StreamWaitEvent", c_void_p(stream), c_void_p(event), c_uint(0))

    def copy(self, targets: Addresses, sources: Addresses, sizes: Addresses, stream: int) -> None:
        """Queue copies, of which none overlap; many of them in one call, where the driver can."""
        targets, sources, sizes = (np.ascontiguousarray(array, np.int64) for array in (targets, sources, sizes))
        if sizes.size > 1 and self._batch:
            for first in range(0, sizes.size, _MOST_IN_A_BATCH):
                part = slice(first, first + _MOST_IN_A_BATCH)
                self._copy_batch(targets[part], sources[part], sizes[part], c_void_p(stream))
            return
        for target, source, size in zip(targets.tolist(), sources.tolist(), sizes.tolist(), strict=True):
            self._copy_one(c_void_p(target), c_void_p(source), c_size_t(size), c_void_p(stream))

    def register(self, address: int, nbytes: int) -> str:
        """Pin host memory; the answer is the driver's error, empty if it did."""
        code = self._function(self._names["register"])(c_void_p(address), c_size_t(nbytes), c_uint(_REGISTER_PORTABLE))
        return self._name_of(code) if code else ""

    def unregister(self, address: int) -> None:
        """Undo ``register``."""
        self._call(self._names["unregister"], c_void_p(address))

    @abstractmethod
    def _copy_one(self, target: c_void_p, source: c_void_p, size: c_size_t, stream: c_void_p) -> None: ...

    @abstractmethod
    def _copy_batch(self, targets: Addresses, sources: Addresses, sizes: Addresses, stream: c_void_p) -> None: ...

    def _has(self, name: str) -> bool:
        return hasattr(self._library, self._prefix + name)

    def _function(self, name: str) -> Any:
        try:
            return getattr(self._library, self._prefix + name)
        except AttributeError:
            raise DeviceError(f"the {self.vendor} driver has no {self._prefix}{name}; update it") from None

    def _call(self, name: str, *arguments: Any, but: int = 0) -> int:
        code = int(self._function(name)(*arguments))
        if code not in (0, but):
            raise DeviceError(f"{self._prefix}{name} failed: {self._name_of(code)}")
        return code

    @abstractmethod
    def _name_of(self, code: int) -> str: ...


class CUDADriver(Driver):
    """NVIDIA's driver."""

    vendor = "CUDA"
    _prefix = "cu"
    _names: ClassVar = {
        "stream": "StreamCreate",
        "event": "EventCreate",
        "register": "MemHostRegister_v2",
        "unregister": "MemHostUnregister",
    }

    def __init__(self, library: str = "libcuda.so.1") -> None:
        super().__init__(library)
        self._call("Init", c_uint(0))
        self._contexts: dict[int, int] = {}
        # CUDA 12.8 has the first form, which reports where it failed; CUDA 13 the second.
        self._batch = next((name for name in ("MemcpyBatchAsync_v2", "MemcpyBatchAsync") if self._has(name)), "")

    @contextmanager
    def _entered(self, device: int) -> Iterator[None]:
        context = self._contexts.get(device)
        if context is None:
            handle, ordinal = c_void_p(), c_int()
            self._call("DeviceGet", ctypes.byref(ordinal), c_int(device))
            self._call("DevicePrimaryCtxRetain", ctypes.byref(handle), ordinal)  # torch's own
            context = self._contexts[device] = handle.value or 0
        self._call("CtxPushCurrent_v2", c_void_p(context))
        try:
            yield
        finally:
            self._call("CtxPopCurrent_v2", ctypes.byref(c_void_p()))

    def _copy_one(self, target: c_void_p, source: c_void_p, size: c_size_t, stream: c_void_p) -> None:
        self._call("MemcpyAsync", target, source, size, stream)

    def _copy_batch(self, targets: Addresses, sources: Addresses, sizes: Addresses, stream: c_void_p) -> None:
        attributes, first = _Attributes(order=_SOURCE_IN_STREAM_ORDER), c_size_t(0)
        failed = [] if self._batch.endswith("_v2") else [ctypes.byref(c_size_t())]
        self._call(
            self._batch,
            *(c_void_p(array.ctypes.data) for array in (targets, sources, sizes)),
            c_size_t(sizes.size),
            ctypes.byref(attributes),
            ctypes.byref(first),
            c_size_t(1),
            *failed,
            stream,
        )

    def _name_of(self, code: int) -> str:
        text = ctypes.c_char_p()
        self._library.cuGetErrorName(c_int(code), ctypes.byref(text))
        return text.value.decode() if text.value else f"error {code}"


class HIPDriver(Driver):
    """AMD's runtime."""

    vendor = "HIP"
    # A registration of a large pool by eight processes fails there, and its device addresses differ from the host's.
    prefers_staging = "large registrations are not reliable on ROCm"
    _prefix = "hip"
    _names: ClassVar = {
        "stream": "StreamCreateWithFlags",
        "event": "EventCreateWithFlags",
        "register": "HostRegister",
        "unregister": "HostUnregister",
    }
    _MEMCPY_DEFAULT = 4

    def __init__(self, library: str | None = None) -> None:
        super().__init__(library or _mapped("libamdhip64.so"))
        self._batch = "MemcpyBatchAsync" if self._has("MemcpyBatchAsync") else ""

    @contextmanager
    def _entered(self, device: int) -> Iterator[None]:
        before = c_int()
        self._call("GetDevice", ctypes.byref(before))
        self._call("SetDevice", c_int(device))
        try:
            yield
        finally:
            self._call("SetDevice", before)

    def _copy_one(self, target: c_void_p, source: c_void_p, size: c_size_t, stream: c_void_p) -> None:
        self._call("MemcpyAsync", target, source, size, c_int(self._MEMCPY_DEFAULT), stream)

    def _copy_batch(self, targets: Addresses, sources: Addresses, sizes: Addresses, stream: c_void_p) -> None:
        self._call(
            self._batch,
            *(c_void_p(array.ctypes.data) for array in (targets, sources, sizes)),
            c_size_t(sizes.size),
            None,  # attributes are not supported there, and refused by some versions
            None,
            c_size_t(0),
            ctypes.byref(c_size_t()),
            stream,
        )

    def _name_of(self, code: int) -> str:
        function = self._function("GetErrorName")
        function.restype = ctypes.c_char_p
        return (function(c_int(code)) or b"").decode() or f"error {code}"


def _mapped(name: str, maps: Iterable[str] | None = None) -> str:
    """The file of a library that this process has loaded: torch brings its own HIP runtime, and there must be one."""
    lines = Path("/proc/self/maps").read_text(encoding="utf-8").splitlines() if maps is None else maps
    return next((path for line in lines if name in (path := line.rpartition(" ")[2])), name)
