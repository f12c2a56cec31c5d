"""One connection of a client to the daemon: a request, then its reply, by a deadline."""

from __future__ import annotations

import os
import select
import socket
import time
from collections.abc import Callable
from pathlib import Path

from lmcache_sdk.daemon import protocol as p
from lmcache_sdk.errors import BackendFormatError, BackendUnavailable


class Channel:
    """One connection: a request, then its reply. Any trouble is an OSError or ProtocolError, and ends it.

    Raises:
        BackendUnavailable: whoever listens there could be anybody.
    """

    def __init__(self, path: Path, timeout_s: float) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._frames = p.FrameReader()
        self._replied = select.poll()
        self._replied.register(self._socket, select.POLLIN)
        self.descriptors: list[int] = []
        try:
            self._socket.settimeout(timeout_s)
            self._socket.connect(str(path))
            _check_peer(self._socket, path)
        except BaseException:
            self._socket.close()
            raise

    def call(self, message: p.Message, timeout_s: float) -> p.Message:
        """Raises TimeoutError at the deadline, ConnectionError, other OSErrors, or ProtocolError.

        To Hello also BackendFormatError: the daemon speaks another version.
        """
        return self.send(p.encode(message), timeout_s, hello=isinstance(message, p.Hello))

    def send(
        self, frame: bytes, timeout_s: float, *, hello: bool = False, meanwhile: Callable[[], bool] | None = None
    ) -> p.Message:
        """See :meth:`call`. Until the reply comes, ``meanwhile`` does pieces of work, as long as it says there are."""
        if timeout_s <= 0:
            raise TimeoutError("no time left")
        deadline = time.monotonic() + timeout_s
        self._socket.settimeout(timeout_s)
        self._socket.sendall(frame)
        while meanwhile is not None and meanwhile() and not self._replied.poll(0) and time.monotonic() < deadline:
            pass
        while (body := self._frames.next()) is None:
            left = deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError(f"no answer within {timeout_s} s")
            self._socket.settimeout(left)
            self._frames.add(self._receive(hello))
        if hello:
            version = p.version_of(body)
            if version is not None and version != p.PROTOCOL_VERSION:
                raise BackendFormatError(p.skew(version, p.PROTOCOL_VERSION))
        return p.decode_reply(body)

    def _receive(self, with_descriptors: bool) -> bytes:
        if with_descriptors:
            data, descriptors, _, _ = socket.recv_fds(self._socket, 1 << 16, p.MOST_SEGMENTS, socket.MSG_CMSG_CLOEXEC)
            self.descriptors += descriptors
        else:
            data = self._socket.recv(1 << 18)
        if not data:
            raise ConnectionError("the daemon closed the connection")
        return data

    def fileno(self) -> int:
        return self._socket.fileno()

    def drop_descriptors(self) -> None:
        """Close what was passed with the reply to Hello."""
        while self.descriptors:
            os.close(self.descriptors.pop())

    def close(self) -> None:
        self._socket.close()
        self.drop_descriptors()


def _check_peer(connection: socket.socket, path: Path) -> None:
    """Who answers must be this user, root, or whose folder it is: in a folder for all, anyone can listen."""
    _, uid, _ = p.peer_of(connection)
    if uid not in (0, os.geteuid(), path.parent.stat().st_uid):
        raise BackendUnavailable(f"user {uid} listens on {path}, in a folder that is not that user's")
