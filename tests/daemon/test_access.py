"""Who may connect, what is on the socket's path, and where the pool lies: other users, groups, namespaces."""

from __future__ import annotations

import json
import os
import shutil
import socket
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from lmcache_sdk.daemon import protocol as p
from lmcache_sdk.daemon.channel import Channel
from lmcache_sdk.daemon.client import DaemonCache
from lmcache_sdk.daemon.listening import listen
from lmcache_sdk.errors import BackendUnavailable
from lmcache_sdk.pool.processes import identity, may_live
from tests.core.engine import PRODUCER
from tests.daemon.daemon_process import Daemon, Process, until
from tests.daemon.engine_process import CHUNKS, EngineProcess, close, connect, layered

EXACT = {"hit": CHUNKS, "failed": [], "wrong": []}
NOBODY = 65534
GROUP = 54321
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="becoming another user takes root")


def unshare(*options: str) -> bool:
    if shutil.which("unshare") is None:
        return False
    return subprocess.run(["unshare", *options, "true"], capture_output=True, check=False).returncode == 0


in_namespaces = pytest.mark.skipif(not unshare("-m"), reason="no mount namespaces here")


def stranger(daemon: Daemon, *groups: int) -> EngineProcess:
    """An engine of user nobody."""
    daemon.folder.chmod(0o755)
    return EngineProcess(daemon, uid=NOBODY, groups=list(groups))


@as_root
def test_the_socket_is_this_users_alone(daemon: Daemon) -> None:
    status = daemon.socket.stat()
    assert stat.S_IMODE(status.st_mode) == 0o600
    with stranger(daemon) as engine:
        assert engine.ask(do="connected") is False
        assert engine.ask(do="store", seed=1)
        assert engine.ask(do="load", seed=1)["hit"] == 0
    daemon.socket.chmod(0o666)  # even then: the kernel says who it is
    with stranger(daemon) as engine:
        assert engine.ask(do="connected") is False
        assert daemon.check()["clients"] == 0
    assert "not this daemon's" in (daemon.folder / "log").read_text()


@as_root
def test_a_group_may_share_it() -> None:
    with Daemon(group=GROUP) as daemon:
        daemon.start()
        status = daemon.socket.stat()
        assert stat.S_IMODE(status.st_mode) == 0o660 and status.st_gid == GROUP
        with stranger(daemon, GROUP) as member, stranger(daemon) as other, EngineProcess(daemon) as own:
            assert member.ask(do="connected") is True
            assert other.ask(do="connected") is False
            assert member.ask(do="store", seed=1)
            assert own.ask(do="load", seed=1) == member.ask(do="load", seed=1) == EXACT
            member.kill()
            daemon.settled()
        daemon.socket.chmod(0o666)
        with stranger(daemon, GROUP + 1) as other:
            assert other.ask(do="connected") is False


@as_root
def test_a_daemon_of_somebody_else_is_not_trusted() -> None:
    """In a folder for all anyone could listen, and hand out any bytes."""
    program = (
        "import os, socket, sys\n"
        "os.setgid(65534)\nos.setuid(65534)\n"
        "listener = socket.socket(socket.AF_UNIX)\nlistener.bind(sys.argv[1])\nlistener.listen()\n"
        "os.chmod(sys.argv[1], 0o666)\nprint('\"ready\"', flush=True)\nsys.stdin.read()\n"
    )
    with Daemon() as daemon:
        daemon.folder.chmod(0o1777)
        listener = Process([sys.executable, "-c", program, str(daemon.socket)], daemon.folder / "log")
        assert listener.hear() == "ready"
        with pytest.raises(BackendUnavailable, match=f"user {NOBODY} listens"):
            Channel(daemon.socket, 1.0)
        cache = DaemonCache(daemon.socket, layered(), PRODUCER)
        assert not cache.connected
        cache.close(1.0)
        os.chown(daemon.folder, NOBODY, NOBODY)  # now it is that user's folder, and nobody else's
        Channel(daemon.socket, 1.0).close()
        listener.kill()


@in_namespaces
def test_two_mount_namespaces() -> None:
    """The container case: the engine sees the socket, and no pool; descriptors are all that it needs."""
    with Daemon() as daemon:
        daemon.start()
        code = (
            "import os,sys; assert not os.path.exists(sys.argv[1]); "
            "os.execv(sys.executable, [sys.executable, *sys.argv[2:]])"
        )
        from tests.daemon import engine_process

        arguments = [str(daemon.pool), engine_process.__file__, json.dumps({"url": daemon.url})]
        engine = EngineProcess.__new__(EngineProcess)
        line = ["sh", "-c", 'mount -t tmpfs none /dev/shm && exec "$@"', "sh", sys.executable, "-c", code, *arguments]
        super(EngineProcess, engine).__init__(["unshare", "-m", *line], daemon.folder / "engines.log")
        with engine, EngineProcess(daemon) as other:
            assert engine.hear() == "ready"
            assert engine.ask(do="store", seed=1)
            assert other.ask(do="load", seed=1) == EXACT
            assert other.ask(do="store", seed=2)
            assert engine.ask(do="load", seed=2) == EXACT
            engine.tell(do="held load", seed=1, at=2)
            assert engine.hear() == "held"
            daemon.kill()
            daemon.start()
            assert engine.ask(do="go") == EXACT
            until(lambda: engine.ask(do="connected"), 3)
            assert engine.ask(do="load", seed=2) == EXACT
            daemon.settled()


@pytest.mark.skipif(not unshare("-p", "-f", "--mount-proc"), reason="no pid namespaces here")
def test_an_engine_in_a_pid_namespace_of_its_own(daemon: Daemon) -> None:
    from tests.daemon import engine_process

    line = ["unshare", "-p", "-f", "--kill-child", "--mount-proc", sys.executable, engine_process.__file__]
    engine = EngineProcess.__new__(EngineProcess)
    super(EngineProcess, engine).__init__([*line, json.dumps({"url": daemon.url})], daemon.folder / "engines.log")
    with engine:
        assert engine.hear() == "ready"
        assert engine.ask(do="store", seed=1)
        assert engine.ask(do="claim", seed=1) == CHUNKS
        assert daemon.check()["leases"] == 1
        engine.kill()
        daemon.settled()


@pytest.mark.skipif(not unshare("-p", "-f", "--mount-proc"), reason="no pid namespaces here")
def test_a_daemon_that_cannot_see_its_clients_frees_nothing_on_suspicion() -> None:
    """Its number for them is 0. Whether they live is theirs to say, in the next life as well."""
    with Daemon() as daemon:
        inside = ["unshare", "-p", "-f", "--kill-child", "--mount-proc"]
        daemon.start(command=inside)
        with EngineProcess(daemon) as engine:
            engine.tell(do="held store", seed=1, at=2)
            assert engine.hear() == "held"
            until(lambda: daemon.check()["reservations"] == 1)
            daemon.kill()
            daemon.start(command=inside)
            with EngineProcess(daemon) as other:
                for seed in range(10, 16):
                    assert other.ask(do="store", seed=seed)
            assert daemon.check()["quarantined_bytes"] > 0
            assert engine.ask(do="go")
            until(lambda: engine.ask(do="connected"), 3)
            daemon.settled()


def test_which_process_is_meant() -> None:
    mine = identity(os.getpid())
    assert mine and may_live(os.getpid(), mine)
    assert not may_live(os.getpid(), mine + (1 << 24)), "another process by the same number"
    assert may_live(os.getpid(), mine ^ 1), "a number of another pid namespace says nothing"
    assert identity(0) == 0 and may_live(0, 0)
    child = subprocess.Popen(["cat"], stdin=subprocess.PIPE)
    known = identity(child.pid)
    assert may_live(child.pid, known) and may_live(child.pid, 0)
    child.communicate()
    assert not may_live(child.pid, known) and not may_live(child.pid, 0)


@in_namespaces
def test_no_room_for_the_pool() -> None:
    with Daemon(pool_bytes=32 << 20) as daemon:
        mount = f'mount -t tmpfs -o size=4m none "{daemon.pool}" && exec "$@"'
        error = daemon.fail(command=["unshare", "-m", "sh", "-c", mount, "sh"])
        assert "no room for a pool of 32" in error and "shm-size" in error
        assert not daemon.socket.exists()
        daemon.start()  # outside there is room


def test_a_pool_of_another_size_is_refused_and_kept(daemon: Daemon) -> None:
    with EngineProcess(daemon) as engine:
        assert engine.ask(do="store", seed=1)
        daemon.kill()
        assert "holds a pool of" in daemon.fail(pool_bytes=2 << 20)
        daemon.start()
        until(lambda: engine.ask(do="connected"), 3)
        assert engine.ask(do="load", seed=1) == EXACT


def test_what_is_left_of_a_killed_daemon_is_replaced(daemon: Daemon) -> None:
    daemon.kill()
    assert daemon.socket.is_socket()
    daemon.start()
    close(connect(daemon))
    assert [path.name for path in daemon.folder.iterdir() if path.name.startswith(".")] == []


def test_a_second_daemon_on_the_socket_is_refused(daemon: Daemon) -> None:
    with Daemon() as other:
        assert "another daemon answers" in other.fail(socket=str(daemon.socket))
    with EngineProcess(daemon) as engine:
        assert engine.ask(do="store", seed=1)
        assert engine.ask(do="load", seed=1) == EXACT


def test_a_hung_daemon_is_not_replaced(daemon: Daemon) -> None:
    assert daemon.process is not None
    daemon.process.stop()
    with Daemon() as other:
        assert "another daemon answers" in other.fail(socket=str(daemon.socket))
    daemon.process.go_on()


def test_paths_that_cannot_be() -> None:
    with Daemon() as daemon:
        daemon.socket.write_text("precious")
        assert "is no socket" in daemon.fail()
        assert daemon.socket.read_text() == "precious"
        assert "does not exist" in daemon.fail(socket=str(daemon.folder / "none" / "s"))
        assert "107" in daemon.fail(socket=str(daemon.folder / ("s" * 110)))
        assert "cannot create" in daemon.fail(socket="/proc/s")


@pytest.mark.parametrize("what", ["file", "nothing", "daemon"])
def test_a_socket_that_is_replaced(daemon: Daemon, what: str) -> None:
    """Who is connected is served; a daemon that ends removes its own socket only."""
    with EngineProcess(daemon) as engine, Daemon() as other:
        assert engine.ask(do="store", seed=1)
        daemon.socket.unlink()
        if what == "file":
            daemon.socket.write_text("precious")
        if what == "daemon":
            other.start(socket=str(daemon.socket))
        assert engine.ask(do="load", seed=1)["hit"] in (0, CHUNKS)
        until(lambda: "no longer this daemon's socket" in (daemon.folder / "log").read_text())
        assert daemon.terminate() == 0
        until(lambda: engine.ask(do="connected") == (what == "daemon"), 3)
        if what == "file":
            assert daemon.socket.read_text() == "precious"
            daemon.socket.unlink()
        if what == "daemon":
            assert engine.ask(do="load", seed=1)["hit"] == 0
            assert engine.ask(do="store", seed=2)
            assert engine.ask(do="load", seed=2) == EXACT
            other.settled()
            other.kill()
        daemon.start()
        until(lambda: engine.ask(do="connected"), 3)
        assert engine.ask(do="load", seed=1)["hit"] == CHUNKS, "its pool was kept"


def test_the_socket_is_there_only_when_it_may_be_used(tmp_path: Path) -> None:
    """Made under another name, with its rights, then renamed: nobody meets it half made."""
    with Daemon() as daemon:
        daemon.start()
        channel = Channel(daemon.socket, 1.0)
        assert isinstance(channel.call(p.Hello(p.PROTOCOL_VERSION), 1.0), p.Welcome)
        channel.close()
        names = sorted(path.name for path in daemon.folder.iterdir())
        assert names == ["log", "s"]


def test_a_hello_is_waited_for_no_longer_than_that(daemon: Daemon, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as silent:
        silent.connect(str(daemon.socket))
        silent.settimeout(14)
        assert silent.recv(1) == b""


def test_the_socket_is_made_under_a_name_of_its_own(tmp_path: Path) -> None:
    """Two containers that share the folder have processes of the same number."""
    other = tmp_path / f".{os.getpid()}"
    other.write_text("another daemon's")
    listener, _ = listen(tmp_path / "s", None)
    assert other.read_text() == "another daemon's"
    assert {path.name for path in tmp_path.iterdir()} == {"s", other.name}
    listener.close()


def test_a_socket_that_cannot_be_made_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(OverflowError):
        listen(tmp_path / "s", 1 << 40)
    if os.geteuid():
        with pytest.raises(BackendUnavailable):
            listen(tmp_path / "s", 0)
    assert not list(tmp_path.iterdir())


LOOK = """
import os, sys
from pathlib import Path
from lmcache_sdk.daemon.serve import ask
from lmcache_sdk.errors import BackendUnavailable
os.setgroups([])
os.setgid(65534)
os.setuid(65534)
try:
    ask(Path(sys.argv[1]))
except BackendUnavailable as error:
    print(error)
"""


@as_root
def test_somebody_else_who_looks_is_told_why_there_is_nothing_to_see(daemon: Daemon) -> None:
    daemon.folder.chmod(0o755)

    def look() -> str:
        line = [sys.executable, "-c", LOOK, str(daemon.socket)]
        return subprocess.run(line, capture_output=True, text=True, check=False, timeout=30).stdout

    assert f"this user may not use the daemon on {daemon.socket}; it serves its own user" in look()
    daemon.socket.chmod(0o666)
    assert "has hung up: it ends, or refuses this user; it serves its own user" in look()


@as_root
def test_a_socket_that_is_out_of_reach_is_an_error_of_its_own(tmp_path: Path) -> None:
    tmp_path.chmod(0o700)
    program = (
        "import os, sys; from pathlib import Path; from lmcache_sdk.daemon.listening import check_free\n"
        "os.setgid(65534); os.setuid(65534); check_free(Path(sys.argv[1]))"
    )
    line = [sys.executable, "-c", program, str(tmp_path / "s")]
    done = subprocess.run(line, capture_output=True, text=True, check=False, timeout=30)
    assert f"ConfigError: cannot look at {tmp_path / 's'} (Permission denied)" in done.stderr
