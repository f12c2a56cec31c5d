"""Which process is meant: a number is given out again, a number with its start time is not."""

from __future__ import annotations

import os
from pathlib import Path

_PROC = Path("/proc")
_NAMESPACE_BITS = 24
_NAMESPACE = (1 << _NAMESPACE_BITS) - 1


def start_time(pid: int) -> int | None:
    """When a process started, in clock ticks since the machine did; None if there is none, or only its remains.

    Also None where it cannot be seen: a process of another pid namespace has another number here.
    """
    try:
        stat = (_PROC / str(pid) / "stat").read_bytes()
        # The name, in parentheses, may contain anything, parentheses included.
        fields = stat[stat.rindex(b")") + 2 :].split()
        # A zombie's memory is gone, unless only its first thread has ended.
        gone = fields[0] == b"X" or (fields[0] == b"Z" and int(fields[17]) <= 1)
        return None if gone else int(fields[19])
    except (OSError, ValueError, IndexError):
        return None


def process_alive(pid: int, started: int) -> bool:
    """Whether the process with this number and :func:`start_time` still runs."""
    return start_time(pid) == started


def identity(pid: int) -> int:
    """A number for :func:`may_live`, in this or a later life of the daemon: start time and pid namespace.

    0 = the process cannot be seen from here.
    """
    started = start_time(pid) if pid > 0 else None
    return 0 if started is None else started << _NAMESPACE_BITS | _namespace()


def may_live(pid: int, known: int) -> bool:
    """False only if the process of this :func:`identity` is proven gone."""
    if pid <= 0 or (known and known & _NAMESPACE != _namespace()):
        return True  # in other pid namespaces numbers mean other processes
    if known:
        return process_alive(pid, known >> _NAMESPACE_BITS)
    try:
        os.kill(pid, 0)  # it may be there, and be hidden from us
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _namespace() -> int:
    return (_PROC / "self/ns/pid").stat().st_ino & _NAMESPACE
