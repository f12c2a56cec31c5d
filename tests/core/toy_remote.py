"""A remote store in a few lines: what the proxy and the fault suite are tried with where no server is installed."""

from __future__ import annotations

import contextlib
import socket
import socketserver
import threading
import time
from collections.abc import Sequence
from typing import Any, ClassVar

import msgspec

from lmcache_backends.memory import MemoryBackend
from lmcache_sdk.backend import Buffer, Item, Miss
from lmcache_sdk.errors import BackendUnavailable


class ToyServer:
    """Records in memory behind TCP: a length, then a msgpack list, both ways. Can be killed and started again."""

    def __init__(self) -> None:
        self.records = MemoryBackend()
        self.port = 0
        self.start()

    def start(self) -> None:
        outer, self.sockets = self, set[socket.socket]()

        class Handler(socketserver.StreamRequestHandler):
            def handle(self) -> None:
                outer.sockets.add(self.request)
                with contextlib.suppress(OSError):
                    while head := self.rfile.read(4):
                        request = msgspec.msgpack.decode(self.rfile.read(int.from_bytes(head)))
                        answer = msgspec.msgpack.encode(outer.answer(*request))
                        self.wfile.write(len(answer).to_bytes(4) + answer)

        class Server(socketserver.ThreadingTCPServer):
            allow_reuse_address = daemon_threads = True
            block_on_close = False

        self.server = Server(("127.0.0.1", self.port), Handler)
        self.port = self.server.server_address[1]
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True)
        self.thread.start()

    def kill(self) -> None:
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()
        for connection in self.sockets:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def answer(self, call: str, keys: list[str], values: list[bytes], if_absent: bool) -> Any:
        records = self.records
        if call == "get":
            found = [records._records.get(key) for key in keys]
            return [data if data is None or len(data) <= room else -1 for data, room in zip(found, values, strict=True)]
        if call == "put":
            items = [Item(key, memoryview(data)) for key, data in zip(keys, values, strict=True)]
            return records.put(items, if_absent=if_absent)
        return getattr(records, call)(keys)


class ToyBackend:
    """One connection, one call at a time; each call ends within ``timeout_s``.

    ``keeps_going`` is a defect for the suite to find: a connection whose call failed is used for the next one.
    """

    instant: ClassVar[bool] = False
    keeps_going: ClassVar[bool] = False

    def __init__(self, port: int, timeout_s: float) -> None:
        self.port, self.timeout_s = port, timeout_s
        self._lock = threading.Lock()
        self._socket: socket.socket | None = None
        self._closed = False

    def get(self, keys: Sequence[str], buffers: Sequence[Buffer]) -> list[int | Miss]:
        answers: list[int | Miss] = []
        found = self._call("get", list[bytes | int | None], keys, [len(buffer) for buffer in buffers])
        for data, buffer in zip(found, buffers, strict=True):
            if not isinstance(data, bytes) or len(data) > len(buffer):
                answers.append(Miss.ABSENT if data is None else Miss.TOO_LARGE)
                continue
            buffer[: len(data)] = data
            answers.append(len(data))
        return answers

    def put(self, items: Sequence[Item], *, if_absent: bool = True) -> list[bool]:
        data = [bytes(item.data) for item in items]
        return self._call("put", list[bool], [item.key for item in items], data, if_absent)

    def contains(self, keys: Sequence[str]) -> list[bool]:
        return self._call("contains", list[bool], keys)

    def prefix_len(self, keys: Sequence[str]) -> int:
        return min(self._call("prefix_len", int, keys), len(keys))

    def delete(self, keys: Sequence[str]) -> int:
        return self._call("delete", int, keys)

    def close(self, timeout_s: float) -> None:
        self._closed = True
        with self._lock:
            self._drop()

    def _call(self, call: str, kind: Any, keys: Sequence[str], values: Any = (), if_absent: bool = True) -> Any:
        if self._closed:
            raise BackendUnavailable("closed")
        deadline = time.monotonic() + self.timeout_s
        request = msgspec.msgpack.encode([call, list(keys), list(values), if_absent])
        with self._lock:
            try:
                if self._socket is None:
                    self._socket = socket.create_connection(("127.0.0.1", self.port), self.timeout_s)
                connection = self._socket
                connection.settimeout(self.timeout_s)
                connection.sendall(len(request).to_bytes(4) + request)
                head = self._receive(connection, 4, deadline)
                answer = msgspec.msgpack.decode(self._receive(connection, int.from_bytes(head), deadline), type=kind)
                if isinstance(answer, list) and len(answer) != len(keys):
                    raise ConnectionError(f"{len(answer)} answers for {len(keys)} keys")
                return answer
            except (OSError, msgspec.DecodeError) as error:
                if not (self.keeps_going and isinstance(error, TimeoutError)):
                    self._drop()
                raise BackendUnavailable(f"toy: {error}") from error

    def _receive(self, connection: socket.socket, nbytes: int, deadline: float) -> bytes:
        data = bytearray()
        while len(data) < nbytes:
            connection.settimeout(max(1e-6, deadline - time.monotonic()))
            piece = connection.recv(min(nbytes - len(data), 1 << 18))
            if not piece:
                raise ConnectionError("ended early")
            data += piece
        return bytes(data)

    def _drop(self) -> None:
        if self._socket:
            self._socket.close()
            self._socket = None
