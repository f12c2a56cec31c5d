"""A directory that several processes share: one winner, the bound, what a killed writer leaves. With real processes."""

from __future__ import annotations

import errno
import json
import os
import random
import re
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from io import FileIO
from pathlib import Path

import pytest

from lmcache_backends.file import FileBackend
from lmcache_sdk.backend import Miss, Url
from lmcache_sdk.errors import BackendFull, BackendUnavailable, ConfigError
from lmcache_sdk.testing.backends import item, read, some_bytes

MIB = 1 << 20
SIZE = 16 * MIB
KEYS = 200

PREAMBLE = """
import json, random, sys
from pathlib import Path
from lmcache_backends.file import FileBackend
from lmcache_sdk.backend import Miss
backend, seed = FileBackend(Path(sys.argv[1]), int(sys.argv[2])), int(sys.argv[3])
rng = random.Random(seed)
def data(n):
    return random.Random(n).randbytes((0, 100, 70_000, 300_000)[n % 4])
print("ready", flush=True)
sys.stdin.readline()
"""
RACE = """
wins = [n for n in range(%d) if backend.put([(f"race/{n}", memoryview(b"%%d" %% seed))]) == [True]]
print(json.dumps(wins))
"""
CHURN = """
buffer = memoryview(bytearray(300_000))
for turn in range(1_000_000):
    n = rng.randrange(%d)
    backend.put([(f"n/{n}", memoryview(data(n)))], if_absent=rng.random() < 0.5)
    n = rng.randrange(%d)
    (found,) = backend.get([f"n/{n}"], [buffer])
    assert found is Miss.ABSENT or buffer[:found] == data(n), n
    if turn %% 20 == 0:
        print("turn", flush=True)
"""


class Writer:
    def __init__(self, code: str, place: Path, seed: int) -> None:
        environ = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        line = [sys.executable, "-c", PREAMBLE + code, str(place), str(SIZE), str(seed)]
        self.process = subprocess.Popen(line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environ)
        assert self.hear() == "ready\n"

    def hear(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline()

    def begin(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate()


def used(place: Path) -> int:
    total = 0
    for folder, _, names in os.walk(place):
        for name in names:
            with suppress(FileNotFoundError):
                total += Path(folder, name).stat().st_size
    return total


def test_of_three_processes_one_wins_each_key(tmp_path: Path) -> None:
    writers = [Writer(RACE % KEYS, tmp_path / "kv", seed) for seed in range(3)]
    for writer in writers:
        writer.begin()
    wins = [json.loads(writer.hear()) for writer in writers]
    for writer in writers:
        writer.process.communicate(timeout=10)
    backend = FileBackend(tmp_path / "kv", SIZE)
    for n in range(KEYS):
        winners = [seed for seed in range(3) if n in wins[seed]]
        assert len(winners) == 1
        assert read(backend, f"race/{n}") == b"%d" % winners[0]
    assert not list((tmp_path / "kv").rglob("*.new"))


def test_three_processes_one_of_them_killed_again_and_again(tmp_path: Path) -> None:
    seed = random.randrange(1 << 30)
    print(f"seed {seed}")
    place = tmp_path / "kv"
    churn = CHURN % (KEYS, KEYS)
    steady = [Writer(churn, place, seed + i) for i in range(2)]
    for writer in steady:
        writer.begin()
    largest = 0
    for kill in range(4):
        writer = Writer(churn, place, seed + 10 + kill)
        writer.begin()
        for _ in range(3):
            assert writer.hear() == "turn\n"
            largest = max(largest, used(place))
        writer.kill()
    for writer in steady:
        assert writer.hear() == "turn\n", "a reader found other bytes"
        writer.kill()
    assert largest <= SIZE + 3 * 300_000  # what three are just writing comes on top

    backend = FileBackend(place, SIZE)
    found = {stat.key: stat for stat in backend.scan()}
    assert len(found) > 20
    for key, stat in found.items():
        n = int(key.removeprefix("n/"))
        assert read(backend, key) == random.Random(n).randbytes((0, 100, 70_000, 300_000)[n % 4])
        assert abs(time.time() - stat.modified) < 120


def test_what_a_crashed_writer_left_is_removed(tmp_path: Path) -> None:
    backend = FileBackend(tmp_path / "kv", SIZE)
    backend.put([item("k", b"1")])
    folder = backend.path_of("k").parent
    left, under_way = folder / f"={'a' * 32}.new", folder / f"={'b' * 32}.new"
    theirs = [folder / "contract.new", folder / "YWJj=", tmp_path / "kv" / "records" / "2024" / "draft.new"]
    for file in (left, under_way, *theirs):
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(bytes(1000))
    for file in (left, *theirs):
        os.utime(file, (time.time() - 4000, time.time() - 4000))
    again = FileBackend(tmp_path / "kv", SIZE)
    assert [stat.key for stat in again.scan()] == ["k"]
    again.put([item("other", b"2")])
    assert not left.exists()
    assert under_way.exists()
    assert all(file.exists() for file in theirs)
    assert again.usage().records == 2


def test_long_keys_share_their_folders(tmp_path: Path) -> None:
    """A folder is not removed with its last record: another process may be about to write to it."""
    backend = FileBackend(tmp_path / "kv", SIZE)
    keys = [f"{'p' * 64}/{number:0180}" for number in range(1000)]
    backend.put([item(key, b"1") for key in keys])
    assert len(list((tmp_path / "kv" / "records").iterdir())) <= 256
    assert sorted(stat.key for stat in backend.scan()) == keys
    assert backend.delete(keys) == len(keys)
    assert not [path for path in (tmp_path / "kv").rglob("*") if path.is_file()]


@pytest.mark.parametrize("nbytes", [199, 200, 201, 202, 400])
def test_a_long_key_is_no_way_out(tmp_path: Path, nbytes: int) -> None:
    backend = FileBackend(tmp_path / "kv", SIZE)
    for front in ("", ".", "..", "../..", "/"):
        key = front + "k" * (nbytes - len(front))
        assert backend.put([item(key, b"1")]) == [True]
        assert backend.path_of(key).resolve().parents[1] == tmp_path / "kv" / "records"
        assert [stat.key for stat in backend.scan()] == [key]
        assert backend.delete([key]) == 1


def test_the_least_recently_used_go_first(tmp_path: Path) -> None:
    nbytes = SIZE // 32
    keys = [f"k{i}" for i in range(20)]
    backend = FileBackend(tmp_path / "kv", SIZE)
    backend.put([item(key, some_bytes(nbytes)) for key in keys])
    buffers = [memoryview(bytearray(nbytes)) for _ in range(5)]
    assert backend.get(keys[:5], buffers) == [nbytes] * 5  # the front of a prefix stays longest
    backend.touch([keys[7]])
    backend.put([item(f"new{i}", some_bytes(nbytes)) for i in range(25)])
    kept = {key for key, here in zip(keys, backend.contains(keys), strict=True) if here}
    assert {"k0", "k7"} <= kept <= {"k0", "k1", "k2", "k7"}
    assert backend.usage().evictions == len(keys) - len(kept)


def test_records_that_are_too_large(tmp_path: Path) -> None:
    backend = FileBackend(tmp_path / "kv", 32_000)
    with pytest.raises(BackendFull, match=r"28001 bytes is too large .*size=32000"):
        backend.put([item("k", bytes(28_001))])
    assert backend.put([item("k", bytes(28_000))]) == [True]


def test_a_directory_that_goes_away(tmp_path: Path) -> None:
    backend = FileBackend(tmp_path / "kv", SIZE)
    (tmp_path / "kv").rmdir()
    (tmp_path / "kv").write_text("a file")
    with pytest.raises(BackendUnavailable, match=re.escape(str(tmp_path))):
        backend.put([item("k", b"1")])
    with pytest.raises(BackendUnavailable, match="Not a directory"):
        read(backend, "k")
    (tmp_path / "kv").unlink()
    assert read(backend, "k") is Miss.ABSENT
    assert backend.put([item("k", b"1")]) == [True]
    with pytest.raises(BackendUnavailable, match="No such file"):
        FileBackend(tmp_path / "no" / "kv", SIZE)


@pytest.mark.parametrize(
    ("url", "named"),
    [
        ("file:///mnt/kv", "needs a path and a size"),
        ("file://mnt/kv?size=1GiB", "three slashes"),
        ("file:///?size=1GiB", "needs a path"),
        ("file:///mnt/kv?size=much", "'much' is not a size"),
        ("file:///mnt/kv?sise=1GiB", "unknown parameter 'sise'"),
    ],
)
def test_bad_urls(url: str, named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        FileBackend.from_url(Url(url))


def test_a_record_that_may_not_be_read_is_a_miss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = FileBackend(tmp_path / "kv", SIZE)
    backend.put([item(key, key.encode()) for key in "abc"])
    forbidden = backend.path_of("b")

    def opened(path: str) -> FileIO:
        if path == str(forbidden) and os.geteuid() == 0:  # whom no mode keeps out
            raise PermissionError(errno.EACCES, "Permission denied")
        return FileIO(path)

    forbidden.chmod(0)
    monkeypatch.setattr("lmcache_backends.file.FileIO", opened)
    buffers = [memoryview(bytearray(1)) for _ in "abc"]
    assert backend.get(list("abc"), buffers) == [1, Miss.ABSENT, 1]


def test_close_waits_for_the_calls_inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their buffers are theirs until they return."""
    backend = FileBackend(tmp_path / "kv", SIZE)
    backend.put([item("k", b"data")])
    inside, go_on = threading.Event(), threading.Event()

    def slow(path: str) -> FileIO:
        inside.set()
        assert go_on.wait(30)
        return FileIO(path)

    monkeypatch.setattr("lmcache_backends.file.FileIO", slow)
    with ThreadPoolExecutor(2) as pool:
        reading = pool.submit(read, backend, "k")
        assert inside.wait(30)
        closing = pool.submit(backend.close, 30)
        with pytest.raises(TimeoutError):
            closing.result(0.2)
        go_on.set()
        assert reading.result(30) == b"data"
        closing.result(30)
    with pytest.raises(BackendUnavailable, match="is closed"):
        backend.contains(["k"])
