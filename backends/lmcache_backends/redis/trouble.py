"""What went wrong, in the operator's words and with the fix; never with a password."""

from __future__ import annotations

import socket
import ssl
from collections.abc import Iterator

import redis

from lmcache_backends.redis.link import ProtocolError, Refused
from lmcache_backends.redis.settings import Settings
from lmcache_sdk.errors import BackendError, BackendFull, BackendUnavailable

_OTHER_NAME = (62, 64)  # OpenSSL's codes for a certificate of another host or address

_REFUSALS = {
    "OOM": "is full and evicts nothing; raise maxmemory, or set maxmemory-policy to allkeys-lru",
    "NOAUTH": "needs a password; give it in the URL, or as password_file=FILE",
    "WRONGPASS": "rejects this user name or password",
    "READONLY": "is a replica, which takes no records; name the primary",
    "LOADING": "is loading its data; try again later",
    "MISCONF": "cannot save to its disk and therefore takes no records; see its log",
    "MASTERDOWN": "has lost its primary",
    "CLUSTERDOWN": "is of a cluster that serves not all slots; see CLUSTER INFO",
    "TRYAGAIN": "is moving these records to another node; try again later",
    "MOVED": "is a node of a cluster; write redis+cluster:// (with TLS rediss+cluster://)",
    "ASK": "is a node of a cluster; write redis+cluster:// (with TLS rediss+cluster://)",
}
_TEXTS = {
    "without any password": "has no password, but one was given; take it out of the URL",
    "max number of clients": "has as many clients as it allows; raise its maxclients, or take fewer connections",
    "cluster support disabled": "is no node of a cluster; write redis:// (with TLS rediss://)",
    "not allowed in cluster mode": "is a node of a cluster; write redis+cluster:// (with TLS rediss+cluster://)",
    "protected mode": "runs in protected mode; set a password there, or bind it to this machine",
}


def refusal(place: str, refused: Refused, settings: Settings) -> BackendError:
    """An error reply as an error."""
    kind = BackendFull if refused.code == "OOM" else BackendUnavailable
    return kind(f"{place} {_explained(refused.code, refused.text, settings)}")


def lost(place: str, error: OSError | ProtocolError, settings: Settings) -> BackendUnavailable:
    """A connection that broke, or that cannot be trusted any more."""
    if isinstance(error, TimeoutError):
        return BackendUnavailable(f"{place} did not answer within {settings.timeout_s:g} s (timeout)")
    if isinstance(error, ProtocolError):
        return BackendUnavailable(f"{place} does not talk as Redis does: {error}")
    return BackendUnavailable(f"{place}: the connection broke: {_reason(error)}")


def refused_connection(place: str, error: Exception, settings: Settings) -> BackendUnavailable:
    """No connection came about. What redis-py raised hides what it was raised for."""
    for cause in _chain(error):
        text = _connecting(cause, settings)
        if text:
            return BackendUnavailable(f"{place} {text}")
    if isinstance(error, redis.ResponseError | redis.ConnectionError) and str(error):
        text = str(error)
        code = getattr(error, "status_code", None) or text.partition(" ")[0]
        return BackendUnavailable(f"{place} {_explained(code, text, settings)}")
    return BackendUnavailable(f"{place} cannot be used: {type(error).__name__}")


def _connecting(error: BaseException, settings: Settings) -> str:
    if isinstance(error, ssl.SSLCertVerificationError):
        if error.verify_code in _OTHER_NAME:
            return "has a certificate for another name; write the URL with the name in it"
        return f"has a certificate that is not trusted ({error.verify_message}); give ca=FILE with that of its issuer"
    if isinstance(error, ssl.SSLError):
        ended = isinstance(error, ssl.SSLEOFError)  # how a server may refuse who shows it no certificate
        if "certificate required" in str(error) or ended:
            asks = "may ask" if ended else "asks"
            return f"does not accept the connection; it {asks} for a client's certificate: cert=FILE and key=FILE"
        reason = error.reason or error.strerror
        return f"does not agree on TLS ({reason}); a port without TLS needs redis:// or valkey://"
    if isinstance(error, redis.AuthenticationError):
        text = str(error)
        if "without any password" in text:
            return _TEXTS["without any password"]
        return _REFUSALS["NOAUTH" if "required" in text else "WRONGPASS"]
    if isinstance(error, redis.InvalidResponse):
        return "does not talk as Redis does; is the port right?"
    if isinstance(error, redis.BusyLoadingError):
        return _REFUSALS["LOADING"]
    if isinstance(error, redis.ResponseError) and "DB index" in str(error):
        return f"has no database {settings.db}; see its setting databases"
    if isinstance(error, TimeoutError | redis.TimeoutError):
        question = "is it up and reachable?"
        if settings.tls is not None:
            question = "is it up, reachable, and does its port speak TLS? Without TLS write redis:// or valkey://"
        return f"did not answer within {settings.connect_timeout_s:g} s (connect_timeout); {question}"
    if isinstance(error, socket.gaierror):
        return f"cannot be found: there is no host {settings.host!r}"
    if isinstance(error, ConnectionRefusedError):
        return "cannot be reached: nothing listens there; is it up?"
    if isinstance(error, FileNotFoundError):
        return "cannot be reached: there is no such socket; is it up, and with this unixsocket?"
    if isinstance(error, PermissionError):
        return "must not be used by this user; see its setting unixsocketperm"
    closed = "closed by server" in str(error) or isinstance(error, ConnectionResetError | BrokenPipeError)
    if closed and settings.tls is None:
        return "closed the connection; if its port speaks TLS, write rediss:// or valkeys://"
    return "closed the connection" if closed else ""


def _explained(code: str, text: str, settings: Settings) -> str:
    for part, explanation in _TEXTS.items():
        if part in text:
            return explanation
    if code in _REFUSALS:
        return _REFUSALS[code]
    # A server that does not know a command repeats its arguments: of AUTH, those are the secrets.
    text = text.partition(", with args")[0]
    if settings.password:
        text = text.replace(settings.password, "***")
    if code == "NOPERM":
        return f"does not permit that: {text}; see docs/redis.md for the commands that a user needs"
    return f"says {text[:200]!r}"


def _chain(error: BaseException) -> Iterator[BaseException]:
    """The error and what it came from, the innermost first."""
    if cause := error.__cause__ or error.__context__:
        yield from _chain(cause)
    yield error


def _reason(error: OSError) -> str:
    return error.strerror or str(error) or type(error).__name__
