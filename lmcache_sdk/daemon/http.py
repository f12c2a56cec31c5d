"""``/metrics`` for Prometheus and ``/healthz`` for whoever restarts a daemon that does not answer any more.

For this machine alone; for others only with a token and TLS.
"""

from __future__ import annotations

import contextlib
import hmac
import os
import socket
import ssl
import stat
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from prometheus_client import CONTENT_TYPE_LATEST

from lmcache_sdk.config import Config, is_loopback
from lmcache_sdk.errors import BackendUnavailable, ConfigError
from lmcache_sdk.observe.logs import logger

_log = logger("http")

_REQUEST_S = 5.0  # for a TLS handshake and a request, however it drips in
_REPLY_S = 10.0
_AT_ONCE = 16
_GIVE_WAY_S = 0.5


class MetricsServer:
    """Takes its port when it is made, and answers from :meth:`start` on.

    Raises:
        ConfigError: the address could be reached from elsewhere, and there is no token or no TLS; or one of the files
            cannot be used.
        BackendUnavailable: the port is in use, or the address is not of this machine.
    """

    def __init__(self, config: Config) -> None:
        token = _token(Path(config.metrics_token_file)) if config.metrics_token_file else b""
        tls = _tls(config) if config.metrics_cert else None
        if not is_loopback(config.metrics_host) and not (token and tls):
            raise ConfigError(f"metrics on {config.metrics_host} need a token and TLS; use 127.0.0.1 without")
        place = f"{config.metrics_host} port {config.metrics_port}"
        try:
            self._http = _Server(config.metrics_host, config.metrics_port, token, tls)
        except OSError as error:
            raise BackendUnavailable(
                f"cannot serve metrics on {place} ({error.strerror}); choose another metrics_port or metrics_host"
            ) from error
        host = f"[{config.metrics_host}]" if ":" in config.metrics_host else config.metrics_host
        self.url = f"{'https' if tls else 'http'}://{host}:{self._http.server_address[1]}"
        self._thread: threading.Thread | None = None

    def start(self, metrics: Callable[[], bytes], healthy: Callable[[], bool]) -> None:
        """Answer from now on, in threads of its own."""
        self._http.metrics, self._http.healthy = metrics, healthy
        self._thread = threading.Thread(target=self._http.serve_forever, name="lmcache-http", daemon=True)
        self._thread.start()
        _log.info("metrics on %s/metrics", self.url)

    def close(self) -> None:
        """Stop answering."""
        if self._thread is not None:
            self._http.shutdown()
            self._thread.join()
        self._http.server_close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False  # who scrapes slowly must not hold up the daemon's end
    request_queue_size = 128  # or a burst of connections makes the next one wait for a second

    def __init__(self, host: str, port: int, token: bytes, tls: ssl.SSLContext | None) -> None:
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self.token = token
        self.metrics: Callable[[], bytes] = bytes
        self.healthy: Callable[[], bool] = bool
        self._tls = tls
        self._free = threading.BoundedSemaphore(_AT_ONCE)
        self._lock = threading.Lock()
        self._asking: dict[socket.socket, float] = {}  # connection -> when it has to have asked, oldest first
        super().__init__((host, port), _Handler)

    def get_request(self) -> tuple[socket.socket, object]:
        connection, address = super().get_request()
        if self._tls is not None:
            # The handshake waits for the peer, so it is left to the connection's own thread.
            connection = self._tls.wrap_socket(connection, server_side=True, do_handshake_on_connect=False)
        return connection, address

    def verify_request(self, request: object, client_address: object) -> bool:
        """Bounds the threads. Where all are taken, who has not finished asking for longest has to go: so that nobody
        who may not ask, or does not, keeps out one who may and does.
        """
        if self._free.acquire(blocking=False):
            return True
        with self._lock:
            oldest = next(iter(self._asking), None)
            if oldest is not None:
                self._cut_off(oldest)
        return self._free.acquire(timeout=_GIVE_WAY_S)

    def process_request(self, request: socket.socket, client_address: object) -> None:  # type: ignore[override]  # TCP
        with self._lock:
            self._asking[request] = time.monotonic() + _REQUEST_S
        try:
            super().process_request(request, client_address)
        except BaseException:  # there is no thread for it
            self._ended(request)
            raise

    def process_request_thread(self, request: socket.socket, client_address: object) -> None:  # type: ignore[override]  # TCP
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._ended(request)

    def service_actions(self) -> None:
        """Called twice a second: a byte now and then is no request."""
        now = time.monotonic()
        with self._lock:
            for connection in [connection for connection, due in self._asking.items() if due <= now]:
                self._cut_off(connection)

    def asked(self, connection: socket.socket) -> None:
        """Its request is there, and allowed."""
        with self._lock:
            self._asking.pop(connection, None)

    def _ended(self, connection: socket.socket) -> None:
        self.asked(connection)
        self._free.release()

    def _cut_off(self, connection: socket.socket) -> None:
        """Under the lock. Its thread notices, and ends."""
        del self._asking[connection]
        with contextlib.suppress(OSError):  # it has just ended
            socket.socket.shutdown(connection, socket.SHUT_RDWR)  # not TLS's, which its thread is in the middle of

    def handle_error(self, request: object, client_address: object) -> None:
        _log.debug("a connection ended in an error", exc_info=True)


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    timeout = _REPLY_S

    def version_string(self) -> str:
        return "lmcache-sdk"

    def do_GET(self) -> None:
        if self.server.token and not self._authorized():
            self._reply(401, b"a token is required\n", "WWW-Authenticate", "Bearer")
            return
        self.server.asked(self.connection)
        if self.path == "/metrics":
            self._reply(200, self.server.metrics(), "Content-Type", CONTENT_TYPE_LATEST)
        elif self.path == "/healthz":
            healthy = self.server.healthy()
            self._reply(200 if healthy else 503, b"ok\n" if healthy else b"the daemon does not answer\n")
        else:
            self._reply(404, b"there are /metrics and /healthz\n")

    do_HEAD = do_GET  # noqa: N815 - the name is the base class's

    def _authorized(self) -> bool:
        scheme, _, token = self.headers.get("Authorization", "").partition(" ")
        given = token.strip().encode("utf-8", "surrogateescape")
        return hmac.compare_digest(given, self.server.token) and scheme.lower() == "bearer"

    def _reply(self, status: int, body: bytes, header: str = "Content-Type", value: str = "text/plain") -> None:
        self.send_response(status)
        self.send_header(header, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the name is the base class's
        _log.debug(format, *args)


def _token(path: Path) -> bytes:
    try:
        token = path.read_bytes().strip()
        mode = path.stat().st_mode
    except OSError as error:
        raise ConfigError(f"cannot read metrics_token_file {path}: {error.strerror}") from error
    if not token:
        raise ConfigError(f"metrics_token_file {path} is empty; write a token into it")
    if mode & stat.S_IROTH:
        _log.warning("all users can read the token in %s; chmod 600 it", path)
    return token


def _tls(config: Config) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    for name in (config.metrics_cert, config.metrics_key):
        if not os.access(name, os.R_OK):
            raise ConfigError(f"cannot read {name}, which TLS for the metrics needs")
    try:
        context.load_cert_chain(config.metrics_cert, config.metrics_key, password=lambda: "")  # and do not ask
    except (ssl.SSLError, OSError) as error:
        raise ConfigError(
            f"metrics_cert {config.metrics_cert} and metrics_key {config.metrics_key} are no certificate with its key "
            f"in PEM form: {error}"
        ) from error
    return context
