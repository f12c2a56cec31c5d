"""Codecs: how a payload is encoded in a record. One file a codec, found by entry point."""

from __future__ import annotations

from functools import cache
from importlib.metadata import entry_points
from typing import ClassVar, Protocol, runtime_checkable

from lmcache_sdk.codecs.raw import RawCodec
from lmcache_sdk.errors import ConfigError

__all__ = ["Codec", "RawCodec", "codec_by_name"]

ENTRY_POINTS = "lmcache_sdk.codecs"


@runtime_checkable
class Codec(Protocol):
    """Payload bytes <-> record bytes. Stateless and thread-safe.

    Every implementation MUST decode what it encoded to the same number of bytes, to the same bytes if ``lossless``,
    and MUST raise ValueError for anything that it cannot decode; it never writes outside the given buffers.

    Attributes:
        name: at most 16 ASCII characters; part of the record header, and of the fidelity if not lossless.
        identity: encoding changes nothing, so that records are read and written in place.
    """

    name: ClassVar[str]
    lossless: ClassVar[bool]
    identity: ClassVar[bool]

    def max_encoded(self, nbytes: int) -> int:
        """An upper bound of the encoded size of ``nbytes`` bytes."""
        ...

    def encode(self, payload: memoryview, out: memoryview) -> int:
        """Write the encoding into ``out`` (at least ``max_encoded`` bytes); the answer is its length."""
        ...

    def decode(self, encoded: memoryview, out: memoryview) -> None:
        """Fill ``out`` (exactly the payload's size)."""
        ...


@cache
def codec_by_name(name: str) -> Codec:
    """The codec with this name. Raises ConfigError if no installed package announces it."""
    if name == RawCodec.name:
        return RawCodec()
    for point in entry_points(group=ENTRY_POINTS, name=name):
        try:
            codec: Codec = point.load()()
        except (ImportError, AttributeError) as error:
            raise ConfigError(f"the codec {name!r} ({point.value}) does not load: {error}") from error
        return codec
    known = sorted({RawCodec.name, *(point.name for point in entry_points(group=ENTRY_POINTS))})
    raise ConfigError(f"unknown codec {name!r}; installed are: {', '.join(known)}")
