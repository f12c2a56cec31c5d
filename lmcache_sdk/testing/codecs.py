"""The conformance suite of codecs: subclass :class:`CodecTests` and say how to make yours."""

from __future__ import annotations

import contextlib
import random
import re
from concurrent.futures import ThreadPoolExecutor
from typing import ClassVar

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lmcache_sdk.codecs import Codec

SIZES = (0, 1, 2, 63, 64, 4096, 65_537)
GUARD = 64
_FILL = 0xA5

# One test function serves every subclass; none of them keeps anything between examples.
_several_classes = settings(suppress_health_check=[HealthCheck.differing_executors])


def contents(nbytes: int) -> dict[str, bytes]:
    """Payloads of one size: what compresses well, what does not, and what KV looks like (bf16 numbers near 0)."""
    source = random.Random(nbytes)  # noqa: S311
    halves = (0x3C00 | source.getrandbits(10) | source.getrandbits(1) << 15 for _ in range(nbytes // 2 + 1))
    return {
        "zeros": bytes(nbytes),
        "ones": b"\xff" * nbytes,
        "ramp": bytes(at % 251 for at in range(nbytes)),
        "noise": source.randbytes(nbytes),
        "bf16": b"".join(half.to_bytes(2, "little") for half in halves)[:nbytes],
    }


class _Guarded:
    """A buffer between guards that must stay as they are; at an odd address."""

    def __init__(self, nbytes: int) -> None:
        self._whole = bytearray([_FILL]) * (GUARD + 1 + nbytes + GUARD)
        self._start, self._end = GUARD + 1, GUARD + 1 + nbytes
        self.view = memoryview(self._whole)[self._start : self._end]

    def check(self) -> None:
        outside = self._whole[: self._start] + self._whole[self._end :]
        assert outside == bytearray([_FILL]) * len(outside), "bytes outside the given buffer were written"


def encode(codec: Codec, payload: bytes) -> bytes:
    """The encoding of a payload, with all that holds for every call."""
    bound = codec.max_encoded(len(payload))
    out = _Guarded(bound)
    source = bytearray(payload)
    length = codec.encode(memoryview(source), out.view)
    out.check()
    assert source == payload, "encode changed its input"
    assert 0 <= length <= bound, f"{length} bytes for a payload of {len(payload)}, the bound is {bound}"
    return bytes(out.view[:length])


def decode(codec: Codec, encoded: bytes, nbytes: int) -> bytes:
    """The payload of an encoding, with all that holds for every call, also for one that raises."""
    out = _Guarded(nbytes)
    source = bytearray(encoded)
    try:
        codec.decode(memoryview(source), out.view)
    finally:
        out.check()
        assert source == encoded, "decode changed its input"
    return bytes(out.view)


class CodecTests:
    """Holds a codec to the MUSTs of the protocol. It is given buffers between guards, so that it cannot write beside
    them unnoticed; a codec in native code should also be run under a sanitizer.

    A lossless codec must return the very bytes, a lossy one as many; how near they are is for its own tests to say.
    """

    unit: ClassVar[int] = 1  #: payload sizes are multiples of so many bytes

    # What a subclass provides

    def make(self) -> Codec:
        """The codec."""
        raise NotImplementedError

    # Claims

    def test_is_a_codec(self) -> None:
        codec = self.make()
        assert isinstance(codec, Codec)
        assert isinstance(codec.lossless, bool)
        assert isinstance(codec.identity, bool)

    def test_the_name_fits_the_header(self) -> None:
        """At most 16 ASCII characters; those of a key, since a lossy codec's name is part of it."""
        assert re.fullmatch(r"[a-z0-9._-]{1,16}", self.make().name)

    def test_identity_is_claimed_only_where_it_is_one(self) -> None:
        """Records of an identity codec are read and written in place, without a call of the codec."""
        codec = self.make()
        if not codec.identity:
            pytest.skip("encodes")
        assert codec.lossless
        for nbytes in self._sizes():
            assert codec.max_encoded(nbytes) == nbytes
            for payload in contents(nbytes).values():
                assert encode(codec, payload) == payload

    # Round trips

    @pytest.mark.parametrize("content", list(contents(0)))
    def test_round_trip(self, content: str) -> None:
        codec = self.make()
        for nbytes in self._sizes():
            self._round_trip(codec, contents(nbytes)[content])

    @_several_classes
    @given(data=st.data())
    def test_round_trip_of_anything(self, data: st.DataObject) -> None:
        units = data.draw(st.integers(0, 2000 // self.unit))
        self._round_trip(self.make(), data.draw(st.binary(min_size=units * self.unit, max_size=units * self.unit)))

    def test_read_only_input(self) -> None:
        codec, payload = self.make(), contents(64 * self.unit)["bf16"]
        out = _Guarded(codec.max_encoded(len(payload)))
        length = codec.encode(memoryview(payload), out.view)
        codec.decode(memoryview(bytes(out.view[:length])), _Guarded(len(payload)).view)

    def test_a_buffer_that_is_larger_than_the_bound(self) -> None:
        codec, payload = self.make(), contents(64 * self.unit)["bf16"]
        out = _Guarded(codec.max_encoded(len(payload)) + 1000)
        length = codec.encode(memoryview(payload), out.view)
        out.check()
        assert decode(codec, bytes(out.view[:length]), len(payload)) == self._once(codec, payload)

    def test_threads(self) -> None:
        """Stateless: calls side by side do not mix."""
        codec = self.make()
        payloads = [random.Random(seed).randbytes(4096 * self.unit) for seed in range(4)]  # noqa: S311

        def work(payload: bytes) -> list[bytes]:
            return [self._once(codec, payload) for _ in range(25)]

        expected = [self._once(codec, payload) for payload in payloads]
        with ThreadPoolExecutor(len(payloads)) as pool:
            for results, wanted in zip(pool.map(work, payloads), expected, strict=True):
                assert results == [wanted] * len(results)

    # Misuse and bytes that are no encoding

    @pytest.mark.parametrize("content", ["bf16", "noise"])
    def test_room_that_is_too_small_to_encode(self, content: str) -> None:
        codec, payload = self.make(), contents(64 * self.unit)[content]
        length = len(encode(codec, payload))
        for room in {0, 1, length // 2, length - 1} - {length}:
            out = _Guarded(room)
            with pytest.raises(ValueError):  # noqa: PT011 - the protocol fixes the type, not the text
                codec.encode(memoryview(payload), out.view)
            out.check()

    @pytest.mark.parametrize("content", ["bf16", "noise"])
    def test_a_payload_of_another_size(self, content: str) -> None:
        codec, payload = self.make(), contents(64 * self.unit)[content]
        encoded = encode(codec, payload)
        for nbytes in (0, len(payload) - self.unit, len(payload) + self.unit, 2 * len(payload)):
            with pytest.raises(ValueError):  # noqa: PT011
                decode(codec, encoded, nbytes)

    @pytest.mark.parametrize("content", ["bf16", "noise"])
    def test_an_encoding_that_is_cut_off(self, content: str) -> None:
        codec, payload = self.make(), contents(64 * self.unit)[content]
        encoded = encode(codec, payload)
        for length in range(len(encoded)):
            with pytest.raises(ValueError):  # noqa: PT011
                decode(codec, encoded[:length], len(payload))

    @_several_classes
    @given(encoded=st.binary(max_size=600), units=st.integers(0, 300))
    def test_garbage_is_decoded_or_refused(self, encoded: bytes, units: int) -> None:
        """No other exception, no write beside the buffer. What garbage decodes to is the checksum's concern."""
        self._decode_or_refuse(encoded, units * self.unit)

    @_several_classes
    @given(data=st.data())
    def test_a_flipped_bit_is_decoded_or_refused(self, data: st.DataObject) -> None:
        payload = contents(32 * self.unit)["bf16"]
        encoded = bytearray(encode(self.make(), payload))
        bit = data.draw(st.integers(0, 8 * len(encoded) - 1))
        encoded[bit // 8] ^= 1 << bit % 8
        self._decode_or_refuse(bytes(encoded), len(payload))

    def _decode_or_refuse(self, encoded: bytes, nbytes: int) -> None:
        with contextlib.suppress(ValueError):
            decode(self.make(), encoded, nbytes)

    def _round_trip(self, codec: Codec, payload: bytes) -> None:
        decoded = self._once(codec, payload)
        if codec.lossless:
            assert decoded == payload

    def _once(self, codec: Codec, payload: bytes) -> bytes:
        return decode(codec, encode(codec, payload), len(payload))

    def _sizes(self) -> list[int]:
        return sorted({-(-nbytes // self.unit) * self.unit for nbytes in SIZES})
