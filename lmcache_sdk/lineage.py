"""What an engine's memory holds that is not exact: what it computes behind that is not exact, either."""

from __future__ import annotations

from collections.abc import Iterable

from lmcache_sdk.api import Ticket
from lmcache_sdk.keys import DIGEST_BYTES, Chain

_MOST = 1 << 18  # chunks


class Lineage:
    """Of one cache, and so of one engine's process. An engine may keep blocks and give them to other requests, and does
    not tell when they are gone: so nothing is forgotten here, and beyond a bound nothing counts as exact any more.
    """

    def __init__(self, most: int = _MOST) -> None:
        self._most = most
        self._inexact: set[bytes] = set()

    def loaded(self, ticket: Ticket) -> None:
        """The engine gets these chunks."""
        if ticket.inexact:
            digests = ticket.inexact
            self._add(digests[at : at + DIGEST_BYTES] for at in range(0, len(digests), DIGEST_BYTES))

    def first_inexact(self, chain: Chain, end: int) -> int | None:
        """Which of the chunks before ``end``, which the engine stores, is the first that is not exact; None = all are.

        A chain whose positions are not known may go on behind any chunk.
        """
        if not self._inexact:
            return None
        digests, first = chain.digests(end), 0
        if chain.positions_known and len(self._inexact) < self._most:
            inexact = self._inexact
            found = next((number for number, digest in enumerate(digests) if digest in inexact), None)
            if found is None:
                return None
            first = found
        self._add(digests[first:])
        return first

    def _add(self, digests: Iterable[bytes]) -> None:
        if len(self._inexact) < self._most:
            self._inexact.update(digests)
