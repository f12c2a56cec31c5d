"""The daemon's pool: what is left of it when its process is killed, refused, full, damaged, or not alone."""

from __future__ import annotations

import contextlib
import mmap
import os
import random
import shutil
import signal
import socket
import stat
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import xxhash

from lmcache_sdk.errors import BackendError, BackendFormatError, BackendFull, BackendLocked, ConfigError
from lmcache_sdk.pool import Pool, PrivatePool, segment_sizes
from lmcache_sdk.pool.journal import ExtentState, Recovered, RecoveredClient
from lmcache_sdk.pool.mapping import HUGE_PAGE_BYTES, map_segments, nodes, plan_nodes, prefer_node
from lmcache_sdk.pool.processes import identity, process_alive, start_time
from lmcache_sdk.pool.shared import SharedPool

SEED = int(os.environ.get("LMCACHE_SDK_SEED", "20261124"))
MIB = 1 << 20
SEGMENT = 1 << 40  # between the addresses of two segments
CLIENT = bytes(range(16))
CLIENTS, SPACES, SLOTS = 4096, 69632, 1118208


@pytest.fixture
def directory() -> Iterator[Path]:
    """Where a pool may be made, on tmpfs."""
    above = Path(tempfile.mkdtemp(prefix="lmcache-sdk-test-", dir="/dev/shm"))
    yield above / "pool"
    shutil.rmtree(above)


@contextlib.contextmanager
def opened(directory: Path, nbytes: int = 4 * MIB, *, segment_bytes: int = 2 * MIB) -> Iterator[SharedPool]:
    pool = SharedPool.open(directory, nbytes, segment_bytes=segment_bytes)
    try:
        yield pool
    finally:
        pool.close(keep=True)


def journal_of(pool: Pool) -> object:
    return pool.journal


def descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def content(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


# Memory


def test_segments() -> None:
    assert segment_sizes(100, 64) == [64, 36]
    assert segment_sizes(128, 64) == [64, 64]
    with pytest.raises(ConfigError):
        segment_sizes(0)
    assert journal_of(PrivatePool([4096])) is None


def test_a_pool_is_complete_aligned_and_for_its_user_only(directory: Path) -> None:
    with opened(directory, 5 * MIB) as pool:
        assert pool.sizes == [2 * MIB, 2 * MIB, MIB]
        assert [segment.nbytes for segment in pool.segments] == pool.sizes
        assert all(segment.ctypes.data % HUGE_PAGE_BYTES == 0 for segment in pool.segments)
        assert stat.S_IMODE(directory.stat().st_mode) == 0o700
        for path in directory.iterdir():
            status = path.stat()
            assert stat.S_IMODE(status.st_mode) == 0o600
            assert status.st_blocks * 512 >= status.st_size, f"{path.name} is sparse"
        assert pool.prefault()
        assert [(info.segment, info.nbytes) for info in pool.describe()] == list(enumerate(pool.sizes))
        pool.segments[1][100:200] = 7
        assert bytes(pool.record(SEGMENT + 128, 64)) == b"\7" * 64
        pool.record(2 * SEGMENT, 10)[:] = b"x" * 10
        assert (directory / "segment-2").read_bytes()[:11] == b"x" * 10 + b"\0"


def test_prefault_stops_when_told(directory: Path) -> None:
    stop = threading.Event()
    stop.set()
    with opened(directory) as pool:
        assert not pool.prefault(stop)


def test_prefault_keeps_content_and_makes_it_resident(directory: Path) -> None:
    with opened(directory, 8 * MIB, segment_bytes=8 * MIB) as pool:
        rng = np.random.default_rng(SEED)
        pool.segments[0][:] = expected = rng.integers(0, 256, 8 * MIB, dtype=np.uint8)
        assert pool.prefault()
        assert np.array_equal(pool.segments[0], expected)
        assert resident(pool.segments[0]) == 8 * MIB


def resident(segment: npt.NDArray[np.uint8]) -> int:
    """Bytes in this process's tables."""
    here = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if line.startswith(f"{segment.ctypes.data:x}-"):
            here = True
        elif here and line.startswith("Rss:"):
            return int(line.split()[1]) * 1024
    return 0


def test_views_outlive_the_pool(directory: Path) -> None:
    pool = SharedPool.open(directory, 4 * MIB, segment_bytes=2 * MIB)
    journal, array, record = pool.journal, pool.segments[0][10:20], pool.record(SEGMENT, 100)
    pool.close(keep=False)
    pool.close(keep=False)
    array[:] = 3
    record[:] = b"z" * 100
    assert array.sum() == 30 and bytes(record) == b"z" * 100
    assert str(directory) in Path("/proc/self/maps").read_text()
    del array, record
    assert str(directory) not in Path("/proc/self/maps").read_text()
    with pytest.raises(ValueError, match="released"):
        journal.allocated(0, 64)
    assert not directory.exists()


def test_no_descriptor_leaks(directory: Path) -> None:
    before = descriptors()
    for keep in (True, True, False):
        SharedPool.open(directory, 4 * MIB, segment_bytes=2 * MIB).close(keep=keep)
    with opened(directory), pytest.raises(BackendLocked):
        SharedPool.open(directory, 4 * MIB)
    for nbytes in (0, 8 * MIB):
        with pytest.raises((ConfigError, BackendError)):
            SharedPool.open(directory, nbytes)
    assert SharedPool.remove(directory)
    assert descriptors() == before


def test_nodes(tmp_path: Path) -> None:
    listed = tmp_path / "has_memory"
    for text, expected in [("0\n", [0]), ("0-1,4\n", [0, 1, 4]), ("", [0]), ("what", [0])]:
        listed.write_text(text)
        assert nodes(listed) == expected
    assert nodes(tmp_path / "none") == [0]
    assert plan_nodes(5, [0, 2]) == [0, 2, 0, 2, 0]
    assert plan_nodes(2, nodes())
    segment = map_segment(8192)
    prefer_node(segment, nodes()[0])  # the kernel may refuse, or know no nodes
    assert not prefer_node(segment, 1000)
    segment[:] = 1


def map_segment(nbytes: int) -> npt.NDArray[np.uint8]:
    descriptor = os.memfd_create("segment")
    try:
        os.posix_fallocate(descriptor, 0, nbytes)
        return map_segments([descriptor], [nbytes])[0]
    finally:
        os.close(descriptor)


def test_a_file_that_is_not_whole_is_not_mapped() -> None:
    descriptor = os.memfd_create("segment")
    os.ftruncate(descriptor, 8192)
    with pytest.raises(BackendFormatError, match="segment 0"):
        map_segments([descriptor], [8192])
    os.posix_fallocate(descriptor, 0, 8192)
    with pytest.raises(BackendFormatError, match="16384 bytes"):
        map_segments([descriptor], [16384])
    os.close(descriptor)


CLIENT_PROGRAM = """
import os, socket, sys
from lmcache_sdk.pool.mapping import map_segments
with socket.socket(fileno=int(sys.argv[1])) as channel:
    _, descriptors, _, _ = socket.recv_fds(channel, 1, 8)
    segments = map_segments(descriptors, [2 << 20, 2 << 20], populate=True)
    for descriptor in descriptors:
        os.close(descriptor)
    assert all(segment.ctypes.data % (2 << 20) == 0 for segment in segments)
    segments[1][1000:2000] = segments[0][:1000] + 1
    channel.send(b"x")
"""


def test_a_client_writes_through_passed_descriptors(directory: Path) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs, opened(directory) as pool:
        pool.segments[0][:1000] = np.arange(1000) % 200
        command = [sys.executable, "-c", CLIENT_PROGRAM, str(theirs.fileno())]
        process = subprocess.Popen(command, pass_fds=[theirs.fileno()])
        socket.send_fds(ours, [b"x"], pool.descriptors())
        theirs.close()
        ours.settimeout(20)
        assert ours.recv(1) == b"x"
        assert np.array_equal(pool.segments[1][1000:2000], np.arange(1000) % 200 + 1)
        assert process.wait(10) == 0


# The directory


def test_another_process_is_named(directory: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from lmcache_sdk.pool.shared import SharedPool;"
        "pool = SharedPool.open(Path(sys.argv[1]), 4 << 20, segment_bytes=2 << 20); print('open', flush=True);"
        "sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, str(directory)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None and process.stdout.readline() == b"open\n"
        for attempt in (lambda: SharedPool.open(directory, 4 * MIB), lambda: SharedPool.remove(directory)):
            with pytest.raises(BackendLocked, match=rf"process {process.pid};"):
                attempt()
        process.kill()
    with opened(directory):
        pass


def test_another_size_or_version_is_refused_and_nothing_lost(directory: Path) -> None:
    with opened(directory) as pool:
        pool.journal.allocated(0, 4096)
        pool.segments[0][:] = 9
    before = content(directory)
    for nbytes, segment_bytes in ((8 * MIB, 2 * MIB), (4 * MIB, 4 * MIB)):
        with pytest.raises(BackendFormatError, match=rf"{4 * MIB} bytes.*{nbytes}.*remove"):
            SharedPool.open(directory, nbytes, segment_bytes=segment_bytes)
    assert {name: text for name, text in content(directory).items() if name != "LOCK"} == {
        name: text for name, text in before.items() if name != "LOCK"
    }
    control = bytearray(before["control"])
    control[8:16] = (2).to_bytes(8, sys.byteorder)
    control[120:128] = struct.pack("=Q", xxhash.xxh3_64_intdigest(bytes(control[:120])))
    (directory / "control").write_bytes(control)
    with pytest.raises(BackendFormatError, match=r"version 2, this release reads version 1.*remove"):
        SharedPool.open(directory, 4 * MIB, segment_bytes=2 * MIB)
    assert (directory / "control").read_bytes() == control
    assert SharedPool.remove(directory)
    assert not SharedPool.remove(directory)
    with pytest.raises(ConfigError, match="2 MiB"):
        SharedPool.open(directory, 4 * MIB, segment_bytes=3000)


@pytest.mark.parametrize("name", ["other", "control", "segment-0", "LOCK", "segment-x"])
def test_foreign_files_are_left_alone(directory: Path, name: str) -> None:
    directory.mkdir(mode=0o700)
    (directory / name).write_text("not ours")
    for attempt in (lambda: SharedPool.open(directory, MIB), lambda: SharedPool.remove(directory)):
        with pytest.raises(BackendFormatError, match=name):
            attempt()
    assert content(directory) == {name: b"not ours"}


def test_a_link_among_the_files_is_foreign(directory: Path, tmp_path: Path) -> None:
    with opened(directory):
        pass
    victim = tmp_path / "victim"
    victim.write_bytes(b"v" * 2 * MIB)
    (directory / "segment-0").unlink()
    (directory / "segment-0").symlink_to(victim)
    with pytest.raises(BackendFormatError, match="segment-0"):
        SharedPool.open(directory, 4 * MIB, segment_bytes=2 * MIB)
    assert victim.read_bytes() == b"v" * 2 * MIB


def test_a_directory_that_others_control_is_refused(directory: Path) -> None:
    with pytest.raises(ConfigError, match="does not exist"):
        SharedPool.open(directory / "deep" / "er", MIB)
    directory.mkdir()
    directory.chmod(0o770)
    with pytest.raises(ConfigError, match="chmod"):
        SharedPool.open(directory, MIB)
    directory.chmod(0o700)
    link = directory.with_name("link")
    link.symlink_to(directory)
    with pytest.raises(ConfigError, match="link"):
        SharedPool.open(link, MIB)
    if os.geteuid() == 0:
        os.chown(directory, 12345, 12345)
        with pytest.raises(ConfigError, match="belongs to user 12345"):
            SharedPool.open(directory, MIB)
    assert not list(directory.iterdir())
    link.unlink()
    link.write_text("a file")
    with pytest.raises(ConfigError, match="no directory"):
        SharedPool.open(link, MIB)


def test_a_full_file_system_is_an_error_and_leaves_nothing(directory: Path) -> None:
    status = os.statvfs(directory.parent)
    total = status.f_blocks * status.f_frsize
    if not total:
        pytest.skip("/dev/shm is not bounded")
    before = descriptors()
    with pytest.raises(BackendFull, match=r"--shm-size") as caught:
        SharedPool.open(directory, total + (8 << 30))
    assert str(directory) in str(caught.value) and "are free" in str(caught.value)
    assert not directory.exists() and descriptors() == before


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a file system")
def test_a_small_file_system_in_use(directory: Path) -> None:
    directory.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=12m,mode=700", "none", directory], check=False).returncode:
        pytest.skip("may not mount")
    try:
        first, second = directory / "first", directory / "second"
        with opened(first) as pool:
            pool.segments[0][:] = 5
            with pytest.raises(BackendFull, match=r"pool of 8.0 MiB in \S*second: 6\.\d MiB are free"):
                SharedPool.open(second, 8 * MIB, segment_bytes=2 * MIB)
            assert not second.exists()
            with opened(second, 4 * MIB):
                (directory / "rest").touch()
                with contextlib.suppress(OSError):
                    (directory / "rest").write_bytes(bytes(12 * MIB))
                for number in range(1000):  # all that is the pool's can be written to, though nothing is free
                    pool.journal.allocated(number * 64, 64)
                pool.segments[1][:] = 6
        with pytest.raises(BackendFull, match=r"pool of 1.0 MiB in \S*third: 0 B are free"):
            SharedPool.open(directory / "third", MIB)
        assert sorted(path.name for path in directory.iterdir()) == ["first", "rest", "second"]
    finally:
        subprocess.run(["umount", directory], check=True)


def test_what_a_killed_start_left_is_cleared(directory: Path) -> None:
    with opened(directory):
        pass
    (directory / "control").rename(directory / "control.new")
    with opened(directory) as pool:
        assert not pool.recovered
    assert sorted(content(directory)) == ["LOCK", "control", "segment-0", "segment-1"]


# The journal


def test_the_next_life_finds_what_the_last_one_noted(directory: Path) -> None:
    with opened(directory) as pool:
        journal = pool.journal
        assert (pool.recovered, pool.earlier_clients, pool.recovered_spaces) == ([], [], [])
        for address, nbytes in ((0, 100), (128, 64), (SEGMENT, 2 * MIB), (4096, 4096)):
            assert journal.allocated(address, nbytes)
        journal.sealed([0, 128, SEGMENT])
        journal.busy([128])
        journal.leased([0, SEGMENT])
        journal.leased([0])
        journal.leased([SEGMENT, 4096], -1)
        journal.freed(4096)
        assert journal.client_joined(CLIENT, 12, 34) and journal.client_joined(CLIENT, 12, 34)
        assert journal.client_joined(b"b" * 16, 56, 78)
        journal.client_left(b"b" * 16)
        journal.client_left(b"b" * 16)
        assert [journal.save_space(space) for space in (b"one", b"two, longer", b"one", b"")] == [
            True,
            True,
            True,
            False,
        ]
    expected = [
        Recovered(0, 128, ExtentState.SEALED, 2),
        Recovered(128, 64, ExtentState.BUSY, 0),
        Recovered(SEGMENT, 2 * MIB, ExtentState.SEALED, 0),
    ]
    for _ in range(2):
        with opened(directory) as pool:
            assert pool.recovered == expected
            assert pool.earlier_clients == [RecoveredClient(CLIENT, 12, 34)]
            assert pool.recovered_spaces == [b"one", b"two, longer"]
    with opened(directory) as pool:
        for extent in pool.recovered:
            pool.journal.freed(extent.address)
        assert pool.journal.save_space(b"two, longer") and pool.journal.save_space(b"three")
        pool.journal.client_left(CLIENT)
        assert pool.journal.allocated(64, 64)
    with opened(directory) as pool:
        assert pool.recovered == [Recovered(64, 64, ExtentState.BUSY, 0)]
        assert pool.recovered_spaces == [b"one", b"two, longer", b"three"] and not pool.earlier_clients


def test_a_client_with_two_processes_is_gone_when_it_has_left(directory: Path) -> None:
    with opened(directory) as pool:
        assert pool.journal.client_joined(CLIENT, 1, 2) and pool.journal.client_joined(CLIENT, 3, 4)
    with opened(directory) as pool:
        assert pool.earlier_clients == [RecoveredClient(CLIENT, 1, 2), RecoveredClient(CLIENT, 3, 4)]
        pool.journal.client_left(CLIENT)
    with opened(directory) as pool:
        assert not pool.earlier_clients


def test_what_is_full_says_so(directory: Path) -> None:
    with opened(directory) as pool:
        journal = pool.journal
        slots = 4 * MIB // 16384 + 4096
        assert all(journal.allocated(number * 64, 64) for number in range(slots))
        assert not journal.allocated(slots * 64, 64)
        journal.freed(64)
        assert journal.allocated(slots * 64, 64)
        here = os.getpid(), identity(os.getpid())
        assert all(journal.client_joined(number.to_bytes(16, "big"), *here) for number in range(1024))
        assert not journal.client_joined(b"x" * 16, 1, 2)
        journal.client_left((7).to_bytes(16, "big"))
        assert journal.client_joined(b"x" * 16, 1, 2)
        spaces = [bytes([number]) * (MIB // 4 - 16) for number in range(4)]
        assert all(map(journal.save_space, spaces))
        assert not journal.save_space(b"x")
    with opened(directory) as pool:
        assert [extent.address // 64 for extent in pool.recovered] == [0, *range(2, slots + 1)]
        assert len(pool.earlier_clients) == 1024 and pool.recovered_spaces == spaces
        assert not pool.journal.save_space(b"x") and not pool.journal.allocated(64, 64)


def test_lease_counts_stay_within_their_field(directory: Path) -> None:
    with opened(directory) as pool:
        for number in range(3):
            pool.journal.allocated(number * 64, 64)
        pool.journal.sealed([0, 64, 128])
        pool.journal.leased([0], -5)
        pool.journal.leased([64], 1 << 30)
        pool.journal.leased([64], -1)
        pool.journal.leased([128], (1 << 22) - 2)
        pool.journal.leased([128], -3)
    with opened(directory) as pool:
        assert [extent.leases for extent in pool.recovered] == [0, (1 << 22) - 1, (1 << 22) - 5]
        assert {extent.state for extent in pool.recovered} == {ExtentState.SEALED}


def test_spaces_that_are_not_kept_make_room(directory: Path, caplog: pytest.LogCaptureFixture) -> None:
    spaces = [bytes([number]) * (MIB // 4 - 16) for number in range(4)]
    with opened(directory) as pool:
        assert all(map(pool.journal.save_space, spaces))
        assert not pool.journal.save_space(b"x") and not pool.journal.save_space(b"y")
        assert caplog.text.count("list of models and engines is full") == 1
    with opened(directory) as pool:
        pool.journal.keep_spaces(spaces[1:3])
        assert pool.journal.save_space(b"x")
    with opened(directory) as pool:
        assert pool.recovered_spaces == [*spaces[1:3], b"x"]
        pool.journal.keep_spaces([])
    with opened(directory) as pool:
        assert pool.recovered_spaces == []


def test_rows_of_dead_clients_are_given_to_others(directory: Path) -> None:
    gone = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    known = identity(gone.pid)
    with opened(directory) as pool:
        journal = pool.journal
        here = os.getpid(), identity(os.getpid())
        assert all(journal.client_joined(number.to_bytes(16, "big"), *here) for number in range(1023))
        assert journal.client_joined(CLIENT, gone.pid, known)
        assert not journal.client_joined(b"x" * 16, *here)
        gone.communicate(b"")
        assert journal.client_joined(b"x" * 16, *here)
        assert not journal.client_joined(b"y" * 16, *here)
    with opened(directory) as pool:
        assert len(pool.earlier_clients) == 1024 and CLIENT not in {row.client_id for row in pool.earlier_clients}


# Damage


def test_a_damaged_control_file_costs_its_content_and_nothing_else(
    directory: Path, caplog: pytest.LogCaptureFixture
) -> None:
    print(f"seed {SEED}")
    rng = random.Random(SEED)
    with opened(directory) as pool:
        for number in range(40):
            pool.journal.allocated(number % 2 * SEGMENT + number * 4096, rng.randint(1, 64) * 64)
        pool.journal.sealed(number % 2 * SEGMENT + number * 4096 for number in range(20))
        pool.journal.client_joined(CLIENT, 12, 34)
        spaces = [b"first" * 20, b"second" * 20]
        for space in spaces:
            pool.journal.save_space(space)
    with opened(directory) as pool:
        expected = pool.recovered
    sound = (directory / "control").read_bytes()
    used = [(0, 136), (CLIENTS, 128), (SPACES, 300), (SLOTS, 40 * 16), (0, len(sound))]
    intact = 0
    for cycle in range(200):
        control = bytearray(sound)
        start, nbytes = used[cycle % len(used)]
        for _ in range(rng.choice([1, 1, 1, 2, 8])):
            at = start + rng.randrange(nbytes)
            control[at] = control[at] ^ 1 << rng.randrange(8) if rng.random() < 0.7 else rng.randrange(256)
        if rng.random() < 0.05:
            del control[rng.randrange(len(control)) :]
        (directory / "control").write_bytes(control)
        before = [(directory / f"segment-{number}").stat().st_ino for number in (0, 1)]
        try:
            with opened(directory) as pool:
                check_extents(pool)
                assert set(pool.recovered_spaces) <= set(spaces)
                if pool.recovered:
                    intact += pool.recovered == expected
                else:
                    after = [(directory / f"segment-{number}").stat().st_ino for number in (0, 1)]
                    assert not set(before) & set(after), "a client of the earlier life could still write to it"
                    assert not pool.earlier_clients
                pool.journal.save_space(b"another")
        except BackendFormatError:  # a version of the future, by the checksum's mere chance
            assert control[:128] != sound[:128]
    assert intact > 40, "damage in the spaces and in free room costs no extents"
    assert "starting with an empty one" in caplog.text


def check_extents(pool: SharedPool) -> None:
    for extent in pool.recovered:
        segment, offset = divmod(extent.address, SEGMENT)
        assert extent.nbytes > 0 and offset + extent.nbytes <= pool.sizes[segment]
        assert extent.address % 64 == extent.nbytes % 64 == 0
    for one, other in pairwise(pool.recovered):
        assert one.address + one.nbytes <= other.address


def test_overlapping_extents_are_not_believed(directory: Path) -> None:
    with opened(directory) as pool:
        pool.journal.allocated(0, 128)
        pool.journal.allocated(64, 64)  # what no store does
    with opened(directory) as pool:
        assert not pool.recovered


@pytest.mark.parametrize("damage", ["missing", "short", "sparse"])
def test_a_damaged_segment_is_replaced(directory: Path, damage: str) -> None:
    with opened(directory) as pool:
        pool.journal.allocated(0, 128)
    segment = directory / "segment-1"
    if damage == "missing":
        segment.unlink()
    else:
        os.truncate(segment, MIB)
        if damage == "sparse":
            os.truncate(segment, 2 * MIB)
    with opened(directory) as pool:
        assert not pool.recovered
        pool.segments[1][:] = 1


# Kill -9


def test_a_process() -> None:
    mine = start_time(os.getpid())
    assert mine is not None and process_alive(os.getpid(), mine)
    assert not process_alive(os.getpid(), mine + 1)
    with subprocess.Popen(["sleep", "60"]) as process:
        started = start_time(process.pid)
        assert started is not None and process_alive(process.pid, started)
        process.kill()
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        assert not process_alive(process.pid, started), "a zombie has no memory"
    assert not process_alive(process.pid, started)


@pytest.mark.timeout(120)
def test_what_a_killed_daemon_left_is_what_it_had_noted(directory: Path) -> None:
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}  # it forks
    lives = subprocess.run(
        [sys.executable, __file__, str(directory), str(SEED), "20"],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    print(lives.stdout, lives.stderr)
    assert lives.returncode == 0


UNIT = 16 << 10
OPERATIONS = ("allocate", "seal", "busy", "free", "lease", "release", "join", "leave", "save")


class Shadow:
    """What a life has done, in memory that it shares with the one who kills it: operation, place, size, fill."""

    def __init__(self) -> None:
        self.words = np.frombuffer(mmap.mmap(-1, 16 << 20), dtype=np.int64).reshape(-1, 4)

    def begin(self, operation: str, place: int = 0, units: int = 0, fill: int = 0) -> None:
        at = int(self.words[0, 0]) + 1
        self.words[at] = OPERATIONS.index(operation), place, units, fill
        self.words[0, 0] = at

    def operations(self) -> list[list[int]]:
        count = int(self.words[0, 0])
        rows: list[list[int]] = self.words[1 : count + 1].tolist()
        return rows


class State:
    """What must be there after some operations."""

    def __init__(self) -> None:
        self.extents: dict[int, tuple[int, ExtentState, int]] = {}
        self.fills: dict[int, int] = {}
        self.clients: set[int] = set()
        self.spaces: list[int] = []

    def apply(self, operation: int, place: int, units: int, fill: int) -> None:
        name = OPERATIONS[operation]
        size, state, leases = self.extents.get(place, (units, ExtentState.BUSY, 0))
        if name in ("allocate", "seal", "busy", "lease", "release"):
            state = {"seal": ExtentState.SEALED, "busy": ExtentState.BUSY}.get(name, state)
            leases += {"lease": 1, "release": -1}.get(name, 0)
            self.extents[place] = size, state, leases
            if name == "seal":
                self.fills[place] = fill
        elif name == "free":
            del self.extents[place]
        elif name == "join":
            self.clients.add(place)
        elif name == "leave":
            self.clients.discard(place)
        else:
            self.spaces.append(place)

    def matches(self, pool: SharedPool) -> bool:
        expected = [
            Recovered(place * UNIT, size * UNIT, state, leases)
            for place, (size, state, leases) in sorted(self.extents.items())
        ]
        clients = {int.from_bytes(client.client_id, "big") for client in pool.earlier_clients}
        spaces = [int(space) for space in pool.recovered_spaces]
        return (pool.recovered, clients, spaces) == (expected, self.clients, self.spaces)


def live(directory: Path, state: State, shadow: Shadow, rng: random.Random) -> None:
    """Allocate, write, seal, lease and free for ever."""
    pool = SharedPool.open(directory, 4 * MIB, segment_bytes=4 * MIB)
    journal, places = pool.journal, 4 * MIB // UNIT

    def note(name: str, place: int, units: int = 0, fill: int = 0) -> None:
        shadow.begin(name, place, units, fill)
        state.apply(OPERATIONS.index(name), place, units, fill)

    while shadow.words[0, 0] < 200_000:
        used = {place + n for place, (size, _, _) in state.extents.items() for n in range(size)}
        place, units = rng.randrange(places), rng.randint(1, 4)
        if place + units <= places and not used & set(range(place, place + units)):
            note("allocate", place, units)
            journal.allocated(place * UNIT, units * UNIT)
        if rng.random() < 0.05:
            client = rng.randrange(100)
            note("leave" if client in state.clients else "join", client)
            (journal.client_left(client.to_bytes(16, "big")) if client not in state.clients
             else journal.client_joined(client.to_bytes(16, "big"), client, 5))  # fmt: skip
        if rng.random() < 0.02 and len(state.spaces) < 500:
            number = len(state.spaces)
            note("save", number)
            journal.save_space(b"%d" % number)
        for place in rng.sample(sorted(state.extents), min(8, len(state.extents))):
            size, extent, leases = state.extents[place]
            address = place * UNIT
            if extent is ExtentState.BUSY and rng.random() < 0.7:
                fill = rng.randrange(256)
                pool.record(address, size * UNIT)[:] = bytes([fill]) * (size * UNIT)
                note("seal", place, 0, fill)
                journal.sealed([address])
            elif extent is ExtentState.SEALED and rng.random() < 0.5:
                note("release" if leases else "lease", place)
                journal.leased([address], -1 if leases else 1)
            elif extent is ExtentState.SEALED and rng.random() < 0.3:
                note("busy", place)
                journal.busy([address])
            elif rng.random() < 0.5:
                note("free", place)
                journal.freed(address)


def kill_lives(directory: Path, seed: int, lives: int) -> None:
    rng = random.Random(seed)
    print(f"seed {seed}")
    state = State()
    for life in range(lives):
        shadow = Shadow()
        process = os.fork()
        if not process:
            live(directory, state, shadow, random.Random(seed + life))
            os._exit(1)
        while life and not shadow.words[0, 0] and rng.random() < 0.9:  # some are killed while they open the pool
            time.sleep(0.001)
        time.sleep(rng.random() * 0.05)
        os.kill(process, signal.SIGKILL)
        _, status = os.waitpid(process, 0)
        assert os.WIFSIGNALED(status), "it ended by itself"
        done = shadow.operations()
        for operation in done[:-1]:
            state.apply(*operation)
        with opened(directory, segment_bytes=4 * MIB) as pool:
            # The last one was begun. It was completed, or it was not.
            without = state.matches(pool)
            if done and not without:
                state.apply(*done[-1])
            assert state.matches(pool), f"life {life}: {pool.recovered} is not {state.extents}"
            check_extents(pool)
            for extent in pool.recovered:
                if extent.state is ExtentState.SEALED:
                    fill = state.fills[extent.address // UNIT]
                    assert set(pool.record(extent.address, extent.nbytes)) == {fill}
        print(f"life {life}: {len(done)} operations, {len(state.extents)} extents")


if __name__ == "__main__":
    kill_lives(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
