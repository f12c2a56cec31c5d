"""What the scheduler's half and the workers' halves of the connector tell each other, step by step."""

from __future__ import annotations

from dataclasses import dataclass, field

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorMetadata, KVConnectorWorkerMetadata

from lmcache_sdk.api import Ticket


@dataclass(frozen=True, slots=True)
class Load:
    """Tokens ``start .. end - 1`` of a request, to be copied into its blocks.

    Attributes:
        ticket: None if the lease could not be had any more: then all of it has failed.
        blocks: of the request, from its first token on.
    """

    rid: str
    ticket: Ticket | None
    start: int
    end: int
    blocks: list[int]


@dataclass(frozen=True, slots=True)
class Store:
    """Chunks from ``first`` on, to be copied out of a request's blocks.

    Attributes:
        digests: of all chunks from the request's first on, joined.
        blocks: as in Load.
        salted: whether a cache salt is in the digests.
    """

    rid: str
    first: int
    digests: bytes
    blocks: list[int]
    tenant: str
    salted: bool


@dataclass
class StepMeta(KVConnectorMetadata):
    """Scheduler to workers.

    Attributes:
        step: a number to be sent back; None = the scheduler does not measure this step.
        idle: nothing is computed in this step.
        preempted: requests whose blocks may be overwritten in this step; None = any.
        held: requests that have finished, and whose blocks wait for their stores to end.
    """

    step: int | None = None
    idle: bool = False
    loads: list[Load] = field(default_factory=list)
    stores: list[Store] = field(default_factory=list)
    preempted: set[str] | None = field(default_factory=set)
    held: set[str] = field(default_factory=set)


@dataclass
class StepReport(KVConnectorWorkerMetadata):
    """Workers to scheduler, summed over the workers.

    Attributes:
        step: of the StepMeta, if that had one.
        stored: stores that have ended, by request.
        failed: requests of which not all was loaded.
        trouble: why a worker's memory cannot be served; empty if it can.
    """

    step: int | None = None
    stored: dict[str, int] = field(default_factory=dict)
    failed: set[str] = field(default_factory=set)
    trouble: str = ""

    def aggregate(self, other: KVConnectorWorkerMetadata) -> StepReport:
        assert isinstance(other, StepReport)
        stored = dict(self.stored)
        for rid, count in other.stored.items():
            stored[rid] = stored.get(rid, 0) + count
        step = self.step if self.step is not None else other.step
        return StepReport(step, stored, self.failed | other.failed, self.trouble or other.trouble)
