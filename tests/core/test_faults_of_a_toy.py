"""The fault suite on a store of a few lines, and on one with a defect that it must find."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from lmcache_sdk.testing.proxy import Proxy
from tests.backends.fault_tests import RemoteFaultTests
from tests.core.toy_remote import ToyBackend, ToyServer


@pytest.fixture
def toy() -> Iterator[ToyServer]:
    server = ToyServer()
    yield server
    server.kill()


class TestToy(RemoteFaultTests):
    timeout_s = 0.2

    @pytest.fixture(autouse=True)
    def server(self, toy: ToyServer) -> None:
        self.toy = toy

    def target(self) -> tuple[str, int]:
        return "127.0.0.1", self.toy.port

    def open(self, port: int) -> ToyBackend:
        return ToyBackend(port, self.timeout_s)

    def kill_server(self) -> None:
        self.toy.kill()

    def start_server(self) -> None:
        self.toy.start()


class KeepsGoing(ToyBackend):
    keeps_going = True


class OtherErrors(ToyBackend):
    def contains(self, keys):  # type: ignore[no-untyped-def]
        try:
            return super().contains(keys)
        except ConnectionError as error:
            raise ValueError("not what was agreed") from error


@contextmanager
def closed_after(backend: ToyBackend) -> Iterator[ToyBackend]:
    """A failure keeps the backend alive: its connection would be the collector's to close, in any later test."""
    try:
        yield backend
    finally:
        backend.close(1.0)


def test_a_reply_taken_for_another_is_found(toy: ToyServer) -> None:
    with (
        Proxy("127.0.0.1", toy.port) as proxy,
        closed_after(KeepsGoing(proxy.port, TestToy.timeout_s)) as backend,
        pytest.raises(AssertionError, match="other bytes under"),
    ):
        TestToy().test_a_late_reply_is_not_taken_for_another(proxy, backend)


def test_an_error_of_another_kind_is_found(toy: ToyServer) -> None:
    with Proxy("127.0.0.1", toy.port) as proxy, closed_after(OtherErrors(proxy.port, TestToy.timeout_s)) as backend:
        proxy.reset()
        with pytest.raises(AssertionError, match="ValueError"):
            TestToy().check_each_call(backend, {"k": b"1"})


def test_a_call_that_does_not_end_is_found(toy: ToyServer) -> None:
    backend = ToyBackend(0, timeout_s=10)
    with closed_after(backend), Proxy("127.0.0.1", toy.port) as proxy:  # the proxy's end is the call's
        backend.port = proxy.port
        proxy.blackhole()
        with pytest.raises(AssertionError, match="still under way"):
            TestToy().check_each_call(backend, {"k": b"1"})
