"""The conformance suite on the backends that need no server, how backends are found, and the page about writing one."""

import importlib
import re
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from lmcache_backends import file
from lmcache_backends.lmdb import LMDBBackend
from lmcache_backends.memory import MemoryBackend
from lmcache_backends.noop import NoopBackend
from lmcache_sdk.backend import Backend, Miss, Scan, Url, Usage, open_backend
from lmcache_sdk.errors import BackendFull, BackendUnavailable, ConfigError
from lmcache_sdk.testing.backends import BackendTests, item, read
from lmcache_sdk.testing.faulty import Faults, Faulty

DOC = Path(__file__).parents[2] / "docs" / "writing-a-backend.md"


class TestMemory(BackendTests):
    bound = 8 << 20

    def open(self, place: Path) -> MemoryBackend:
        return MemoryBackend(self.bound)

    def raw_get(self, backend: MemoryBackend, key: str) -> bytes | None:
        return backend._records.get(key)

    def raw_set(self, backend: MemoryBackend, key: str, data: bytes) -> None:
        backend._records[key] = data


class TestUnboundedMemory(TestMemory):
    bound = 0


class TestNoop(BackendTests):
    stores = False

    def open(self, place: Path) -> NoopBackend:
        return NoopBackend()


class TestLMDB(BackendTests):
    bound = 16 << 20
    durable = True

    def open(self, place: Path) -> LMDBBackend:
        return LMDBBackend.from_url(Url(f"lmdb://{place}/store?size={self.bound}"))

    def raw_get(self, backend: LMDBBackend, key: str) -> bytes | None:
        with backend._environment.env.begin(backend._environment.records) as txn:
            return txn.get(key.encode())

    def raw_set(self, backend: LMDBBackend, key: str, data: bytes) -> None:
        with backend._environment.env.begin(backend._environment.records, write=True) as txn:
            txn.put(key.encode(), data)
        backend._index[key] = len(data)


class TestFaultyWithoutFaults(TestMemory):
    def open(self, place: Path) -> Faulty:
        return Faulty(MemoryBackend(self.bound))

    def raw_get(self, backend: Faulty, key: str) -> bytes | None:
        return super().raw_get(backend.inner, key)

    def raw_set(self, backend: Faulty, key: str, data: bytes) -> None:
        super().raw_set(backend.inner, key, data)


def test_the_page_shows_the_very_files() -> None:
    shown = re.findall(r"```python\n# (\S+\.py)\n(.*?)```", DOC.read_text(), re.DOTALL)
    assert dict(shown) == {
        "lmcache_backends/file.py": Path(file.__file__).read_text(),
        "test_file.py": (DOC.parents[1] / "tests" / "backends" / "test_file.py").read_text(),
    }


def test_capabilities() -> None:
    memory = MemoryBackend()
    assert isinstance(memory, Scan)
    assert isinstance(memory, Usage)
    assert issubclass(LMDBBackend, Scan)
    assert issubclass(LMDBBackend, Usage)
    assert not isinstance(NoopBackend(), Scan)


@pytest.mark.parametrize(
    ("cls", "url", "named"),
    [
        (MemoryBackend, "memory://host", "host"),
        (MemoryBackend, "memory://?size=0", "'0'"),
        (MemoryBackend, "memory://?size=-1", "-1"),
        (MemoryBackend, "memory://?size=lots", "lots"),
        (MemoryBackend, "memory://?sise=1GiB", "sise"),
        (NoopBackend, "noop://?size=1", "size"),
        (NoopBackend, "noop:///path", "path"),
        (LMDBBackend, "lmdb://relative/path", "three slashes"),
        (LMDBBackend, "lmdb://", "three slashes"),
        (LMDBBackend, "lmdb:///", "three slashes"),
        (LMDBBackend, "lmdb:///nowhere/here?sync=1", "sync"),
        (LMDBBackend, "lmdb:///nowhere/here?size=0", "'0'"),
        (LMDBBackend, "lmdb:///nowhere/here?size=-5GiB", "-5GiB"),
        (LMDBBackend, "lmdb:///nowhere/here?size=100KiB", "size=102400"),
        (LMDBBackend, "lmdb:///nowhere/here?size=", "has no value"),
        (LMDBBackend, "lmdb:///nowhere/here?size=1GiB", "/nowhere does not exist"),
    ],
)
def test_bad_urls(cls: type[Backend], url: str, named: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(named)):
        cls.from_url(Url(url))


def test_options_of_a_tier_are_not_ignored() -> None:
    with pytest.raises(ConfigError, match="behind #"):
        open_backend("memory://#encrypt_key_file=/etc/kv.key")


def test_memory_evicts_the_least_recently_used() -> None:
    backend = MemoryBackend(30)
    backend.put([item("a", b"x" * 10), item("b", b"x" * 10), item("c", b"x" * 10)])
    read(backend, "a")
    backend.put([item("d", b"x" * 10)])
    assert backend.contains(["a", "b", "c", "d"]) == [True, False, True, True]
    assert backend.usage() == (3, 30, 30, 1)
    with pytest.raises(BackendFull, match="31 bytes"):
        backend.put([item("e", b"x" * 31)])
    assert backend.usage().records == 3


class TestFaulty:
    def test_the_same_seed_fails_the_same_way(self) -> None:
        def history(seed: int) -> list[object]:
            backend = Faulty(MemoryBackend(), Faults(0.2, 0.2, 0.2, 0.2, 0.2, 0.2), seed=seed)
            seen: list[object] = []
            for i in range(100):
                try:
                    seen.append(backend.put([item(f"k{i % 7}", bytes(100))], if_absent=False))
                    seen.append(read(backend, f"k{i % 7}", 100))
                except (BackendUnavailable, BackendFull) as error:
                    seen.append(str(error))
            assert set(backend.injected) == set(Faults._fields)
            return seen

        assert history(1) == history(1)
        assert history(1) != history(2)

    def test_faults_one_by_one(self) -> None:
        backend = Faulty(MemoryBackend())
        data = bytes(1000)
        backend.put([item("k", data)])
        backend.faults = Faults(flipped=1)
        flipped = read(backend, "k")
        assert isinstance(flipped, bytes)
        assert sum(byte.bit_count() for byte in flipped) == 1
        backend.faults = Faults(truncated=1)
        assert len(read(backend, "k")) < 1000
        backend.faults = Faults(lost=1)
        assert read(backend, "k") is Miss.ABSENT
        backend.faults = Faults(late=1)
        with pytest.raises(BackendUnavailable):
            backend.put([item("late", data)])
        backend.faults = Faults(full=1)
        with pytest.raises(BackendFull):
            backend.put([item("full", data)])
        backend.faults = Faults(unavailable=1)
        with pytest.raises(BackendUnavailable):
            backend.delete(["k"])
        backend.faults = Faults()
        assert backend.contains(["k", "late", "full"]) == [True, True, False]

    def test_the_gate(self) -> None:
        backend = Faulty(MemoryBackend())
        backend.gate.clear()
        with ThreadPoolExecutor(1) as pool:
            job = pool.submit(backend.put, [item("k", b"1")])
            assert backend.entered.acquire(timeout=10)
            assert not job.done()
            assert backend.inner.contains(["k"]) == [False]
            backend.gate.set()
            assert job.result(timeout=10) == [True]

    def test_it_has_no_url(self) -> None:
        with pytest.raises(ConfigError):
            Faulty.from_url(Url("faulty://"))


def test_close_leaves_a_late_call_to_end() -> None:
    """A call that outlasts the timeout of close ends well, and only then is the memory released."""
    from lmcache_sdk.calls import Calls

    released, inside, leave = threading.Event(), threading.Event(), threading.Event()
    calls = Calls("x", released.set)

    def call() -> None:
        with calls:
            inside.set()
            assert leave.wait(10)
            assert not released.is_set()

    with ThreadPoolExecutor(1) as pool:
        job = pool.submit(call)
        assert inside.wait(10)
        assert not calls.close(0.01)
        assert not released.is_set()
        with pytest.raises(BackendUnavailable), calls:
            pass
        leave.set()
        job.result(timeout=10)
    assert released.is_set()
    assert calls.close(0)


def test_an_installed_package_adds_a_scheme(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And does not replace one of ours."""
    info = tmp_path / "fake_backend-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: fake-backend\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[lmcache_sdk.backends]\nfake = fake_backend:Fake\nmemory = fake_backend:Fake\n"
        "broken = fake_backend:Absent\nlost = no_such_module_here:Lost\n"
        "optional = no_such_module_here.client:Lost [client]\n"
    )
    (tmp_path / "fake_backend.py").write_text(
        "from lmcache_backends.memory import MemoryBackend\nclass Fake(MemoryBackend):\n    pass\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.invalidate_caches()
    opened = open_backend("fake://?size=1MiB")
    assert type(opened).__name__ == "Fake"
    opened.close(1.0)
    ours = open_backend("memory://")
    assert type(ours) is MemoryBackend
    ours.close(1.0)
    for scheme, what in (("broken", "Absent"), ("lost", "no_such_module_here")):
        with pytest.raises(ConfigError, match=f"fake-backend, does not load: .*{what}"):
            open_backend(f"{scheme}://")
    with pytest.raises(ConfigError) as refused:
        open_backend("optional://")
    assert str(refused.value) == (
        "optional:// needs the package 'no_such_module_here': pip install 'fake-backend[client]'"
    )
    del sys.modules["fake_backend"]
