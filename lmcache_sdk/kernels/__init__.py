"""Bytes between engine memory and canonical chunks: the kernel interface, the choice of a package, the CPU's own.

A *gather* copies chosen slots of engine memory into a chunk, a *scatter* the reverse. A chunk is uint8, C order
``[plane, token, head, dim]``, planes in canonical order (layer by layer, in each ``k`` then ``v``). Kernels see
addresses and strides, never a key.

``interface.py`` says what a kernel package provides, ``choice.py`` which one serves a device, ``tables.py`` turns slots
and strides into blocks to copy, ``checks.py`` refuses what is wrong, ``device.py`` has what kernels for a device share,
``cpu.py`` the kernels for host memory, which are also the reference for all others.
"""

from lmcache_sdk.kernels.choice import ENTRY_POINTS, Choice, choose, describe_kernels, kernels_for
from lmcache_sdk.kernels.cpu import CPUKernels
from lmcache_sdk.kernels.device import QueuedKernels, host_buffer
from lmcache_sdk.kernels.interface import Bytes, CopyStream, DeviceKernels, Event, Kernels, Offsets, Pinned, Plan, Room

__all__ = [
    "ENTRY_POINTS",
    "Bytes",
    "CPUKernels",
    "Choice",
    "CopyStream",
    "DeviceKernels",
    "Event",
    "Kernels",
    "Offsets",
    "Pinned",
    "Plan",
    "QueuedKernels",
    "Room",
    "choose",
    "describe_kernels",
    "host_buffer",
    "kernels_for",
]
