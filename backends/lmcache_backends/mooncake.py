"""``mooncake://``: records in the memory of the nodes of a Mooncake store. See ``docs/mooncake.md``."""

from __future__ import annotations

import importlib
import importlib.util
import mmap
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar, NamedTuple, Self

import numpy as np

from lmcache_sdk.backend import Buffer, Item, Miss, Url, leading
from lmcache_sdk.calls import Calls
from lmcache_sdk.config import format_size, parse_size
from lmcache_sdk.errors import BackendError, BackendFull, BackendUnavailable, ConfigError
from lmcache_sdk.observe.logs import logger

if importlib.util.find_spec("mooncake") is None:  # only looked for: it takes system libraries to load it
    raise ModuleNotFoundError("No module named 'mooncake'", name="mooncake")

log = logger("mooncake")

DEFAULT_PORT = 50051
DEFAULT_STAGING = "64MiB"
DEFAULT_TIMEOUT = "5s"
_CONNECT_S = 2.0

# The store keeps no record of length 0: this stands for one.
EMPTY = b"lmcache-sdk: a record of length 0"

_RAISE = "raise staging=, or have the memory registered"

_NO_ROOM = -200
_TOO_SMALL = -600
_UNFINISHED = -703  # somebody writes it, or has given up: nobody can read it
_NOT_FOUND = -704
_NO_REPLY = (-900, -901)
# Evicted meanwhile, not yet or no longer readable, or on a node that is gone.
_MISSES = (-702, _UNFINISHED, _NOT_FOUND, -707, -800)


class Settings(NamedTuple):
    """How to take part in a store.

    Attributes:
        metadata: where clients find each other: ``P2PHANDSHAKE`` (they ask each other), or a metadata server's URL.
        protocol: ``tcp`` or ``rdma``.
        devices: RDMA devices, separated by commas; empty = all that there are.
        hostname: where other nodes reach this one; empty = the address from which this one reaches the master.
        segment: memory that this process gives to the store, in bytes; 0 = none.
        staging: memory through which buffers go that were not registered, in bytes; no such record may be larger.
        timeout_s: for the master to answer, and for a transfer to make progress.
    """

    metadata: str = "P2PHANDSHAKE"
    protocol: str = "tcp"
    devices: str = ""
    hostname: str = ""
    segment: int = 0
    staging: int = parse_size(DEFAULT_STAGING)
    timeout_s: float = 5.0


class MooncakeBackend:
    """A client of a Mooncake store.

    A call that gets no answer blocks for the timeout of each step that it takes, and at most about 5 s to find that
    there is no connection; when it returns, no transfer into or out of its buffers is under way (seen with TCP).

    Args:
        host, port: of the master.

    Raises:
        ConfigError: the client does not load.
        BackendUnavailable: the master cannot be reached, or does not take this client.
    """

    instant: ClassVar[bool] = False

    def __init__(self, host: str, port: int, settings: Settings) -> None:
        self._master = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        self._address = host, port
        self._writing = threading.Lock()  # of puts of one key by this process, one is the first
        self._registered: list[tuple[int, int]] = []  # first address, and that behind the last
        self._client = self._connect(settings)
        self._leaving = threading.Thread(target=self._leave, name="lmcache-mooncake-close", daemon=True)
        self._calls = Calls(f"mooncake://{self._master}", self._release)
        self._staging = _Staging(settings.staging)
        self.register_memory(self._staging.memory)

    @classmethod
    def from_url(cls, url: Url) -> Self:
        """``mooncake://master:50051/[?segment=4GiB&protocol=rdma&…]``. Raises as the class does."""
        settings = Settings(
            metadata=url.take("metadata", "P2PHANDSHAKE"),
            protocol=url.take("protocol", "tcp"),
            devices=url.take("devices"),
            hostname=url.take("hostname"),
            segment=parse_size(text) if (text := url.take("segment", "0")) != "0" else 0,
            staging=parse_size(url.take("staging", DEFAULT_STAGING)),
            timeout_s=url.take_seconds("timeout", DEFAULT_TIMEOUT, least=0.01, most=3600),
        )
        url.finish()
        host, port = url.server(DEFAULT_PORT)
        if url.path not in ("", "/") or url.username is not None:
            raise ConfigError(
                f"{url.shown!r} must name the master and nothing else, like mooncake://host:{DEFAULT_PORT}/"
            )
        if settings.protocol not in ("tcp", "rdma"):
            raise ConfigError(f"protocol={settings.protocol!r} is neither tcp nor rdma")
        return cls(host, port, settings)

    def _connect(self, settings: Settings) -> Any:
        """Join the store. The client's own ``setup`` would go on trying, with the interpreter stopped: look first."""
        module = _client_module()
        try:
            with socket.create_connection(self._address, _CONNECT_S) as connection:
                here: str = connection.getsockname()[0]
        except OSError as error:
            raise BackendUnavailable(
                f"there is no Mooncake master at {self._master} ({error.strerror or error}); "
                f"start mooncake_master there, or correct the URL"
            ) from error
        # The client takes these from the environment only, when it is set up.
        os.environ["MC_RPC_TIMEOUT_MS"] = str(max(1, int(settings.timeout_s * 1000)))
        os.environ["MC_TCP_PROGRESS_TIMEOUT_SEC"] = str(max(1, round(settings.timeout_s)))
        os.environ.setdefault("MC_STORE_CLIENT_SETUP_RETRIES", "3")
        os.environ.setdefault("MC_LOG_LEVEL", "ERROR")
        client = module.MooncakeDistributedStore()
        code = client.setup(
            settings.hostname or here, settings.metadata, settings.segment, 0, settings.protocol, settings.devices,
            self._master,
        )  # fmt: skip
        if code:
            raise BackendUnavailable(
                f"the Mooncake master at {self._master} did not take this client (code {code}); its log says more"
            )
        return client

    # Memory

    def register_memory(self, segment: memoryview) -> None:
        start = _address(segment)
        with self._calls:
            if code := self._client.register_buffer(start, len(segment)):
                raise BackendUnavailable(
                    f"Mooncake cannot use {format_size(len(segment))} of memory (code {code}): it is in use already, "
                    f"or over what this user may lock (ulimit -l)"
                )
            self._registered = [*self._registered, (start, start + len(segment))]

    def unregister_memory(self, segment: memoryview) -> None:
        start = _address(segment)
        with self._calls:  # the client crashes where it has been closed
            self._registered = [known for known in self._registered if known[0] != start]
            self._client.unregister_buffer(start)

    def _is_registered(self, buffer: memoryview) -> bool:
        start = _address(buffer)
        return any(first <= start and start + len(buffer) <= end for first, end in self._registered)

    # Reading

    def get(self, keys: Sequence[str], buffers: Sequence[Buffer]) -> list[int | Miss]:
        with self._calls:
            answers: dict[int, int | Miss] = {}
            staged: list[int] = []
            direct: list[int] = []
            for index, buffer in enumerate(buffers):
                (direct if len(buffer) >= len(EMPTY) and self._is_registered(buffer) else staged).append(index)
            if direct:
                targets = [buffers[index] for index in direct]
                fronts = [bytes(target[: len(EMPTY)]) for target in targets]
                found = self._read([keys[index] for index in direct], targets)
                for index, target, front, answer in zip(direct, targets, fronts, found, strict=True):
                    if answer == len(EMPTY) and target[: len(EMPTY)] == EMPTY:
                        target[: len(EMPTY)], answer = front, 0
                    answers[index] = answer
            # EMPTY fits every place; a record may be far smaller than its buffer.
            room = len(self._staging.memory)
            for batch in self._staging.batches(staged, [min(max(len(buffers[i]), len(EMPTY)), room) for i in staged]):
                found = self._read([keys[index] for index, _ in batch], [place for _, place in batch])
                for (index, place), answer in zip(batch, found, strict=True):
                    if answer is Miss.TOO_LARGE and len(place) < len(buffers[index]):
                        raise BackendFull(f"a record does not fit the staging memory of {format_size(room)}; {_RAISE}")
                    answers[index] = _taken(place, answer, buffers[index])
            return [answers[index] for index in range(len(keys))]

    def _read(self, keys: list[str], targets: list[memoryview]) -> list[int | Miss]:
        codes = self._client.batch_get_into(keys, [_address(target) for target in targets], [len(t) for t in targets])
        return [code if code >= 0 else self._miss(code) for code in codes]

    def _miss(self, code: int) -> Miss:
        if code == _TOO_SMALL:
            return Miss.TOO_LARGE
        if code in _MISSES:
            return Miss.ABSENT
        raise self._trouble(code)

    def contains(self, keys: Sequence[str]) -> list[bool]:
        with self._calls:
            return self._present(keys)

    def prefix_len(self, keys: Sequence[str]) -> int:
        with self._calls:
            return leading(self._present(keys))

    def _present(self, keys: Sequence[str]) -> list[bool]:
        if not keys:
            return []
        codes = self._client.batch_is_exist(list(keys))
        self._check(codes)
        return [code == 1 for code in codes]

    # Writing

    def put(self, items: Sequence[Item], *, if_absent: bool = True) -> list[bool]:
        with self._calls, self._writing:
            if not if_absent:
                for run in _without_repetition(items):
                    self._write(run, self._client.batch_upsert_from)
                return [True] * len(items)
            # The store itself keeps what is there, but does not say so.
            seen = {item.key for item, here in zip(items, self._present([i.key for i in items]), strict=True) if here}
            fresh: list[bool] = []
            for item in items:
                fresh.append(item.key not in seen)
                seen.add(item.key)
            self._write([item for item, new in zip(items, fresh, strict=True) if new], self._client.batch_put_from)
            return fresh

    def _write(self, items: Sequence[Item], send: Callable[[list[str], list[int], list[int]], list[int]]) -> None:
        direct: list[Item] = []
        staged: list[Item] = []
        for key, data in items:
            if data == EMPTY:
                raise BackendUnavailable(
                    "these bytes stand for a record of length 0, they cannot be stored in Mooncake"
                )
            item = Item(key, data if len(data) else memoryview(EMPTY))
            (direct if self._is_registered(item.data) else staged).append(item)
        if direct:
            self._check(send([k for k, _ in direct], [_address(d) for _, d in direct], [len(d) for _, d in direct]))
        for batch in self._staging.batches(staged, [len(item.data) for item in staged]):
            for item, place in batch:
                _copy(place, item.data)
            self._check(send([i.key for i, _ in batch], [_address(p) for _, p in batch], [len(p) for _, p in batch]))

    def delete(self, keys: Sequence[str]) -> int:
        """Also what somebody is reading: a lease would keep it. The checksum of what they read tells them."""
        with self._calls:
            codes = self._client.batch_remove(list(keys), True) if keys else []
            self._check([code for code in codes if code not in (_NOT_FOUND, _UNFINISHED)])
            return sum(code == 0 for code in codes)

    # Trouble, closing

    def _check(self, codes: Sequence[int]) -> None:
        for code in codes:
            if code < 0:
                raise self._trouble(code)

    def _trouble(self, code: int) -> BackendError:
        if code == _NO_ROOM:
            return BackendFull(
                f"the Mooncake store of {self._master} has no room: its nodes give too little memory (segment=), "
                f"or all of it is in use"
            )
        if code in _NO_REPLY:
            return BackendUnavailable(f"the Mooncake master at {self._master} does not answer (code {code})")
        return BackendUnavailable(f"the Mooncake store of {self._master} failed (code {code})")

    def close(self, timeout_s: float) -> None:
        """Leave the store, and take the segment out of it: what it holds is gone."""
        deadline = time.monotonic() + timeout_s
        if not self._calls.close(timeout_s):
            log.warning("mooncake://%s is in use still, it closes when its last call returns", self._master)
        if self._leaving.is_alive():
            self._leaving.join(max(0.0, deadline - time.monotonic()))

    def _release(self) -> None:
        self._leaving.start()

    def _leave(self) -> None:
        """The client stops the interpreter while it closes: for a second, or 20 where no master answers it."""
        try:
            socket.create_connection(self._address, _CONNECT_S).close()
            answers = self._client.is_exist("k") >= 0
        except OSError:
            answers = False
        if answers:
            self._client.close()
        else:
            _left.append(self._client)


_left: list[Any] = []  # clients without a master: the process takes them with it


class _Staging:
    """Registered memory for what lies elsewhere."""

    def __init__(self, nbytes: int) -> None:
        self.memory = memoryview(mmap.mmap(-1, nbytes))
        self._lock = threading.Lock()

    def batches(self, things: Sequence[Any], sizes: Sequence[int]) -> Iterator[list[tuple[Any, memoryview]]]:
        """Each thing with a place of its size, as many at once as there is room for. The room is the caller's until it
        asks for the next batch.
        """
        if things:
            with self._lock:
                whole = self.memory
                batch: list[tuple[Any, memoryview]] = []
                at = 0
                for thing, nbytes in zip(things, sizes, strict=True):
                    if nbytes > len(whole):
                        raise BackendFull(
                            f"a record of {format_size(nbytes)} does not fit the staging memory of "
                            f"{format_size(len(whole))}; {_RAISE}"
                        )
                    if at + nbytes > len(whole):
                        yield batch
                        batch, at = [], 0
                    batch.append((thing, whole[at : at + nbytes]))
                    at += -(-nbytes // 64) * 64
                yield batch


def _taken(place: memoryview, answer: int | Miss, buffer: memoryview) -> int | Miss:
    """Copy what was read to where it belongs."""
    if isinstance(answer, Miss):
        return answer
    if answer == len(EMPTY) and place[:answer] == EMPTY:
        return 0
    if answer > len(buffer):
        return Miss.TOO_LARGE
    _copy(buffer[:answer], place[:answer])
    return answer


def _copy(target: memoryview, source: memoryview) -> None:
    if len(source):
        np.copyto(np.frombuffer(target, np.uint8), np.frombuffer(source, np.uint8))  # without the interpreter's lock


def _address(buffer: memoryview) -> int:
    return np.frombuffer(buffer, np.uint8).ctypes.data if len(buffer) else 0


def _without_repetition(items: Sequence[Item]) -> Iterator[list[Item]]:
    """Cut where a key comes again: within a call, nothing says which of the two would be the last."""
    run: dict[str, Item] = {}
    for item in items:
        if item.key in run:
            yield list(run.values())
            run = {}
        run[item.key] = item
    yield list(run.values())


def _client_module() -> Any:
    """The client, which is not loaded unless it is used."""
    try:
        return importlib.import_module("mooncake.store")
    except ImportError as error:
        raise ConfigError(
            f"the Mooncake client does not load: {error}; it needs system libraries, on Debian and Ubuntu: "
            f"apt-get install libibverbs1 librdmacm1 libnuma1 libcurl4"
        ) from error
