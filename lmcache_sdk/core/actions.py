"""What the core asks its shell to do, or tells it."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from lmcache_sdk.core.entries import Entry, Request, Source
from lmcache_sdk.keys import Origin


class JobKind(StrEnum):
    """Read from a tier; check what an earlier life left; take checksums; write to a tier."""

    FETCH = "fetch"
    VERIFY = "verify"
    SEAL = "seal"
    PUT = "put"


@dataclass(eq=False, slots=True)
class Job:
    """Work for the shell's threads. It holds its entries until :meth:`Core.job_done`, whenever that comes.

    Attributes:
        tier: -1 for SEAL and VERIFY.
        ahead: of a read: bytes that its tier reads first, its own included; they have their time before the deadline.
        leaving: of a write of what is to be evicted then: when it began, as :attr:`Index.tick`; else None.
    """

    id: int
    kind: JobKind
    tier: int
    entries: list[Entry]
    deadline: float
    ahead: int = 0
    abandoned: bool = False
    started: bool = False
    leaving: int | None = None


@dataclass(frozen=True, slots=True)
class StartJob:
    """Run a job; answer by :meth:`Core.job_done`."""

    job: Job


@dataclass(eq=False, slots=True)
class Probe:
    """Ask a tier how many chunks of a space it has from ``start`` on; answer by :meth:`Core.probed`."""

    request: Request
    source: Source
    tier: int
    start: int
    deadline: float
    abandoned: bool = False
    started: bool = False


@dataclass(eq=False, slots=True)
class DeleteRecords:
    """Delete these chunks' records (None = all of the origin that can be listed) from all tiers, after the writes that
    were started before; tell each tier's end by :meth:`Core.records_deleted`. Until then none is loaded.

    Attributes:
        left: tiers that have not ended.
    """

    origin: Origin
    digests: tuple[bytes, ...] | None
    left: int


@dataclass(frozen=True, slots=True)
class Resolved:
    """A request is no longer PENDING."""

    request: Request


@dataclass(frozen=True, slots=True)
class Stored:
    """A chunk has become readable. ``parent`` is the digest of the chunk before it, if that is known."""

    origin: Origin
    digest: bytes
    parent: bytes | None


@dataclass(frozen=True, slots=True)
class Removed:
    """An entry left the index. ``reason``: evicted, quota, deleted, cleared, aborted, failed, abandoned.

    Attributes:
        readable_since: when it became readable in this life; 0 if it did not.
    """

    origin: Origin
    digest: bytes
    reason: str
    readable_since: float = 0.0


Action = StartJob | Probe | DeleteRecords | Resolved | Stored | Removed
