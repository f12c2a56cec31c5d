"""The fault suite on a store of a few lines, and on one with a defect that it must find."""

from __future__ import annotations

from collections.abc import Iterator

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


def test_a_reply_taken_for_another_is_found(toy: ToyServer) -> None:
    with Proxy("127.0.0.1", toy.port) as proxy, pytest.raises(AssertionError, match="other bytes under"):
        TestToy().test_a_late_reply_is_not_taken_for_another(proxy, KeepsGoing(proxy.port, TestToy.timeout_s))


def test_an_error_of_another_kind_is_found(toy: ToyServer) -> None:
    with Proxy("127.0.0.1", toy.port) as proxy:
        proxy.reset()
        with pytest.raises(AssertionError, match="ValueError"):
            TestToy().check_each_call(OtherErrors(proxy.port, TestToy.timeout_s), {"k": b"1"})


def test_a_call_that_does_not_end_is_found(toy: ToyServer) -> None:
    with Proxy("127.0.0.1", toy.port) as proxy:
        proxy.blackhole()
        with pytest.raises(AssertionError, match="still under way"):
            TestToy().check_each_call(ToyBackend(proxy.port, timeout_s=10), {"k": b"1"})
