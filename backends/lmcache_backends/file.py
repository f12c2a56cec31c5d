"""``file://``: a record is a file, in a directory that many processes and machines may share."""

import errno
import os
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from io import FileIO
from pathlib import Path
from typing import Self
from zlib import crc32

from lmcache_sdk.backend import Backend, Buffer, Item, Miss, Stat, Url, UsageReport
from lmcache_sdk.calls import Calls
from lmcache_sdk.config import parse_size
from lmcache_sdk.errors import BackendFull, BackendUnavailable, ConfigError


class FileBackend(Backend):
    """Files in the folder ``records`` of a directory. They are the only truth: whoever finds ``size`` bytes reached
    evicts what was used least recently, no matter who wrote it.
    """

    dated = True  # scan tells when each was written

    def __init__(self, directory: Path, size: int) -> None:
        self._root, self._size, self._evictions = directory / "records", size, 0
        self._unseen = 0  # bytes that may be written until the directory is looked at again
        self._lock = threading.Lock()
        self._calls = Calls(str(directory), lambda: None)
        with self._call():
            directory.mkdir(exist_ok=True)

    @classmethod
    def from_url(cls, url: Url) -> Self:
        """``file:///absolute/path?size=50GiB``: its parent must exist. All who share it should say the same size."""
        size = url.take("size")
        url.finish()
        if url.host or len(url.path) < 2 or not size:
            raise ConfigError(f"{url.shown!r} needs a path and a size, like file:///mnt/kv?size=50GiB (three slashes)")
        return cls(Path(url.path), parse_size(size))

    def path_of(self, key: str) -> Path:
        """Where its record is, if there is one."""
        return self._root / _name(key)

    def get(self, keys: Sequence[str], buffers: Sequence[Buffer]) -> list[int | Miss]:
        pairs = zip(reversed(keys), reversed(buffers), strict=True)  # the front of a prefix is used last, and stays
        with self._call():
            return [self._read(f"{self._root}/{_name(key)}", buffer) for key, buffer in pairs][::-1]

    def _read(self, path: str, buffer: Buffer) -> int | Miss:
        with suppress(FileNotFoundError, PermissionError), FileIO(path) as file:  # the latter: another user's
            stat = os.fstat(file.fileno())
            if stat.st_size > len(buffer):
                return Miss.TOO_LARGE
            with suppress(OSError):  # another user's, too
                os.utime(file.fileno(), ns=(time.time_ns(), stat.st_mtime_ns))
            if file.readinto(buffer[: stat.st_size]) == stat.st_size:
                return stat.st_size
        return Miss.ABSENT

    def touch(self, keys: Sequence[str]) -> None:
        with self._call():
            for path in map(self.path_of, keys):
                with suppress(OSError):  # it is gone, or another user's
                    os.utime(path, ns=(time.time_ns(), path.stat().st_mtime_ns))

    def put(self, items: Sequence[Item], *, if_absent: bool = True) -> list[bool]:
        with self._call():
            return [self._write(self.path_of(key), data, if_absent) for key, data in items]

    def _write(self, path: Path, data: memoryview, if_absent: bool) -> bool:
        if if_absent and path.exists():
            return False
        self._make_room(len(data))
        path.parent.mkdir(parents=True, exist_ok=True)
        new = path.with_name(f"={os.urandom(16).hex()}.new")
        try:
            new.write_bytes(data)
            path.hardlink_to(new) if if_absent else new.replace(path)  # all at once; a link replaces nothing
            return True
        except FileExistsError:
            return False
        finally:
            new.unlink(missing_ok=True)

    def _make_room(self, need: int) -> None:
        """Evict to 28/32 of the size, and look again 1/32 later: so the bound holds with up to four who write."""
        with self._lock:
            self._unseen -= need
            if self._unseen >= 0:
                return
            goal = self._size // 32 * 28 - need
            if goal < 0:
                raise BackendFull(f"a record of {need} bytes is too large for {self._root} with size={self._size}")
            files = sorted(self._files(), key=lambda file: file[2].st_atime_ns)
            used = sum(stat.st_size for *_, stat in files)
            for path, key, stat in files:
                # Not finished, and not written to for an hour: its writer crashed. Two machines' clocks may differ.
                if used > goal if key else time.time() - stat.st_mtime > 3600:
                    path.unlink(missing_ok=True)
                    used -= stat.st_size
                    self._evictions += bool(key)
            self._unseen = self._size // 32

    def _files(self) -> Iterator[tuple[Path, str, os.stat_result]]:
        """What is ours. What is not finished has no key."""
        for path in self._root.glob("*/*"):
            key = (path.parent.name[2:] + path.name).replace(",", "/").removesuffix("=")
            with suppress(FileNotFoundError):
                if (new := path.match("=*.new")) or path == self.path_of(key):
                    yield path, "" if new else key, path.stat()

    def scan(self, prefix: str = "") -> Iterator[Stat]:
        with self._call():
            for _, key, stat in self._files():
                if key and key.startswith(prefix):
                    yield Stat(key, stat.st_size, stat.st_mtime)

    def usage(self) -> UsageReport:
        sizes = [stat.nbytes for stat in self.scan()]
        return UsageReport(len(sizes), sum(sizes), self._size, self._evictions)

    def contains(self, keys: Sequence[str]) -> list[bool]:
        with self._call():
            return [self.path_of(key).exists() for key in keys]

    def delete(self, keys: Sequence[str]) -> int:
        there = self.contains([*set(keys)])
        with self._call():
            for key in keys:
                self.path_of(key).unlink(missing_ok=True)
        return sum(there)

    def close(self, timeout_s: float) -> None:
        self._calls.close(timeout_s)

    @contextmanager
    def _call(self) -> Iterator[None]:
        with self._calls:
            try:
                yield
            except OSError as error:
                kind = BackendFull if error.errno in (errno.ENOSPC, errno.EDQUOT) else BackendUnavailable
                raise kind(f"{self._root.parent}: {error.strerror}; it must be writable, its parent there") from error


def _name(key: str) -> str:
    """Of its file. A key is a name, and may be too long for a file's: then the front of it is in the folder's."""
    name = key.replace("/", ",") + "="
    return f"{crc32(name.encode()) & 255:02x}{name[:-200]}/{name[-200:]}"
