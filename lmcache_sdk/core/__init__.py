"""Pure decisions: what is where, who holds it, what to load, write back and evict. See ``core.py``."""

from lmcache_sdk.core.actions import (
    Action,
    DeleteRecords,
    Job,
    JobKind,
    Probe,
    Removed,
    Resolved,
    StartJob,
    Stored,
)
from lmcache_sdk.core.breaker import Breaker
from lmcache_sdk.core.core import Core
from lmcache_sdk.core.entries import Derived, Entry, EntryState, Request, RequestState, Reserved, Source, Space
from lmcache_sdk.core.tiers import Limits

__all__ = [
    "Action",
    "Breaker",
    "Core",
    "DeleteRecords",
    "Derived",
    "Entry",
    "EntryState",
    "Job",
    "JobKind",
    "Limits",
    "Probe",
    "Removed",
    "Request",
    "RequestState",
    "Reserved",
    "Resolved",
    "Source",
    "Space",
    "StartJob",
    "Stored",
]
