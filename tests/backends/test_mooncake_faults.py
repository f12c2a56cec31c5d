"""Mooncake when its master, a node or the network breaks."""

from __future__ import annotations

import mmap
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import ClassVar

import pytest

from lmcache_backends.mooncake import MooncakeBackend
from lmcache_sdk.backend import Item, Miss, Url
from lmcache_sdk.errors import BackendError, BackendUnavailable, ConfigError
from lmcache_sdk.testing.backends import item, read
from lmcache_sdk.testing.proxy import Proxy
from tests.backends.fault_tests import RemoteFaultTests
from tests.backends.mooncake_master import MooncakeMaster
from tests.backends.programs import free_port
from tests.backends.proxy_process import ProxyProcess

MIB = 1 << 20


class TestMooncakeFaults(RemoteFaultTests):
    """The proxy stands before the master; what is read and written goes directly to the node."""

    grace_s = 6.0  # the client looks for a master that is gone for 4.5 s, whatever it was told
    master: ClassVar[MooncakeMaster]

    @pytest.fixture(scope="class", autouse=True)
    @classmethod
    def running(cls, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
        with MooncakeMaster(tmp_path_factory.mktemp("mooncake")) as cls.master:
            cls.master.add_node(64 * MIB)
            yield

    @pytest.fixture
    def proxy(self) -> Iterator[Proxy]:
        print(f"seed of the garbage: {self.seed}")
        with ProxyProcess(*self.target(), seed=self.seed) as proxy:
            yield proxy

    def target(self) -> tuple[str, int]:
        return "127.0.0.1", self.master.port

    def open(self, port: int) -> MooncakeBackend:
        return MooncakeBackend.from_url(Url(f"mooncake://127.0.0.1:{port}/?timeout={self.timeout_s}&staging=8MiB"))

    def kill_server(self) -> None:
        self.master.kill()

    def start_server(self) -> None:
        self.master.start()


# Nodes


@pytest.fixture
def master(tmp_path: Path) -> Iterator[MooncakeMaster]:
    with MooncakeMaster(tmp_path) as master:
        yield master


@contextmanager
def opened(master: MooncakeMaster, options: str = "") -> Iterator[MooncakeBackend]:
    backend = MooncakeBackend.from_url(Url(f"mooncake://{master.address}/?timeout=1&staging=4MiB{options}"))
    try:
        yield backend
    finally:
        backend.close(10)


def until_it_works(call: Callable[[], object], seconds: float = 30.0) -> None:
    deadline, pause = time.monotonic() + seconds, threading.Event()
    while True:
        try:
            if call():
                return
        except BackendError:
            pass
        assert time.monotonic() < deadline, f"it does not work after {seconds} s"
        pause.wait(0.1)


def test_what_a_lost_node_held_is_missed(master: MooncakeMaster) -> None:
    """And what the others hold is found."""
    records = {f"k{i}": random.Random(i).randbytes(300_000) for i in range(40)}
    lost = master.add_node(32 * MIB)
    master.add_node(32 * MIB)
    with opened(master) as backend:
        assert all(backend.put([item(key, data) for key, data in records.items()]))
        lost.kill()
        lost.wait()
        started = time.monotonic()
        found = {key: read(backend, key) for key in records}
        assert time.monotonic() - started < 20
        assert all(answer in (records[key], Miss.ABSENT) for key, answer in found.items())
        assert 0 < sum(answer is Miss.ABSENT for answer in found.values()) < len(records)
        # When the master has given the node up, the records are stored anew.
        until_it_works(lambda: all(backend.put([item(key, data)]) for key, data in records.items()))
        until_it_works(lambda: {key: read(backend, key) for key in records} == records)


@pytest.mark.parametrize("after_s", [0.0, 0.005])
def test_a_node_that_stands_still(master: MooncakeMaster, after_s: float) -> None:
    """The call ends in time, and nobody writes into its buffer when the node goes on."""
    data = random.Random(1).randbytes(32 * MIB)
    node = master.add_node(128 * MIB)
    memory = memoryview(mmap.mmap(-1, len(data)))
    with opened(master) as backend:
        backend.register_memory(memory)
        memory[:] = data
        assert backend.put([Item("k", memory)]) == [True]
        threading.Timer(after_s, node.send_signal, [signal.SIGSTOP]).start()
        memory[:] = bytes(len(data))
        started = time.monotonic()
        answers = []
        while time.monotonic() - started < 0.5:  # until one is caught in the midst of it
            answers += backend.get(["k"], [memory])
        assert answers[-1] is Miss.ABSENT
        assert set(answers[:-1]) <= {len(data)}
        assert time.monotonic() - started < 6
        left = bytes(memory)
        node.send_signal(signal.SIGCONT)
        until_it_works(lambda: read(backend, "k", 1) is Miss.TOO_LARGE)
        assert memory == left, "written to after the call"
        assert backend.get(["k"], [memory]) == [len(data)]
        assert memory == data


def test_two_that_give_memory_and_share_records(master: MooncakeMaster) -> None:
    """Each finds what the other has stored; who leaves takes along what it held, and no more."""
    with opened(master, "&segment=64MiB") as first:
        with opened(master, "&segment=64MiB") as second:
            records = {f"k{i}": random.Random(i).randbytes(200_000) for i in range(40)}
            for i, (key, data) in enumerate(records.items()):
                assert (first, second)[i % 2].put([item(key, data)]) == [True]
                assert (second, first)[i % 2].put([item(key, data)]) == [False]
            for backend in (first, second):
                assert {key: read(backend, key) for key in records} == records
        found = {key: read(first, key) for key in records}
        assert all(answer in (records[key], Miss.ABSENT) for key, answer in found.items())
        assert 0 < sum(answer is Miss.ABSENT for answer in found.values()) < len(records)


def test_the_master_starts_again_and_nodes_come_back(master: MooncakeMaster) -> None:
    """It has forgotten all records; clients and nodes join again by themselves."""
    with opened(master, "&segment=64MiB") as backend:
        assert backend.put([item("k", b"1")]) == [True]
        master.kill()
        with pytest.raises(BackendUnavailable, match="does not answer"):
            backend.contains(["k"])
        with pytest.raises(BackendUnavailable, match="does not answer"):
            backend.put([item("k", b"1")])
        master.start()
        until_it_works(lambda: backend.put([item("k", b"2")]))
        until_it_works(lambda: read(backend, "k") == b"2")


def test_closing_without_a_master_does_not_wait(master: MooncakeMaster) -> None:
    with opened(master, "&segment=64MiB") as backend:
        master.kill()
        started = time.monotonic()
        backend.close(10)
        assert time.monotonic() - started < 3
        with pytest.raises(BackendUnavailable, match="closed"):
            backend.contains(["k"])


def test_there_is_no_master() -> None:
    with pytest.raises(BackendUnavailable, match=r"no Mooncake master at 127\.0\.0\.1:\d+ .*start mooncake_master"):
        MooncakeBackend.from_url(Url(f"mooncake://127.0.0.1:{free_port()}/"))


def test_a_client_that_does_not_load_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(name: str) -> None:
        raise ImportError("libibverbs.so.1: cannot open shared object file: No such file or directory")

    monkeypatch.setattr("importlib.import_module", load)
    with pytest.raises(ConfigError, match=r"libibverbs\.so\.1.*apt-get install libibverbs1"):
        MooncakeBackend.from_url(Url("mooncake://127.0.0.1:1/"))
