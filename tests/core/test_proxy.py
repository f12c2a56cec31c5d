"""The proxy that breaks: each of its ways, on a server that echoes."""

from __future__ import annotations

import socket
import socketserver
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from lmcache_sdk.testing.proxy import Proxy


class Echo(socketserver.ThreadingTCPServer):
    daemon_threads = True
    block_on_close = False

    def __init__(self) -> None:
        self.ended = threading.Semaphore(0)
        super().__init__(("127.0.0.1", 0), EchoHandler)


class EchoHandler(socketserver.BaseRequestHandler):
    def handle(self) -> None:
        try:
            while data := self.request.recv(1 << 16):
                self.request.sendall(data)
        except OSError:
            pass
        finally:
            self.server.ended.release()  # type: ignore[attr-defined]


@pytest.fixture
def echo() -> Iterator[Echo]:
    with Echo() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def proxy(echo: Echo) -> Iterator[Proxy]:
    with Proxy("127.0.0.1", echo.server_address[1], seed=7) as proxy:
        yield proxy


Dial = Callable[[], socket.socket]


@pytest.fixture
def dial(proxy: Proxy) -> Iterator[Dial]:
    sockets: list[socket.socket] = []

    def dial() -> socket.socket:
        sockets.append(socket.create_connection(("127.0.0.1", proxy.port), 10))
        return sockets[-1]

    yield dial
    for opened in sockets:
        opened.close()


def ask(client: socket.socket, data: bytes = b"hello") -> bytes:
    """What comes back for it; less if the connection ends early."""
    sender = threading.Thread(target=client.sendall, args=(data,))
    sender.start()
    answer = receive(client, len(data))
    sender.join()
    return answer


def receive(client: socket.socket, nbytes: int) -> bytes:
    answer = bytearray()
    while len(answer) < nbytes and (piece := client.recv(nbytes - len(answer))):
        answer += piece
    return bytes(answer)


def silent(client: socket.socket) -> bool:
    client.settimeout(0.2)
    try:
        client.recv(1)
    except TimeoutError:
        return True
    finally:
        client.settimeout(10)
    return False


def test_it_passes_everything_on_and_counts(proxy: Proxy, dial: Dial) -> None:
    data = bytes(range(256)) * 40_000
    client, other = dial(), dial()
    assert ask(client, data) == data
    assert ask(other) == b"hello"
    assert (proxy.connections, proxy.bytes_up, proxy.bytes_down) == (2, len(data) + 5, len(data) + 5)


def test_the_end_of_either_side_is_passed_on(proxy: Proxy, dial: Dial, echo: Echo) -> None:
    client = dial()
    assert ask(client) == b"hello"
    client.close()
    assert echo.ended.acquire(timeout=10)


def test_latency_is_once_a_request(proxy: Proxy, dial: Dial) -> None:
    client = dial()
    ask(client)
    proxy.latency(0.3)
    start = time.monotonic()
    assert ask(client) == b"hello"
    assert 0.3 <= time.monotonic() - start < 5
    proxy.pass_through()
    start = time.monotonic()
    ask(client)
    assert time.monotonic() - start < 0.3


def test_reset_meets_connections_that_stand_and_new_ones(proxy: Proxy, dial: Dial, echo: Echo) -> None:
    client = dial()
    ask(client)
    proxy.reset()
    with pytest.raises(ConnectionResetError):
        client.recv(1)
    assert echo.ended.acquire(timeout=10)
    with pytest.raises(ConnectionError):  # as it connects, or as it is used
        dial().recv(1)
    proxy.pass_through()
    assert ask(dial()) == b"hello"


def test_half_open_tells_the_server_but_not_the_client(proxy: Proxy, dial: Dial, echo: Echo) -> None:
    client = dial()
    ask(client)
    proxy.half_open()
    assert echo.ended.acquire(timeout=10)
    client.sendall(b"anyone?")
    new = dial()
    new.sendall(b"anyone?")
    assert silent(client) and silent(new)
    proxy.pass_through()
    client.sendall(b"again")
    with pytest.raises(ConnectionResetError):
        client.recv(1)
    assert ask(dial()) == b"hello"


@pytest.mark.parametrize("nbytes", [0, 3, 200_000])
def test_truncate_ends_each_connection_after_so_many_bytes(proxy: Proxy, dial: Dial, nbytes: int) -> None:
    client = dial()
    ask(client)
    proxy.truncate(nbytes)
    for connection in (client, dial()):
        connection.sendall(b"x" * 300_000)
        assert receive(connection, 300_000) == b"x" * nbytes
    proxy.pass_through()
    assert ask(dial()) == b"hello"


def test_a_blackhole_holds_replies(proxy: Proxy, dial: Dial, echo: Echo) -> None:
    client = dial()
    ask(client)
    proxy.blackhole()
    client.sendall(b"late")
    new = dial()
    new.sendall(b"late")
    assert silent(client) and silent(new)
    assert proxy.bytes_up == 13  # the server has heard them
    proxy.pass_through()
    assert receive(client, 4) == receive(new, 4) == b"late"


def test_garbage_is_the_same_for_the_same_seed(echo: Echo, proxy: Proxy, dial: Dial) -> None:
    data = bytes(200_000)
    with Proxy("127.0.0.1", echo.server_address[1], seed=7) as twin:
        twin.garbage()
        with socket.create_connection(("127.0.0.1", twin.port), 10) as client:
            expected = ask(client, data)
    proxy.garbage()
    client = dial()
    spoilt = ask(client, data)
    assert spoilt == expected
    assert 100 < len(data) - spoilt.count(0) < 400
    proxy.pass_through()
    assert ask(client, data) == data


def test_a_target_that_is_not_there_resets(dial: Dial, proxy: Proxy) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        proxy.target_port = unused.getsockname()[1]
        with pytest.raises(ConnectionError):
            dial().recv(1)


def test_leaving_ends_everything(echo: Echo) -> None:
    with Proxy("127.0.0.1", echo.server_address[1]) as proxy:
        client = socket.create_connection(("127.0.0.1", proxy.port), 10)
        ask(client)
        proxy.blackhole()
    with pytest.raises(ConnectionResetError), client:
        client.recv(1)
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", proxy.port), 10)
