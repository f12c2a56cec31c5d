"""Putting a daemon together: pool, tiers, store, server; and its orderly end."""

from __future__ import annotations

import gc
import hashlib
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from lmcache_sdk.config import Config, Tenant, default_socket, format_size
from lmcache_sdk.core import Limits
from lmcache_sdk.daemon import protocol as p
from lmcache_sdk.daemon.channel import Channel
from lmcache_sdk.daemon.listening import check_free
from lmcache_sdk.daemon.server import Server, Settings
from lmcache_sdk.errors import BackendError, BackendFormatError, BackendUnavailable, ConfigError, LMCacheSDKError
from lmcache_sdk.observe.logs import logger
from lmcache_sdk.pool.processes import start_time
from lmcache_sdk.pool.shared import SharedPool
from lmcache_sdk.store import Store
from lmcache_sdk.tiers import open_tiers

_log = logger("daemon")

DRAIN_S = 30.0
_R = TypeVar("_R", p.Figures, p.Count)

_HEALTH_S = 2.0
_PROMPT_BYTES = 64 << 20  # of 4,096 tokens of a small model: 16 KiB of KV a token


@dataclass(frozen=True)
class Daemon:
    """Everything that runs; made by :func:`daemon`."""

    pool: SharedPool
    store: Store
    server: Server


def pool_directory(socket: Path) -> Path:
    """Where the pool of the daemon on this socket lies: on tmpfs, so that it outlives the process."""
    name = hashlib.sha256(os.fsencode(socket.absolute())).hexdigest()[:12]
    return Path("/dev/shm") / f"lmcache-sdk-{os.getuid()}-{name}"  # noqa: S108 - SharedPool refuses what is not ours


@contextmanager
def daemon(
    settings: Settings,
    *,
    pool_bytes: int,
    tiers: Sequence[str] = (),
    directory: Path | None = None,
    limits: Limits | None = None,
    tenants: Mapping[str, Tenant] | None = None,
    eviction: str = "lru",
    keep_pool: bool = True,
) -> Iterator[Daemon]:
    """A daemon that is ready to serve; ended in order on leaving: writes are drained, the pool is kept.

    Args:
        tiers: URLs with options behind ``#``, fastest first; see :func:`~lmcache_sdk.tiers.parse_tier`.
        directory: of the pool; by default :func:`pool_directory`.
        tenants, eviction: what each may have of the pool, and what goes first, see :class:`Store`.
        keep_pool: leave the pool for the next life. Otherwise nothing of it remains, however the process ends.

    Raises:
        ConfigError, BackendError: what cannot be opened, and the fix.
    """
    directory = directory or pool_directory(settings.socket)
    found = (directory / "control").exists()
    with ExitStack() as undo:
        started, returned = False, True
        pool = SharedPool.open(directory, pool_bytes)

        def close_store(store: Store) -> None:
            nonlocal returned
            returned = store.close(DRAIN_S)

        def close_pool() -> None:
            if returned:  # A daemon that does not come up leaves a pool that it found, but none that it made.
                pool.close(keep=keep_pool and (found or started))
            else:
                _log.warning("a tier has not returned from a call: the pool stays locked until this process has ended")

        undo.callback(close_pool)
        opened = open_tiers(tiers)
        with ExitStack() as failed:
            for tier in opened:
                failed.callback(tier.backend.close, 1.0)
            store = Store(opened, pool=pool, limits=limits, tenants=tenants, eviction=eviction, keep_pool=keep_pool)
            failed.pop_all()
        undo.callback(close_store, store)
        server = Server(store, pool, settings)
        undo.callback(server.close)
        started = True
        if not keep_pool:
            pool.disown()
        yield Daemon(pool, store, server)


def run(running: Daemon, on_ready: Callable[[], None] = lambda: None) -> None:
    """Serve until SIGTERM or SIGINT. In the main thread. A second signal ends the process at once."""
    _calm_collector()
    numbers = (signal.SIGTERM, signal.SIGINT)
    before = {number: signal.signal(number, lambda *_: running.server.stop()) for number in numbers}
    try:
        on_ready()
        running.server.serve()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    _log.info("stopping: writing what is not yet in the tiers")


def _calm_collector() -> None:
    """Look for garbage cycles among young objects only.

    What the daemon keeps lives long, in millions, and without cycles: reference counts free it. Looking through all of
    it would hold up every client, for half a second where there are a million chunks.
    """
    gc.freeze()
    gc.set_threshold(2_000, 1 << 30, 1 << 30)


def serve(config: Config, group: int | None = None) -> None:
    """What ``lmcache-sdk serve`` does: all that is configured, until a signal ends it.

    Args:
        group: the number of ``config.group``.

    Raises:
        ConfigError, BackendError: what cannot be opened, and the fix. Then nothing has been changed.
    """
    path = Path(config.socket) if config.socket else _own_folder(default_socket())
    check_free(path)  # first, or who starts it twice is told of a port or a pool that is in use
    settings = Settings(socket=path, group=group, require_salt=config.require_salt)
    with ExitStack() as stack:
        web = None
        if config.metrics_port:  # before all else: a pool of many GiB takes seconds
            from prometheus_client import disable_created_metrics

            from lmcache_sdk.daemon.http import MetricsServer

            disable_created_metrics()  # type: ignore[no-untyped-call]  # doubles the series, and Prometheus makes nothing of them
            web = MetricsServer(config)
            stack.callback(web.close)
        running = stack.enter_context(
            daemon(
                settings,
                pool_bytes=config.pool_bytes,
                tiers=config.tiers,
                tenants=config.tenants,
                eviction=config.eviction,
                keep_pool=config.keep_pool,
            )
        )
        if web is not None:
            web.start(lambda: exposition(running), lambda: answers(path))
        for advice in useless(config, path):
            _log.warning("%s", advice)

        def ready() -> None:
            extra = {"socket": str(path), "pool_bytes": config.pool_bytes, "boot": running.store.boot}
            started, pool = f"after {_age_s():.2f} s", f"pool of {format_size(config.pool_bytes)}"
            tiers = ", ".join(tier.name for tier in running.store.tiers) or "no tier"
            _log.info("ready %s on unix://%s: %s, %s", started, path, pool, tiers, extra=extra)
            notify("READY=1")

        run(running, ready)
        notify("STOPPING=1")
    _log.info("stopped; the pool is %s", "kept for the next start" if config.keep_pool else "gone")


def useless(config: Config, path: Path) -> Iterator[str]:
    """Settings that do less than they seem to."""
    if config.pool_bytes < _PROMPT_BYTES:
        yield (
            f"a pool of {format_size(config.pool_bytes)} holds less than one prompt of 4,096 tokens of a small model "
            f"({format_size(_PROMPT_BYTES)}) and is of little use; --pool 20GiB would be usual"
        )
    if not config.tiers:
        yield "no tier: chunks are in memory only, which a reboot of this machine loses; --tier lmdb:///path adds one"
    if config.group and not path.parent.stat().st_mode & 0o011:
        yield (
            f"members of {config.group} cannot reach {path}, since {path.parent} is closed to them; "
            "choose a socket in a folder that they may enter, like /run/lmcache-sdk/lmcache-sdk.sock"
        )


def exposition(running: Daemon) -> bytes:
    """All metrics in Prometheus' text format."""
    from prometheus_client import generate_latest

    running.store.stats()  # brings the gauges up to date
    running.store.metrics.clients.set(running.server.client_count)
    return generate_latest(running.store.metrics.registry)


def answers(path: Path, timeout_s: float = _HEALTH_S) -> bool:
    """Whether the daemon on this socket says hello."""
    try:
        ask(path, timeout_s)
    except LMCacheSDKError:
        return False
    return True


_WHOM = "it serves its own user, and the members of a --group that it was started with"


def ask(path: Path, timeout_s: float = _HEALTH_S) -> p.Figures:
    """The figures of the daemon on this socket, for a tool that only looks.

    Raises:
        BackendUnavailable: nobody answers.
        BackendFormatError: it is of another release.
    """
    return _call(path, p.Ask(), p.Figures, timeout_s)


def reopen(path: Path, namespace: str, producers: tuple[str, str]) -> bool:
    """Have the daemon compare two producers anew that differed; False if they are not closed. Raises as ``ask``."""
    return bool(_call(path, p.Reopen(namespace, producers), p.Count, _HEALTH_S).count)


def _call(path: Path, request: p.Request, kind: type[_R], timeout_s: float) -> _R:
    channel = None
    try:
        channel = Channel(path, timeout_s)
        reply = channel.call(p.Hello(p.PROTOCOL_VERSION), timeout_s)
        if isinstance(reply, p.Welcome):
            reply = channel.call(request, timeout_s)
        if isinstance(reply, p.Refused):
            raise (BackendFormatError if reply.kind == "version" else BackendUnavailable)(reply.message)
        if not isinstance(reply, kind):
            raise p.ProtocolError(f"expected {kind.__name__}, got {type(reply).__name__}")
        return reply
    except (FileNotFoundError, ConnectionRefusedError) as error:
        raise BackendUnavailable(
            f"no daemon on {path}; start one with lmcache-sdk serve, or name its --socket"
        ) from error
    except BackendError:
        raise
    except PermissionError as error:
        raise BackendUnavailable(f"this user may not use the daemon on {path}; {_WHOM}") from error
    except (ConnectionResetError, BrokenPipeError) as error:
        raise BackendUnavailable(f"the daemon on {path} has hung up: it ends, or refuses this user; {_WHOM}") from error
    except (OSError, p.ProtocolError) as error:
        raise BackendUnavailable(f"the daemon on {path} does not answer: {error}") from error
    finally:
        if channel is not None:
            channel.close()


def notify(state: str) -> None:
    """Tell systemd, if it wants to know."""
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    if address.startswith("@"):
        address = "\0" + address[1:]
    with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as channel:
        channel.sendto(state.encode(), address)


def _own_folder(path: Path) -> Path:
    """Make the folder of the default socket if it is one in /tmp; see :func:`default_socket`."""
    try:
        path.parent.mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"cannot create {path.parent} for the socket: {error.strerror}") from error
    if path.parent != Path(os.environ.get("XDG_RUNTIME_DIR", "")):
        _log.info("no XDG_RUNTIME_DIR: the socket is %s", path)
    return default_socket()  # checks whose folder that is now


def _age_s() -> float:
    """How long this process has been there."""
    ticks = start_time(os.getpid()) or 0
    return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
