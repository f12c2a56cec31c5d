"""The answers to clients' requests: what a client asks for becomes a call of the store, and what it is given is noted.

No call here waits. Memory that a client may still touch comes back only through :meth:`Answers.release` and
:meth:`Answers.take_back`.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Container
from typing import NamedTuple

import msgspec

from lmcache_sdk.api import LookupState
from lmcache_sdk.config import format_size
from lmcache_sdk.daemon import protocol as p
from lmcache_sdk.daemon.peers import Client, Held, Lease
from lmcache_sdk.keys import DIGEST_BYTES, Chain
from lmcache_sdk.observe.logs import logger
from lmcache_sdk.store import OpenSpace, Store

_log = logger("daemon")

_MOST_REQUESTS = 16_384  # of a client at a time; then the oldest is forgotten
_MOST_LEASED = 1 << 20  # chunks of a process, each as often as it is leased
_MOST_PINS = 4096


class Owed(NamedTuple):
    """A reply that may take time. ``ready``: it, or None while there is none; ``late``: the one at the deadline."""

    timeout_s: float
    ready: Callable[[], p.Message | None]
    late: Callable[[], p.Message]


class _Pin(NamedTuple):
    """``chunks``: a name for them; who pins the same again holds them once. ``nbytes``: of these and all before them,
    which are held as well.
    """

    until: float
    chunks: tuple[OpenSpace, bytes]
    nbytes: int


class Answers:
    """See the module's docstring.

    Args:
        limit_bytes: what one process may hold by leases and reservations; and all pins together, which outlive clients.
        require_salt: refuse requests without a cache salt.
    """

    def __init__(self, store: Store, limit_bytes: int, *, require_salt: bool) -> None:
        self._store = store
        self._limit = limit_bytes
        self._require_salt = require_salt
        self._leases: dict[int, Lease] = {}
        self._pins: list[_Pin] = []

    def answer(self, client: Client, request: p.Request) -> p.Message | Owed:
        """Carry a request out. Raises ProtocolError for one that nobody may send, or not to here."""
        store = self._store
        match request:
            case p.Subscribe():
                return self._subscribe(request)
            case p.Reopen():
                return p.Count(int(store.reopen(request.namespace, request.producers)))
            case p.Drain():
                return Owed(
                    request.timeout_s,
                    lambda: p.Count(1) if store.drained() else None,
                    lambda: p.Count(int(store.drained())),
                )
        opened = client.opened
        if opened is None:
            return p.Refused("settings", "this connection named no namespace")
        match request:
            case p.Lookup():
                return self._lookup(client, opened, request)
            case p.Wait():
                return self._wait(client, request)
            case p.Claim():
                return self._claim(client, opened, request)
            case p.Take():
                return p.Count(int(self._take(client, request)))
            case p.Release():
                self.release(client, request.lease, request.part)
                return p.Count()
            case p.Forget():
                rid = _rid(client, request.rid)
                client.requests.pop(rid, None)
                store.forget(rid)
                return p.Count()
            case p.Reserve():
                return self._reserve(client, opened, request)
            case p.Publish():
                room = client.end_room(request.lease)
                if room is not None:
                    store.publish_lease(room.number, request.chunks)
                return p.Count()
            case p.Pin():
                return p.Count(self._pin(client, opened, request))
            case p.Delete():
                return p.Count(store.delete(opened, p.cut_digests(request.digests)))
            case p.Clear():
                return p.Count(store.clear_some(opened))
        raise p.ProtocolError(f"{type(request).__name__} is no request for here")

    def release(self, client: Client, number: int, part: int) -> None:
        """The copy of this part has ended. Without effect if it is not this client's."""
        lease = client.leases.get(number)
        if lease is None or lease.parts.get(part) is not client:
            return
        del lease.parts[part]
        self._store.release_part(lease.number, part)
        if client not in lease.parts.values():
            client.end_lease(number)
        if not lease.parts:
            del self._leases[number]

    def take_back(self, client: Client, but: Container[tuple[int, int]] = ()) -> None:
        """All that a client holds but these (lease, part): no copy of its is under way there."""
        for number, lease in list(client.leases.items()):
            for part in [part for part, owner in lease.parts.items() if owner is client]:
                if (number, part) not in but:
                    self.release(client, number, part)
        for number, room in list(client.rooms.items()):
            if (number, 0) not in but:
                client.end_room(number)
                self._store.abort_lease(room.number)

    def forget_all(self, client: Client) -> None:
        """It has said that it is done, or is gone."""
        self.take_back(client)
        for rid in client.requests:
            self._store.forget(rid)

    def _lookup(self, client: Client, opened: OpenSpace, request: p.Lookup) -> p.Message:
        if self._require_salt and not request.salted:
            return p.Found(LookupState.MISS, 0, 0, "a cache salt is required", {})
        rid = _rid(client, request.rid)
        most = self._most(opened)  # more could not be claimed: do not load it from a tier either
        wanted = request.start + p.count_digests(request.digests)
        digests = p.cut_digests(request.digests, most - request.start)
        if request.start:
            known = self._store.digests_of(rid)
            if len(known) != min(request.start, most):
                return p.Found(LookupState.MISS, 0, p.AGAIN, "send all digests again", {})
            digests = known + digests
        chain = Chain.from_digests(
            digests, opened.spec.chunk_tokens, tenant=request.tenant, positions_known=request.positions_known
        )
        client.requests.pop(rid, None)
        client.requests[rid] = None
        if len(client.requests) > _MOST_REQUESTS:
            oldest = next(iter(client.requests))
            del client.requests[oldest]
            self._store.forget(oldest)
        self._store.lookup(opened, rid, chain, share=client.sharing, prefetch=request.prefetch, total=request.total)
        found = self._found(rid)
        if wanted > most == found.chunks:
            return msgspec.structs.replace(found, why="more than one client may hold")
        return found

    def _wait(self, client: Client, request: p.Wait) -> Owed:
        rid = _rid(client, request.rid)

        def ready() -> p.Message | None:
            found = self._found(rid)
            return None if found.state == LookupState.PENDING else found

        def late() -> p.Message:
            if request.settle:
                self._store.hurry(rid)
            return self._found(rid)

        return Owed(request.timeout_s, ready, late)

    def _found(self, rid: str) -> p.Found:
        found, walked = self._store.found(rid)
        sources = dict(found.sources)
        return p.Found(found.state, found.chunks, walked, found.why, sources, found.found, found.missing, found.eta_s)

    def _claim(self, client: Client, opened: OpenSpace, request: p.Claim) -> p.Message:
        ticket = self._store.claim(_rid(client, request.rid), request.boundary, request.first, request.parts)
        if ticket is None:
            return p.Claimed(None)
        lease, number = Lease.of(ticket, opened.space.chunk_bytes), _number()
        lease.parts.update(dict.fromkeys(range(request.parts), client))
        self._leases[number] = lease
        client.lease(number, lease)
        if self._is_too_much(client):
            for part in range(request.parts):
                self.release(client, number, part)
            return p.Claimed(None)
        return p.Claimed(msgspec.structs.replace(ticket, lease=number))

    def _take(self, client: Client, request: p.Take) -> bool:
        number, lease = request.lease, self._leases.get(request.lease)
        owner = lease.parts.get(request.part) if lease is not None else None
        if lease is None or owner is None or owner.opened is not client.opened:
            return False
        if number not in client.leases:
            client.lease(number, lease)
            if self._is_too_much(client):
                client.end_lease(number)
                return False
        lease.parts[request.part] = client
        if owner not in lease.parts.values():
            owner.end_lease(number)
        return True

    def _reserve(self, client: Client, opened: OpenSpace, request: p.Reserve) -> p.Message:
        if self._require_salt and not request.salted:
            return p.Reserved(None)
        cells = range(len(opened.payload_bytes))
        if not request.cells or not set(request.cells) <= set(cells) or len(set(request.cells)) != len(request.cells):
            raise p.ProtocolError(f"cells {request.cells[:8]} … are not within 0 .. {len(cells) - 1}, each once")
        wanted, chunk_bytes = p.count_digests(request.digests), opened.space.chunk_bytes
        most = max(0, self._limit - client.share.nbytes) // chunk_bytes
        if most < wanted:
            self._too_much(client, f"room for {most} of {wanted} chunks to store")
        digests = p.cut_digests(request.digests, min(most, p.most_chunks(len(request.cells))))
        if len(request.parent) not in (0, DIGEST_BYTES) or request.parent in digests:
            raise p.ProtocolError("the parent is no digest of a chunk before")
        reservation = self._store.reserve(
            opened,
            digests,
            request.first,
            request.cells,
            parent=request.parent or None,
            tenant=request.tenant,
            positions_known=request.positions_known,
            inexact=request.inexact,
            share=client.sharing,
        )
        if reservation is None:
            return p.Reserved(None)
        number = _number()
        client.reserve(number, Held.of(reservation, chunk_bytes))
        return p.Reserved(msgspec.structs.replace(reservation, lease=number))

    def _pin(self, client: Client, opened: OpenSpace, request: p.Pin) -> int:
        now = time.monotonic()
        self._pins = [pin for pin in self._pins if pin.until > now]
        digests = p.cut_digests(request.digests)
        pinned: dict[tuple[OpenSpace, bytes], int] = {}
        for pin in self._pins:
            pinned[pin.chunks] = max(pin.nbytes, pinned.get(pin.chunks, 0))
        nbytes = self._store.count_to_root(opened, digests) * opened.space.chunk_bytes
        if len(self._pins) >= _MOST_PINS or sum(pinned.values()) + nbytes > self._limit:
            _log.warning(
                "not pinned: %s for process %d; %s in %d pins are pinned, of at most %s in %d",
                format_size(nbytes), client.pid, format_size(sum(pinned.values())), len(self._pins),
                format_size(self._limit), _MOST_PINS,
            )  # fmt: skip
            return 0
        count = self._store.pin(opened, digests, request.ttl_s)
        if count:
            chunks = (opened, digests[count - 1])
            self._pins.append(_Pin(now + request.ttl_s, chunks, nbytes))
        return count

    def _subscribe(self, request: p.Subscribe) -> Owed:
        boot, log = self._store.boot, self._store.events
        sequence = request.sequence if request.boot == boot else -1

        def ready() -> p.Message | None:
            events, lost = log.after(sequence, request.limit)
            return p.Events(boot, events, lost) if events or lost else None

        return Owed(request.timeout_s, ready, lambda: ready() or p.Events(boot, (), False))

    def _most(self, opened: OpenSpace) -> int:
        """Chunks of one claim."""
        return min(self._limit // opened.space.chunk_bytes, p.most_chunks(len(opened.payload_bytes)))

    def _is_too_much(self, client: Client) -> bool:
        """Whether its process holds more than it may, now that this client has one lease more."""
        if client.share.nbytes <= self._limit and client.share.leased <= _MOST_LEASED:
            return False
        self._too_much(client, "a load is refused")
        return True

    def _too_much(self, client: Client, what: str) -> None:
        _log.warning(
            "process %d holds %s of the pool by loads and stores under way, of at most %s: %s",
            client.pid, format_size(client.share.nbytes), format_size(self._limit), what,
        )  # fmt: skip


def _number() -> int:
    """Of a lease or reservation, as clients know it: who has it has been given it."""
    return secrets.randbits(63)


def _rid(client: Client, rid: str) -> str:
    """Requests of different clients never meet."""
    return f"{client.id.hex()}/{rid}"
