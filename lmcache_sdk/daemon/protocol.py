"""What a client and the daemon say to each other. Specified in ``docs/daemon-protocol.md``.

A frame is a length (uint32, little-endian) and that many bytes of msgpack: one message, a map whose ``op`` names its
type. A client sends one request at a time on a connection and gets one reply. No pickle: a message is data.
"""

from __future__ import annotations

import socket
import struct
from typing import Union

import msgspec

from lmcache_sdk.api import Reservation, Stats, Ticket
from lmcache_sdk.errors import BackendFormatError, BackendUnavailable, LMCacheSDKError
from lmcache_sdk.keys import DIGEST_BYTES
from lmcache_sdk.observe.events import Event
from lmcache_sdk.spec import Namespace, Producer

PROTOCOL_VERSION = 1
FRAME_LIMIT = 8 << 20  # the digests of 16 million tokens in chunks of 64
LENGTH = struct.Struct("<I")


class Message(msgspec.Struct, frozen=True, tag_field="op", tag=lambda name: name.lower(), forbid_unknown_fields=True):
    """Base of all messages."""


# Requests


class Hello(Message, frozen=True):
    """First on every connection.

    Attributes:
        version: of the protocol; another one is refused.
        client: empty on a client's first connection; then the id that :class:`Welcome` gave, to join it.
        namespace, producer: whose chunks this client reads and writes; None for a tool that only looks.
    """

    version: int
    client: bytes = b""
    namespace: Namespace | None = None
    producer: Producer | None = None


class Lookup(Message, frozen=True):
    """Find the longest prefix. ``digests`` are those from chunk ``start`` on; earlier ones were sent before.

    Attributes:
        salted: a cache salt is in the seed.
    """

    rid: str
    start: int
    digests: bytes
    tenant: str = ""
    salted: bool = False
    positions_known: bool = True
    prefetch: bool = True


class Wait(Message, frozen=True):
    """Answer when the lookup is no longer pending, at the latest after ``timeout_s``."""

    rid: str
    timeout_s: float


class Claim(Message, frozen=True):
    """Lease chunks of a READY lookup."""

    rid: str
    boundary: int
    first: int = 0
    parts: int = 1


class Release(Message, frozen=True):
    """Give one part of a lease back."""

    lease: int
    part: int = 0


class Forget(Message, frozen=True):
    """The request has ended."""

    rid: str


class Reserve(Message, frozen=True):
    """Room for chunks ``first …`` with these digests; ``parent`` is the digest before, empty if there is none."""

    digests: bytes
    first: int
    cells: tuple[int, ...]
    parent: bytes = b""
    tenant: str = ""
    salted: bool = False
    positions_known: bool = True


class Publish(Message, frozen=True):
    """Chunks of a reservation have been written; None = all, empty = none."""

    lease: int
    chunks: tuple[int, ...] | None = None


class Pin(Message, frozen=True):
    """Keep chunks from eviction for a while."""

    digests: bytes
    ttl_s: float


class Delete(Message, frozen=True):
    """Remove chunks from pool and tiers."""

    digests: bytes


class Clear(Message, frozen=True):
    """Remove all chunks of this client's namespace and producer."""


class Ask(Message, frozen=True):
    """The daemon's figures."""


class Drain(Message, frozen=True):
    """Answer when all that was published has reached the tiers, at the latest after ``timeout_s``."""

    timeout_s: float


class Drained(Message, frozen=True):
    """No copy of an earlier life of the daemon is under way any more in this client's process."""

    client: bytes


class Bye(Message, frozen=True):
    """This client ends: no copy of its is under way."""


class Subscribe(Message, frozen=True):
    """KV events after ``sequence`` of life ``boot``; at most ``limit``, waiting up to ``timeout_s`` for the first."""

    boot: str = ""
    sequence: int = 0
    limit: int = 1000
    timeout_s: float = 0.0


# Replies


class Welcome(Message, frozen=True):
    """The answer to a first Hello; the descriptors of the pool's segments come with it.

    Attributes:
        boot: this life of the daemon.
        client: this client's id; a secret, since it gives access to what the client holds.
        segments: sizes in bytes.
    """

    version: int
    boot: str
    client: bytes
    segments: tuple[int, ...]


class Found(Message, frozen=True):
    """The answer to Lookup and Wait.

    Attributes:
        walked: chunks from the front that were found, loaded or not; all that were sent if a tier is still asked.
    """

    state: str
    chunks: int
    walked: int
    why: str
    sources: dict[str, int]


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
    """The request was not carried out. ``kind``: version, message, settings, tenant, limit."""

    kind: str
    message: str


Request = Union[  # noqa: UP007 - msgspec reads the union at run time
    Hello,
    Lookup,
    Wait,
    Claim,
    Release,
    Forget,
    Reserve,
    Publish,
    Pin,
    Delete,
    Clear,
    Ask,
    Drain,
    Drained,
    Bye,
    Subscribe,
]
Reply = Union[Welcome, Found, Claimed, Reserved, Count, Figures, Events, Refused]  # noqa: UP007

_encoder = msgspec.msgpack.Encoder()
_request_decoder = msgspec.msgpack.Decoder(Request)
_reply_decoder = msgspec.msgpack.Decoder(Reply)


class ProtocolError(LMCacheSDKError):
    """Bytes that are no frame, or a frame that is no message."""


def encode(message: Message) -> bytes:
    """One frame. Raises ProtocolError for a message over the limit."""
    body = _encoder.encode(message)
    if len(body) > FRAME_LIMIT:
        raise ProtocolError(f"a message of {len(body)} bytes is over the limit of {FRAME_LIMIT}")
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


class FrameReader:
    """Cuts a stream of bytes into frames. Nothing is allocated for a frame before its length has been checked."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def add(self, data: bytes) -> None:
        """Take in what was received. Raises ProtocolError if a peer sends more than one frame ahead."""
        self._buffer += data
        if len(self._buffer) > 2 * (LENGTH.size + FRAME_LIMIT):
            raise ProtocolError("too much was sent ahead")

    def next(self) -> bytes | None:
        """The body of the next frame, if it is complete. Raises ProtocolError for a length over the limit."""
        buffer = self._buffer
        if len(buffer) < LENGTH.size:
            return None
        length = LENGTH.unpack_from(buffer)[0]
        if length > FRAME_LIMIT:
            raise ProtocolError(f"a frame of {length} bytes is over the limit of {FRAME_LIMIT}")
        end = LENGTH.size + length
        if len(buffer) < end:
            return None
        body = bytes(memoryview(buffer)[LENGTH.size : end])
        del buffer[:end]
        return body


def cut_digests(blob: bytes) -> list[bytes]:
    """Digests sent as one blob. Raises ProtocolError if its length does not fit."""
    if len(blob) % DIGEST_BYTES:
        raise ProtocolError(f"{len(blob)} bytes are no whole number of digests of {DIGEST_BYTES} bytes")
    return [blob[at : at + DIGEST_BYTES] for at in range(0, len(blob), DIGEST_BYTES)]


def peer_of(connection: socket.socket) -> tuple[int, int, int]:
    """(pid, uid, gid) of the process at the other end of a unix socket, as the kernel says."""
    raw = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    pid, uid, gid = struct.unpack("3i", raw)
    return pid, uid, gid


def raise_refusal(refusal: Refused) -> None:
    """Turn a refused Hello into the error that the user sees."""
    if refusal.kind == "version":
        raise BackendFormatError(refusal.message)
    raise BackendUnavailable(refusal.message)
