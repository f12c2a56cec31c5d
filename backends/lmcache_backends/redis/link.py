"""One connection: commands out and replies in, large values from and into the caller's memory without a copy.

redis-py has connected, spoken TLS and authenticated; from then on its socket is only used here. What it would do with a
value (read it in pieces, join them, hand out a copy) costs several times what the transfer does.
"""

from __future__ import annotations

import re
import select
import socket
import ssl
import time
from typing import NamedTuple

from redis.connection import AbstractConnection

from lmcache_sdk.backend import Miss

_BUFFER = 1 << 16
# Bytes of a value that the kernel holds, twice over. Left to itself it takes whole values in, which have left the
# caches when the server reads them: 1 MiB then takes half as long again. Enough for 1 GB/s at a round trip of 1 ms.
_UNDER_WAY = 1 << 19
_LINE = _BUFFER // 2  # bytes at most
_HEADER = 64  # bytes to ask for where a value may follow: what is more than its header has to be copied
_SMALL = 1 << 24  # bytes of a value that is read without a buffer given, and items of a list
_DEPTH = 8  # lists in lists; CLUSTER SLOTS has four
_LENGTH = re.compile(rb"[$:*](-1|\d{1,18})")


class ProtocolError(Exception):
    """What came is no reply, or not one to what was asked."""


class Refused(NamedTuple):
    """An error reply: its first word, and all of it."""

    code: str
    text: str


Reply = int | bytes | None | Refused | list["Reply"]


class Link:
    """Each command that is sent has one reply, in order; several may be under way. Not thread-safe.

    Every method raises OSError or :class:`ProtocolError`; after that, and where it is not ``idle``, the link is only
    good for closing: what would come next is not known.

    Args:
        connection: connected and authenticated, and not used by anything else from now on.
        timeout_s: for sending a command, and for receiving a reply, each as a whole.
    """

    def __init__(self, connection: AbstractConnection, timeout_s: float) -> None:
        self._connection = connection
        self._socket: socket.socket = connection._sock
        self._timeout_s = timeout_s
        self._bytes = bytearray(_BUFFER)
        self._view = memoryview(self._bytes)
        self._start = self._end = 0  # of what has been received and not been read, in the view
        self._owed = 0
        self._tls = isinstance(self._socket, ssl.SSLSocket)
        if self._socket.family != socket.AF_UNIX:
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _UNDER_WAY)

    @property
    def idle(self) -> bool:
        """Nothing is under way."""
        return self._owed == 0 and self._start == self._end

    @property
    def stale(self) -> bool:
        """While nothing was asked, something came: the end of the connection, or what nobody can want."""
        poll = select.poll()
        poll.register(self._socket, select.POLLIN)
        return bool(poll.poll(0))

    def close(self) -> None:
        """Idempotent."""
        self._connection.disconnect()

    # Out

    def send(self, *parts: bytes | memoryview, commands: int = 1) -> None:
        """So many commands, as :func:`command` and :func:`bulk` make them, in parts that are not joined."""
        self._owed += commands
        until = time.monotonic() + self._timeout_s
        left = [memoryview(part) for part in parts]
        while left:
            self._wait_until(until)
            sent = self._socket.send(left[0]) if self._tls else self._socket.sendmsg(left)
            while left and sent >= len(left[0]):
                sent -= len(left.pop(0))
            if sent:
                left[0] = left[0][sent:]

    # In

    def reply(self) -> Reply:
        """Any reply but a large value."""
        reply = self._parse(time.monotonic() + self._timeout_s, _DEPTH)
        self._owed -= 1
        return reply

    def counts(self, number: int) -> list[int | Refused]:
        """All that are under way, so many, each of which is a count."""
        until = time.monotonic() + self._timeout_s
        found: list[int | Refused] = []
        while len(found) < number:
            end = self._bytes.rfind(b"\r\n", self._start, self._end)
            if end < 0:
                if self._end - self._start >= _LINE:
                    raise ProtocolError("a line without an end")
                self._fill(until, _BUFFER)
                continue
            lines = bytes(self._view[self._start : end]).split(b"\r\n")
            self._start = end + 2
            found += [_count(line) for line in lines]
        if len(found) > number:
            raise ProtocolError("more replies than questions")
        self._owed -= number
        return found

    def receive(self, buffer: memoryview) -> int | Miss | Refused:
        """A value, into the front of the buffer; its length, or why there is none."""
        until = time.monotonic() + self._timeout_s
        line = self._line(until, _HEADER)
        answer: int | Miss | Refused
        if line[:1] == b"-":
            answer = _refused(line)
        elif line[:1] != b"$":
            raise ProtocolError("no value where one was asked for")
        elif (nbytes := _length(line)) < 0:
            answer = Miss.ABSENT
        elif nbytes > len(buffer):
            self._drain(nbytes, until)
            answer = Miss.TOO_LARGE
        else:
            self._read_into(buffer[:nbytes], until)
            self._line_end(until)
            answer = nbytes
        self._owed -= 1
        return answer

    def _parse(self, until: float, depth: int) -> Reply:
        line = self._line(until, _BUFFER)
        kind = line[:1]
        if kind == b":":
            return _length(line)
        if kind == b"+":
            return line[1:]
        if kind == b"-":
            return _refused(line)
        if kind not in (b"$", b"*"):
            raise ProtocolError("no reply of Redis")
        length = _length(line)
        if length > _SMALL or not depth:
            raise ProtocolError("a reply that is too large")
        if length < 0:
            return None
        if kind == b"*":
            return [self._parse(until, depth - 1) for _ in range(length)]
        value = bytearray(length)
        self._read_into(memoryview(value), until)
        self._line_end(until)
        return bytes(value)

    def _line(self, until: float, at_once: int) -> bytes:
        """Up to the end of the line, asking for so many bytes at a time."""
        searched = self._start
        while True:
            end = self._bytes.find(b"\r\n", searched, self._end)
            if end >= 0:
                line = bytes(self._bytes[self._start : end])
                self._start = end + 2
                return line
            if self._end - self._start >= _LINE:
                raise ProtocolError("a line without an end")
            searched = self._fill(until, at_once)

    def _line_end(self, until: float) -> None:
        while self._end - self._start < 2:
            self._fill(until, _HEADER)
        if not self._bytes.startswith(b"\r\n", self._start, self._end):
            raise ProtocolError("a value that is longer than it was said to be")
        self._start += 2

    def _fill(self, until: float, at_once: int) -> int:
        """Receive more; the answer is where a search for the end of a line has to go on."""
        if self._start:
            rest = bytes(self._view[self._start : self._end])
            self._view[: len(rest)] = rest
            self._start, self._end = 0, len(rest)
        known = self._end
        self._end += self._receive(self._view[known : known + at_once], until)
        return max(0, known - 1)

    def _read_into(self, target: memoryview, until: float) -> None:
        done = min(len(target), self._end - self._start)
        target[:done] = self._view[self._start : self._start + done]
        self._start += done
        while done < len(target):
            done += self._receive(target[done:], until)

    def _drain(self, nbytes: int, until: float) -> None:
        """Let a value pass by."""
        left = nbytes - min(nbytes, self._end - self._start)
        self._start += nbytes - left
        while left:
            left -= self._receive(self._view[:left], until)  # it is empty now
        self._line_end(until)

    def _receive(self, target: memoryview, until: float) -> int:
        self._wait_until(until)
        count = self._socket.recv_into(target)
        if not count:
            raise ConnectionResetError("the server closed the connection")
        return count

    def _wait_until(self, until: float) -> None:
        left = until - time.monotonic()
        if left <= 0:
            raise TimeoutError
        self._socket.settimeout(left)


def command(*words: bytes, more: int = 0) -> bytes:
    """A command, to be sent as it is; ``more`` of its words follow."""
    return b"*%d\r\n%s" % (len(words) + more, b"".join(map(bulk, words)))


def bulk(word: bytes) -> bytes:
    """A word of a command."""
    return b"$%d\r\n%s\r\n" % (len(word), word)


def _length(line: bytes) -> int:
    match = _LENGTH.fullmatch(line)
    if match is None:
        raise ProtocolError("a length that is no number")
    return int(match[1])


def _count(line: bytes) -> int | Refused:
    if line[:1] == b":":
        return _length(line)
    if line[:1] == b"-":
        return _refused(line)
    raise ProtocolError("no count where one was asked for")


def _refused(line: bytes) -> Refused:
    text = line[1:].decode("ascii", "replace")
    return Refused(text.partition(" ")[0], text)
