"""Opening an LMDB environment that a crash, a power cut or a stray write may have damaged.

LMDB maps the file, so damage in it can kill the process that reads it. Therefore what is in doubt is first
verified by a reader that does not map it, in a process of its own, and set aside when that fails.
"""

from __future__ import annotations

import mmap
import shutil
import subprocess
import sys
from logging import getLogger
from pathlib import Path
from typing import TYPE_CHECKING

import lmdb

from lmcache_backends.lmdb.home import Home, Trust
from lmcache_sdk.errors import BackendUnavailable

if TYPE_CHECKING:
    from lmdb import _Database

log = getLogger(__name__)

VERIFY_TIMEOUT_S = 120.0
DAMAGE = (
    lmdb.CorruptedError,
    lmdb.PageNotFoundError,
    lmdb.InvalidError,
    lmdb.VersionMismatchError,
    lmdb.BadTxnError,
)
_READERS = 1024  # read transactions at once, a thread each


class Environment:
    """An open LMDB environment with the two trees of a store.

    Attributes:
        records: key -> the record. LMDB knows a value's length without touching its pages, so this tree is
            also the index that is read at start: there is no second one that could disagree.
        recency: 8-byte digest of the key -> 8-byte big-endian sequence number of its last use.
    """

    def __init__(self, path: Path, env: lmdb.Environment) -> None:
        self.path = path
        self.env = env
        self.records: _Database = env.open_db(b"records")
        self.recency: _Database = env.open_db(b"recency")
        env.reader_check()

    @property
    def extent(self) -> int:
        """Bytes of the file that LMDB has taken into use, free pages included."""
        return _extent(self.env)

    def load(self) -> tuple[dict[str, int], dict[bytes, bytes]]:
        """Lengths by key, and recency by digest."""
        with self.env.begin(buffers=True) as txn:
            lengths = {str(key, "ascii"): len(value) for key, value in txn.cursor(self.records)}
            recency = {bytes(key): bytes(value) for key, value in txn.cursor(self.recency)}
        return lengths, recency

    def compacted(self, size: int) -> Environment:
        """Give the free pages back to the file system: copy what is in use, replace, reopen with ``size``.

        Nothing else may use the environment. It is closed afterwards, even on an error (OSError, lmdb.Error).
        """
        copy = self.path.with_name("records.compact")
        try:
            discard_copy(self.path)
            copy.mkdir(mode=0o700)
            self.env.copy(str(copy), compact=True)
        finally:
            self.env.close()
        (copy / "data.mdb").replace(self.path / "data.mdb")
        (self.path / "lock.mdb").unlink(missing_ok=True)
        discard_copy(self.path)
        return Environment(self.path, _map(self.path, size))


def _map(path: Path, size: int) -> lmdb.Environment:
    return lmdb.open(
        str(path),
        map_size=size - size % mmap.PAGESIZE,
        mode=0o600,
        sync=False,
        metasync=False,
        meminit=False,
        # With MADV_RANDOM (readahead off) every 4 KiB page of a cold record is a disk access of its own.
        readahead=True,
        max_readers=_READERS,
        max_spare_txns=16,
        max_dbs=2,
        lib_version=0,  # the 0.9 format, whatever the environment variable of py-lmdb says
    )


def _extent(env: lmdb.Environment) -> int:
    return int((env.info()["last_pgno"] + 1) * env.stat()["psize"])


def discard_copy(path: Path) -> None:
    """Remove what an interrupted compaction of ``path`` left."""
    shutil.rmtree(path.with_name("records.compact"), ignore_errors=True)


def verified(path: Path) -> str:
    """Audit the structure of a closed environment; empty if it is sound, else what is wrong.

    py-lmdb's auditor parses the file by itself and maps nothing; it runs elsewhere for the sake of the
    deadline, and of whatever memory a damaged file may make it take. It does not read payloads.
    """
    command = [sys.executable, "-m", "lmdb", "verify", str(path)]
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=VERIFY_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return f"its structure could not be verified within {VERIFY_TIMEOUT_S:.0f} s"
    except OSError as error:
        return f"its structure could not be verified ({error})"
    if done.returncode == 0:
        return ""
    said = (done.stdout + done.stderr).strip().splitlines() or [f"the verifier ended with {done.returncode}"]
    return said[0][:200]


def open_records(home: Home, size: int) -> tuple[Environment, dict[str, int], dict[bytes, bytes]]:
    """Open the records of a claimed home, after verifying or setting aside what is in doubt.

    Raises:
        BackendUnavailable: the file system refuses.
    """
    try:
        discard_copy(home.records)
        trust, why = home.trust()
        if trust is not Trust.OPEN:
            log.warning("verifying %s: %s", home.records, why)
            fault = verified(home.records) if trust is Trust.VERIFY else why
            if fault:
                home.set_aside(fault)
            else:
                home.mark_verified()
        home.mark_opening()
        try:
            opened = _open(home.records, size)
        except DAMAGE as error:
            home.set_aside(str(error))
            home.mark_opening()
            opened = _open(home.records, size)
        home.mark_open(size)
    except (OSError, lmdb.Error) as error:
        raise BackendUnavailable(f"cannot open the store in {home.path}: {error}") from error
    return opened


def _open(path: Path, size: int) -> tuple[Environment, dict[str, int], dict[bytes, bytes]]:
    path.mkdir(mode=0o700, exist_ok=True)
    env = _map(path, size)
    try:
        # Pages past the end of the file would kill us with SIGBUS. A few may rightly never have been written.
        if (path / "data.mdb").stat().st_size < _extent(env):
            env.close()
            if fault := verified(path):
                raise lmdb.CorruptedError(fault)
            env = _map(path, size)
        environment = Environment(path, env)
        return environment, *environment.load()
    except BaseException as error:
        env.close()
        if isinstance(error, UnicodeDecodeError):
            raise lmdb.CorruptedError("a key is not text") from error
        raise
