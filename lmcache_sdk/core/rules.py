"""How the core uses one tier."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Write(StrEnum):
    """When a chunk is written to a tier: as soon as it is sealed; when it has stayed for a while; or when the pool
    needs its room.
    """

    THROUGH = "through"
    BACK = "back"
    EVICT = "evict"


class Admit(StrEnum):
    """Which chunks are written: all; or those that were found by a request, or stored again after they had gone."""

    ALWAYS = "always"
    SECOND = "second"


@dataclass(frozen=True, slots=True)
class TierRules:
    """What a user may choose for each tier, see ``docs/tiers.md``. Times in seconds.

    Attributes:
        back_s: how long a chunk stays before it is written, with ``write=back``.
        min_tokens: a prefix is written from this length on.
        promote: what was loaded from here is kept like any other chunk, and goes to the tiers before this one, too;
            otherwise it gives its room first.
        missing_s: how long it is remembered that the tier lacks a chunk. Not for a tier that answers at once.
        probe_s: how long the tier may take to say what it has, before it is passed over.
        failures, retry_s: after so many failures in a row it is left alone for so long, then longer.
    """

    write: Write = Write.THROUGH
    back_s: float = 5.0
    admit: Admit = Admit.ALWAYS
    min_tokens: int = 0
    promote: bool = True
    missing_s: float = 2.0
    probe_s: float = 2.0
    failures: int = 3
    retry_s: float = 2.0
