"""Frames and messages: whatever comes in, the answer is a message or a ProtocolError."""

from __future__ import annotations

import contextlib
import os
import random
import time
import tracemalloc
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from lmcache_sdk.api import LookupState, PoolStats, Reservation, Stats, Ticket
from lmcache_sdk.daemon import protocol as p
from lmcache_sdk.observe.events import Event
from tests.core.engine import PRODUCER
from tests.daemon.engine_process import layered

SEED = int(os.environ.get("LMCACHE_SDK_SEED", "20261124"))
STATS = Stats(PoolStats(4, 1, 2, 1, 1), 3, 2, (), {"lookups": 1.0})
PLACES = {"lease": 5, "boot": "b", "cells": (0, 1), "extents": bytes(32)}
MESSAGES: list[p.Message] = [
    p.Hello(1, b"c" * 16, layered(), PRODUCER, 3, ((7, 0), (8, 1))),
    p.Lookup("r", 2, bytes(64), tenant="t", salted=True),
    p.Wait("r", 1.5),
    p.Claim("r", 5, 1, 2),
    p.Take(7, 1),
    p.Release(7, 1),
    p.Forget("r"),
    p.Reserve(bytes(32), 0, (0, 1), parent=b"p" * 32),
    p.Publish(9, (1, 2)),
    p.Publish(9),
    p.Pin(bytes(32), 60.0),
    p.Delete(bytes(32)),
    p.Clear(),
    p.Ask(),
    p.Reopen("n", ("one", "two")),
    p.Drain(1.0),
    p.Drained(b"c" * 16),
    p.Bye(),
    p.Subscribe("b", 7, 10, 0.5),
    p.Welcome(1, "b", b"c" * 16, (1 << 30,)),
    p.Found(LookupState.READY, 3, 4, "", {"pool": 3}),
    p.Claimed(Ticket(first=0, boundary=1, **PLACES)),  # type: ignore[arg-type]
    p.Claimed(None),
    p.Reserved(Reservation(chunks=(0,), **PLACES)),  # type: ignore[arg-type]
    p.Count(3),
    p.Figures("b", STATS, {"clients": msgspec.Raw(b"\x90")}),
    p.Events("b", (Event(1, True, "n", b"d" * 32),), False),
    p.Refused("message", "why"),
]


def decode(body: bytes) -> None:
    """Either decoder, on anything."""
    for decoder in (p.decode_request, p.decode_reply):
        with contextlib.suppress(p.ProtocolError):
            decoder(body)
    p.version_of(body)


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: type(message).__name__)
def test_every_message_comes_through(message: Any) -> None:
    frames = p.FrameReader()
    for byte in p.encode(message):
        assert frames.next() is None
        frames.add(bytes([byte]))
    body = frames.next()
    assert body is not None and not len(frames)
    decoder = p.decode_request if isinstance(message, p.Request) else p.decode_reply
    assert p.encode(decoder(body)) == p.encode(message)


def test_all_messages_are_in_the_list_above() -> None:
    every = {*p.Request.__args__, *p.Reply.__args__}  # type: ignore[attr-defined]
    assert {type(message) for message in MESSAGES} == every


def test_a_length_over_the_limit_is_refused_before_anything_is_kept_for_it() -> None:
    frames = p.FrameReader()
    tracemalloc.start()
    frames.add(p.LENGTH.pack(p.FRAME_LIMIT + 1))
    with pytest.raises(p.ProtocolError, match="over the limit"):
        frames.next()
    assert tracemalloc.get_traced_memory()[1] < 100_000
    tracemalloc.stop()
    frames = p.FrameReader()
    frames.add(p.LENGTH.pack(p.FRAME_LIMIT))
    assert frames.next() is None


def test_two_frames_at_once_are_refused() -> None:
    frames = p.FrameReader()
    frames.add(2 * p.encode(p.Ask()))
    with pytest.raises(p.ProtocolError, match="more"):
        frames.next()


def test_random_bytes_as_a_stream() -> None:
    print(f"seed {SEED}")
    rng = random.Random(SEED)
    good = [p.encode(message) for message in MESSAGES]
    for _ in range(12_000):
        stream = bytearray(rng.choice(good) if rng.random() < 0.8 else rng.randbytes(rng.randint(0, 60)))
        for _ in range(rng.choice([0, 1, 1, 2, 8])):
            if stream:
                at = rng.randrange(len(stream))
                match rng.randrange(4):
                    case 0:
                        stream[at] = rng.randrange(256)
                    case 1:
                        stream[at] ^= 1 << rng.randrange(8)
                    case 2:
                        del stream[at:]
                    case 3:
                        stream[at:at] = rng.randbytes(rng.randint(1, 5))
        frames = p.FrameReader()
        try:
            while stream:
                size = rng.randint(1, len(stream))
                frames.add(bytes(stream[:size]))
                del stream[:size]
                if (body := frames.next()) is not None:
                    assert len(body) <= p.FRAME_LIMIT
                    decode(body)
        except p.ProtocolError:
            continue


@hypothesis_settings(max_examples=1000, deadline=None)
@given(st.binary(max_size=200))
def test_any_bytes_as_a_body(body: bytes) -> None:
    decode(body)


_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(1 << 63), (1 << 64) - 1) | st.floats() | st.text() | st.binary(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)
_names = [message.__struct_config__.tag for message in (*p.Request.__args__, *p.Reply.__args__)]  # type: ignore[attr-defined]
_fields = sorted({name for message in MESSAGES for name in message.__struct_fields__})


@hypothesis_settings(max_examples=300, deadline=None)
@given(st.sampled_from(_names), st.dictionaries(st.sampled_from(_fields) | st.text(max_size=4), _values, max_size=6))
def test_any_values_in_a_message(op: str, fields: dict[str, Any]) -> None:
    decode(msgspec.msgpack.encode({**fields, "op": op}))


@pytest.mark.parametrize(
    "body",
    [
        b"\x81" * 100_000,
        b"\x91" * 100_000,
        b"\xdf\xff\xff\xff\xff\xa2op\xa7publish",
        b"\x83\xa2op\xa7publish\xa5lease\x01\xa6chunks\xdd\xff\xff\xff\xff",
        b"\x83\xa2op\xa5hello\xa7version\x01\xa6client\xc6\xff\xff\xff\xff",
    ],
    ids=["maps", "lists", "map32", "list32", "bytes32"],
)
def test_what_claims_to_be_huge_costs_nothing(body: bytes) -> None:
    started = time.perf_counter()
    tracemalloc.start()
    decode(body)
    assert tracemalloc.get_traced_memory()[1] < 10_000_000
    tracemalloc.stop()
    assert time.perf_counter() - started < 1


@pytest.mark.parametrize(
    "fields",
    [
        {"op": "wait", "rid": "r", "timeout_s": float("nan")},
        {"op": "wait", "rid": "r", "timeout_s": float("inf")},
        {"op": "wait", "rid": "r", "timeout_s": -1.0},
        {"op": "wait", "rid": "r" * 257, "timeout_s": 1.0},
        {"op": "claim", "rid": "r", "boundary": 1, "parts": 1 << 40},
        {"op": "claim", "rid": "r", "boundary": 1, "parts": 0},
        {"op": "release", "lease": -1},
        {"op": "reserve", "digests": b"", "first": 1 << 40, "cells": [0]},
        {"op": "pin", "digests": b"", "ttl_s": float("nan")},
        {"op": "subscribe", "limit": 1 << 30},
        {"op": "hello", "version": 1, "client": b"c" * 17},
        {"op": "ask", "more": 1},
        {"op": "exec"},
        {},
    ],
    ids=str,
)
def test_what_its_numbers_alone_say_is_wrong(fields: dict[str, Any]) -> None:
    with pytest.raises(p.ProtocolError):
        p.decode_request(msgspec.msgpack.encode(fields))


def test_what_cannot_be_sent_is_said_so() -> None:
    for message in (p.Forget("\ud800"), p.Count(1 << 70), p.Delete(bytes(p.FRAME_LIMIT))):
        with pytest.raises(p.ProtocolError):
            p.encode(message)


def test_digests_are_whole_and_different() -> None:
    assert p.cut_digests(b"") == []
    assert p.cut_digests(b"a" * 32 + b"b" * 32) == [b"a" * 32, b"b" * 32]
    with pytest.raises(p.ProtocolError, match="whole number"):
        p.cut_digests(b"a" * 33)
    with pytest.raises(p.ProtocolError, match="twice"):
        p.cut_digests(b"a" * 64)


def test_a_release_to_come_is_recognised_by_its_version() -> None:
    hello = msgspec.msgpack.encode({"op": "hello", "version": 99, "colour": "blue", "namespace": 7})
    assert p.version_of(hello) == 99
    assert p.version_of(p.encode(p.Ask())[4:]) is None
    assert "99" in p.skew(1, 99) and "1" in p.skew(1, 99)
