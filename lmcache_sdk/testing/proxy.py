"""A TCP proxy that breaks on command: what stands between a client and its server in tests of faults."""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
import struct
import threading
from collections.abc import Coroutine
from types import TracebackType
from typing import Any, Self

_PIECE = 1 << 16
_COMMAND_TIMEOUT_S = 10.0
_AT_ONCE = struct.pack("ii", 1, 0)  # SO_LINGER: closing sends RST instead of FIN
_ACCEPT_TURNS = 8  # of the loop, within which a connection that was just accepted has become one of ours


class Proxy:
    """Forwards TCP connections on a free loopback port to a target, until it is told to break. A context manager.

    One way of breaking at a time: each command replaces the one before, for the connections that stand and for new
    ones, and has taken effect when it returns. Where a target cannot be reached, a client is reset.

    Args:
        target_host, target_port: where to; may be changed at any time, for new connections.
        seed: of the garbage.

    Attributes:
        host, port: where it listens.
        connections: how many it has accepted.
        bytes_up: requests passed on to the target.
        bytes_down: replies passed on to clients.
    """

    host = "127.0.0.1"

    def __init__(self, target_host: str, target_port: int, seed: int = 0) -> None:
        self.target_host = target_host
        self.target_port = target_port
        self.seed = seed
        self.port = 0
        self.connections = 0
        self.bytes_up = 0
        self.bytes_down = 0
        self.mode = "pass_through"
        self.delay_s = 0.0
        self.garbage_every = 0
        self.left_for_each: int | None = None
        self.flowing: asyncio.Event
        self._standing: set[_Connection] = set()

    def __enter__(self) -> Self:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="proxy", daemon=True)
        self._thread.start()
        self._run(self._listen())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._run(self._end())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    # Commands

    def pass_through(self) -> None:
        """Break no more. Replies that were held flow; a client of a half-open connection is reset when it speaks."""
        self._run(self._change("pass_through"))

    def latency(self, seconds: float) -> None:
        """The reply to each request begins so much later."""
        self._run(self._change("latency", delay_s=seconds))

    def reset(self) -> None:
        """Reset all connections, and new ones once they are accepted."""
        self._run(self._change("reset"))

    def half_open(self) -> None:
        """The target is gone and the client is not told: its bytes vanish, nothing comes back."""
        self._run(self._change("half_open"))

    def truncate(self, nbytes: int) -> None:
        """Each connection ends in an orderly way after so many more bytes of replies."""
        self._run(self._change("truncate", left=nbytes))

    def blackhole(self) -> None:
        """Requests arrive at the target, but no reply comes back."""
        self._run(self._change("blackhole"))

    def garbage(self, every: int = 1000) -> None:
        """About one byte in so many of the replies is another one. The same for the same seed, number of connection,
        and bytes since the command.
        """
        self._run(self._change("garbage", every=every))

    # In the loop's thread

    def _run(self, work: Coroutine[Any, Any, None]) -> None:
        asyncio.run_coroutine_threadsafe(work, self._loop).result(_COMMAND_TIMEOUT_S)

    async def _listen(self) -> None:
        self.flowing = asyncio.Event()
        self.flowing.set()
        self._server = await asyncio.start_server(self._accept, self.host, 0)
        self.port = self._server.sockets[0].getsockname()[1]

    async def _end(self) -> None:
        self._server.close()
        for _ in range(_ACCEPT_TURNS):
            await asyncio.sleep(0)
        for connection in list(self._standing):
            connection.reset()
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)

    async def _change(self, mode: str, *, delay_s: float = 0.0, left: int | None = None, every: int = 0) -> None:
        self.mode = mode
        self.delay_s, self.left_for_each, self.garbage_every = delay_s, left, every
        if mode == "blackhole":
            self.flowing.clear()
        else:
            self.flowing.set()
        for connection in list(self._standing):
            connection.struck()
        await asyncio.sleep(0)  # transports close in the next turn of the loop

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        connection = _Connection(self, self.connections, reader, writer)
        self._standing.add(connection)
        try:
            await connection.serve()
        except (OSError, asyncio.CancelledError):  # cancelled: everything ends
            connection.reset()
        finally:
            self._standing.discard(connection)


class _Connection:
    """One client, and its connection to the target."""

    def __init__(self, proxy: Proxy, number: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._proxy = proxy
        self._number = number
        self._client = (reader, writer)
        self._target: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None
        self._asked = False  # since the last reply
        self._ended = False  # for the client: no reply comes any more
        self.struck()

    def struck(self) -> None:
        """The proxy has just been told how to break."""
        proxy = self._proxy
        self._left = proxy.left_for_each
        self._random = random.Random(f"{proxy.seed}/{self._number}")  # noqa: S311 - no secret depends on it
        self._sound = self._gap()
        if proxy.mode == "reset":
            self.reset()
        elif proxy.mode == "half_open" and self._target:
            _abort(self._target[1])
            self._target = None

    def reset(self) -> None:
        """End both sides at once."""
        _abort(self._client[1])
        if self._target:
            _abort(self._target[1])

    async def serve(self) -> None:
        """Pass on what both sides say, until one of them ends."""
        replies = None
        if self._proxy.mode == "reset":
            return
        if self._proxy.mode != "half_open":
            target = await asyncio.open_connection(self._proxy.target_host, self._proxy.target_port)
            self._target = target
            self.struck()  # the mode may have changed meanwhile
            replies = asyncio.ensure_future(self._pass_replies(*target))
        try:
            await self._pass_requests()
        finally:
            if replies:
                replies.cancel()
                await asyncio.gather(replies, return_exceptions=True)
            self._client[1].close()
            if self._target:
                self._target[1].close()

    async def _pass_requests(self) -> None:
        proxy = self._proxy
        while data := await self._client[0].read(_PIECE):
            if self._ended:
                continue
            if self._target:
                self._asked = True
                proxy.bytes_up += len(data)
                self._target[1].write(data)
                try:
                    await self._target[1].drain()
                except OSError:
                    if not self._cut():  # meanwhile; the client is not told, or has been told in an orderly way
                        raise
            elif proxy.mode != "half_open":
                self.reset()  # what a host says that has been restarted

    async def _pass_replies(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        proxy, client = self._proxy, self._client[1]
        with contextlib.suppress(OSError):
            while data := await reader.read(_PIECE):
                if self._asked:
                    self._asked = False
                    await asyncio.sleep(proxy.delay_s)
                await proxy.flowing.wait()
                if not self._target:  # half-open meanwhile
                    return
                if proxy.garbage_every:
                    data = self._spoilt(data)
                if self._left is not None:
                    data = data[: self._left]
                    self._left -= len(data)
                proxy.bytes_down += len(data)
                client.write(data)
                await client.drain()
                if self._left == 0:
                    break
        if self._target:  # else the client is not told that the target is gone
            self._ended = True
            _abort(writer)
            # Only this direction: to close a socket that has unread bytes resets it, and what it has sent is lost.
            with contextlib.suppress(OSError):  # it has gone meanwhile
                client.write_eof()

    def _cut(self) -> bool:
        return self._ended or self._target is None

    def _spoilt(self, data: bytes) -> bytes:
        changed = bytearray(data)
        at = self._sound
        while at < len(changed):
            changed[at] ^= self._random.randrange(1, 256)
            at += 1 + self._gap()
        self._sound = at - len(changed)
        return bytes(changed)

    def _gap(self) -> int:
        """Bytes that stay as they are, before the next that does not."""
        every = self._proxy.garbage_every
        return int(self._random.expovariate(1 / every)) if every else 0


def _abort(writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _AT_ONCE)
    writer.transport.abort()
