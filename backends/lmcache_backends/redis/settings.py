"""What a URL says."""

from __future__ import annotations

import os
import re
import ssl
from pathlib import Path
from typing import NamedTuple

from lmcache_sdk.backend import Url
from lmcache_sdk.errors import ConfigError

TLS = ("rediss", "valkeys", "rediss+cluster")
CLUSTER = ("redis+cluster", "rediss+cluster")
UNIX = "redis+unix"


class Settings(NamedTuple):
    """Everything about the servers.

    Attributes:
        shown: the URL as messages may show it.
        host, port: of the server, or of one node of the cluster.
        path: of a unix socket, instead of these two.
        tls: arguments of redis-py's SSLConnection; None = no TLS.
        ttl_ms: after which a record expires; 0 = never.
        connections: at most, to each server.
        timeout_s: for sending a command, and for receiving its reply, each.
        connect_timeout_s: for connecting, and for each reply until the connection stands.
    """

    scheme: str
    shown: str
    host: str
    port: int
    path: str
    username: str | None
    password: str | None
    db: int
    tls: dict[str, object] | None
    cluster: bool
    ttl_ms: int
    connections: int
    timeout_s: float
    connect_timeout_s: float


def read(url: Url) -> Settings:
    """Raises ConfigError."""
    unix, cluster = url.scheme == UNIX, url.scheme in CLUSTER
    if unix and (url.hostname or not url.path):
        raise ConfigError(f"{url.shown!r} needs the path of a socket: {UNIX}:///run/redis/redis.sock?db=0")
    host, port = ("", 0) if unix else url.server(6379)
    username = url.username or None
    password = _password(url)
    if username and password is None:
        raise ConfigError(f"{url.shown!r} names a user without a password; add it, or password_file=FILE")
    settings = Settings(
        scheme=url.scheme,
        shown=url.shown,
        host=host,
        port=port,
        path=url.path if unix else "",
        username=username,
        password=password,
        db=_database(url, unix, cluster),
        tls=_tls(url) if url.scheme in TLS else None,
        cluster=cluster,
        ttl_ms=_ttl_ms(url),
        connections=_count(url, "connections", "4"),
        timeout_s=_positive(url, "timeout", "5"),
        connect_timeout_s=_positive(url, "connect_timeout", "2"),
    )
    url.finish()
    return settings


def _password(url: Url) -> str | None:
    """From the URL, or from a file, so that it need not be seen in a list of processes."""
    file = url.take("password_file")
    if not file:
        return url.password
    if url.password is not None:
        raise ConfigError(f"{url.shown!r} has a password and a password_file; give one of them")
    try:
        return Path(file).read_text().rstrip("\r\n")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not text"
        raise ConfigError(f"cannot read the password_file of {url.shown!r}: {reason}") from None


def _database(url: Url, unix: bool, cluster: bool) -> int:
    text = url.take("db", "0") if unix else url.path.strip("/") or "0"
    if not re.fullmatch(r"\d{1,9}", text):
        raise ConfigError(f"{text!r} is no number of a database; write it like {url.scheme}://cache.example:6379/0")
    if cluster and int(text):
        raise ConfigError(f"a cluster has database 0 only, got {text}")
    return int(text)


def _tls(url: Url) -> dict[str, object]:
    ca, cert, key, verify = url.take("ca"), url.take("cert"), url.take("key"), url.take("verify", "yes")
    if verify not in ("yes", "no"):
        raise ConfigError(f"verify must be yes or no, got {verify!r}")
    if key and not cert:
        raise ConfigError(f"key={key} needs cert=FILE, too")
    for name, file in (("ca", ca), ("cert", cert), ("key", key)):
        if file and not os.access(file, os.R_OK):
            raise ConfigError(f"{name}={file}: there is no such file, or it must not be read")
    try:
        context = ssl.create_default_context(cafile=ca or None)
        if cert:
            # An encrypted key would be asked for on the terminal.
            context.load_cert_chain(cert, key or None, password=lambda: "")
    except (OSError, ValueError) as error:
        names = ", ".join(f"{name}={file}" for name, file in (("ca", ca), ("cert", cert), ("key", key)) if file)
        raise ConfigError(f"{names}: not PEM files that fit together and need no password: {error}") from None
    return {
        "ssl_ca_certs": ca or None,
        "ssl_certfile": cert or None,
        "ssl_keyfile": key or None,
        "ssl_cert_reqs": "required" if verify == "yes" else "none",
        "ssl_check_hostname": verify == "yes",
    }


def _ttl_ms(url: Url) -> int:
    seconds = url.take_seconds("ttl", "0")
    if 0 < seconds < 0.001:
        raise ConfigError(f"ttl must be at least 0.001s, or 0 for none, got {seconds:f}s")
    return round(seconds * 1000)


def _positive(url: Url, name: str, default: str) -> float:
    return url.take_seconds(name, default, least=0.01, most=3600)


def _count(url: Url, name: str, default: str) -> int:
    text = url.take(name, default)
    if not re.fullmatch(r"\d{1,4}", text) or not 1 <= int(text) <= 64:
        raise ConfigError(f"{name} must be from 1 to 64, got {text!r}")
    return int(text)
