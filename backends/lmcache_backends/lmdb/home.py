"""The directory of a store: whose it is, which format it has, and how its last user left it.

FORMAT            what this directory is, and the version of all in it
LOCK              held (flock) while a process has the store open; names that process
STATE             how the last user left
records/          the LMDB environment
records.damaged-N one that was set aside; only the newest is kept
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
from enum import Enum
from logging import getLogger
from pathlib import Path
from typing import Annotated, NamedTuple

import msgspec

from lmcache_sdk.errors import BackendFormatError, BackendLocked, BackendUnavailable, ConfigError

log = getLogger(__name__)

FORMAT_NAME = "lmcache-sdk-lmdb"
FORMAT_VERSION = 1
_STATE_BYTES = 512
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_CRASHES_TRUSTED = 3  # unclean ends in a row without a reboot before the structure is verified all the same


class Trust(Enum):
    """What the last user's end allows."""

    OPEN = "open"
    VERIFY = "verify"
    SET_ASIDE = "set aside"


class State(NamedTuple):
    """How the last user left the store.

    Attributes:
        clean: it was closed, after everything had reached the disk.
        boot: the kernel's boot id at that time. A process that is killed loses nothing (the kernel has its
            writes); a machine that goes down may.
        opening: attempts to open it that did not survive, in a row.
        crashes: uses that did not end with a close, in a row.
        size: the bound that it was last opened with, in bytes; 0 = not known.
    """

    clean: bool
    boot: str
    opening: int = 0
    crashes: int = 0
    size: int = 0


class _StateFile(msgspec.Struct):
    """What STATE holds, checked."""

    clean: bool
    boot: str
    opening: Annotated[int, msgspec.Meta(ge=0)] = 0
    crashes: Annotated[int, msgspec.Meta(ge=0)] = 0
    size: Annotated[int, msgspec.Meta(ge=0)] = 0

    def state(self) -> State:
        return State(self.clean, self.boot, self.opening, self.crashes, self.size)


def boot_id() -> str:
    """Changes whenever the machine boots; unknown (empty) is taken for a reboot."""
    try:
        return _BOOT_ID.read_text().strip()
    except OSError:
        return ""


def _read_state(path: Path) -> State:
    """Raises OSError, or ValueError for what is not a state."""
    return msgspec.json.decode((path / "STATE").read_bytes(), type=_StateFile).state()


def last_size(path: Path) -> int:
    """The size that a store was last opened with, in bytes: what it means to open it without naming one. 0 = no store.

    Where that is not known, what its file takes: opening must not evict because nobody named a size.
    """
    try:
        if size := int(_read_state(path).size):
            return size
    except (OSError, ValueError, TypeError):
        pass
    try:
        return (path / "records" / "data.mdb").stat().st_size
    except OSError:
        return 0


class Home:
    """The claimed directory. Made by :meth:`claim`, given up by :meth:`release`."""

    def __init__(self, path: Path, lock: int) -> None:
        self.path = path
        self.records = path / "records"
        self._lock = lock
        self._state = State(clean=True, boot="")

    @classmethod
    def claim(cls, path: Path) -> Home:
        """Create or recognise the directory, and lock it.

        Raises:
            ConfigError: the parent does not exist, or the path is no directory.
            BackendFormatError: it holds something else, or another version. Nothing has been written.
            BackendLocked: somebody has it open, this process included.
            BackendUnavailable: no permission, or a disk error.
        """
        try:
            path.mkdir(mode=0o700, exist_ok=True)
            known = _check_format(path)
            lock = os.open(path / "LOCK", os.O_RDWR | os.O_CREAT, 0o600)
        except FileNotFoundError:
            raise ConfigError(
                f"{path.parent} does not exist; create it, or choose another path for the store"
            ) from None
        except (FileExistsError, NotADirectoryError):
            raise ConfigError(f"{path} is not a directory; choose another path for the store") from None
        except OSError as error:
            raise BackendUnavailable(
                f"cannot use {path} ({error.strerror}); it must be writable for this user"
            ) from error
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = os.pread(lock, 32, 0).decode(errors="replace").strip() or "unknown"
            os.close(lock)
            if not isinstance(error, BlockingIOError):
                raise BackendUnavailable(
                    f"cannot lock {path} ({error.strerror}); it must be on a local disk"
                ) from error
            raise BackendLocked(
                f"{path} is open already (process {holder}); share it through a daemon, or use another path"
            ) from None
        home = cls(path, lock)
        try:
            os.ftruncate(lock, 0)
            os.pwrite(lock, f"{os.getpid()}\n".encode(), 0)
            if not known:
                home._write("FORMAT", {"format": FORMAT_NAME, "version": FORMAT_VERSION})
        except OSError as error:
            home.release()
            raise BackendUnavailable(f"cannot write to {path} ({error.strerror})") from error
        return home

    def trust(self) -> tuple[Trust, str]:
        """What may be done with the records that are there, and why."""
        if not (self.records / "data.mdb").exists():
            return Trust.OPEN, "new"
        try:
            self._state = _read_state(self.path)
        except (OSError, ValueError, TypeError):
            return Trust.VERIFY, "its STATE file is missing or unreadable"
        state = self._state
        if state.opening >= 2:
            return Trust.SET_ASIDE, f"{state.opening} attempts to open it died"
        if state.opening:
            return Trust.VERIFY, "an attempt to open it died"
        if not state.clean and state.boot != (boot_id() or None):
            return Trust.VERIFY, "it was not closed before the machine went down"
        if state.crashes >= _CRASHES_TRUSTED:
            return Trust.VERIFY, f"its last {state.crashes} users crashed"
        return Trust.OPEN, "closed cleanly" if state.clean else "its last user died, the machine did not"

    def mark_opening(self) -> None:
        """Before LMDB touches the records: should it kill this process, the next one will know."""
        state = self._state
        crashes = 0 if state.clean else state.crashes + 1
        self._mark(State(False, boot_id(), state.opening + 1, crashes, state.size))

    def mark_open(self, size: int) -> None:
        """The records could be opened and listed, within this bound."""
        self._mark(self._state._replace(opening=0, size=size))

    def mark_verified(self) -> None:
        """Its structure is sound: what its users did before is forgiven."""
        self._state = self._state._replace(clean=True)

    def mark_suspect(self) -> None:
        """Something in the records was wrong: the next user verifies them."""
        self._mark(self._state._replace(clean=False, boot="suspect"))

    def mark_clean(self) -> None:
        """Everything is on the disk, unless something was suspect."""
        if self._state.boot != "suspect":
            self._mark(State(True, boot_id(), size=self._state.size))

    def set_aside(self, why: str) -> None:
        """Move the records out of the way, keeping only the newest that were set aside."""
        old = {int(m[1]): p for p in self.path.iterdir() if (m := re.fullmatch(r"records\.damaged-(\d+)", p.name))}
        aside = self.path / f"records.damaged-{max(old, default=0) + 1}"
        self.records.rename(aside)
        for path in old.values():
            shutil.rmtree(path, ignore_errors=True)
        log.error(
            "the records in %s are set aside as %s: %s. Starting empty; delete it if unwanted",
            self.path,
            aside,
            why,
        )
        self._mark(State(False, boot_id(), size=self._state.size))

    def release(self) -> None:
        """Unlock. Said aloud and not left to the descriptor's end, which a forked child may hold open."""
        fcntl.flock(self._lock, fcntl.LOCK_UN)
        os.close(self._lock)

    def _mark(self, state: State) -> None:
        """Overwrite STATE in place: a full disk has no room for a new file. Torn, it is unreadable."""
        self._state = state
        text = json.dumps(state._asdict()).encode().ljust(_STATE_BYTES)
        file = os.open(self.path / "STATE", os.O_WRONLY | os.O_CREAT, 0o600)
        try:
            os.pwrite(file, text, 0)
            os.fsync(file)
        finally:
            os.close(file)

    def _write(self, name: str, content: dict[str, object]) -> None:
        """Replace a small file, durably and all at once."""
        new = self.path / f"{name}.new"
        with new.open("w", encoding="ascii") as file:
            json.dump(content, file)
            file.flush()
            os.fsync(file.fileno())
        new.replace(self.path / name)
        directory = os.open(self.path, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)


def _check_format(path: Path) -> bool:
    """True if the directory is a store of ours, False if it is empty. Raises BackendFormatError otherwise."""
    try:
        marker = json.loads((path / "FORMAT").read_bytes())
        name, version = marker["format"], marker["version"]
    except FileNotFoundError:
        # What a process that was stopped between mkdir and FORMAT leaves is still empty.
        foreign = sorted({entry.name for entry in path.iterdir()} - {"LOCK", "FORMAT.new", "lost+found"})
        if foreign:
            raise BackendFormatError(
                f"{path} is not empty and not a store ({foreign[0]!r} is in it); choose a new directory"
            ) from None
        return False
    except (ValueError, KeyError, TypeError):
        raise BackendFormatError(f"{path}/FORMAT is unreadable; choose another directory, or delete this one") from None
    if (name, version) != (FORMAT_NAME, FORMAT_VERSION):
        raise BackendFormatError(
            f"{path} holds format {name!r} version {version!r}, this release reads {FORMAT_NAME!r} version "
            f"{FORMAT_VERSION}; choose another directory, or delete this one"
        )
    return True
