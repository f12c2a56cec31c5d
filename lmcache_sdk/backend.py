"""What a storage backend is: a small, structural, synchronous, batch-first protocol; and how one is found.

A backend stores *records* (opaque bytes) under *keys* (text, at most 400 ASCII characters of ``[A-Za-z0-9._/-]``).
It never sees a tensor. Threads, deadlines, retries, breakers, checksums and codecs are the store's: a backend may
block, and may be called from several threads at once. Writing one: ``docs/writing-a-backend.md``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from enum import Enum
from importlib.metadata import EntryPoint, entry_points
from typing import ClassVar, NamedTuple, Protocol, Self, runtime_checkable
from urllib.parse import parse_qsl, unquote, urlsplit

from lmcache_sdk.config import hide_secrets, parse_seconds
from lmcache_sdk.errors import ConfigError

ENTRY_POINTS = "lmcache_sdk.backends"
KEY_LIMIT = 400

_HOST = re.compile(r"[\w.-]+|[0-9a-f.:]+(%[\w.-]+)?")

Buffer = memoryview  # writable, contiguous, of unsigned bytes


class Miss(Enum):
    """Why :meth:`Backend.get` gave no bytes. Never an exception."""

    ABSENT = "absent"
    TOO_LARGE = "too_large"  # the record does not fit the given buffer
    UNREADABLE = "unreadable"  # it is there, and this reader has not the key to it

    def __repr__(self) -> str:
        return f"Miss.{self.name}"


class Item(NamedTuple):
    """One record to be written. ``data`` must not change until the call returns; it is not kept after."""

    key: str
    data: memoryview


@runtime_checkable
class Backend(Protocol):
    """Where records rest.

    Every implementation MUST:
      * make a record visible all at once: a reader sees the whole of it or nothing;
      * return for ``get`` the very bytes last put under that key, or a :class:`Miss`;
      * never modify a buffer beyond the record's length, nor after the call has returned (what a miss leaves in it is
        of no interest);
      * leave nothing behind for a key that was deleted, or whose ``put`` failed.
    Every call raises :class:`~lmcache_sdk.errors.BackendError` (Unavailable, Full) when the backend is in trouble.

    Attributes:
        instant: ``contains`` and ``prefix_len`` take microseconds and never wait for a network or a disk that is not
            local, so that a lookup may ask in line.
    """

    instant: ClassVar[bool] = False

    @classmethod
    def from_url(cls, url: Url) -> Self:
        """Open what the URL names. Raises ConfigError (bad parameter), or a BackendError (cannot be opened)."""
        ...

    def get(self, keys: Sequence[str], buffers: Sequence[Buffer]) -> list[int | Miss]:
        """Read ``keys[i]`` into the front of ``buffers[i]``; the answer is the length, or why there is none."""
        ...

    def put(self, items: Sequence[Item], *, if_absent: bool = True) -> list[bool]:
        """Write records; False where one was there already and ``if_absent`` kept it. Stops at the first error."""
        ...

    def contains(self, keys: Sequence[str]) -> list[bool]: ...

    def prefix_len(self, keys: Sequence[str]) -> int:
        """How many of the leading keys are present. What is here asks for one after the other."""
        return leading(self.contains([key])[0] for key in keys)

    def delete(self, keys: Sequence[str]) -> int:
        """Remove records; the answer is how many were there. An absent key is no error."""
        ...

    def close(self, timeout_s: float) -> None:
        """Flush and release. Idempotent; every later call raises BackendUnavailable."""
        ...


class Stat(NamedTuple):
    """A record at rest. ``nbytes`` is the record's length; ``modified`` is when it was written, in seconds since the
    epoch, 0 where that is not known.
    """

    key: str
    nbytes: int
    modified: float = 0.0


@runtime_checkable
class Scan(Protocol):
    """Can list its keys. One that also knows when each was written says so by a class attribute ``dated = True``, and
    may then be kept to a size and an age by whoever uses it.
    """

    def scan(self, prefix: str = "") -> Iterator[Stat]:
        """All records whose key starts with ``prefix``, in any order; what changes meanwhile may be missed."""
        ...


@runtime_checkable
class Touch(Protocol):
    """Evicts by use, and can be told of a use that it does not see."""

    def touch(self, keys: Sequence[str]) -> None:
        """Count these as just used, the last one last. Absent keys are no error."""
        ...


class Range(NamedTuple):
    """Bytes of one record: those from ``offset`` on, as many as fit the buffers, one behind the other."""

    key: str
    offset: int
    buffers: Sequence[Buffer]


@runtime_checkable
class RangeGet(Protocol):
    """Can read a part of a record, so that several chunks may rest in one."""

    def get_ranges(self, ranges: Sequence[Range]) -> list[int | Miss]:
        """Fill the buffers of each range in their order; the answer is the sum of what was read, less than they hold
        where the record ends earlier.
        """
        ...


@runtime_checkable
class RegisterMemory(Protocol):
    """Reads into and writes from memory that it was shown before (RDMA, or what works like it)."""

    def register_memory(self, segment: memoryview) -> None:
        """Called for each segment of the pool, before buffers in it are used. Raises BackendError."""
        ...

    def unregister_memory(self, segment: memoryview) -> None:
        """The memory is about to go."""
        ...


class UsageReport(NamedTuple):
    """``capacity_bytes`` is 0 where there is no bound; ``used_bytes`` is what counts against it."""

    records: int
    used_bytes: int
    capacity_bytes: int
    evictions: int


@runtime_checkable
class Usage(Protocol):
    """Can tell how full it is."""

    def usage(self) -> UsageReport: ...


class Url:
    """A parsed backend URL: ``scheme://user:password@host:port/path?key=value``. Parameters are taken once each; what
    is left is an error.

    Attributes:
        shown: the URL as messages and logs may show it, without a password and without the value of a parameter whose
            name says that it is a secret.
        host: what stands between ``//`` and the path, as it is.
        hostname, port, username, password: its parts; None where they are not given.

    Raises:
        ConfigError: it is no URL or has no scheme, a port that is none, or a fragment, or a parameter appears twice.
    """

    def __init__(self, text: str) -> None:
        self.text = text
        self.shown = hide_secrets(text)
        try:
            split = urlsplit(text)
        except ValueError:  # whose text may have a password in it
            raise ConfigError(
                f"{self.shown!r} is not a URL: its host has a bracket or a character that none has"
            ) from None
        if not split.scheme or "://" not in text:
            raise ConfigError(f"{self.shown!r} is not a URL; expected something like lmdb:///var/lib/kv?size=50GiB")
        if split.fragment:
            raise ConfigError(f"{self.shown!r}: what stands behind # are options of a tier, which are not taken here")
        self.scheme = split.scheme
        self.host = unquote(split.netloc)
        self.path = unquote(split.path)
        self.hostname = split.hostname
        self.username = unquote(split.username) if split.username is not None else None
        self.password = unquote(split.password) if split.password is not None else None
        try:
            self.port = split.port
        except ValueError:
            raise ConfigError(
                f"{self.shown!r} has a port that is no number from 0 to 65535; in a password, # ? and / are written "
                f"%23, %3F and %2F"
            ) from None
        pairs = parse_qsl(split.query, keep_blank_values=True)
        self._parameters = dict(pairs)
        if len(self._parameters) != len(pairs):
            raise ConfigError(f"{self.shown!r} names a parameter twice")
        if empty := next((name for name, value in pairs if not value), ""):
            raise ConfigError(f"parameter {empty!r} of {self.shown!r} has no value; leave it out, or give it one")
        self._known: list[str] = []

    def server(self, port: int) -> tuple[str, int]:
        """Host and port of the one server that it names; ``port`` is the default. Raises ConfigError: it names none, or
        what cannot be one.
        """
        host = self.hostname or ""
        if not host:
            raise ConfigError(f"{self.shown!r} names no host; write it like {self.scheme}://cache.example:{port}/")
        try:
            host.encode("idna")  # the length of its parts
            odd = not _HOST.fullmatch(host)
        except UnicodeError:
            odd = True
        if odd:
            raise ConfigError(f"{host!r} in {self.shown!r} is neither the name nor the address of one host")
        if self.port == 0:
            raise ConfigError(f"port 0 in {self.shown!r} is none to connect to; leave it out for {port}")
        return host, self.port or port

    def take(self, name: str, default: str = "") -> str:
        """The value of a parameter, which is thereby known."""
        self._known.append(name)
        return self._parameters.pop(name, default)

    def take_seconds(self, name: str, default: str, *, least: float = 0.0, most: float = 1e9) -> float:
        """The value of a parameter that is a duration, like ``30s``. Raises ConfigError: none, or out of bounds."""
        text = self.take(name, default)
        try:
            seconds = parse_seconds(text)
        except ConfigError as error:
            raise ConfigError(f"{name}={text!r}: {error}") from None
        if not least <= seconds <= most:
            raise ConfigError(f"{name} must be from {least:g}s to {most:g}s, got {text!r}")
        return seconds

    def finish(self) -> None:
        """Raise ConfigError if a parameter was not taken: a misspelt one must not be ignored."""
        if self._parameters:
            known = f"known are: {', '.join(self._known)}" if self._known else "it has none"
            raise ConfigError(f"unknown parameter {next(iter(self._parameters))!r} for {self.scheme}://; {known}")


def schemes() -> list[str]:
    """The URL schemes that installed packages announce."""
    return sorted({point.name for point in entry_points(group=ENTRY_POINTS)})


def open_backend(url: str) -> Backend:
    """Open the backend that a URL names, found by its scheme among the installed entry points.

    Raises:
        ConfigError: unknown scheme or bad parameter; the message names it and what there is.
        BackendError: the place cannot be opened.
    """
    parsed = Url(url)
    # What comes with this package is not replaced by installing another: ours sort first.
    found = sorted(
        entry_points(group=ENTRY_POINTS, name=parsed.scheme),
        key=lambda point: not point.value.startswith("lmcache_backends."),
    )
    if not found:
        raise ConfigError(
            f"unknown scheme {parsed.scheme!r} in {parsed.shown!r}; installed are: {', '.join(schemes())}; "
            "an engine's cache may also be a daemon, unix:///path/of/socket"
        )
    backend_class: type[Backend] = load_backend(found[0])
    return backend_class.from_url(parsed)


def load_backend(point: EntryPoint) -> type[Backend]:
    """The class that an entry point names. Raises ConfigError, with the fix, where it does not load."""
    try:
        backend_class: type[Backend] = point.load()
    except (ImportError, AttributeError) as error:
        missing = (error.name or "").partition(".")[0] if isinstance(error, ModuleNotFoundError) else ""
        if missing and (install := install_command(point)):
            raise ConfigError(f"{point.name}:// needs the package {missing!r}: {install}") from error
        package = point.dist.name if point.dist else point.value
        raise ConfigError(
            f"the backend for {point.name}://, of the package {package}, does not load: {error}; "
            f"install what it needs, or remove it"
        ) from error
    return backend_class


def install_command(point: EntryPoint) -> str:
    """The command that installs what an entry point needs besides its distribution; empty where it names no extra."""
    if not point.extras or not point.dist:
        return ""
    return f"pip install '{point.dist.name}[{','.join(point.extras)}]'"


def leading(present: Iterable[bool]) -> int:
    """How many leading values are true: ``prefix_len`` from ``contains``."""
    count = 0
    for here in present:
        if not here:
            break
        count += 1
    return count
