"""Mapping the pool's files, by the daemon and by its clients: aligned for huge pages, filled in, put on a NUMA node.

Python's ``mmap`` can choose no address and binds no node, so this calls the C library.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import platform
import re
import weakref
from collections.abc import Sequence
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
import numpy.typing as npt

from lmcache_sdk.errors import BackendFormatError, BackendUnavailable

HUGE_PAGE_BYTES = 2 << 20
_PAGE_BYTES = mmap.PAGESIZE
_SLICE_BYTES = 64 << 20  # one call into the kernel; a few ten milliseconds

# Not in Python's mmap. The numbers are Linux's, the same on all machines that this runs on.
_MADV_POPULATE_READ = 22  # since 5.14
_MADV_POPULATE_WRITE = 23  # since 5.14
_MADV_COLLAPSE = 25  # since 6.1
_MAP_FIXED = 0x10
_PROT_NONE = 0
_MPOL_PREFERRED = 1
_MBIND = {"x86_64": 237, "aarch64": 235, "ppc64le": 259, "s390x": 268, "riscv64": 235}

_NODES = Path("/sys/devices/system/node/has_memory")

_c = ctypes.CDLL(None, use_errno=True)
_c.mmap.restype = ctypes.c_void_p
_c.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
_c.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_c.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_MAP_FAILED = ctypes.c_void_p(-1).value


class _Mapping:
    """Mapped memory as numpy's array interface. It is unmapped when the last array or view of it is gone."""

    def __init__(self, address: int, nbytes: int) -> None:
        self.__array_interface__: dict[str, Any] = {
            "version": 3,
            "shape": (nbytes,),
            "typestr": "|u1",
            "data": (address, False),
        }
        # Not at the interpreter's exit: threads may still copy then, and the kernel does it anyway.
        weakref.finalize(self, _c.munmap, address, nbytes).atexit = False


def map_shared(descriptor: int, nbytes: int) -> npt.NDArray[np.uint8]:
    """Map the start of a file, readable and writable, at a multiple of 2 MiB. The descriptor may then be closed.

    Raises:
        BackendUnavailable: the kernel refuses (out of address space, a limit).
    """
    # Room with 2 MiB to spare; the file is then put over the aligned part, and what sticks out is given back.
    room_bytes = nbytes + HUGE_PAGE_BYTES
    room = _mmap(None, room_bytes, _PROT_NONE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1)
    start = -(-room // HUGE_PAGE_BYTES) * HUGE_PAGE_BYTES
    try:
        _mmap(start, nbytes, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_SHARED | _MAP_FIXED, descriptor)
    except BackendUnavailable:
        _c.munmap(room, room_bytes)
        raise
    end = -(-(start + nbytes) // _PAGE_BYTES) * _PAGE_BYTES
    for low, high in ((room, start), (end, room + room_bytes)):
        if low < high:
            _c.munmap(low, high - low)
    return np.asarray(_Mapping(start, nbytes))


def is_complete(descriptor: int, nbytes: int) -> bool:
    """Whether a file has this size and no holes: touching it then kills nobody, however full the file system is."""
    status = os.fstat(descriptor)
    return status.st_size == nbytes and status.st_blocks * 512 >= nbytes


def map_segments(
    descriptors: Sequence[int], sizes: Sequence[int], *, populate: bool = False
) -> list[npt.NDArray[np.uint8]]:
    """Map a daemon's segments: what a client does with the descriptors that it was passed.

    The descriptors stay the caller's, who may close them at once. The memory is unmapped with its last array or view.

    Args:
        sizes: bytes of each segment.
        populate: enter all pages into this process's tables now (0.1 s per GiB, nothing where pages are huge), instead
            of one by one as they are touched.

    Raises:
        BackendFormatError: a file is not whole; touching it would kill this process.
        BackendUnavailable: the kernel refuses.
    """
    for number, (descriptor, size) in enumerate(zip(descriptors, sizes, strict=True)):
        if not is_complete(descriptor, size):
            raise BackendFormatError(f"segment {number} has not the {size} bytes that it should have")
    segments = [map_shared(descriptor, size) for descriptor, size in zip(descriptors, sizes, strict=True)]
    if populate:
        for segment in segments:
            _advise(segment, 0, len(segment), _MADV_POPULATE_READ)
    return segments


def prefault(segment: npt.NDArray[np.uint8], stop: Event | None = None) -> bool:
    """Have the kernel provide all pages of a segment now, as huge ones where it can; False if told to stop.

    Content is kept, and others may use the segment meanwhile. The interpreter is not held up.
    """
    collapse = populate = True
    for start in range(0, len(segment), _SLICE_BYTES):
        if stop is not None and stop.is_set():
            return False
        nbytes = min(_SLICE_BYTES, len(segment) - start)
        # Huge pages first: they are filled and entered in one go, small ones would be entered only to be replaced.
        # Where one slice finds no huge pages the next may; EINVAL = this kernel has none.
        if collapse:
            collapse = _advise(segment, start, nbytes, _MADV_COLLAPSE) != errno.EINVAL
        if populate:
            populate = _advise(segment, start, nbytes, _MADV_POPULATE_WRITE) != errno.EINVAL
        if not populate:
            segment[start : start + nbytes : _PAGE_BYTES].max()  # reading does it too, page by page
    return True


def nodes(path: Path = _NODES) -> list[int]:
    """The NUMA nodes that have memory, ascending; [0] if that cannot be read."""
    try:
        text = path.read_text(encoding="ascii").strip()
        spans = [re.fullmatch(r"(\d+)(?:-(\d+))?", span) for span in text.split(",")]
        found = [node for span in spans if span for node in range(int(span[1]), int(span[2] or span[1]) + 1)]
    except (OSError, ValueError):
        found = []
    return sorted(found) or [0]


def plan_nodes(segments: int, available: Sequence[int]) -> list[int]:
    """The node of each segment, in turn."""
    return [available[number % len(available)] for number in range(segments)]


def prefer_node(segment: npt.NDArray[np.uint8], node: int) -> bool:
    """Take the segment's pages, from now on and whoever touches them, from one node; False if the kernel refuses.

    Preferred and not bound: a node that has run out must not be the end of the process.
    """
    number = _MBIND.get(platform.machine())
    if number is None:
        return False
    mask = (ctypes.c_ulong * (node // 64 + 1))()
    mask[node // 64] = 1 << node % 64
    bits = ctypes.c_ulong(len(mask) * 64 + 1)  # the kernel takes one off
    address, nbytes = ctypes.c_void_p(segment.ctypes.data), ctypes.c_ulong(len(segment))
    return bool(_c.syscall(ctypes.c_long(number), address, nbytes, _MPOL_PREFERRED, mask, bits, 0) == 0)


def _mmap(address: int | None, nbytes: int, protection: int, flags: int, descriptor: int) -> int:
    mapped = _c.mmap(address, nbytes, protection, flags, descriptor, 0)
    if mapped == _MAP_FAILED:
        raise BackendUnavailable(f"cannot map {nbytes} bytes: {os.strerror(ctypes.get_errno())}")
    return int(mapped)


def _advise(segment: npt.NDArray[np.uint8], start: int, nbytes: int, advice: int) -> int:
    """0, or the error's number."""
    return ctypes.get_errno() if _c.madvise(segment.ctypes.data + start, nbytes, advice) else 0
