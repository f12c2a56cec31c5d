"""The few calls of CANN's runtime that torch_npu does not offer, through ctypes. Streams and addresses are integers."""

from __future__ import annotations

import ctypes
import platform
import re
from collections.abc import Iterator
from contextlib import contextmanager
from ctypes import c_int, c_size_t, c_uint8, c_uint32, c_uint64, c_void_p
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from lmcache_sdk.errors import DeviceError

Addresses = npt.NDArray[np.int64]

_HOST_TO_DEVICE, _DEVICE_TO_HOST = 1, 2
_ON_HOST, _ON_DEVICE = 0, 1
_MAPPED_AND_PINNED = 0x10000002
_MOST_IN_A_BATCH = 4096  # more are refused
_OLD_LINUX = (5, 10)  # up to which memory may only be registered that CANN has allocated; other memory faults


class _Location(ctypes.Structure):
    _fields_: ClassVar = [("id", c_uint32), ("type", c_int)]


class _Attributes(ctypes.Structure):
    """aclrtMemcpyBatchAttr."""

    _fields_: ClassVar = [("target", _Location), ("source", _Location), ("reserved", c_uint8 * 16)]


class Acl:
    """CANN's runtime library. Every method raises DeviceError if it reports an error.

    Args:
        library: its file; by default the one that CANN's environment script puts on the search path.
    """

    def __init__(self, library: str = "libascendcl.so") -> None:
        try:
            self._library = ctypes.CDLL(library)
        except OSError as error:
            raise DeviceError(f"CANN's runtime cannot be used: {error}; source CANN's set_env.sh first") from error
        self._has_batch = hasattr(self._library, "aclrtMemcpyBatchAsync")  # since CANN 8.5

    @contextmanager
    def on(self, device: int) -> Iterator[None]:
        """The device is the calling thread's meanwhile. One that had none keeps it, an engine's gets its own back."""
        before = c_int()
        had = self._library.aclrtGetDevice(ctypes.byref(before)) == 0
        self._call("aclrtSetDevice", c_int(device))
        try:
            yield
        finally:
            if had and before.value != device:
                self._call("aclrtSetDevice", before)

    def copy(
        self, targets: Addresses, sources: Addresses, sizes: Addresses, stream: int, *, device: int, to_host: bool
    ) -> None:
        """Queue copies between host and device, of which none overlap; in one call where CANN can."""
        targets, sources, sizes = (np.ascontiguousarray(array, np.int64) for array in (targets, sources, sizes))
        if sizes.size > 1 and self._has_batch:
            for first in range(0, sizes.size, _MOST_IN_A_BATCH):
                part = slice(first, first + _MOST_IN_A_BATCH)
                self._copy_batch(targets[part], sources[part], sizes[part], stream, device, to_host)
            return
        kind = c_int(_DEVICE_TO_HOST if to_host else _HOST_TO_DEVICE)
        for target, source, size in zip(targets.tolist(), sources.tolist(), sizes.tolist(), strict=True):
            self._call(
                "aclrtMemcpyAsync",
                c_void_p(target),
                c_size_t(size),  # the room there
                c_void_p(source),
                c_size_t(size),
                kind,
                c_void_p(stream),
            )

    def register(self, address: int, nbytes: int) -> str:
        """Pin host memory; the answer is what went wrong, empty if nothing did."""
        if not hasattr(self._library, "aclrtHostRegisterV2"):
            return "this CANN cannot pin memory that it has not allocated (aclrtHostRegisterV2); 8.5 can"
        if tuple(map(int, re.findall(r"\d+", platform.release())[:2])) <= _OLD_LINUX:
            return f"Linux {platform.release()} cannot pin memory that CANN has not allocated; newer than 5.10 can"
        code = self._library.aclrtHostRegisterV2(c_void_p(address), c_uint64(nbytes), c_uint32(_MAPPED_AND_PINNED))
        return f"aclrtHostRegisterV2 failed: error {code}" if code else ""

    def unregister(self, address: int) -> None:
        """Undo ``register``."""
        self._call("aclrtHostUnregister", c_void_p(address))

    def _copy_batch(
        self, targets: Addresses, sources: Addresses, sizes: Addresses, stream: int, device: int, to_host: bool
    ) -> None:
        there, host = _Location(device, _ON_DEVICE), _Location(0, _ON_HOST)
        attributes = _Attributes(*((host, there) if to_host else (there, host)))
        first, failed = c_size_t(0), c_size_t()
        self._call(
            "aclrtMemcpyBatchAsync",
            c_void_p(targets.ctypes.data),
            c_void_p(sizes.ctypes.data),  # the room there
            c_void_p(sources.ctypes.data),
            c_void_p(sizes.ctypes.data),
            c_size_t(sizes.size),
            ctypes.byref(attributes),
            ctypes.byref(first),
            c_size_t(1),
            ctypes.byref(failed),
            c_void_p(stream),
        )

    def _call(self, name: str, *arguments: Any) -> None:
        if code := getattr(self._library, name)(*arguments):
            raise DeviceError(f"{name} failed: error {code}")
