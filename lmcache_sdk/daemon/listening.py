"""The daemon's socket: whoever finds its file can connect, and nobody who may not."""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
import stat
from pathlib import Path

from lmcache_sdk.errors import BackendLocked, BackendUnavailable, ConfigError


def listen(path: Path, group: int | None) -> tuple[socket.socket, tuple[int, int]]:
    """The listening socket, and what its file is (see :func:`inode`).

    Args:
        group: None = only this user may connect; else members of this group too (a numeric id).

    Raises:
        BackendLocked: somebody answers there.
        BackendUnavailable: it cannot be made.
        ConfigError: the folder is missing, or the path is too long or something else.
    """
    # Made under a name of its own and then renamed: at no moment may anybody connect who must not. By chance and not by
    # the process's number, which another one has, too, where two containers share the folder.
    place = path.with_name(f".{secrets.token_hex(6)}")
    if max(len(os.fsencode(path)), len(os.fsencode(place))) > 107:
        raise ConfigError(f"the socket path {path} has over 107 bytes; choose a shorter one")
    if not path.parent.is_dir():
        raise ConfigError(f"{path.parent} does not exist; create it, or choose another socket")
    check_free(path)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        os.fchmod(listener.fileno(), 0o600)  # of the file that bind makes
        listener.bind(str(place))
        if group is not None:
            os.chown(place, -1, group)
            place.chmod(0o660)
        listener.listen(1024)
        found = inode(place)
        assert found is not None
        place.rename(path)
    except BaseException as error:
        listener.close()
        with contextlib.suppress(OSError):
            place.unlink()
        if isinstance(error, OSError):
            raise BackendUnavailable(f"cannot create the socket {path}: {error.strerror}") from error
        raise
    return listener, found


def inode(path: Path) -> tuple[int, int] | None:
    """Which file is there; None if there is none."""
    try:
        status = path.lstat()
    except OSError:
        return None
    return status.st_dev, status.st_ino


def check_free(path: Path) -> None:
    """Raises BackendLocked if somebody answers there, ConfigError if it is no socket, or out of reach."""
    try:
        kind = stat.S_IFMT(path.stat().st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return
    except OSError as error:
        raise ConfigError(f"cannot look at {path} ({error.strerror}); choose another socket") from error
    if kind != stat.S_IFSOCK:
        raise ConfigError(f"{path} exists and is no socket; choose another path")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(str(path))
        except (ConnectionRefusedError, FileNotFoundError):
            return  # a daemon that was killed has left it
        except OSError as error:
            why = error.strerror or "it does not accept connections"
            raise BackendLocked(f"{path} is in use ({why}); stop that daemon, or choose another socket") from error
    raise BackendLocked(f"another daemon answers on {path}; stop it, or choose another socket")
