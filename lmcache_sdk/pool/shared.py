"""The daemon's pool: named files on tmpfs, which outlive it, in a directory of their own.

LOCK        held (flock) while a daemon has the pool open; names its process
control     what the pool is and what lies in it, see ``journal``
segment-N   the memory that clients map

The files are complete, or there are none: a full tmpfs is an error at start, and never kills who touches a page.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import stat
import time
from contextlib import suppress
from logging import getLogger
from pathlib import Path
from threading import Event
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from lmcache_sdk.config import format_size
from lmcache_sdk.core.extents import SEGMENT_SHIFT, offset_of, segment_of
from lmcache_sdk.errors import BackendFormatError, BackendFull, BackendLocked, BackendUnavailable, ConfigError
from lmcache_sdk.pool import SEGMENT_LIMIT
from lmcache_sdk.pool.journal import (
    ControlBroken,
    Geometry,
    Journal,
    Recovered,
    RecoveredClient,
    read_geometry,
    write_control,
)
from lmcache_sdk.pool.mapping import HUGE_PAGE_BYTES, is_complete, map_shared, nodes, plan_nodes, prefault, prefer_node

_log = getLogger(__name__)

_LOCK_TEXT = b"lmcache-sdk pool, process "
_LOCK_BYTES = 64
_OURS = re.compile(r"LOCK|control|control\.new|segment-\d+")
_NO_TRICKS = os.O_NOFOLLOW | os.O_CLOEXEC


class SegmentInfo(NamedTuple):
    """One segment. ``node`` is the NUMA node that its memory is taken from where that has any; None = not chosen."""

    segment: int
    nbytes: int
    node: int | None


class SharedPool:
    """Made by :meth:`open`, given up by :meth:`close`.

    Whoever may map it may write all of it: one pool is one trust domain.

    Attributes:
        sizes, segments: bytes of each segment; uint8 [nbytes] each, at multiples of 2 MiB.
        journal: to be told of every change.
        recovered, earlier_clients, recovered_spaces: what the earlier life has left, see :class:`Journal`. Empty if
            there was none, and if what it has left is damaged: then the segments are new files, which no client of
            the earlier life can write to.
    """

    def __init__(self, home: _Home, geometry: Geometry, *, create: bool) -> None:
        self._home = home
        self._descriptors: list[int] = []
        self.sizes = geometry.sizes
        self.segments: list[npt.NDArray[np.uint8]] = []
        self._nodes: list[int | None] = []
        available = nodes()
        try:
            for number, node in enumerate(plan_nodes(len(self.sizes), available)):
                self._open_segment(number, node if len(available) > 1 else None, create=create)
            self._views = [segment.data for segment in self.segments]
            if create:
                home.write_control(geometry)
            control = home.open("control", os.O_RDWR)
            try:
                self.journal = Journal(control, geometry)
            finally:
                os.close(control)
        except BaseException:
            self._drop()
            raise
        self.recovered: list[Recovered] = self.journal.recovered
        self.earlier_clients: list[RecoveredClient] = self.journal.earlier_clients
        self.recovered_spaces: list[bytes] = self.journal.recovered_spaces

    @classmethod
    def open(cls, directory: Path, pool_bytes: int, *, segment_bytes: int = SEGMENT_LIMIT) -> SharedPool:
        """Create the pool, or take over what an earlier life has left, however it ended.

        Takes 0.3 s per GiB where the pool is new, to claim the memory; 2 µs per extent where there is one.

        Args:
            directory: on tmpfs; its parent must exist.

        Raises:
            ConfigError: a size is wrong, the directory's parent is missing, or others may write to the directory.
            BackendFull: the file system has no room. Nothing is left behind.
            BackendLocked: another daemon has the pool open.
            BackendFormatError: there is something else in the directory, or a pool of another size or version.
                Nothing is changed.
            BackendUnavailable: no permission, or the kernel refuses.
        """
        if not 0 < segment_bytes < 1 << SEGMENT_SHIFT or segment_bytes % HUGE_PAGE_BYTES:
            raise ConfigError(f"segment_bytes must be a multiple of 2 MiB below 1 TiB, got {segment_bytes}")
        geometry = Geometry(pool_bytes, segment_bytes)
        assert geometry.sizes, "or it has raised"
        home = _Home.claim(directory)
        try:
            try:
                home.sign()
                if home.has_control():
                    home.check_geometry(geometry)
                    return cls(home, geometry, create=False)
            except ControlBroken as error:
                _log.warning("the pool in %s is damaged, starting with an empty one: %s", directory, error)
            home.wipe()  # also what a daemon has left that was killed before its pool was complete
            return cls(home, geometry, create=True)
        except BaseException as error:
            if not home.has_control():  # nor anything that could be used
                home.remove()
            home.release()
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise _full(directory, pool_bytes) from None
            if isinstance(error, OSError) and not isinstance(error, BackendUnavailable):
                raise BackendUnavailable(f"cannot use {directory} for the pool ({error.strerror})") from error
            raise

    @staticmethod
    def remove(directory: Path) -> bool:
        """Delete a pool of whatever size and version that nobody has open; False if there is none.

        Raises:
            BackendLocked, BackendFormatError, ConfigError, BackendUnavailable: as :meth:`open`.
        """
        if not directory.exists():
            return False
        home = _Home.claim(directory)
        try:
            home.remove()
        finally:
            home.release()
        return True

    def record(self, address: int, nbytes: int) -> memoryview:
        """The first ``nbytes`` of an extent: header and payload."""
        offset = offset_of(address)
        return self._views[segment_of(address)][offset : offset + nbytes]

    def prefault(self, stop: Event | None = None) -> bool:
        """Have the kernel provide all memory now, as huge pages where it can; False if told to stop.

        Takes 0.4 to 3 s per GiB, the more the harder it is for the kernel to find huge pages; in slices, so that it
        can run in a thread beside the daemon's work. What is touched before its turn has come is provided then.
        """
        started = time.monotonic()
        if not all(prefault(segment, stop) for segment in list(self.segments)):
            return False
        _log.info("pool memory provided: %s in %.1f s", format_size(sum(self.sizes)), time.monotonic() - started)
        return True

    def disown(self) -> None:
        """There is no next life: delete the files' names now. However this process ends, nothing remains of the pool
        but an empty directory; who has it mapped, or gets its descriptors, uses it as before.
        """
        self._home.wipe()

    def descriptors(self) -> list[int]:
        """Of the segments, to be passed to clients. They stay the pool's."""
        return list(self._descriptors)

    def describe(self) -> list[SegmentInfo]:
        return list(map(SegmentInfo, range(len(self.sizes)), self.sizes, self._nodes))

    def close(self, *, keep: bool) -> None:
        """Give the pool up once nobody here writes to it any more, see :meth:`Store.close`. Idempotent. The lock of one
        that is never closed is kept until the process ends.

        Arrays and views that are still about stay usable. The journal is closed: another process may be its writer.

        Args:
            keep: leave the files for the next life, or remove them.
        """
        if not self._home.held:
            return
        self.journal.close()
        self._drop()
        if not keep:
            self._home.remove()
        self._home.release()

    def _open_segment(self, number: int, node: int | None, *, create: bool) -> None:
        nbytes = self.sizes[number]
        try:
            descriptor = self._home.open(f"segment-{number}", os.O_RDWR | (os.O_CREAT | os.O_EXCL if create else 0))
        except FileNotFoundError:
            raise ControlBroken(f"segment {number} is missing") from None
        self._descriptors.append(descriptor)
        if create:
            os.ftruncate(descriptor, nbytes)
        elif not is_complete(descriptor, nbytes):
            raise ControlBroken(f"segment {number} has not the {nbytes} bytes that it should have")
        segment = map_shared(descriptor, nbytes)
        # Before the memory is claimed, for it is claimed on that node.
        chosen = node is not None and prefer_node(segment, node)
        if create:
            os.posix_fallocate(descriptor, 0, nbytes)
        self.segments.append(segment)
        self._nodes.append(node if chosen else None)

    def _drop(self) -> None:
        """Close and forget. What is still in use elsewhere is unmapped when that ends."""
        for descriptor in self._descriptors:
            os.close(descriptor)
        self._descriptors, self.segments, self._views = [], [], []


class _Home:
    """The claimed directory. Its files are reached through its descriptor: no other directory can take its place."""

    def __init__(self, path: Path, directory: int, lock: int) -> None:
        self.path = path
        self.held = True
        self._directory = directory
        self._lock = lock

    @classmethod
    def claim(cls, path: Path) -> _Home:
        """Create or recognise the directory, and lock it. Raises as :meth:`SharedPool.open`."""
        try:
            with suppress(FileExistsError):
                path.mkdir(mode=0o700)
            directory = os.open(path, os.O_RDONLY | os.O_DIRECTORY | _NO_TRICKS)
        except FileNotFoundError:
            raise ConfigError(f"{path.parent} does not exist; choose another directory for the pool") from None
        except NotADirectoryError:
            raise ConfigError(f"{path} is no directory, or a link; choose another one for the pool") from None
        except OSError as error:
            raise BackendUnavailable(f"cannot use {path} for the pool ({error.strerror})") from error
        try:
            _check_directory(path, directory)
            return cls(path, directory, _lock(path, directory))
        except BaseException as error:
            os.close(directory)
            if isinstance(error, OSError) and not isinstance(error, BackendUnavailable):
                raise BackendUnavailable(f"cannot use {path} for the pool ({error.strerror})") from error
            raise

    def sign(self) -> None:
        """Say in the lock whose it is. Overwritten in place: it is never without its text."""
        text = _LOCK_TEXT + str(os.getpid()).encode()
        os.pwrite(self._lock, text.ljust(_LOCK_BYTES), 0)

    def open(self, name: str, flags: int) -> int:
        return os.open(name, flags | _NO_TRICKS, 0o600, dir_fd=self._directory)

    def has_control(self) -> bool:
        return "control" in _entries(self._directory)

    def check_geometry(self, wanted: Geometry) -> None:
        """Raises ControlBroken; BackendFormatError: it is a pool, but another one."""
        remedy = f"or remove it and what is in it (rm -r {self.path})"
        control = self.open("control", os.O_RDONLY)
        try:
            found = read_geometry(control)
        except BackendFormatError as error:
            raise BackendFormatError(f"{self.path}: {error}; use the release that made it, {remedy}") from None
        finally:
            os.close(control)
        if found != wanted:
            segments = ""
            if found.segment_bytes != wanted.segment_bytes:
                segments = f" in segments of {found.segment_bytes} bytes, not {wanted.segment_bytes}"
            raise BackendFormatError(
                f"{self.path} holds a pool of {found.pool_bytes} bytes ({format_size(found.pool_bytes)}){segments}; "
                f"asked for are {wanted.pool_bytes}: start with its own size (--pool {found.pool_bytes}), {remedy}"
            )

    def write_control(self, geometry: Geometry) -> None:
        """All at once: the pool exists from here on."""
        control = self.open("control.new", os.O_RDWR | os.O_CREAT | os.O_EXCL)
        try:
            os.posix_fallocate(control, 0, geometry.control_bytes)
            write_control(control, geometry)
        finally:
            os.close(control)
        os.rename("control.new", "control", src_dir_fd=self._directory, dst_dir_fd=self._directory)

    def wipe(self) -> None:
        """Delete all but the lock; the control file first, without which the others count for nothing."""
        for name in sorted(_entries(self._directory).keys() - {"LOCK"}):
            os.unlink(name, dir_fd=self._directory)

    def remove(self) -> None:
        self.wipe()
        os.unlink("LOCK", dir_fd=self._directory)
        with suppress(OSError):  # it may be a mount point, or its parent not ours
            self.path.rmdir()

    def release(self) -> None:
        """Unlock. Said aloud and not left to the descriptor's end, which a forked child may hold open."""
        self.held = False
        fcntl.flock(self._lock, fcntl.LOCK_UN)
        os.close(self._lock)
        os.close(self._directory)


def _entries(directory: int) -> dict[str, bool]:
    """What is in the directory, and whether it could be a pool's."""
    with os.scandir(directory) as entries:
        return {
            entry.name: bool(_OURS.fullmatch(entry.name)) and entry.is_file(follow_symlinks=False) for entry in entries
        }


def _check_directory(path: Path, directory: int) -> None:
    """It must be ours alone, and hold nothing but a pool."""
    status = os.fstat(directory)
    if status.st_uid != os.geteuid():
        raise ConfigError(f"{path} belongs to user {status.st_uid}; choose another directory for the pool")
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise ConfigError(f"others may write to {path}; chmod it to 700, or choose another directory for the pool")
    entries = _entries(directory)
    foreign = sorted(name for name, possible in entries.items() if not possible)
    if entries and not foreign and not _has_our_lock(directory):
        foreign = sorted(entries)
    if foreign:
        raise BackendFormatError(
            f"{path} is not empty and no pool ({foreign[0]!r} is in it); choose a directory of its own for the pool"
        )
    if not _is_tmpfs(status.st_dev):
        _log.warning("%s is not on tmpfs: the pool will be written to a disk; choose a directory in /dev/shm", path)


def _has_our_lock(directory: int) -> bool:
    """The lock comes first and goes last: without it, whatever is there is somebody else's."""
    try:
        lock = os.open("LOCK", os.O_RDONLY | _NO_TRICKS, dir_fd=directory)
    except FileNotFoundError:
        return False
    try:
        text = os.pread(lock, _LOCK_BYTES, 0)
        return not text or text.startswith(_LOCK_TEXT)
    finally:
        os.close(lock)


def _lock(path: Path, directory: int) -> int:
    lock = os.open("LOCK", os.O_RDWR | os.O_CREAT | _NO_TRICKS, 0o600, dir_fd=directory)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not os.fstat(lock).st_nlink:
            raise BackendUnavailable(f"the pool in {path} has just been removed; try again")
    except BlockingIOError:
        holder = os.pread(lock, _LOCK_BYTES, 0).removeprefix(_LOCK_TEXT).strip().decode(errors="replace")
        os.close(lock)
        raise BackendLocked(
            f"the pool in {path} is open in process {holder or 'unknown'}; stop that daemon, or use it"
        ) from None
    except BaseException:
        os.close(lock)
        raise
    return lock


def _full(path: Path, pool_bytes: int) -> BackendFull:
    status = os.statvfs(path if path.exists() else path.parent)
    return BackendFull(
        f"no room for a pool of {format_size(pool_bytes)} in {path}: {format_size(status.f_bavail * status.f_frsize)} "
        f"are free. Make the pool smaller or the file system larger (mount -o remount,size=…; in a container "
        f"--shm-size, without which its /dev/shm has 64 MB)"
    )


def _is_tmpfs(device: int) -> bool:
    """Also True where that is not known."""
    wanted = f"{os.major(device)}:{os.minor(device)}"
    with suppress(OSError, IndexError):
        for line in Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            place, _, kind = line.partition(" - ")
            if place.split()[2] == wanted:
                return kind.split()[0] in ("tmpfs", "ramfs", "hugetlbfs")
    return True
