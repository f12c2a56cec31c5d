"""Which producers of a namespace read each other's chunks, and the proof that they may.

KV that two engines computed of the same tokens is the same but for rounding, unless one of them has another convention:
then it is garbage that nothing else would show. So what both have stored is compared, until enough of it agrees; and a
part of it for ever. See ``docs/concepts.md``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Annotated, Any, NamedTuple, TypeVar

import msgspec
import numpy as np
import numpy.typing as npt

from lmcache_sdk.adoption import Verdict
from lmcache_sdk.api import PairStats
from lmcache_sdk.core import Source
from lmcache_sdk.jobs import OpenSpace
from lmcache_sdk.keys import Chain, Origin
from lmcache_sdk.spec import KVSpec, Producer, Share, canonical_json
from lmcache_sdk.workers import Worker

_T = TypeVar("_T")

# Of the relative error of each head of a layer, in one chunk. Seen between engines in bfloat16 (SmolLM2, 30 layers of 3
# heads, 64 tokens): up to 0.0176 for K and 0.0363 for V; with slightly different weights, 0.14 and 0.31 or more.
BOUNDS = {"k": 0.03, "v": 0.06, "latent": 0.06}
LEAVE_OUT = 64  # of the prefixes that an engine could have from others, one in so many it computes for the comparison
NAME = 300  # characters of a producer's
_ENOUGH = 3  # chunks that agree
_REMEMBERED = 64  # positions and digests of a pair
_MOST_PRODUCERS = 32  # of a namespace
_MOST_SOURCES = 8  # of one lookup
_MOST_WAITING = 256  # comparisons; beyond it none is begun
_MOST_TRIED = 4096
_MOST_AGREED = 256  # pairs that are not served at present
_FLOATS = ("bfloat16", "float16", "float32")
_Key = tuple[str, str, str]
_Id = Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{16}\\Z")]  # of a producer


class _Raw(msgspec.Struct):
    """Of a manifest, entry by entry."""

    producers: Sequence[Any] = ()
    closed: Sequence[Any] = ()


def _readable(entries: Iterable[Any], kind: type[_T]) -> list[_T]:
    found = []
    for entry in entries:
        with suppress(msgspec.ValidationError):
            found.append(msgspec.convert(entry, kind))
    return found


def is_name(producer: Producer) -> bool:
    """Whether it can be listed and logged."""
    return len(producer.name) <= NAME and producer.name.isprintable()


class Turn(msgspec.Struct, frozen=True, array_like=True, order=True):
    """How often two producers, by their ids in order, were closed and reopened: odd = they are closed."""

    first: _Id
    second: _Id
    turn: Annotated[int, msgspec.Meta(ge=1, lt=1 << 32)] = 1  # it is in the names of spaces


class Known(msgspec.Struct, frozen=True):
    """What stores that share a tier tell each other of a namespace, in its manifest. It only grows, so that nothing is
    lost for long if two of them write at once.

    Attributes:
        closed: pairs that disagree, or did until they were reopened.
    """

    producers: tuple[Producer, ...] = ()
    closed: tuple[Turn, ...] = ()

    @classmethod
    def read(cls, manifest: bytes | memoryview) -> Known:
        """What can be read of it: others write it too, and what is closed must not be lost with a broken entry."""
        try:
            raw = msgspec.json.decode(manifest, type=_Raw)
        except msgspec.MsgspecError:
            return cls()
        producers = [producer for producer in _readable(raw.producers, Producer) if is_name(producer)]
        return cls(tuple(producers), tuple(_readable(raw.closed, Turn)))

    def joined(self, other: Known) -> Known:
        producers = {producer.id: producer for producer in (*self.producers, *other.producers)}
        kept = sorted(producers.values(), key=lambda producer: producer.id)[:_MOST_PRODUCERS]
        latest = {(turn.first, turn.second): turn for turn in sorted((*self.closed, *other.closed))}
        return Known(tuple(kept), tuple(latest.values()))


@dataclass
class Pair:
    """Two producers of a namespace.

    Attributes:
        positions, digests: of the chunks that agreed, as many as matter. One whose position neither of the two has told
            proves nothing of any depth, and so has none here.
        tried: digests that need not be looked at again soon.
        worst: role -> the largest relative error of a head.
        why: they cannot be compared.
        proven: the depth that an earlier life had found.
        saved: the depth that the next life will know.
    """

    namespace: str
    names: tuple[str, str]
    chunk_tokens: int
    why: str = ""
    closed: bool = False
    proven: int = 0
    saved: int = 0
    compared: int = 0
    failed: int = 0
    positions: set[int] = field(default_factory=set)
    digests: set[bytes] = field(default_factory=set)
    tried: set[bytes] = field(default_factory=set)
    worst: dict[str, float] = field(default_factory=dict)

    @property
    def depth(self) -> int:
        """Up to which position chunks are served, in tokens: as far as the deepest that agreed, once three have, one of
        them the first of a request.
        """
        enough = self.proven or (0 in self.positions and len(self.positions) >= _ENOUGH)
        if self.closed or not enough:
            return 0
        return max(self.proven, max(self.positions, default=-self.chunk_tokens) + self.chunk_tokens)

    @property
    def state(self) -> str:
        if self.closed:
            return "closed"
        return "open" if self.depth else "checking"

    def anew(self) -> Pair:
        """Of which nothing is known."""
        return Pair(self.namespace, self.names, self.chunk_tokens, self.why)

    def reach(self, chain: Chain) -> int:
        """How many chunks of a request may be served. Where its positions are not known, all, once the pair is open."""
        if chain.positions_known:
            return min(len(chain), self.depth // self.chunk_tokens)
        return len(chain) if self.state == "open" else 0

    def wants(self, digest: bytes, position: int, *, stored: bool) -> bool:
        """Whether to compare a chunk that has been stored just now, or was found."""
        if self.closed or self.why:
            return False
        return stored or (digest not in self.tried and (self.state == "checking" or position >= self.depth))

    def note(self, digest: bytes, position: int, errors: Mapping[str, float]) -> bool:
        """A chunk has been compared; whether they agree. One that agreed before is not counted again."""
        known = digest in self.digests
        agrees = all(error < BOUNDS[role] for role, error in errors.items())  # which what is no number does not
        self.compared += not (known and agrees)
        self.worst = {role: max(error, self.worst.get(role, 0.0)) for role, error in errors.items()}
        if not agrees:
            self.failed += 1
            self.closed = True
            return False
        if position >= 0 and (len(self.positions) < _REMEMBERED or position > max(self.positions)):
            self.positions.add(position)
        if len(self.digests) < _REMEMBERED:
            self.digests.add(digest)
        return True


class Sharing:
    """The producers of each namespace, and what is known of each two of them. The store's lock guards it.

    A key is a namespace and two producers' ids, in order.
    """

    def __init__(self) -> None:
        self._families: dict[str, dict[str, OpenSpace]] = {}  # by namespace and producer: what is exact
        self._pairs: dict[_Key, Pair] = {}
        self._turns: dict[str, dict[tuple[str, str], int]] = {}
        self._agreed: dict[_Key, Verdict] = {}  # of pairs that are not served at present

    def join(self, opened: OpenSpace) -> None:
        """Native forms are no one's but an engine's own."""
        if opened.namespace.form != "canonical":
            return
        family = self._families.setdefault(opened.namespace.id, {})
        if len(family) < _MOST_PRODUCERS:
            family[opened.producer.id] = opened
            for other in self.others(opened):
                self.pair(opened, other)

    def leave(self, opened: OpenSpace) -> None:
        family = self._families.get(opened.namespace.id, {})
        if family.get(opened.producer.id) is not opened:
            return
        del family[opened.producer.id]
        if not family:
            del self._families[opened.namespace.id]
        for key, pair in list(self._pairs.items()):
            if key[0] == opened.namespace.id and opened.producer.id in key and not pair.closed:
                self._keep(self._verdict(key))
                del self._pairs[key]

    def others(self, opened: OpenSpace) -> list[OpenSpace]:
        family = self._families.get(opened.namespace.id, {})
        if opened.producer.id not in family:
            return []
        return [other for other in family.values() if other.producer != opened.producer]

    def pair(self, one: OpenSpace, other: OpenSpace) -> Pair:
        namespace = one.namespace
        first, second = sorted((one.producer, other.producer), key=lambda producer: producer.id)
        key = (namespace.id, first.id, second.id)
        pair = self._pairs.get(key)
        if pair is None:
            dtypes = sorted({group.dtype for group in namespace.spec.groups} - set(_FLOATS))
            why = f"{', '.join(dtypes)} is not compared" if dtypes else ""
            pair = Pair(namespace.id, (first.name, second.name), namespace.spec.chunk_tokens, why)
            pair.closed = bool(self._turn(key) % 2)
            agreed = self._agreed.pop(key, None)
            if agreed is not None and agreed.turn == self._turn(key):
                pair.proven = pair.saved = agreed.depth
                pair.compared, pair.worst = agreed.compared, dict(agreed.worst)
            self._pairs[key] = pair
        return pair

    def is_shared(self, origin: Origin) -> bool:
        """Whether there is anybody to share with."""
        return len(self._families.get(origin.namespace, ())) > 1

    def sources(self, opened: OpenSpace, chain: Chain, share: Share) -> list[Source]:
        """The others from whom chunks may come that an engine's own producer lacks."""
        found: list[Source] = []
        if share is Share.OWN or not self.is_shared(opened.space.origin):
            return found
        for other in self.others(opened):
            reach = len(chain) if share is Share.ANY else self.pair(opened, other).reach(chain)
            if reach:
                found.append(Source(other.space, reach))
        return found[:_MOST_SOURCES]

    def wanted(
        self, opened: OpenSpace, chunks: Sequence[tuple[bytes, int]], *, stored: bool
    ) -> list[tuple[OpenSpace, bytes, int]]:
        """With whose to compare which of some chunks (digest, position)."""
        found = []
        for other in self.others(opened):
            pair = self.pair(opened, other)
            for digest, position in chunks:
                if pair.wants(digest, position, stored=stored):
                    pair.tried.add(digest)
                    found.append((other, digest, position))
            if len(pair.tried) > _MOST_TRIED:
                pair.tried.clear()
        return found

    def closed(self, namespace: str) -> list[tuple[str, str]]:
        """Pairs of producers' ids that disagree."""
        return [pair for pair, turn in self._turns.get(namespace, {}).items() if turn % 2]

    def is_sound(self, opened: OpenSpace) -> bool:
        """Whether what was computed behind others' chunks may still be read: not if one of these has been closed."""
        return not any(opened.producer.id in pair for pair in self.closed(opened.namespace.id))

    def history(self, opened: OpenSpace) -> str:
        """8 hex digits for which pairs with this producer were closed or reopened, how often; empty if none was."""
        turns = self._turns.get(opened.namespace.id, {})
        its = [(*pair, turn) for pair, turn in sorted(turns.items()) if opened.producer.id in pair]
        return hashlib.sha256(canonical_json(its)).hexdigest()[:8] if its else ""

    def close(self, one: OpenSpace, other: OpenSpace) -> Verdict:
        """Until somebody reopens them."""
        first, second = sorted((one.producer.id, other.producer.id))
        turns = self._turns.setdefault(one.namespace.id, {})
        turns[first, second] = turns.get((first, second), 0) | 1
        self.pair(one, other).closed = True
        return self.verdict(one, other)

    def reopen(self, namespace: str, names: tuple[str, str]) -> Verdict | None:
        """The two producers, by their names, are to be compared anew; None if they are not closed."""
        for key, pair in self._pairs.items():
            if key[0] == namespace and set(pair.names) == set(names) and pair.closed:
                self._turns[namespace][key[1:]] += 1
                self._pairs[key] = pair.anew()
                return self._verdict(key)
        return None

    def known(self, namespace: str) -> Known:
        """For other stores."""
        producers = tuple(opened.producer for opened in self._families.get(namespace, {}).values())
        return Known(producers, tuple(Turn(*pair, turn) for pair, turn in self._turns.get(namespace, {}).items()))

    def learn(self, namespace: str, known: Known) -> list[Verdict]:
        """What is closed or reopened elsewhere is so here; the answer is what was not."""
        news = []
        for first, second, turn in map(msgspec.structs.astuple, known.closed):
            key = (namespace, first, second)
            if turn > self._turn(key):
                self._turns.setdefault(namespace, {})[first, second] = turn
                if (pair := self._pairs.get(key)) is not None:
                    self._pairs[key] = pair.anew()
                    self._pairs[key].closed = bool(turn % 2)
                news.append(self._verdict(key))
        for (where, *_), pair in self._pairs.items():
            if where == namespace:
                pair.tried.clear()
        return news

    def remember(self, verdict: Verdict) -> None:
        """What an earlier life has found out, before the pair is served."""
        key = (verdict.namespace, *verdict.producers)
        if verdict.turn >= self._turn(key):
            if verdict.turn:
                self._turns.setdefault(verdict.namespace, {})[verdict.producers] = verdict.turn
            self._keep(verdict)

    def verdict(self, one: OpenSpace, other: OpenSpace) -> Verdict:
        first, second = sorted((one.producer.id, other.producer.id))
        return self._verdict((one.namespace.id, first, second))

    def verdicts(self) -> list[Verdict]:
        """For the next life."""
        keys = {(namespace, *pair) for namespace, turns in self._turns.items() for pair in turns}
        found = [self._verdict(key) for key in sorted({*keys, *self._pairs, *self._agreed})]
        return [verdict for verdict in found if verdict.turn or verdict.depth]

    def _turn(self, key: _Key) -> int:
        return self._turns.get(key[0], {}).get(key[1:], 0)

    def _verdict(self, key: _Key) -> Verdict:
        turn, pair, agreed = self._turn(key), self._pairs.get(key), self._agreed.get(key)
        if pair is not None and pair.depth:
            return Verdict(key[0], key[1:], turn, pair.depth, pair.compared, dict(pair.worst))
        return agreed if agreed is not None and agreed.turn == turn else Verdict(key[0], key[1:], turn)

    def _keep(self, verdict: Verdict) -> None:
        if verdict.depth:
            self._agreed[verdict.namespace, *verdict.producers] = verdict
            while len(self._agreed) > _MOST_AGREED:
                del self._agreed[next(iter(self._agreed))]

    def stats(self) -> tuple[PairStats, ...]:
        return tuple(
            PairStats(p.namespace, p.names, p.state, p.compared, p.failed, p.depth, dict(p.worst), p.why)
            for p in self._pairs.values()
        )


def first_middle_last(count: int) -> list[int]:
    """Of so many chunks, those that are compared."""
    return sorted({0, count // 2, count - 1}) if count else []


class Copy(NamedTuple):
    """Of a chunk: its cells, and the position of its first token, -1 where its author has not told."""

    cells: list[npt.NDArray[np.uint8]]
    position: int


class OverlapCheck:
    """Compares what producers have stored of the same tokens, in a thread of its own.

    Args:
        copy: a chunk, by its digest, from the pool or a tier; None if it is not there.
        tell: what has come of a comparison: the two, digest, position, errors.

    Attributes:
        ended: nothing is compared any more.
    """

    def __init__(
        self,
        copy: Callable[[OpenSpace, bytes], Copy | None],
        tell: Callable[[OpenSpace, OpenSpace, bytes, int, Mapping[str, float]], None],
    ) -> None:
        self.worker = Worker("overlap")
        self.ended = False
        self._copy = copy
        self._tell = tell

    def begin(self, one: OpenSpace, other: OpenSpace, digest: bytes, position: int) -> None:
        """Unless too many wait; another chunk will do."""
        if not self.ended and self.worker.waiting < _MOST_WAITING:
            self.worker.submit(lambda: self._compare(one, other, digest, position))

    def end(self) -> None:
        """Compare no more: the tiers are about to be closed. What is being compared may take a moment yet."""
        self.ended = True
        self.worker.stop()

    def _compare(self, one: OpenSpace, other: OpenSpace, digest: bytes, position: int) -> None:
        if self.ended:
            return
        theirs = self._copy(other, digest)
        ours = self._copy(one, digest) if theirs is not None and not self.ended else None
        if ours is not None and theirs is not None:
            # A digest has one position, whoever tells it.
            position = max(position, ours.position, theirs.position)
            self._tell(one, other, digest, position, relative_errors(one.spec, ours.cells, theirs.cells))


def relative_errors(
    spec: KVSpec, ours: Sequence[npt.NDArray[np.uint8]], theirs: Sequence[npt.NDArray[np.uint8]]
) -> dict[str, float]:
    """Role -> the largest relative error (Frobenius norm) of a head of a layer, between two chunks.

    Args:
        ours, theirs: the bytes of each cell, in canonical form.
    """
    worst: dict[str, float] = {}
    for cell, our, their in zip(spec.cells, ours, theirs, strict=True):
        group = spec.group(cell.group)
        shape = (len(cell.layers), len(group.roles), spec.chunk_tokens, cell.heads[1] - cell.heads[0], -1)
        a, b = (_floats(data, group.dtype).reshape(shape).astype(np.float64) for data in (our, their))
        with np.errstate(all="ignore"):
            differences, sizes = (np.sqrt((values**2).sum((2, 4))) for values in (a - b, a))
            errors = np.where(differences == 0, 0.0, differences / sizes)  # [layer, role, head]
        errors[np.isnan(errors)] = np.inf  # what is no number is no agreement
        for role, error in zip(group.roles, errors.max((0, 2)).tolist(), strict=True):
            worst[role] = max(worst.get(role, 0.0), error)
    return worst


def _floats(data: npt.NDArray[np.uint8], dtype: str) -> npt.NDArray[np.float32]:
    if dtype == "bfloat16":
        return (data.view("<u2").astype("<u4") << np.uint32(16)).view("<f4")
    return data.view("<f2" if dtype == "float16" else "<f4").astype("<f4")
