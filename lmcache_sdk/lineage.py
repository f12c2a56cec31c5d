"""What an engine's memory holds that is not exact: what it computes behind that is not exact, either."""

from __future__ import annotations

import threading

from lmcache_sdk.api import Ticket
from lmcache_sdk.keys import Chain

_MOST = 1 << 18  # digests
_MOST_KEPT = 64  # lineages of a process
_kept: dict[str, Lineage] = {}
_keeping = threading.Lock()


class Lineage:
    """Of one engine's process. An engine may keep blocks and give them to other requests, and does not tell when they
    are gone: so nothing is forgotten here, and beyond a bound nothing counts as exact any more.

    Args:
        most: digests.
        splits_chunks: the engine may give a part of a chunk to another request, whose own chunk then has a digest that
            tells nothing of it: once it has loaded what is not exact, nothing counts as exact any more.
    """

    def __init__(self, most: int = _MOST, *, splits_chunks: bool = False) -> None:
        self._most = 1 if splits_chunks else most
        self._inexact: set[bytes] = set()

    @classmethod
    def of_process(cls, namespace: str) -> Lineage:
        """The one of all caches of this process for a namespace, by its id; it outlives them, as what an engine keeps
        may do.
        """
        with _keeping:
            if len(_kept) >= _MOST_KEPT and namespace not in _kept:
                namespace = ""  # all further ones are one
            return _kept.setdefault(namespace, cls())

    def loaded(self, ticket: Ticket) -> None:
        """The engine gets these chunks. All that lies behind the first one of them that is not exact has that one's
        digest in its chain.
        """
        if ticket.inexact and len(self._inexact) < self._most:
            self._inexact.add(ticket.inexact)

    def first_inexact(self, chain: Chain, end: int) -> int | None:
        """Which of the chunks before ``end``, which the engine stores, is the first that is not exact; None = all are.

        A chain whose positions are not known may go on behind any chunk.
        """
        inexact = self._inexact
        if not inexact:
            return None
        if not chain.positions_known or len(inexact) >= self._most:
            return 0
        return next((number for number, digest in enumerate(chain.digests(end)) if digest in inexact), None)
