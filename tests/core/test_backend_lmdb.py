"""What is LMDB's own: the bound, restarts, crashes, damage, locks, full disks. With real processes."""

import json
import logging
import os
import random
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import lmdb
import pytest

from lmcache_backends.lmdb import LMDBBackend, environment
from lmcache_sdk.backend import Url
from lmcache_sdk.errors import (
    BackendFormatError,
    BackendFull,
    BackendLocked,
    BackendUnavailable,
    ConfigError,
)
from lmcache_sdk.testing.backends import item, read, some_bytes

MIB = 1 << 20


@pytest.fixture
def place(tmp_path: Path) -> Path:
    return tmp_path / "store"


@contextmanager
def opened(place: Path, size: int = 64 * MIB) -> Iterator[LMDBBackend]:
    backend = LMDBBackend(place, size)
    try:
        yield backend
    finally:
        backend.close(10)


def fill(place: Path, count: int = 20, nbytes: int = 100_000) -> dict[str, bytes]:
    records = {f"n/k{i}": some_bytes(nbytes, i) for i in range(count)}
    with opened(place) as backend:
        backend.put([item(key, data) for key, data in records.items()])
    return records


def found(backend: LMDBBackend, records: dict[str, bytes]) -> int:
    """How many of the records are there; what is there must be right."""
    answers = {key: read(backend, key) for key in records}
    for key, answer in answers.items():
        assert not isinstance(answer, bytes) or answer == records[key]
    return sum(isinstance(answer, bytes) for answer in answers.values())


def state(place: Path, **changes: object) -> dict[str, object]:
    """The marker of how the store was left; with changes made to it."""
    marker = json.loads((place / "STATE").read_text()) | changes
    if changes:
        (place / "STATE").write_text(json.dumps(marker))
    return marker


def data_file(place: Path) -> Path:
    return place / "records" / "data.mdb"


def set_aside(place: Path) -> list[str]:
    return sorted(path.name for path in place.glob("records.damaged-*"))


def python(code: str, *arguments: object, **options: object) -> subprocess.Popen[bytes]:
    """Another process, with the store's modules imported."""
    preamble = (
        "import os, sys\nfrom pathlib import Path\n"
        "from lmcache_backends.lmdb import LMDBBackend\n"
        "from lmcache_sdk.testing.backends import item, read, some_bytes\n"
        "place = Path(sys.argv[1])\n"
    )
    environ = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-c", preamble + code, *map(str, arguments)]
    return subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environ, **options
    )


# The bound


@pytest.mark.parametrize(
    "sizes",
    [(1_400_000, 1_400_000), (1000, 3000), (100, 1_000_000), (10_000, 6_000_000)],
    ids=["one size", "small", "mixed", "large"],
)
def test_churn_stays_within_the_bound(place: Path, sizes: tuple[int, int]) -> None:
    """Twenty times the size goes through it, with random reads: the file never grows beyond the size."""
    size = 32 * MIB if sizes[1] > 3000 else 2 * MIB
    rng = random.Random(1)
    stock = memoryview(some_bytes(8 * MIB))
    where: dict[str, tuple[int, int]] = {}
    buffer = memoryview(bytearray(8 * MIB))
    written = puts = 0
    with opened(place, size) as backend:
        while written < 20 * size:
            nbytes, start = rng.randint(*sizes), rng.randrange(MIB)
            key = f"n/{puts}"
            assert backend.put([(key, stock[start : start + nbytes])]) == [True]
            where[key] = start, nbytes
            written += nbytes
            puts += 1
            for old in (rng.randrange(puts), rng.randrange(max(0, puts - 20), puts)):
                (answer,) = backend.get([f"n/{old}"], [buffer])
                start, nbytes = where[f"n/{old}"]
                if isinstance(answer, int):
                    assert answer == nbytes
                    assert buffer[:answer] == stock[start : start + nbytes]
            assert data_file(place).stat().st_size <= size
        report = backend.usage()
        assert report.evictions > 0
        assert report.used_bytes <= size
        assert report.records == sum(1 for _ in backend.scan())
        kept = sum(stat.nbytes for stat in backend.scan())
        assert kept > (0.55 if sizes[1] > 3000 else 0.45) * size  # it is not emptied by fragmentation
        before = {stat.key: stat.nbytes for stat in backend.scan()}
    with opened(place, size) as backend:
        assert {stat.key: stat.nbytes for stat in backend.scan()} == before
        assert backend.usage().used_bytes == report.used_bytes
    assert environment.verified(place / "records") == ""


def test_the_least_recently_used_go_first(place: Path) -> None:
    with opened(place, 4 * MIB) as backend:
        backend.put([item(f"k{i}", some_bytes(200_000, i)) for i in range(15)])
        for i in (0, 3):
            read(backend, f"k{i}")
        backend.put([item(f"new{i}", some_bytes(200_000, i)) for i in range(10)])
        assert backend.contains(["k0", "k3", "k1", "k2"]) == [True, True, False, False]


def test_recency_survives_a_restart(place: Path) -> None:
    with opened(place, 4 * MIB) as backend:
        backend.put([item(f"k{i}", some_bytes(200_000, i)) for i in range(15)])
        for i in (0, 3):
            read(backend, f"k{i}")
    with opened(place, 4 * MIB) as backend:
        backend.put([item(f"new{i}", some_bytes(200_000, i)) for i in range(10)])
        assert backend.contains(["k0", "k3", "k1", "k2"]) == [True, True, False, False]


def test_no_orphans(place: Path) -> None:
    """The records' tree and the recency's hold what the index holds, after evictions and deletions, too."""
    with opened(place, 2 * MIB) as backend:
        for i in range(600):
            backend.put([item(f"k{i}", some_bytes(20_000, i))])
            if i % 7 == 0:
                backend.delete([f"k{i - 3}"])
        index = {stat.key: stat.nbytes for stat in backend.scan()}
    env = lmdb.open(str(place / "records"), max_dbs=2, readonly=True)
    with env.begin() as txn:
        records = {key.decode(): len(value) for key, value in txn.cursor(env.open_db(b"records", txn))}
        recency = txn.stat(env.open_db(b"recency", txn))["entries"]
    env.close()
    assert records == index
    assert recency == len(index)


def test_a_record_too_large_evicts_nothing(place: Path) -> None:
    with opened(place, 4 * MIB) as backend:
        backend.put([item("k", b"1")])
        with pytest.raises(BackendFull, match=r"3\.0 MiB.*raise its size"):
            backend.put([item("big", bytes(3 * MIB))])
        assert backend.contains(["k", "big"]) == [True, False]


def test_large_records_always_find_a_place(place: Path) -> None:
    """Half of the store in one piece, after small records scattered its free pages."""
    rng = random.Random(2)
    with opened(place, 8 * MIB) as backend:
        for turn in range(6):
            backend.put([item(f"{turn}/{i}", some_bytes(rng.randrange(100, 60_000), i)) for i in range(300)])
            data = some_bytes(3_600_000, turn)
            assert backend.put([item(f"{turn}/big", data)]) == [True]
            assert read(backend, f"{turn}/big", 4 * MIB) == data


def test_a_smaller_size_evicts_and_compacts(place: Path) -> None:
    records = fill(place, 40, 500_000)
    before = data_file(place).stat().st_size
    with opened(place, 8 * MIB) as backend:
        assert before > 20_000_000
        assert data_file(place).stat().st_size <= 8 * MIB
        assert 10 <= found(backend, records) <= 16
        assert backend.contains(["n/k39", "n/k0"]) == [True, False]
        for i in range(40):
            backend.put([item(f"new{i}", some_bytes(500_000, i))])
            assert data_file(place).stat().st_size <= 8 * MIB
    assert not (place / "records.compact").exists()
    with opened(place, 8 * MIB) as backend:
        assert backend.contains(["new39"]) == [True]


def test_a_larger_size_grows(place: Path) -> None:
    with opened(place, 2 * MIB) as backend:
        backend.put([item(f"a{i}", some_bytes(100_000, i)) for i in range(20)])
        kept = len(list(backend.scan()))
        assert kept < 20
    with opened(place, 8 * MIB) as backend:
        assert len(list(backend.scan())) == kept
        backend.put([item(f"b{i}", some_bytes(100_000, i)) for i in range(40)])
        assert len(list(backend.scan())) == kept + 40


# Whose it is


def test_one_user_at_a_time(place: Path) -> None:
    with opened(place) as backend:
        backend.put([item("k", b"1")])
        with pytest.raises(BackendLocked, match=f"process {os.getpid()}"):
            LMDBBackend(place, 64 * MIB)
        other = python("LMDBBackend(place, 1 << 26)", place)
        assert b"BackendLocked" in other.communicate(timeout=30)[1]
        assert read(backend, "k") == b"1"
    with opened(place) as backend:
        assert read(backend, "k") == b"1"


def test_a_process_that_is_gone_holds_no_lock(place: Path) -> None:
    other = python("LMDBBackend(place, 1 << 26).put([item('k', b'1')])\nos._exit(0)", place)
    other.communicate(timeout=30)
    assert other.returncode == 0
    with opened(place) as backend:
        assert read(backend, "k") == b"1"


def test_a_forked_child_cannot_use_it(place: Path) -> None:
    code = """
backend = LMDBBackend(place, 1 << 26)
backend.put([item("k", b"1")])
child = os.fork()
if not child:
    try:
        backend.get(["k"], [memoryview(bytearray(9))])
    except ConnectionError as error:
        backend.close(1)
        os._exit(7 if "fork" in str(error) else 1)
    os._exit(1)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
assert read(backend, "k") == b"1"
backend.close(1)
LMDBBackend(place, 1 << 26).close(1)
"""
    other = python(code, place)
    assert other.communicate(timeout=30)[1] == b""
    assert other.returncode == 0


def test_a_foreign_directory_is_refused_untouched(place: Path) -> None:
    place.mkdir()
    (place / "thesis.tex").write_text("mine")
    with pytest.raises(BackendFormatError, match=r"thesis\.tex"):
        LMDBBackend(place, 64 * MIB)
    assert [path.name for path in place.iterdir()] == ["thesis.tex"]


def test_another_format_version_is_refused_untouched(place: Path) -> None:
    fill(place, 1)
    (place / "FORMAT").write_text('{"format": "lmcache-sdk-lmdb", "version": 99}')
    before = {path: path.stat().st_mtime_ns for path in place.rglob("*")}
    with pytest.raises(BackendFormatError, match="99"):
        LMDBBackend(place, 64 * MIB)
    (place / "FORMAT").write_text("{")
    with pytest.raises(BackendFormatError, match="unreadable"):
        LMDBBackend(place, 64 * MIB)
    before.pop(place / "FORMAT")
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())


def test_a_path_that_cannot_be(place: Path) -> None:
    with pytest.raises(ConfigError, match="does not exist"):
        LMDBBackend(place / "deeper", 64 * MIB)
    place.write_text("a file")
    with pytest.raises(ConfigError, match="not a directory"):
        LMDBBackend(place, 64 * MIB)
    with pytest.raises(ConfigError, match="not a directory"):
        LMDBBackend(place / "below", 64 * MIB)


def test_an_unwritable_directory() -> None:
    """As another user where we are root, whom permissions do not stop."""
    folder = Path(tempfile.mkdtemp())  # not pytest's own, which another user cannot reach
    folder.chmod(0o755)
    place = folder / "store"
    place.mkdir(mode=0o555)
    code = """
if os.getuid() == 0:
    os.setuid(65534)
try:
    LMDBBackend(place, 1 << 26)
except Exception as error:
    print(type(error).__name__, error)
"""
    said = python(code, place).communicate(timeout=30)[0].decode()
    place.rmdir()
    folder.rmdir()
    assert said.startswith(("BackendUnavailable", "ConfigError"))
    assert str(place) in said
    assert "writable" in said


# Crashes


@pytest.mark.parametrize("seed", range(3))
def test_kill_in_mid_put(place: Path, seed: int) -> None:
    """Every record whose put had returned is there, byte for byte; the one in flight is whole or absent."""
    code = """
backend = LMDBBackend(place, 1 << 28)
for i in range(100_000):
    backend.put([item(f"n/{i}", some_bytes(300_000 + i, i))])
    os.write(1, b"%d\\n" % i)
"""
    writer = python(code, place)
    enough = random.Random(seed).randrange(20, 120)
    acknowledged = b""
    while acknowledged.count(b"\n") < enough:
        piece = os.read(writer.stdout.fileno(), 1000)
        assert piece, writer.communicate()[1]
        acknowledged += piece
    writer.kill()
    acknowledged += writer.communicate()[0]
    assert writer.returncode == -signal.SIGKILL
    count = acknowledged.count(b"\n")
    with opened(place, 1 << 28) as backend:
        for i in range(count):
            assert read(backend, f"n/{i}") == some_bytes(300_000 + i, i)
        assert {stat.key for stat in backend.scan()} - {f"n/{i}" for i in range(count + 1)} == set()
        assert backend.put([item("after", b"1")]) == [True]
    assert set_aside(place) == []
    assert state(place)["clean"] is True


def leave_unclean(place: Path) -> dict[str, bytes]:
    """Records in a store whose process died, and whose machine then went down."""
    records = fill(place)
    state(place, clean=False, boot="another boot")
    return records


def test_after_a_reboot_a_sound_store_is_used(place: Path, caplog: pytest.LogCaptureFixture) -> None:
    records = leave_unclean(place)
    with caplog.at_level(logging.WARNING), opened(place) as backend:
        assert found(backend, records) == len(records)
    assert "before the machine went down" in caplog.text
    assert set_aside(place) == []


def test_after_a_reboot_a_damaged_store_is_set_aside(place: Path) -> None:
    records = leave_unclean(place)
    with data_file(place).open("r+b") as file:
        for page in range(2, data_file(place).stat().st_size // 4096, 3):
            file.seek(page * 4096)
            file.write(some_bytes(4096, page))
    with opened(place) as backend:
        assert found(backend, records) == 0
        assert backend.put([item("k", b"1")]) == [True]
    assert set_aside(place) == ["records.damaged-1"]
    with opened(place) as backend:
        assert read(backend, "k") == b"1"


def test_a_clean_close_is_trusted_across_reboots(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    records = fill(place)
    state(place, boot="another boot")
    monkeypatch.setattr(environment, "verified", lambda path: pytest.fail("verified"))
    with opened(place) as backend:
        assert found(backend, records) == len(records)


@pytest.mark.parametrize("keep", [0.0, 0.3, 0.9], ids=["empty", "a third", "most"])
def test_a_truncated_file(place: Path, keep: float) -> None:
    """Without a mark of a reboot: the length gives it away, before a missing page can kill the process."""
    records = fill(place)
    os.truncate(data_file(place), int(data_file(place).stat().st_size * keep))
    with opened(place) as backend:
        assert found(backend, records) == 0
        backend.put([item("k", b"1")])
    with opened(place) as backend:
        assert read(backend, "k") == b"1"
    assert len(set_aside(place)) == (keep > 0)


@pytest.mark.parametrize("garbage", [b"\x00", b"\xff"])
def test_garbage_for_meta_pages(place: Path, garbage: bytes) -> None:
    fill(place)
    with data_file(place).open("r+b") as file:
        file.write(garbage * 8192)
    with opened(place) as backend:
        assert backend.usage().records == 0
        backend.put([item("k", b"1")])
    assert set_aside(place) == ["records.damaged-1"]


def test_only_the_newest_damage_is_kept(place: Path) -> None:
    for _ in range(3):
        fill(place)
        os.truncate(data_file(place), 50_000)
        with opened(place):
            pass
    assert set_aside(place) == ["records.damaged-3"]


def test_a_lost_marker_means_verification(place: Path) -> None:
    records = fill(place)
    (place / "STATE").unlink()
    with opened(place) as backend:
        assert found(backend, records) == len(records)
    (place / "STATE").write_text("[]")
    os.truncate(data_file(place), 100_000)
    with opened(place) as backend:
        assert found(backend, records) == 0


def test_it_never_crash_loops(place: Path) -> None:
    """An index that kills whoever reads it: the third process sets it aside and works."""
    fill(place)
    code = """
from lmcache_backends.lmdb import environment
environment.Environment.load = lambda self: os.kill(os.getpid(), 9)
LMDBBackend(place, 1 << 26)
"""
    for attempt in (1, 2):
        victim = python(code, place)
        victim.communicate(timeout=30)
        assert victim.returncode == -signal.SIGKILL
        assert state(place)["opening"] == attempt
    with opened(place) as backend:
        assert backend.usage().records == 0
        backend.put([item("k", b"1")])
    assert set_aside(place) == ["records.damaged-1"]
    assert state(place) == state(place) | {"clean": True, "opening": 0, "crashes": 0}


def test_one_death_while_opening_costs_nothing(place: Path) -> None:
    records = fill(place)
    state(place, clean=False, opening=1)
    with opened(place) as backend:
        assert found(backend, records) == len(records)


def test_users_that_crash_again_and_again_make_it_suspect(place: Path, caplog: pytest.LogCaptureFixture) -> None:
    records = fill(place)
    for _ in range(4):
        dying = python("LMDBBackend(place, 1 << 26)\nos.kill(os.getpid(), 9)", place)
        dying.communicate(timeout=30)
    with caplog.at_level(logging.WARNING), opened(place) as backend:
        assert found(backend, records) == len(records)
    assert "crashed" in caplog.text


def test_a_verifier_that_hangs_has_a_deadline(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    leave_unclean(place)
    monkeypatch.setattr(environment, "VERIFY_TIMEOUT_S", 0.0)
    with opened(place) as backend:
        assert backend.usage().records == 0
    assert set_aside(place) == ["records.damaged-1"]


def test_damage_met_in_use_is_verified_next_time(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    records = fill(place)
    with opened(place) as backend:
        error = backend._failure(lmdb.CorruptedError("a page"))
        assert isinstance(error, BackendUnavailable)
    assert state(place)["clean"] is False
    verified = []
    monkeypatch.setattr(environment, "verified", lambda path: verified.append(path) or "")
    with opened(place) as backend:
        assert found(backend, records) == len(records)
    assert verified


def test_an_interrupted_compaction_leaves_nothing(place: Path) -> None:
    records = fill(place)
    (place / "records.compact").mkdir()
    (place / "records.compact" / "data.mdb").write_bytes(b"half a copy")
    with opened(place) as backend:
        assert found(backend, records) == len(records)
    assert not (place / "records.compact").exists()


def test_a_crash_costs_recency_at_most(place: Path) -> None:
    code = """
backend = LMDBBackend(place, 4 << 20)
backend.put([item(f"k{i}", some_bytes(200_000, i)) for i in range(15)])
os.kill(os.getpid(), 9)
"""
    python(code, place).communicate(timeout=30)
    with opened(place, 4 * MIB) as backend:
        assert all(read(backend, f"k{i}") == some_bytes(200_000, i) for i in range(15))
        backend.put([item(f"new{i}", some_bytes(200_000, i)) for i in range(30)])
        assert data_file(place).stat().st_size <= 4 * MIB


# A full disk


def test_a_file_that_may_not_grow(place: Path) -> None:
    """The kernel refuses to extend the file. Old ones make room or the put fails; no wrong byte is read."""
    code = """
import resource, signal
from lmcache_sdk.errors import BackendError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
backend = LMDBBackend(place, 1 << 26)
resource.setrlimit(resource.RLIMIT_FSIZE, (8 << 20, 8 << 20))
failed = 0
for i in range(60):
    try:
        backend.put([item(f"k{i}", some_bytes(500_000, i))])
    except BackendError as error:
        failed += 1
        print(type(error).__name__, error)
kept = [i for i in range(60) if backend.contains([f"k{i}"]) == [True]]
assert kept
assert all(read(backend, f"k{i}") == some_bytes(500_000, i) for i in kept), "wrong bytes"
backend.close(5)
assert os.path.getsize(place / "records" / "data.mdb") <= 8 << 20
print("kept", kept, "failed", failed)
"""
    process = python(code, place)
    out, err = process.communicate(timeout=50)
    assert process.returncode == 0, (out, err)
    with opened(place) as backend:
        for stat in backend.scan():
            assert read(backend, stat.key) == some_bytes(500_000, int(stat.key[1:]))
        assert backend.put([item("again", b"1")]) == [True]
    assert set_aside(place) == []


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    mount = tmp_path / "disk"
    mount.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(mount)], capture_output=True, check=False
    )
    if made.returncode:
        pytest.skip("cannot mount a tmpfs")
    yield mount
    subprocess.run(["umount", str(mount)], check=True)


def test_a_full_disk(small_disk: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The size allows more than the disk has: it warns, then the disk is the bound."""
    with caplog.at_level(logging.WARNING), opened(small_disk / "store") as backend:
        assert "less than size" in caplog.text
        for i in range(60):
            assert backend.put([item(f"k{i}", some_bytes(500_000, i))]) == [True]
            assert read(backend, f"k{i}") == some_bytes(500_000, i)
        kept = [i for i in range(60) if backend.contains([f"k{i}"]) == [True]]
        assert len(kept) >= 8
        assert all(read(backend, f"k{i}") == some_bytes(500_000, i) for i in kept)
        with pytest.raises(BackendFull):
            backend.put([item("larger than the disk", bytes(9 * MIB))])
        backend.put([item("k", b"1")])
    with opened(small_disk / "store") as backend:
        assert read(backend, "k") == b"1"
        backend.put([item("big", some_bytes(2 * MIB))])
        assert read(backend, "big") == some_bytes(2 * MIB)


def test_a_disk_that_others_filled(small_disk: Path) -> None:
    with opened(small_disk / "store") as backend:
        backend.put([item(f"k{i}", some_bytes(500_000, i)) for i in range(4)])
        with suppress(OSError):
            (small_disk / "ballast").write_bytes(bytes(9 * MIB))
        for i in range(4, 20):
            with suppress(BackendFull, BackendUnavailable):
                backend.put([item(f"k{i}", some_bytes(500_000, i))])
        assert all(
            read(backend, f"k{i}") == some_bytes(500_000, i) for i in range(20) if backend.contains([f"k{i}"])[0]
        )
        (small_disk / "ballast").unlink()
        assert backend.put([item("after", some_bytes(500_000, 99))]) == [True]
        assert read(backend, "after") == some_bytes(500_000, 99)


def test_url_with_escapes(tmp_path: Path) -> None:
    backend = LMDBBackend.from_url(Url(f"lmdb://{tmp_path}/a%20b?size=2MiB"))
    backend.close(1)
    assert (tmp_path / "a b" / "FORMAT").exists()
