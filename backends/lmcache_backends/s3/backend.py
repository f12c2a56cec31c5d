"""Records as objects. The client is obstore: its calls block and release the GIL, so threads drive it."""

from __future__ import annotations

import ipaddress
import os
import re
import ssl
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, ClassVar, Self, TypeVar
from urllib.parse import urlsplit

import numpy as np
import obstore
from obstore.exceptions import AlreadyExistsError
from obstore.store import S3Store

from lmcache_backends.s3.credentials import from_file
from lmcache_backends.s3.names import folder_of, key_of, name_of
from lmcache_backends.s3.trouble import trouble
from lmcache_sdk.backend import Buffer, Item, Miss, Range, Stat, Url, leading
from lmcache_sdk.calls import Calls
from lmcache_sdk.errors import BackendError, BackendUnavailable, ConfigError

_T = TypeVar("_T")

_AT_ONCE = 1000  # what S3 lists, or deletes, by one request
_PIECE = 4 << 20
_PROBE = "!"  # no key is named so


class S3Backend:
    """A bucket, or the objects below a prefix in one.

    Args:
        bucket: must exist.
        prefix: the folder of all objects, for people.
        endpoint: URL of the server; by default AWS's, of the region.
        region: by default the environment's, or ``us-east-1``.
        virtual_host: the bucket is part of the host's name, not of the path.
        profile: of the file of credentials; see :func:`from_file`.
        authority: PEM certificates to trust besides the system's.
        connections: requests at once, for reading and again for writing.
        timeout_s: of a call, retries included; ``delete`` and ``scan`` have it for each 1000 records.

    Raises:
        ConfigError: an argument is wrong.
        BackendUnavailable: the bucket cannot be read.
    """

    instant: ClassVar[bool] = False
    dated: ClassVar[bool] = True
    pack_bytes: ClassVar[int] = 16 << 20  #: what a tier packs into one record, if nobody says otherwise

    def __init__(
        self,
        bucket: str,
        *,
        prefix: str = "",
        endpoint: str = "",
        region: str = "",
        virtual_host: bool = False,
        profile: str = "",
        authority: bytes = b"",
        connections: int = 16,
        timeout_s: float = 20.0,
    ) -> None:
        self._place = f"s3://{bucket}/{prefix}"
        self._timeout_s = timeout_s
        # One request, retries included, takes half of a call's time at most: a quarter for its last attempt, and an
        # eighth each for what came before and for the pause between.
        self._store = S3Store(
            bucket,
            prefix=prefix or None,
            virtual_hosted_style_request=virtual_host,
            unsigned_payload=True,  # records have checksums of their own
            credential_provider=from_file(profile),
            retry_config={
                "retry_timeout": timedelta(seconds=timeout_s / 8),
                "backoff": {
                    "init_backoff": timedelta(seconds=min(0.1, timeout_s / 40)),
                    "max_backoff": timedelta(seconds=timeout_s / 8),
                    "base": 2,
                },
            },
            client_options={
                "allow_http": endpoint.startswith("http://"),
                "connect_timeout": timedelta(seconds=timeout_s / 8),
                "timeout": timedelta(seconds=timeout_s / 4),
                **({"root_certificate": authority} if authority else {}),
            },
            **({"endpoint": _at_bucket(endpoint, bucket) if virtual_host else endpoint} if endpoint else {}),
            **({"region": region} if region else {}),
        )
        # Apart, so that no read waits behind a long queue of writes.
        self._reading = ThreadPoolExecutor(connections, thread_name_prefix="lmcache-s3-read")
        self._writing = ThreadPoolExecutor(connections, thread_name_prefix="lmcache-s3-write")
        self._calls = Calls(self._place, self._release)
        try:
            self._open()
        except BaseException:
            self._release()
            raise

    @classmethod
    def from_url(cls, url: Url) -> Self:
        """See ``docs/s3.md`` for its parameters."""
        if "@" in url.host:
            raise ConfigError(
                f"{url.shown!r}: credentials are not part of the URL; they come from AWS_ACCESS_KEY_ID and "
                f"AWS_SECRET_ACCESS_KEY, from ?profile=, or from the machine's role"
            )
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,254}", url.host):
            raise ConfigError(
                f"{url.host!r} in {url.shown!r} is no bucket; write s3://BUCKET/PREFIX, and a server as ?endpoint="
            )
        prefix = url.path.strip("/")
        if prefix and {"", ".", ".."}.intersection(prefix.split("/")):
            raise ConfigError(f"a prefix has no part that is empty, '.' or '..', got {prefix!r} in {url.shown!r}")
        endpoint = url.take("endpoint") or os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
        style = url.take("style", "path" if endpoint else "virtual")
        arguments: dict[str, Any] = {
            "prefix": prefix,
            "endpoint": _endpoint(endpoint or ""),
            "region": url.take("region"),
            "virtual_host": style == "virtual",
            "profile": url.take("profile"),
            "authority": _certificates(url.take("ca")),
            "connections": _connections(url.take("connections", "16")),
            "timeout_s": url.take_seconds("timeout", "20s", least=0.01, most=3600),
        }
        url.finish()
        if style not in ("path", "virtual"):
            raise ConfigError(f"style is path or virtual, got {style!r}")
        if style == "virtual" and _is_number(urlsplit(arguments["endpoint"]).hostname or ""):
            raise ConfigError(
                f"style=virtual puts the bucket before the server's name, and {endpoint} has none; use path"
            )
        return cls(url.host, **arguments)

    def get(self, keys: Sequence[str], buffers: Sequence[Buffer]) -> list[int | Miss]:
        with self._calls, self._memory() as memory:
            wanted = [(name_of(key), buffer, memory) for key, buffer in zip(keys, buffers, strict=True)]
            return list(self._each(self._fetch, wanted, self._end()))

    def get_ranges(self, ranges: Sequence[Range]) -> list[int | Miss]:
        with self._calls, self._memory() as memory:
            pieces = [(number, piece) for number, part in enumerate(ranges) for piece in _pieces(part)]
            wanted = [(name_of(piece.key), piece.offset, piece.buffers, memory) for _, piece in pieces]
            answers: list[int | Miss] = [0] * len(ranges)
            for (number, _), length in zip(pieces, self._each(self._fetch_range, wanted, self._end()), strict=True):
                before = answers[number]
                if isinstance(length, Miss) or isinstance(before, Miss):
                    answers[number] = Miss.ABSENT
                else:
                    answers[number] = before + length
            return answers

    def put(self, items: Sequence[Item], *, if_absent: bool = True) -> list[bool]:
        with self._calls:
            end = self._end()
            if len({item.key for item in items}) == len(items):
                return self._put(items, if_absent, end)
            return [self._put([item], if_absent, end)[0] for item in items]

    def contains(self, keys: Sequence[str]) -> list[bool]:
        with self._calls:
            return list(self._each(self._has, [(name_of(key),) for key in keys], self._end()))

    def prefix_len(self, keys: Sequence[str]) -> int:
        with self._calls:
            return leading(self._each(self._has, [(name_of(key),) for key in keys], self._end()))

    def delete(self, keys: Sequence[str]) -> int:
        names = [name_of(key) for key in dict.fromkeys(keys)]
        removed = 0
        with self._calls:
            for at in range(0, len(names), _AT_ONCE):
                end, some = self._end(), names[at : at + _AT_ONCE]
                present = self._each(self._has, [(name,) for name in some], end)
                found = [name for name, here in zip(some, present, strict=True) if here]
                if found:
                    next(self._each(obstore.delete, [(self._store, found)], end))
                removed += len(found)
        return removed

    def scan(self, prefix: str = "") -> Iterator[Stat]:
        with self._calls:
            pages = obstore.list(self._store, folder_of(prefix) or None, chunk_size=_AT_ONCE)
        while True:
            with self._calls:
                page = next(self._each(next, [(pages, None)], self._end()))
            if page is None:
                break
            for item in page:
                key = key_of(item["path"])
                if key is not None and key.startswith(prefix):
                    yield Stat(key, item["size"], item["last_modified"].timestamp())

    def close(self, timeout_s: float) -> None:
        self._calls.close(timeout_s)

    def _release(self) -> None:
        for threads in (self._reading, self._writing):
            threads.shutdown(wait=False, cancel_futures=True)

    def _open(self) -> None:
        """Ask for an object that is not there: the answer tells whether all that is asked later has a chance."""

        def probe() -> str:
            try:
                obstore.get(self._store, _PROBE)
            except FileNotFoundError as error:
                return str(error)
            return "it has everything"

        answer = next(self._each(probe, [()], self._end()))
        if "NoSuchKey" not in answer:
            error = trouble(self._place, FileNotFoundError(answer))
            raise error if "NoSuchBucket" in answer else BackendUnavailable(f"no S3 server, it seems: {error}")

    @contextmanager
    def _memory(self) -> Iterator[Calls]:
        """The door to the caller's buffers: shut when the call ends, whoever is late."""
        door = Calls(f"a call to {self._place}", lambda: None)
        try:
            yield door
        finally:
            door.close(self._timeout_s)  # a copy takes milliseconds

    def _end(self) -> float:
        return time.monotonic() + self._timeout_s

    def _each(self, work: Callable[..., _T], arguments: Iterable[tuple[Any, ...]], end: float) -> Iterator[_T]:
        """What ``work`` answers for each of the arguments, in their order; reading threads do it side by side.

        What is not done at the end is given up. So the work must not touch anything of the caller's but behind
        :meth:`_memory`.
        """
        tasks = deque(self._reading.submit(self._try, work, *each) for each in arguments)
        try:
            while tasks:
                yield tasks.popleft().result(end - time.monotonic())
        except TimeoutError:
            raise BackendUnavailable(f"{self._place}: no answer within {self._timeout_s:g} s") from None
        finally:
            for task in tasks:
                task.cancel()

    def _try(self, work: Callable[..., _T], *arguments: Any) -> _T:
        try:
            return work(*arguments)
        except BackendError:
            raise
        except BaseException as error:  # noqa: BLE001 - the client's PanicException is no Exception; in threads that get no other
            raise trouble(self._place, error) from None  # the client's own text is long

    # In reading threads

    def _fetch(self, name: str, buffer: Buffer, memory: Calls) -> int | Miss:
        try:
            found = obstore.get(self._store, name)
            nbytes = found.meta["size"]
            if nbytes > len(buffer):
                return Miss.TOO_LARGE
            data = memoryview(found.bytes())
        except FileNotFoundError as error:
            return self._absent(error)
        if len(data) != nbytes:
            raise BackendUnavailable(f"{self._place}: {len(data)} of {nbytes} bytes came")
        with memory:
            return _fill([buffer], data)

    def _fetch_range(self, name: str, offset: int, buffers: Sequence[Buffer], memory: Calls) -> int | Miss:
        nbytes = sum(map(len, buffers))
        try:
            if not nbytes:
                obstore.head(self._store, name)
                return 0
            data = memoryview(obstore.get_range(self._store, name, start=offset, length=nbytes))
        except FileNotFoundError as error:
            return self._absent(error)
        except Exception as error:
            if "416 Range Not Satisfiable" in str(error):
                return 0
            raise
        with memory:
            return _fill(buffers, data)

    def _has(self, name: str) -> bool:
        try:
            obstore.head(self._store, name)
        except FileNotFoundError:
            return False
        return True

    def _absent(self, error: FileNotFoundError) -> Miss:
        if "NoSuchBucket" in str(error):
            raise trouble(self._place, error)
        return Miss.ABSENT

    # Writing

    def _put(self, items: Sequence[Item], if_absent: bool, end: float) -> list[bool]:
        """A request takes half of the time at most, so one that began before the middle ends in time. It is waited
        for whatever happens: it reads the caller's memory.
        """
        middle = end - self._timeout_s / 2
        names = [name_of(item.key) for item in items]
        present = [False] * len(items)
        if if_absent:  # asking is cheap, sending is not
            present = list(self._each(self._has, [(name,) for name in names], middle))
        mode = "create" if if_absent else "overwrite"  # or another writer may be faster
        tasks = [
            self._writing.submit(self._try, self._send, name, item.data, mode, middle)
            for name, item, here in zip(names, items, present, strict=True)
            if not here
        ]
        written = iter(self._finish(tasks))
        return [not here and next(written) for here in present]

    def _finish(self, tasks: list[Future[bool]]) -> list[bool]:
        try:
            return [task.result() for task in tasks]
        finally:
            for task in tasks:
                task.cancel()
            wait(tasks)

    def _send(self, name: str, data: memoryview, mode: str, latest: float) -> bool:
        if time.monotonic() > latest:
            raise BackendUnavailable(f"{self._place}: too slow to write all within {self._timeout_s:g} s")
        try:
            obstore.put(self._store, name, data, use_multipart=False, mode=mode)
        except AlreadyExistsError:
            return False
        return True


def _pieces(part: Range) -> Iterator[Range]:
    """To be asked for side by side: one connection is slower than the store behind it."""
    some: list[Buffer] = []
    offset = end = part.offset
    for buffer in part.buffers:
        for start in range(0, len(buffer), _PIECE):
            piece = buffer[start : start + _PIECE]
            if end + len(piece) > offset + _PIECE:
                yield Range(part.key, offset, some)
                offset, some = end, []
            some.append(piece)
            end += len(piece)
    yield Range(part.key, offset, some)


def _fill(buffers: Sequence[Buffer], data: memoryview) -> int:
    at = 0
    for buffer in buffers:
        nbytes = min(len(buffer), len(data) - at)
        if nbytes:  # by numpy, which releases the GIL
            np.copyto(np.frombuffer(buffer, np.uint8, nbytes), np.frombuffer(data, np.uint8, nbytes, at))
        at += nbytes
    return at


def _endpoint(text: str) -> str:
    try:
        split = urlsplit(text)
        good = split.scheme in ("http", "https") and split.hostname and split.port != 0 and not split.query
    except ValueError:  # a port that is none
        good = False
    if text and (not good or "@" in text):
        raise ConfigError(f"an endpoint is like https://s3.example.com:9000, got {text.rpartition('@')[2]!r}")
    return text.rstrip("/")


def _is_number(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _at_bucket(endpoint: str, bucket: str) -> str:
    scheme, _, rest = endpoint.partition("://")
    return f"{scheme}://{bucket}.{rest}"


def _certificates(path: str) -> bytes:
    if not path:
        return b""
    try:
        text = Path(path).read_bytes()
        ssl.create_default_context(cadata=text.decode("ascii"))
    except (ssl.SSLError, ValueError):
        raise ConfigError(f"ca={path} holds no certificates in PEM form") from None
    except OSError as error:
        raise ConfigError(f"cannot read the certificates in ca={path}: {error.strerror}") from error
    return text


def _connections(text: str) -> int:
    if not re.fullmatch(r"[1-9][0-9]{0,3}", text):
        raise ConfigError(f"connections is a whole number from 1 to 9999, got {text!r}")
    return int(text)
