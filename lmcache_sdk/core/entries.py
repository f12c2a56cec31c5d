"""What the core knows: chunks in the pool, requests that look for them, and who holds what."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum, StrEnum
from typing import NamedTuple

from lmcache_sdk.core.parted import ByDigest
from lmcache_sdk.keys import Chain, Origin


class EntryState(IntEnum):
    """A chunk's life in the pool."""

    RESERVED = 0
    LOADING = 1
    PUBLISHED = 2
    ADOPTED = 4  # left by an earlier life of the pool, to be verified before its first use
    DEAD = 3  # out of the index; its memory comes back when the last hold is dropped


class Mark(IntEnum):
    """What else is known of a chunk; each a bit."""

    AGAIN = 1  # a request has found it, or it was stored again after it had gone
    DEEP = 2  # one behind it has been written to a tier
    PASSING = 4  # from a tier whose chunks give their room first


class Entry:
    """A chunk in the pool. ``extents[cell]`` is an address, or None for a cell that nobody has reserved."""

    __slots__ = (
        "children",
        "digest",
        "extents",
        "first_position",
        "holds",
        "marks",
        "parent",
        "queued",
        "readable_since",
        "sealed",
        "space",
        "state",
        "tenant",
        "tick",
        "tiers",
        "uses",
        "waiters",
        "written",
    )

    def __init__(self, space: Space, digest: bytes, tenant: str, first_position: int, state: EntryState) -> None:
        self.space = space
        self.digest = digest
        self.tenant = tenant
        self.first_position = first_position
        self.state = state
        self.parent: Entry | None = None
        self.children = 0
        self.extents: list[int | None] = [None] * len(space.cell_bytes)
        self.written = 0  # a bit for each cell
        self.holds = 0
        self.sealed = False
        self.tiers = 0  # a bit for each tier known to have it
        self.queued = 0  # a bit for each tier to which it is written or waits to be
        self.marks = 0
        self.tick = 0
        self.uses = 0  # by requests that found it, see eviction
        self.readable_since = 0.0
        self.waiters: list[tuple[Request, int]] = []


class Space:
    """All entries of one origin. ``cell_bytes[cell]`` is the size of a cell's extent.

    Attributes:
        chunk_tokens: in a chunk.
        deletions: how many chunks have been deleted so far.
        deleting: chunks whose records are about to be deleted from the tiers, and how many times.
        clearing: how many times all of them are about to be.
        block_chunks: how many consecutive chunks a tier likes to get together, see ``packs.py``.
    """

    def __init__(self, origin: Origin, cell_bytes: Sequence[int], chunk_tokens: int) -> None:
        self.origin = origin
        self.chunk_tokens = chunk_tokens
        self.cell_bytes = tuple(cell_bytes)
        self.chunk_bytes = sum(cell_bytes)
        self.all_cells = (1 << len(cell_bytes)) - 1
        self.entries: ByDigest[Entry] = ByDigest()
        self.deletions = 0
        self.deleting: Counter[bytes] = Counter()
        self.clearing = 0
        self.block_chunks = 1


class Source(NamedTuple):
    """Another space than its own from which a request may take chunks, up to the position ``reach``."""

    space: Space
    reach: int


class RequestState(StrEnum):
    """A lookup's life."""

    WALKING = "walking"  # a tier is being asked which chunks it has
    PENDING = "pending"  # chunks are being loaded
    READY = "ready"
    MISS = "miss"
    CLAIMED = "claimed"


class Request:
    """One lookup: the prefix found so far, and what holds it.

    A *run* is a part of the prefix that comes from one space. Each is held by its last chunk.

    Attributes:
        others: from where it takes what its own space lacks, in this order.
        runs: where each begins, and its space.
        source: which of its spaces is being asked for the next chunk; 0 = its own, then ``others``.
        leave_out: see :meth:`Core.lookup`.
    """

    __slots__ = (
        "chain",
        "deadline",
        "deletions",
        "entries",
        "fetch",
        "goals",
        "holds",
        "lacking",
        "lease",
        "leave_out",
        "length",
        "limit",
        "others",
        "own",
        "pending",
        "prefetch",
        "probes",
        "rid",
        "runs",
        "source",
        "space",
        "started",
        "state",
        "tier",
        "total",
        "why",
    )

    def __init__(
        self,
        space: Space,
        rid: str,
        chain: Chain,
        prefetch: bool,
        started: float,
        deadline: float,
        total: int = 0,
        others: Sequence[Source] = (),
        leave_out: int = 0,
    ) -> None:
        self.space = space
        self.rid = rid
        self.chain = chain
        self.length = len(chain)
        self.total = max(total, self.length)  # of the whole prompt, if the chain is only its first part
        self.prefetch = prefetch
        self.started = started
        self.deadline = deadline
        self.state = RequestState.WALKING
        self.own = Source(space, self.length)
        self.others = others
        self.leave_out = leave_out
        self.runs: list[tuple[int, Space]] = []
        self.source = 0
        self.probes = 0  # so many questions to tiers
        self.deletions = self.count_deletions()  # as of when all its entries were known to be in the index
        self.lease = 0  # once it is CLAIMED
        self.entries: list[Entry | None] = []  # None: only a tier has it
        self.fetch: dict[int, int] = {}  # position -> tier
        self.goals: dict[int, int] = {}  # tier -> bytes read from it by when all is here, see ReadingSpeed
        self.tier = 0  # the tier to ask next at this position
        self.lacking = -1  # a tier whose earlier answer already says that it lacks this position
        self.holds: list[Entry] = []
        self.limit = 0
        self.pending = 0  # entries within the limit that are being loaded
        self.why = ""

    def at_hand(self) -> Source:
        """The space that is being asked."""
        return self.others[self.source - 1] if self.source else self.own

    def found(self, entries: Sequence[Entry | None]) -> None:
        """The space that is being asked has these chunks, the next ones; None: in a tier."""
        space = self.at_hand().space
        if entries and (not self.runs or self.runs[-1][1] is not space):
            self.runs.append((len(self.entries), space))
        self.entries += entries

    def space_of(self, position: int) -> Space:
        return next((space for first, space in reversed(self.runs) if first <= position), self.space)

    def last_of_runs(self, boundary: int) -> list[Entry]:
        """Of what was found, up to a boundary; the deepest first."""
        last, end = [], boundary
        for first, _ in reversed(self.runs):
            if first < end:
                entry = self.entries[end - 1]
                assert entry is not None
                last.append(entry)
                end = first
        return last

    def foreign(self, first: int = 0, boundary: int = 1 << 32) -> list[range]:
        """Which chunks of this part of the prefix are not from its own space."""
        found, end = [], min(boundary, len(self.entries))
        for start, space in reversed(self.runs):
            run = range(max(start, first), end)
            if space is not self.space and run:
                found.append(run)
            end = min(end, start)
        return found[::-1]

    def count_deletions(self) -> int:
        """In all of its spaces."""
        count = self.space.deletions
        for other in self.others:
            count += other.space.deletions
        return count

    def sources(self, tiers: Sequence[str]) -> dict[str, int]:
        fetched = Counter(tier for position, tier in self.fetch.items() if position < self.limit)
        found = {tiers[tier]: count for tier, count in fetched.items()}
        from_pool = self.limit - sum(found.values())
        return found | {"pool": from_pool} if from_pool else found


class Derived(NamedTuple):
    """Of a reservation: chunks from ``first`` on were computed behind foreign ones. They go to a space of their own,
    unless they are in one of ``others``.
    """

    first: int
    space: Space
    others: Sequence[Space] = ()


@dataclass(slots=True)
class Lease:
    """A hard lease: every entry is held until the last part is given back."""

    entries: list[Entry]
    parts: set[int]


@dataclass(slots=True)
class Reserved:
    """Room given to a writer, by absolute chunk number: the entry, and which of its cells."""

    entries: dict[int, Entry]
    cells: dict[int, tuple[int, ...]]
