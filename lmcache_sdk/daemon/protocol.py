"""What a client and the daemon say to each other. Specified in ``docs/daemon-protocol.md``.

A frame is a length (uint32, little-endian) and that many bytes of msgpack: one message, a map whose ``op`` names its
type. A client sends one request at a time on a connection and gets one reply. No pickle: a message is data, and what
can be said of it by its numbers alone (a part, a time, a length) is checked while it is decoded.
"""

from __future__ import annotations

import array
import socket
import struct
from typing import Annotated, NoReturn, Union

import msgspec
import numpy as np

from lmcache_sdk.api import LookupState, Reservation, Stats, Ticket
from lmcache_sdk.errors import BackendFormatError, BackendUnavailable, ConfigError, LMCacheSDKError
from lmcache_sdk.keys import DIGEST_BYTES
from lmcache_sdk.observe.events import Event
from lmcache_sdk.spec import Namespace, Producer, Share

PROTOCOL_VERSION = 2
FRAME_LIMIT = 8 << 20  # of a reply: the places of 840,000 tokens in chunks of 64 and 40 cells
REQUEST_LIMIT = 1 << 20
MOST_DIGESTS = (REQUEST_LIMIT - 4096) // DIGEST_BYTES  # in one request: 2 million tokens in chunks of 64
LENGTH = struct.Struct("<I")
LONGEST_WAIT_S = 600.0
LONGEST_PIN_S = 86_400.0
RID_LIMIT = 256  # characters
MOST_PARTS = 1024
MOST_SEGMENTS = 64  # descriptors in one message: 4 TiB of pool
PLACE_BYTES = 16  # of one cell of one chunk, in a ticket or reservation
_NUMBER_BYTES = 9  # at most, of an integer in a message
_SO_PEERGROUPS = 59

Rid = Annotated[str, msgspec.Meta(max_length=RID_LIMIT)]
Tenant = Annotated[str, msgspec.Meta(max_length=256)]
Chunks = Annotated[int, msgspec.Meta(ge=0, lt=1 << 32)]
Lease = Annotated[int, msgspec.Meta(ge=0, le=(1 << 63) - 1)]
PartNumber = Annotated[int, msgspec.Meta(ge=0, lt=MOST_PARTS)]
Seconds = Annotated[float, msgspec.Meta(ge=0, le=LONGEST_WAIT_S)]  # also refuses what is no number
Digest = Annotated[bytes, msgspec.Meta(max_length=DIGEST_BYTES)]
Boot = Annotated[str, msgspec.Meta(max_length=32)]


class Message(msgspec.Struct, frozen=True, tag_field="op", tag=lambda name: name.lower(), forbid_unknown_fields=True):
    """Base of all messages."""


# Requests


class Hello(Message, frozen=True):
    """First on every connection.

    Attributes:
        version: of the protocol; another one is refused.
        client: empty on a client's first connection; then the id that :class:`Welcome` gave. Without a namespace: one
            more connection of that client. With it: the client comes back after it had given the daemon up; it is
            known again if this is still the same life, else it is a new one.
        namespace, producer: whose chunks this client reads and writes; None for a tool that only looks.
        turn: of those that come back: how many times this client has tried to. The highest counts; one that was sent
            earlier and is read later does not.
        held: of those that come back: (lease, part) whose copies have not ended; all else is given back.
        share: whose chunks it is given beside its own producer's.
    """

    version: int
    client: Annotated[bytes, msgspec.Meta(max_length=16)] = b""
    namespace: Namespace | None = None
    producer: Producer | None = None
    turn: Chunks = 0
    held: tuple[tuple[Lease, PartNumber], ...] = ()
    share: Share = Share.VERIFIED


class Lookup(Message, frozen=True):
    """Find the longest prefix. ``digests`` are those from chunk ``start`` on; earlier ones were sent before.

    Attributes:
        total: chunks of the whole prompt, for the metrics; the rest of its digests follows if these are found.
        salted: a cache salt is in the seed.
    """

    rid: Rid
    start: Chunks
    digests: bytes
    total: Chunks = 0
    tenant: Tenant = ""
    salted: bool = False
    positions_known: bool = True
    prefetch: bool = True


class Wait(Message, frozen=True):
    """Answer when the lookup is no longer pending, at the latest after ``timeout_s``; ``settle``: then with the part
    that is there.
    """

    rid: Rid
    timeout_s: Seconds
    settle: bool = True


class Claim(Message, frozen=True):
    """Lease chunks of a READY lookup."""

    rid: Rid
    boundary: Chunks
    first: Chunks = 0
    parts: Annotated[int, msgspec.Meta(ge=1, le=MOST_PARTS)] = 1


class Take(Message, frozen=True):
    """Another process than the one that claimed a lease copies this part of it: it is this client's from now on."""

    lease: Lease
    part: PartNumber


class Release(Message, frozen=True):
    """Give one part of a lease back. Only who has it can."""

    lease: Lease
    part: PartNumber = 0


class Forget(Message, frozen=True):
    """The request has ended."""

    rid: Rid


class Reserve(Message, frozen=True):
    """Room for chunks ``first …`` with these digests; ``parent`` is the digest before, empty if there is none.

    Attributes:
        inexact: the number of the first chunk that is not exact, or was computed behind one that is not.
    """

    digests: bytes
    first: Chunks
    cells: tuple[Chunks, ...]
    parent: Digest = b""
    tenant: Tenant = ""
    salted: bool = False
    positions_known: bool = True
    inexact: Chunks | None = None


class Publish(Message, frozen=True):
    """Chunks of a reservation have been written; None = all, empty = none."""

    lease: Lease
    chunks: tuple[Chunks, ...] | None = None


class Pin(Message, frozen=True):
    """Keep chunks from eviction for a while."""

    digests: bytes
    ttl_s: Annotated[float, msgspec.Meta(ge=0, le=LONGEST_PIN_S)]


class Delete(Message, frozen=True):
    """Remove chunks from pool and tiers."""

    digests: bytes


class Clear(Message, frozen=True):
    """Remove chunks of this client's namespace and producer; to be repeated until there were none."""


class Ask(Message, frozen=True):
    """The daemon's figures."""


class Reopen(Message, frozen=True):
    """Compare two producers anew, by their names, that disagreed. Count: 1, or 0 if they are not closed."""

    namespace: str
    producers: tuple[str, str]


class Drain(Message, frozen=True):
    """Answer when all that was published has reached the tiers, at the latest after ``timeout_s``."""

    timeout_s: Seconds


class Drained(Message, frozen=True):
    """No copy of an earlier life of the daemon is under way any more in this process, which was ``client`` then."""

    client: Annotated[bytes, msgspec.Meta(max_length=16)]


class Bye(Message, frozen=True):
    """This client ends: no copy of its is under way. All of its connections are closed."""


class Subscribe(Message, frozen=True):
    """KV events after ``sequence`` of life ``boot``; at most ``limit``, waiting up to ``timeout_s`` for the first."""

    boot: Boot = ""
    sequence: Annotated[int, msgspec.Meta(ge=0)] = 0
    limit: Annotated[int, msgspec.Meta(ge=1, le=10_000)] = 1000
    timeout_s: Seconds = 0.0


# Replies


class Welcome(Message, frozen=True):
    """The answer to Hello. To one that names a namespace and makes a new client, the segments' descriptors come too.

    Attributes:
        boot: this life of the daemon.
        client: this client's id; a secret, since it gives access to what the client holds. Another one than was
            offered: the daemon does not know that client (any more).
        segments: sizes in bytes.
    """

    version: int
    boot: str
    client: bytes
    segments: tuple[int, ...]


AGAIN = -1


class Found(Message, frozen=True):
    """The answer to Lookup and Wait.

    Attributes:
        walked: chunks from the front that were found, loaded or not; all that were sent if a tier is still asked.
            ``AGAIN``: the daemon does not have the digests before ``start`` (any more), send all again.
        found, missing, eta_s: while it is pending, see :class:`lmcache_sdk.api.Lookup`.
    """

    state: LookupState
    chunks: int
    walked: int
    why: str
    sources: dict[str, int]
    found: int = 0
    missing: int = 0
    eta_s: float | None = None


class Claimed(Message, frozen=True):
    """The answer to Claim."""

    ticket: Ticket | None


class Reserved(Message, frozen=True):
    """The answer to Reserve."""

    reservation: Reservation | None


class Count(Message, frozen=True):
    """The answer to what only counts or confirms."""

    count: int = 0


class Figures(Message, frozen=True):
    """The answer to Ask.

    Attributes:
        stats: what every cache tells.
        details: what only a daemon has: clients, tenants, namespaces, settings.
    """

    boot: str
    stats: Stats
    details: dict[str, msgspec.Raw]


class Events(Message, frozen=True):
    """The answer to Subscribe.

    Attributes:
        lost: events between the asked sequence and the first of these are gone: start from a fresh view.
    """

    boot: str
    events: tuple[Event, ...]
    lost: bool


class Refused(Message, frozen=True):
    """The request was not carried out. ``kind``: version, client, settings, limit; message, internal: and the
    connection is closed.
    """

    kind: str
    message: str


Request = Union[  # noqa: UP007 - msgspec reads the union at run time
    Hello,
    Lookup,
    Wait,
    Claim,
    Take,
    Release,
    Forget,
    Reserve,
    Publish,
    Pin,
    Delete,
    Clear,
    Ask,
    Reopen,
    Drain,
    Drained,
    Bye,
    Subscribe,
]
Reply = Union[Welcome, Found, Claimed, Reserved, Count, Figures, Events, Refused]  # noqa: UP007

_encoder = msgspec.msgpack.Encoder()
_request_decoder = msgspec.msgpack.Decoder(Request)
_reply_decoder = msgspec.msgpack.Decoder(Reply)


class _Versioned(msgspec.Struct):
    """What the first message of either side has in every version of the protocol."""

    op: str
    version: int


_version_decoder = msgspec.msgpack.Decoder(_Versioned)


class ProtocolError(LMCacheSDKError):
    """Bytes that are no frame, or a frame that is no message."""


def most_chunks(cells: int) -> int:
    """Chunks of so many cells whose places fit in one reply."""
    return max(0, FRAME_LIMIT - 4096 - _NUMBER_BYTES * cells) // (PLACE_BYTES * cells + _NUMBER_BYTES)


def encode(message: Message) -> bytes:
    """One frame. Raises ProtocolError for a message over the limit, or with something in it that cannot be sent."""
    try:
        body = _encoder.encode(message)
    except (TypeError, ValueError, OverflowError) as error:
        raise ProtocolError(f"cannot be sent: {error}") from error
    limit = FRAME_LIMIT
    if len(body) > REQUEST_LIMIT and isinstance(message, Request):  # type: ignore[arg-type]  # a union of classes
        limit = REQUEST_LIMIT
    if len(body) > limit:
        raise ProtocolError(f"a message of {len(body)} bytes is over the limit of {limit}")
    return LENGTH.pack(len(body)) + body


def decode_request(body: bytes | bytearray | memoryview) -> Request:
    """Raises ProtocolError."""
    try:
        return _request_decoder.decode(body)  # type: ignore[no-any-return]
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise ProtocolError(f"not a request: {error}") from error


def decode_reply(body: bytes | bytearray | memoryview) -> Reply:
    """Raises ProtocolError."""
    try:
        return _reply_decoder.decode(body)  # type: ignore[no-any-return]
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise ProtocolError(f"not a reply: {error}") from error


def version_of(body: bytes | bytearray | memoryview) -> int | None:
    """What a Hello or Welcome names, whatever else another release has put into it; None if it is neither."""
    try:
        found = _version_decoder.decode(body)
    except (msgspec.MsgspecError, ValueError, RecursionError):
        return None
    return found.version if found.op in ("hello", "welcome") else None


def skew(daemon: int, client: int) -> str:
    """The message for two versions that do not go together."""
    return (
        f"the daemon speaks protocol {daemon}, this client {client}; "
        "install the same release of lmcache-sdk on both sides"
    )


class FrameReader:
    """Cuts a stream of bytes into frames, of up to ``limit`` bytes. Nothing is allocated for a frame before its length
    has been checked.
    """

    def __init__(self, limit: int = FRAME_LIMIT) -> None:
        self._limit = limit
        self._buffer = bytearray()

    def __len__(self) -> int:
        """Bytes that :meth:`next` has not given out."""
        return len(self._buffer)

    def add(self, data: bytes) -> None:
        """Take in what was received."""
        self._buffer += data

    def next(self) -> bytes | None:
        """The body of the next frame, if it is complete.

        Raises:
            ProtocolError: its length is over the limit, or there is more behind it: on a connection one message
                waits for the other.
        """
        buffer = self._buffer
        if len(buffer) < LENGTH.size:
            return None
        length = LENGTH.unpack_from(buffer)[0]
        if length > self._limit:
            raise ProtocolError(f"a frame of {length} bytes is over the limit of {self._limit}")
        end = LENGTH.size + length
        if len(buffer) < end:
            return None
        if len(buffer) > end:
            raise ProtocolError("more was sent than one message")
        body = bytes(memoryview(buffer)[LENGTH.size : end])
        buffer.clear()
        return body


def count_digests(blob: bytes) -> int:
    """Of those sent as one blob. Raises ProtocolError if its length does not fit."""
    if len(blob) % DIGEST_BYTES:
        raise ProtocolError(f"{len(blob)} bytes are no whole number of digests of {DIGEST_BYTES} bytes")
    return len(blob) // DIGEST_BYTES


def cut_digests(blob: bytes, most: int = MOST_DIGESTS) -> list[bytes]:
    """The first ``most`` digests of a blob. Raises ProtocolError if its length does not fit, or if one of them is there
    twice.
    """
    count = min(count_digests(blob), max(0, most))
    digests: list[bytes] = np.frombuffer(blob, f"V{DIGEST_BYTES}", count).tolist()
    if len(set(digests)) != len(digests):
        raise ProtocolError("a chunk cannot follow itself: a digest is there twice")
    return digests


def peer_of(connection: socket.socket) -> tuple[int, int, int]:
    """(pid, uid, gid) of the process at the other end of a unix socket, as the kernel says."""
    raw = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    pid, uid, gid = struct.unpack("3i", raw)
    return pid, uid, gid


def peer_groups(connection: socket.socket) -> set[int]:
    """The supplementary groups of the process at the other end; none if the kernel does not say."""
    try:
        return set(array.array("I", connection.getsockopt(socket.SOL_SOCKET, _SO_PEERGROUPS, 1024)))
    except OSError:
        return set()


def raise_refusal(refusal: Refused) -> NoReturn:
    """Turn a refused Hello into the error that the user sees."""
    kinds = {"version": BackendFormatError, "settings": ConfigError}
    raise kinds.get(refusal.kind, BackendUnavailable)(f"the daemon refuses: {refusal.message}")
