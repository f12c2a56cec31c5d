"""What the producers of a store have to do with each other: they hear of each other through the tiers, what two of them
have stored of the same tokens is compared, and so each is given the other's chunks or not.

The rules are in ``sharing.py``; here they meet the core, the tiers, the journal and the log.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Protocol, TypeVar

import msgspec
import numpy as np

from lmcache_sdk.adoption import Verdict, remembered
from lmcache_sdk.api import Lookup, LookupState
from lmcache_sdk.backend import Backend, Miss
from lmcache_sdk.core import Core, Entry, Request, RequestState, Source, Space
from lmcache_sdk.jobs import OpenSpace, manifests
from lmcache_sdk.keys import EXACT, FOREIGN, Chain, Origin
from lmcache_sdk.observe.logs import logger
from lmcache_sdk.observe.metrics import Metrics
from lmcache_sdk.pool import Pool
from lmcache_sdk.records import HEADER_BYTES
from lmcache_sdk.sharing import Copy, Known, OverlapCheck, Pair, Sharing, first_middle_last
from lmcache_sdk.spec import Namespace, Producer, Share

_log = logger("sharing")
_T = TypeVar("_T")

_OWN = "\0overlap/"  # begins the ids of the requests that are made here
_COPY_S = 5.0  # for a tier to bring a chunk that is to be compared
_MANIFEST_BYTES = 1 << 20
_MEET_S = 30.0  # between two looks at who else stores in a namespace, while it is asked for


class _Event(Protocol):
    def __call__(self, call: Callable[[], _T], /) -> _T: ...


def is_own(request: Request) -> bool:
    """Whether it was made for a comparison, and is nobody's."""
    return request.rid.startswith(_OWN)


class Producers:
    """All of a store, by namespace.

    Args:
        core, spaces: the store's own.
        event: calls with the store's lock held, and carries out what the core answers.
        open_space: of a namespace, producer and fidelity; the lock is held.
        wait: for a request, so many seconds.
        write: gives each tier's writer a task.

    Attributes:
        sharing: who may read whose chunks.
        overlap: compares, in a thread of its own.
    """

    def __init__(
        self,
        core: Core,
        spaces: Mapping[Space, OpenSpace],
        pool: Pool,
        metrics: Metrics,
        *,
        event: _Event,
        open_space: Callable[[Namespace, Producer, str], OpenSpace],
        wait: Callable[[str, float], Lookup],
        write: Callable[[Callable[[Backend], object]], None],
    ) -> None:
        self.sharing = Sharing()
        self.overlap = OverlapCheck(self._copy_of, self._compared)
        self._core = core
        self._spaces = spaces
        self._pool = pool
        self._journal = pool.journal
        self._metrics = metrics
        self._event = event
        self._open_space = open_space
        self._wait = wait
        self._write = write

    # The lock is held

    def sources(self, opened: OpenSpace, chain: Chain, share: Share) -> Sequence[Source]:
        """From where a lookup may take what its own space lacks."""
        others = self.sharing.sources(opened, chain, share)
        derived = self.derived(opened, share) if others else None
        return [Source(derived.space, len(chain)), *others] if derived is not None else others

    def derived(self, opened: OpenSpace, share: Share) -> OpenSpace | None:
        """The space for what an engine computes behind chunks of others; None if it must not be read.

        What any producer may have a part in is kept apart from what was computed behind verified chunks only.
        """
        if share is not Share.ANY and not self.sharing.is_sound(opened):
            return None
        history = self.sharing.history(opened)  # what came of a closed pair stays unread when that is reopened
        fidelity = f"{FOREIGN}.any" if share is Share.ANY else f"{FOREIGN}.{history}" if history else FOREIGN
        return self._open_space(opened.namespace, opened.producer, fidelity)

    def spaces_of(self, opened: OpenSpace) -> list[Space]:
        """All of a producer's: what is exact, and what was derived from others'."""
        whose = (opened.namespace.id, opened.producer.id)
        return [space for origin, space in self._core.spaces.items() if (origin.namespace, origin.producer) == whose]

    def verdicts(self) -> list[bytes]:
        """For the journal; :meth:`remember` reads them."""
        return [msgspec.json.encode(verdict) for verdict in self.sharing.verdicts()]

    def remember(self, verdicts: Iterable[bytes]) -> None:
        """What an earlier life has found out, before anything is open."""
        for verdict in remembered(verdicts, Verdict):
            self.sharing.remember(verdict)

    # The lock is not held

    def meet_when_due(self, opened: OpenSpace, now: float) -> None:
        if now >= opened.meet_at:
            self.meet(opened)

    def meet(self, opened: OpenSpace) -> None:
        """Tell the tiers of a namespace and its producer, and hear who else has stored in it."""
        opened.meet_at = time.monotonic() + _MEET_S
        name, key = opened.namespace.id, opened.manifests[0].key

        def meet(backend: Backend) -> None:
            buffer = memoryview(bytearray(_MANIFEST_BYTES))
            (length,) = backend.get([key], [buffer])
            told = Known.read(buffer[:length]) if not isinstance(length, Miss) else Known()

            def hear() -> Known:
                known = self.sharing.known(name).joined(told)
                for producer in known.producers:
                    self._open_space(opened.namespace, producer, EXACT)
                self._note(self.sharing.learn(name, known))
                opened.manifests = manifests(opened.namespace, opened.producer, known)
                return known

            known = self._event(hear)
            if length in (Miss.TOO_LARGE, Miss.UNREADABLE):  # it may say more than is known here
                _log.warning("the manifest of %s cannot be read (%s) and is left as it is", name, length.value)
            elif known != told:
                backend.put(opened.manifests[:1], if_absent=False)
            backend.put(opened.manifests[1:])

        self._write(meet)

    def reopen(self, namespace: str, names: tuple[str, str]) -> bool:
        """Two producers that disagreed, by their names, are compared anew; False if they are not closed."""

        def reopen() -> list[OpenSpace] | None:
            verdict = self.sharing.reopen(namespace, names)
            if verdict is None:
                return None
            self._note([verdict])
            return [opened for opened in self._spaces.values() if opened.namespace.id == namespace]

        opened = self._event(reopen)
        if opened is None:
            return False
        _log.warning("%s and %s, which differed, are compared anew", *names)
        if opened:
            self.meet(opened[0])  # the tiers are told
        return True

    def end(self) -> None:
        """Nothing is compared any more; the next life will know what has been."""
        self.overlap.end()

        def save() -> None:
            for verdict in self.sharing.verdicts():
                self._save(verdict)

        self._event(save)

    def stored(self, entries: Sequence[Entry]) -> None:
        """Chunks of one space were sealed."""
        picked = [entries[at] for at in first_middle_last(len(entries))]
        self._compare(picked[0].space, [(entry.digest, entry.first_position) for entry in picked], stored=True)

    def found(self, request: Request) -> None:
        """What an engine finds of its own has been proof once, maybe of an earlier life."""
        if not request.limit or is_own(request) or not self.sharing.is_shared(request.space.origin):
            return
        foreign = request.foreign(0, request.limit)
        own, chain = foreign[0].start if foreign else request.limit, request.chain
        digests = chain.digests(own)
        chunks = [
            (digests[at], at * chain.chunk_tokens if chain.positions_known else -1) for at in first_middle_last(own)
        ]
        self._compare(request.space, chunks, stored=False)

    def _compare(self, space: Space, chunks: Sequence[tuple[bytes, int]], *, stored: bool) -> None:
        """Begin to compare them with those of others, as far as that is wanted: they were stored, or were found."""

        def wanted() -> list[tuple[OpenSpace, OpenSpace, bytes, int]]:
            opened = self._spaces.get(space)
            if opened is None or space.origin.fidelity != EXACT:
                return []
            return [(opened, *what) for what in self.sharing.wanted(opened, chunks, stored=stored)]

        for comparison in self._event(wanted):
            self.overlap.begin(*comparison)

    def _copy_of(self, opened: OpenSpace, digest: bytes) -> Copy | None:
        """One chunk, from the pool or a tier; None if it is not there."""
        rid, chain = f"{_OWN}{digest.hex()}", Chain.from_digests([digest], opened.spec.chunk_tokens)

        def lookup() -> Request | None:
            if self.overlap.ended or self._spaces.get(opened.space) is not opened:  # closed meanwhile
                return None
            return self._core.lookup(opened.space, rid, chain, time.monotonic())

        request = self._event(lookup)
        if request is None:
            return None
        try:
            if self._wait(rid, _COPY_S).state is not LookupState.READY:
                return None
            entry = request.entries[0]
            assert entry is not None
            places = [address for address in entry.extents if address is not None]
            records = [
                self._pool.record(address, HEADER_BYTES + nbytes)
                for address, nbytes in zip(places, opened.payload_bytes, strict=True)
            ]
            copies = [np.frombuffer(record, np.uint8, offset=HEADER_BYTES).copy() for record in records]

            def was_held() -> bool:
                """For the request, all the while."""
                return self._core.requests.get(rid) is request and request.state is RequestState.READY

            return Copy(copies, entry.first_position) if self._event(was_held) else None
        finally:
            self._event(lambda: self._core.forget(rid))

    def _compared(
        self, one: OpenSpace, other: OpenSpace, digest: bytes, position: int, errors: Mapping[str, float]
    ) -> None:
        def note() -> tuple[Pair, str, bool, bool] | None:
            pair = self.sharing.pair(one, other)
            before, known = pair.state, digest in pair.digests
            if pair.closed:
                return None
            agreed = pair.note(digest, position, errors)
            if not agreed:
                self._note([self.sharing.close(one, other)])
            if pair.depth >= max(1, 2 * pair.saved):
                self._save(self.sharing.verdict(one, other))
                pair.saved = pair.depth
            return pair, before, known, agreed

        noted = self._event(note)
        if noted is None:
            return
        pair, before, known, agreed = noted
        after = pair.state
        if not (agreed and known):
            self._metrics.overlap_chunks.labels("agreed" if agreed else "disagreed").inc()
        shown = ", ".join(f"{role} {error:.2g}" for role, error in errors.items())
        if after == "closed" != before:
            _log.error(
                "%s and %s differ in the KV of the same tokens (relative error %s, chunk %s at %d): "
                "one of them is wrong, neither reads the other's from now on",
                *pair.names, shown, digest.hex()[:16], position,
            )  # fmt: skip
            self.meet(one)  # the tiers are told
        elif after != before:
            _log.info("%s and %s agree (relative error %s): each reads the other's chunks", *pair.names, shown)

    def _note(self, verdicts: Sequence[Verdict]) -> None:
        """Pairs were closed or reopened: what their producers have found of others is taken back. The lock is held."""
        origins = {Origin(verdict.namespace, producer) for verdict in verdicts for producer in verdict.producers}
        self._core.withdraw([space for origin in origins if (space := self._core.spaces.get(origin)) is not None])
        for verdict in verdicts:
            self._save(verdict)

    def _save(self, verdict: Verdict) -> None:
        if self._journal is not None:
            self._journal.save_space(msgspec.json.encode(verdict))
