"""Real Redis and Valkey servers for the tests, each with a folder of its own, and ended by its handle."""

from __future__ import annotations

import contextlib
import datetime as dt
import ipaddress
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

import redis

from tests.backends.programs import free_port, program

START_S = 20.0


def wait_until(condition: Callable[[], bool], what: str, seconds: float = START_S) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"{what}: not within {seconds:g} s"
        time.sleep(0.02)


class Server:
    """One server on a free loopback port and a unix socket. A context manager; ``start`` may be called again.

    Args:
        options: of the server's command line, without their ``--``.
        kind: ``redis`` or ``valkey``.
        tls: the port speaks nothing but TLS.
        password: of the default user.
    """

    def __init__(
        self,
        options: dict[str, str] | None = None,
        *,
        kind: str = "redis",
        tls: Certificates | None = None,
        password: str = "",
    ) -> None:
        self.program = program(f"{kind}-server")
        self.folder = Path(tempfile.mkdtemp(prefix="kv-", dir="/tmp"))  # short: a socket's path has 107 bytes
        self.port = free_port(below=55_536)  # that of a cluster's bus is 10,000 above
        self.socket = self.folder / "s"
        self.tls = tls
        self.password = password
        self.options = {
            "bind": "127.0.0.1",
            "unixsocket": str(self.socket),
            "dir": str(self.folder),
            "logfile": str(self.folder / "log"),
            "save": "",
            **({"port": "0", "tls-port": str(self.port)} if tls else {"port": str(self.port)}),
            **(tls.server_options() if tls else {}),
            **({"requirepass": password} if password else {}),
            **(options or {}),
        }
        self.process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop(signal.SIGKILL)
        shutil.rmtree(self.folder)

    def start(self) -> None:
        """Returns when it answers."""
        line = [self.program, *(word for name, value in self.options.items() for word in (f"--{name}", value))]
        self.process = subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        with self.client() as client:
            wait_until(lambda: self._answers(client), f"{self.program} does not answer")

    def _answers(self, client: redis.Redis) -> bool:
        assert self.process is not None
        assert self.process.poll() is None, self.log()
        try:
            return bool(client.ping())
        except redis.exceptions.ConnectionError:
            return False

    def stop(self, number: int = signal.SIGTERM) -> None:
        if self.process is not None:
            self.process.send_signal(number)
            self.process.wait(20)
            self.process = None

    def log(self) -> str:
        file = self.folder / "log"
        return file.read_text() if file.exists() else "(no log)"

    def client(self) -> redis.Redis:
        """The store's own client, which goes another way than the backend: over the unix socket."""
        return redis.Redis(unix_socket_path=str(self.socket), password=self.password or None)

    def flush(self) -> None:
        with self.client() as client:
            client.flushall()

    def url(self, scheme: str = "", parameters: str = "", login: str = "") -> str:
        scheme = scheme or ("rediss" if self.tls else "redis")
        return f"{scheme}://{login}127.0.0.1:{self.port}/0?{parameters}"


class Cluster:
    """Three servers, each with a third of the slots. A context manager.

    Args:
        tls: they speak nothing but TLS.
    """

    def __init__(self, tls: Certificates | None = None) -> None:
        options = {"cluster-enabled": "yes", "cluster-node-timeout": "2000", "cluster-require-full-coverage": "no"}
        if tls:
            options["tls-cluster"] = "yes"
        self.servers = [Server(options, tls=tls) for _ in range(3)]
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Self:
        with self._stack as stack:
            for server in self.servers:
                stack.enter_context(server)
            bounds = [16_384 * number // 3 for number in range(4)]
            first = self.servers[0]
            for server, start, end in zip(self.servers, bounds, bounds[1:], strict=False):
                with server.client() as client:
                    client.execute_command("CLUSTER ADDSLOTSRANGE", start, end - 1)
                    client.execute_command("CLUSTER SET-CONFIG-EPOCH", self.servers.index(server) + 1)
                    client.execute_command("CLUSTER MEET", "127.0.0.1", first.port)
            wait_until(self._whole, "the cluster does not form")
            self._stack = stack.pop_all()
        return self

    def _whole(self) -> bool:
        """Every node knows all slots, and that all nodes are well."""
        for server in self.servers:
            with server.client() as client:
                info = client.execute_command("CLUSTER INFO")
                if info["cluster_state"] != "ok" or info["cluster_slots_ok"] != "16384":
                    return False
                if info["cluster_known_nodes"] != "3":
                    return False
        return True

    def __exit__(self, *exit_: object) -> None:
        self._stack.close()

    @property
    def port(self) -> int:
        return self.servers[0].port

    def url(self, scheme: str = "redis+cluster", parameters: str = "") -> str:
        return f"{scheme}://127.0.0.1:{self.port}?{parameters}"

    def flush(self) -> None:
        for server in self.servers:
            server.flush()

    def client(self) -> redis.RedisCluster:
        return redis.RedisCluster(host="127.0.0.1", port=self.port)


class Certificates(NamedTuple):
    """PEM files, made for this run: an authority, a server of 127.0.0.1, a client, and another authority."""

    ca: Path
    cert: Path
    key: Path
    client_cert: Path
    client_key: Path
    other_ca: Path

    def server_options(self) -> dict[str, str]:
        return {
            "tls-cert-file": str(self.cert),
            "tls-key-file": str(self.key),
            "tls-ca-cert-file": str(self.ca),
            "tls-auth-clients": "optional",
        }


def make_certificates(folder: Path) -> Certificates:
    authority = _issue(folder / "ca", None)
    _issue(folder / "server", authority, "127.0.0.1")
    _issue(folder / "client", authority, "127.0.0.1")
    _issue(folder / "other", None)
    names = ("ca.pem", "server.pem", "server.key", "client.pem", "client.key", "other.pem")
    return Certificates(*(folder / name for name in names))


def _issue(place: Path, issuer: tuple | None, address: str = "") -> tuple:
    """A certificate and its key as PEM files; the answer is both, for what it signs."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, place.name)])
    now = dt.datetime.now(dt.UTC)
    builder = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(issuer[0].subject if issuer else name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - dt.timedelta(hours=1))
        .not_valid_after(now + dt.timedelta(days=1))
        .add_extension(x509.BasicConstraints(ca=issuer is None, path_length=None), critical=True)
    )
    if address:
        names = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address(address))])
        builder = builder.add_extension(names, critical=False)
    certificate = builder.sign(issuer[1] if issuer else key, hashes.SHA256())
    place.with_suffix(".pem").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    place.with_suffix(".key").write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return certificate, key
