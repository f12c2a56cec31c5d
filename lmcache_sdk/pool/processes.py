"""Which process is meant: a number is given out again, a number with its start time is not."""

from __future__ import annotations

from pathlib import Path

_PROC = Path("/proc")


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
