"""Clients of a daemon, each a process of its own, that look up until they are told to stop.

Run as ``python -m benchmarks.clients SOCKET PID COUNT CACHED_TOKENS PACE_S``: each of COUNT processes stores a prompt,
says so by a byte, and from the first byte on its standard input looks it up again and again, PACE_S apart. At the end
of the input each writes its :class:`Answer`. PID is the daemon's.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import os
import select
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import msgspec

from benchmarks.prompts import TINY, namespace, store, tokens
from benchmarks.serve import Daemon, connect
from lmcache_sdk.keys import Chain

CHUNK_TOKENS = 64
WARM_UP = 20  # lookups


class Answer(NamedTuple):
    """Of one client. Times in seconds.

    Attributes:
        longest_busy_s: of each wait, only as much counts as the daemon was running meanwhile: on a busy machine it
            waits for a processor, too.
    """

    lookups: int
    mean_s: float
    longest_s: float
    longest_busy_s: float


class Clients:
    """Made by :func:`looking_up`."""

    def __init__(self, process: subprocess.Popen[bytes], count: int) -> None:
        self._process = process
        self._count = count

    def go(self) -> None:
        """Have all of them start at once."""
        assert self._process.stdin is not None
        self._process.stdin.write(b"g" * self._count)
        self._process.stdin.flush()

    def stop(self) -> list[Answer]:
        """End them."""
        answers, _ = self._process.communicate()
        assert self._process.returncode == 0, "a client failed"
        found = [msgspec.json.decode(line, type=Answer) for line in answers.splitlines()]
        assert len(found) == self._count
        return found


@contextlib.contextmanager
def looking_up(daemon: Daemon, count: int, cached_tokens: int, pace_s: float = 0.0) -> Iterator[Clients]:
    """Clients that are ready to go.

    Args:
        cached_tokens: of the prompt that each stores and then finds; 0 = each looks for something that is not there.
    """
    command = [sys.executable, "-m", "benchmarks.clients", *map(str, (*daemon, count, cached_tokens, pace_s))]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert len(process.stdout.read(count)) == count, "the clients did not start"
        yield Clients(process, count)
        process.kill()


def _client(socket: Path, pid: int, cached_tokens: int, pace_s: float) -> Answer:
    clock = ~pid << 3 | 2  # the time that a process has been running, see clock_getcpuclockid(3)
    cache = connect(socket, namespace(CHUNK_TOKENS, *TINY))
    prompt = tokens(int.from_bytes(os.urandom(4)), cached_tokens or CHUNK_TOKENS)
    if cached_tokens:
        store(cache, Chain(prompt, CHUNK_TOKENS))
    expected = cached_tokens // CHUNK_TOKENS
    told = select.poll()
    told.register(0, 0)  # only its end
    times: list[float] = []
    longest_busy = 0.0
    for number in itertools.count():
        if number == WARM_UP:  # this process now has its own copy of whatever memory it writes to
            times, longest_busy = [], 0.0
            os.write(1, b"r")
            os.read(0, 1)
        started, run = time.perf_counter(), time.clock_gettime(clock)
        found = cache.lookup(str(number), Chain(prompt, CHUNK_TOKENS))
        times.append(time.perf_counter() - started)
        longest_busy = max(longest_busy, min(times[-1], time.clock_gettime(clock) - run))
        assert found.chunks == expected and cache.connected, found
        cache.forget(str(number))
        if number >= WARM_UP and told.poll(1000 * pace_s):
            break
    cache.close()
    return Answer(len(times), sum(times) / len(times), max(times), longest_busy)


def main() -> int:
    socket, pid, count, cached_tokens, pace_s = sys.argv[1:]
    gc.freeze()
    children = set()
    for _ in range(int(count)):
        child = os.fork()
        if not child:
            status = 1
            try:
                answer = _client(Path(socket), int(pid), int(cached_tokens), float(pace_s))
                os.write(1, msgspec.json.encode(answer) + b"\n")
                status = 0
            except BaseException:  # noqa: BLE001 - a forked child must not go on as its parent
                traceback.print_exc()
            finally:
                os._exit(status)
        children.add(child)
    while children:
        child, status = os.wait()
        children.remove(child)
        if status:  # the others would wait for it
            for other in children:
                os.kill(other, signal.SIGKILL)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
