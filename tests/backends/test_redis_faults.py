"""Redis behind a proxy that breaks, and servers that are killed."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest

from lmcache_sdk.backend import Backend, open_backend
from tests.backends.fault_tests import RemoteFaultTests
from tests.backends.redis_server import Certificates, Server


class TestRedisFaults(RemoteFaultTests):
    tls: Certificates | None = None

    @pytest.fixture(autouse=True)
    def _server(self) -> Iterator[None]:
        with Server(tls=self.tls) as self.server:
            yield

    def target(self) -> tuple[str, int]:
        return "127.0.0.1", self.server.port

    def open(self, port: int) -> Backend:
        parameters = "timeout=1&connect_timeout=0.5" + (f"&ca={self.tls.ca}" if self.tls else "")
        return open_backend(f"{'rediss' if self.tls else 'redis'}://127.0.0.1:{port}?{parameters}")

    def kill_server(self) -> None:
        self.server.stop(signal.SIGKILL)

    def start_server(self) -> None:
        self.server.start()


@pytest.mark.slow
# Python leaves a socket unclosed that is reset between connecting and the handshake.
@pytest.mark.filterwarnings("ignore:.*ssl.SSLSocket:pytest.PytestUnraisableExceptionWarning")
class TestTLSFaults(TestRedisFaults):
    @pytest.fixture(autouse=True)
    def _server(self, certificates: Certificates) -> Iterator[None]:
        self.tls = certificates
        with Server(tls=certificates) as self.server:
            yield
