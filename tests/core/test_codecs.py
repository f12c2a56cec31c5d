"""Codecs: those built in, a toy one, and broken ones that the conformance suite must catch."""

from __future__ import annotations

import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

import pytest

from lmcache_sdk import ConfigError
from lmcache_sdk.codecs import Codec, RawCodec, codec_by_name
from lmcache_sdk.testing.codecs import CodecTests


class ZlibCodec:
    """A toy: what a codec of the standard library comes to."""

    name: ClassVar[str] = "zlib"
    lossless: ClassVar[bool] = True
    identity: ClassVar[bool] = False

    def max_encoded(self, nbytes: int) -> int:
        return nbytes + nbytes // 1000 + 64

    def encode(self, payload: memoryview, out: memoryview) -> int:
        encoded = zlib.compress(payload, 1)
        out[: len(encoded)] = encoded
        return len(encoded)

    def decode(self, encoded: memoryview, out: memoryview) -> None:
        stream = zlib.decompressobj()
        try:
            payload = stream.decompress(encoded, len(out) + 1)  # a bomb fills no memory
        except zlib.error as error:
            raise ValueError(f"not zlib: {error}") from error
        if len(payload) != len(out) or not stream.eof:
            raise ValueError(f"decodes to other than {len(out)} bytes")
        out[:] = payload


class HalfCodec:
    """A toy that is lossy: keeps the high byte of each 16-bit number."""

    name: ClassVar[str] = "half"
    lossless: ClassVar[bool] = False
    identity: ClassVar[bool] = False

    def max_encoded(self, nbytes: int) -> int:
        return nbytes // 2

    def encode(self, payload: memoryview, out: memoryview) -> int:
        out[: len(payload) // 2] = payload[1::2].tobytes()
        return len(payload) // 2

    def decode(self, encoded: memoryview, out: memoryview) -> None:
        if 2 * len(encoded) != len(out):
            raise ValueError(f"{len(encoded)} bytes cannot be {len(out)}")
        out[::2] = bytes(len(encoded))
        out[1::2] = encoded


class TestRaw(CodecTests):
    def make(self) -> Codec:
        return RawCodec()


class TestZlib(CodecTests):
    def make(self) -> Codec:
        return ZlibCodec()


class TestHalf(CodecTests):
    unit = 2

    def make(self) -> Codec:
        return HalfCodec()


# The suite must not pass what breaks a MUST


class LongName(RawCodec):
    name: ClassVar[str] = "a-name-of-17-char"


class Liar(RawCodec):
    def decode(self, encoded: memoryview, out: memoryview) -> None:
        super().decode(encoded, out)
        out[-1:] = b"\0" * len(out[-1:])


class FalseIdentity(ZlibCodec):
    identity: ClassVar[bool] = True


class Beside(RawCodec):
    """Writes one byte in front of its buffer, as native code can."""

    def decode(self, encoded: memoryview, out: memoryview) -> None:
        super().decode(encoded, out)
        start = out.obj.index(out.tobytes()) if len(out) else 1
        out.obj[start - 1] = 0


class OwnError(ZlibCodec):
    def decode(self, encoded: memoryview, out: memoryview) -> None:
        out[:] = zlib.decompress(encoded)


class Lenient(RawCodec):
    def decode(self, encoded: memoryview, out: memoryview) -> None:
        length = min(len(encoded), len(out))
        out[:length] = encoded[:length]


class Greedy(RawCodec):
    """Encodes to more than it says."""

    def max_encoded(self, nbytes: int) -> int:
        return max(0, nbytes - 1)

    def encode(self, payload: memoryview, out: memoryview) -> int:
        super().encode(payload[: len(out)], out)
        return len(payload)


class Scribbler(RawCodec):
    def encode(self, payload: memoryview, out: memoryview) -> int:
        length = super().encode(payload, out)
        if length and not payload.readonly:
            payload[0] ^= 1
        return length


class Stateful(RawCodec):
    last: bytes = b""

    def encode(self, payload: memoryview, out: memoryview) -> int:
        self.last = bytes(payload)
        return super().encode(payload, out)

    def decode(self, encoded: memoryview, out: memoryview) -> None:
        super().decode(memoryview(self.last), out)


@pytest.mark.parametrize(
    ("codec", "test"),
    [
        (LongName, lambda suite: suite.test_the_name_fits_the_header()),
        (Liar, lambda suite: suite.test_round_trip("noise")),
        (Liar, lambda suite: suite.test_round_trip_of_anything()),
        (FalseIdentity, lambda suite: suite.test_identity_is_claimed_only_where_it_is_one()),
        (Beside, lambda suite: suite.test_round_trip("noise")),
        (OwnError, lambda suite: suite.test_an_encoding_that_is_cut_off("bf16")),
        (OwnError, lambda suite: suite.test_garbage_is_decoded_or_refused()),
        (Lenient, lambda suite: suite.test_a_payload_of_another_size("bf16")),
        (Lenient, lambda suite: suite.test_an_encoding_that_is_cut_off("bf16")),
        (Greedy, lambda suite: suite.test_round_trip("noise")),
        (Scribbler, lambda suite: suite.test_round_trip("noise")),
        (Stateful, lambda suite: suite.test_an_encoding_that_is_cut_off("bf16")),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else "",
)
def test_a_broken_codec_is_caught(codec: type[Codec], test: Callable[[CodecTests], None]) -> None:
    class Suite(CodecTests):
        def make(self) -> Codec:
            return codec()

    with pytest.raises((AssertionError, zlib.error, pytest.fail.Exception)):
        test(Suite())


# Finding one


def test_raw_is_there_and_an_unknown_name_is_refused() -> None:
    assert isinstance(codec_by_name("raw"), RawCodec)
    with pytest.raises(ConfigError, match="unknown codec 'nosuch'; installed are: raw"):
        codec_by_name("nosuch")


def test_a_third_party_codec_is_found_by_its_entry_point(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    metadata = tmp_path / "toy_codec-1.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: toy-codec\nVersion: 1\n")
    (metadata / "entry_points.txt").write_text("[lmcache_sdk.codecs]\ntoy = toy_codec:Toy\n")
    (tmp_path / "toy_codec.py").write_text(
        "from lmcache_sdk.codecs import RawCodec\n\nclass Toy(RawCodec):\n    name = 'toy'\n    identity = False\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert "toy_codec" not in sys.modules
    try:
        assert codec_by_name("toy").name == "toy"
    finally:
        codec_by_name.cache_clear()
        sys.modules.pop("toy_codec", None)
