"""No message that is right makes the daemon stop, fill its memory, or hold what nobody knows of."""

from __future__ import annotations

import os
import threading
import time
from typing import Any

import msgspec.structs as structs
import numpy as np
import pytest

from lmcache_sdk.api import Reservation, Ticket
from lmcache_sdk.daemon import answers, server
from lmcache_sdk.daemon import protocol as p
from lmcache_sdk.keys import Chain
from lmcache_sdk.spec import CellGrid, Group, GroupKind, KVSpec
from tests.core.engine import CHUNK, PRODUCER
from tests.daemon.daemon_here import daemon_here
from tests.daemon.daemon_process import Daemon, until
from tests.daemon.engine_process import CHUNKS, close, connect, layered
from tests.daemon.test_hostile_clients import EXACT, HELLO, Raw, digests

LONG = 100  # chunks


def long_chain() -> Chain:
    return Chain(np.arange(LONG * CHUNK, dtype=np.uint32), CHUNK)


def store_long(cache: Any) -> None:
    chain, done = long_chain(), 0
    while done < LONG:
        room = cache.reserve("s", chain, done, LONG - done)
        assert room is not None
        done += len(room.chunks)
        cache.publish(room)


def test_what_does_not_fit_one_reply_is_not_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(p, "FRAME_LIMIT", 8 << 10)
    most = p.most_chunks(3)
    assert 0 < most < LONG
    with daemon_here() as daemon:
        engine = connect(daemon)  # type: ignore[arg-type]
        store_long(engine.cache)
        found = engine.cache.lookup("r", long_chain())
        assert found.chunks == most and found.why == "more than one client may hold"
        ticket = engine.cache.claim("r", most)
        assert ticket is not None and daemon.held() == (1, 0)
        engine.cache.release(ticket)
        engine.cache.forget("r")
        daemon.settled()
        close(engine)


def test_the_places_of_as_many_chunks_as_are_promised_fit_a_reply(monkeypatch: pytest.MonkeyPatch) -> None:
    for limit, cells in ((8 << 10, 1), (8 << 10, 3), (8 << 20, 16_384)):
        monkeypatch.setattr(p, "FRAME_LIMIT", limit)
        count = p.most_chunks(cells)
        chunks = tuple(range((1 << 32) - count, 1 << 32))
        places = {"lease": (1 << 63) - 1, "boot": "b" * 32, "cells": tuple(range(cells))}
        extents = bytes(count * cells * p.PLACE_BYTES)
        assert p.encode(p.Reserved(Reservation(extents=extents, chunks=chunks, **places)))  # type: ignore[arg-type]
        assert p.encode(p.Claimed(Ticket(extents=extents, first=0, boundary=count, **places)))  # type: ignore[arg-type]


@pytest.mark.parametrize("what", ["claim", "reserve"])
def test_a_reply_that_cannot_be_sent_leaves_nothing_held(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Should it happen all the same."""
    with daemon_here() as daemon:
        engine = connect(daemon)  # type: ignore[arg-type]
        store_long(engine.cache)
        assert engine.cache.lookup("r", long_chain()).chunks == LONG
        monkeypatch.setattr(p, "FRAME_LIMIT", 2 << 10)
        monkeypatch.setattr(p, "most_chunks", lambda cells: LONG)
        if what == "claim":
            assert engine.cache.claim("r", LONG) is None
        else:
            other = Chain(np.arange(LONG * CHUNK, dtype=np.uint32) + 7, CHUNK)
            assert engine.cache.reserve("s", other, 0, LONG) is None
        until(lambda: engine.daemon.connected)
        daemon.settled()
        close(engine)


def cells(groups: int, layers: int, heads: int) -> KVSpec:
    many = (Group(f"g{n}", GroupKind.FULL, tuple(range(layers)), heads, 1, "bfloat16") for n in range(groups))
    return KVSpec(tuple(many), 1, CellGrid(1, 1))


@pytest.mark.parametrize(
    "change",
    [
        {"spec": cells(65, 1, 1)},
        {"spec": cells(1, 4096, 4096)},
        {"spec": cells(60, 300, 1)},
        {"fingerprint": "f" * 20_000},
        {"label": "l" * 20_000},
    ],
    ids=["groups", "heads", "cells", "fingerprint", "label"],
)
def test_a_namespace_too_large_is_refused_before_it_is_listed(daemon: Daemon, change: dict[str, Any]) -> None:
    with Raw(daemon) as raw:
        started = time.monotonic()
        reply = raw.ask(p.Hello(p.PROTOCOL_VERSION, namespace=structs.replace(layered(), **change), producer=PRODUCER))
        assert isinstance(reply, p.Refused) and reply.kind == "settings" and "served" in reply.message, reply
        assert time.monotonic() - started < 1.0


def test_namespaces_that_nobody_uses_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "_MOST_SPACES", 3)
    with daemon_here() as daemon:
        engine = connect(daemon)  # type: ignore[arg-type]
        assert engine.store(1).wait(10)
        for number in range(20):
            with Raw(daemon) as raw:  # type: ignore[arg-type]
                namespace = layered(fingerprint=f"n{number}")
                assert isinstance(raw.ask(structs.replace(HELLO, namespace=namespace)), p.Welcome)
                assert daemon.store.space_count <= 3
                until(lambda: daemon.server.client_count <= 2)
            until(lambda: daemon.server.client_count == 1)
        assert engine.load(1) == EXACT
        raws = [Raw(daemon) for _ in range(3)]  # type: ignore[arg-type]
        for number, raw in enumerate(raws):
            reply = raw.ask(structs.replace(HELLO, namespace=layered(fingerprint=f"m{number}")))
            assert isinstance(reply, p.Welcome if number < 2 else p.Refused), reply
        assert "3 namespaces" in reply.message and daemon.store.space_count == 3
        for raw in raws:
            raw.socket.close()
        again = connect(daemon)  # type: ignore[arg-type]
        assert again.load(1) == EXACT
        close(again)
        close(engine)


def test_a_message_that_does_not_end_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "_READ_S", 0.3)
    monkeypatch.setattr(server, "_LOOK_S", 0.1)
    with daemon_here() as daemon, Raw(daemon) as raw, Raw(daemon) as slow:  # type: ignore[arg-type]
        frame = p.encode(p.Subscribe(timeout_s=1.0, boot=daemon.store.boot))
        for each in (raw, slow):
            assert isinstance(each.ask(HELLO), p.Welcome)
            each.say(frame[: len(frame) // 2])
        slow.say(frame[len(frame) // 2 :])
        started = time.monotonic()
        assert raw.closed()
        assert time.monotonic() - started < 3.0
        assert isinstance(slow.hear(), p.Events), "to wait for a reply is no crime"


def test_a_request_is_bounded_and_long_ones_go_in_pieces(daemon: Daemon, monkeypatch: pytest.MonkeyPatch) -> None:
    with Raw(daemon) as raw:
        assert isinstance(raw.ask(HELLO), p.Welcome)
        reply = raw.ask(p.LENGTH.pack(p.REQUEST_LIMIT + 1))
        assert isinstance(reply, p.Refused) and "limit" in reply.message
    engine = connect(daemon)
    monkeypatch.setattr(p, "MOST_DIGESTS", 7)
    monkeypatch.setattr("lmcache_sdk.daemon.client._FIRST_DIGESTS", 4)
    store_long(engine.cache)
    chain = long_chain()
    assert engine.cache.lookup("r", chain).chunks == LONG
    engine.cache.forget("r")
    assert engine.cache.pin(chain, 0.1) == 7
    assert engine.cache.delete(chain) == LONG
    assert engine.cache.lookup("r", chain).chunks == 0
    close(engine)


def test_leases_of_the_same_chunks_are_bounded_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answers, "_MOST_LEASED", 10 * CHUNKS)
    with daemon_here() as daemon:
        engine = connect(daemon)  # type: ignore[arg-type]
        assert engine.store(1).wait(10)
        tickets = [ticket for ticket in (engine.claim(1) for _ in range(15)) if ticket is not None]
        assert len(tickets) == 10
        for ticket in tickets:
            engine.cache.release(ticket)
        daemon.settled()
        assert engine.load(1) == EXACT
        close(engine)


def test_what_is_leased_many_times_is_counted_without_looking_at_all_of_it() -> None:
    from lmcache_sdk.daemon.peers import Held, Share

    names, share = [os.urandom(16) for _ in range(100)], Share()
    leases = [Held(number, 10, names[: number % 100 + 1]) for number in range(500)]
    for lease in leases:
        share.lease(lease)
    assert share.nbytes == 1000 and share.leased == sum(len(lease.places) for lease in leases)
    for lease in leases[1:]:
        share.give_back(lease)
    assert share.nbytes == 10
    share.give_back(leases[0])
    assert share.nbytes == share.leased == len(share._times) == 0


def test_a_process_has_one_share_however_often_it_says_hello() -> None:
    with Daemon(pool_bytes=160 << 10, client_share=0.25) as daemon:
        daemon.start()
        raws, chunks = [Raw(daemon) for _ in range(4)], []
        for number, raw in enumerate(raws):
            assert isinstance(raw.ask(HELLO), p.Welcome)
            given = [raw.ask(p.Reserve(digests(100 * number + n), 0, (0, 1, 2))).reservation for n in range(6)]
            chunks.append(sum(len(reservation.chunks) for reservation in given if reservation))
        assert chunks[0] > 0 and chunks[1:] == [0, 0, 0]
        assert raws[0].ask(p.Bye()) == p.Count()
        assert raws[1].ask(p.Reserve(digests(7), 0, (0, 1, 2))).reservation is not None, "what it gave back is free"
        for raw in raws[1:]:
            assert raw.ask(p.Bye()) == p.Count()
        daemon.settled()


def test_a_pin_counts_with_all_that_it_keeps() -> None:
    """Who pins the last chunk alone keeps all before it."""
    with Daemon(pool_bytes=160 << 10, client_share=0.25) as daemon:
        daemon.start()
        engine = connect(daemon)
        for seed in range(8):
            assert engine.store(seed).wait(10)
        with Raw(daemon) as raw:
            assert isinstance(raw.ask(HELLO), p.Welcome)
            last = [engine.chain(seed, CHUNKS).digests()[-1] for seed in range(8)]
            granted = sum(raw.ask(p.Pin(digest, 600.0)).count for digest in last)
            chunk_bytes = daemon.check()["used_bytes"] // daemon.check()["chunks"]
            assert 0 < granted * CHUNKS * chunk_bytes <= (160 << 10) // 4
            # The same again, with less said of it, frees nothing for others.
            assert raw.ask(p.Pin(digests(0), 600.0)).count in (0, CHUNKS)
            assert sum(raw.ask(p.Pin(digest, 600.0)).count for digest in last[granted + 1 :]) == 0
            # Nor does one of another prompt behind a chunk of one's own.
            assert raw.ask(p.Pin(digests(6)[:32] + last[7], 600.0)).count == 0
        for seed in range(20, 50):
            assert engine.store(seed).wait(10)
            assert engine.load(seed) == EXACT, "there is room left"
        close(engine)


def test_others_are_served_while_one_sends_as_much_as_it_may(daemon: Daemon) -> None:
    engine = connect(daemon)
    assert engine.store(1).wait(10)
    blob, ended = os.urandom(32 * p.MOST_DIGESTS), threading.Event()
    with Raw(daemon) as raw:
        assert isinstance(raw.ask(HELLO), p.Welcome)

        def flood() -> None:
            for message in (p.Lookup("r", 0, blob), p.Delete(blob), p.Pin(blob, 1.0), p.Reserve(b"", 0, (0,))):
                assert not isinstance(raw.ask(message), p.Refused | None)
            ended.set()

        thread = threading.Thread(target=flood)
        thread.start()
        while not ended.is_set():
            assert engine.load(1) == EXACT
        thread.join(10)
    close(engine)
