"""What an earlier life of the pool left: chunks to be adopted, and memory that its clients may still touch."""

from __future__ import annotations

from collections.abc import Sequence

from lmcache_sdk.core.entries import Entry, EntryState, Space
from lmcache_sdk.core.index import Index


class EarlierLife:
    """See the module's docstring.

    Attributes:
        entries: its clients may still read these.
        extents: they may still write to these.
    """

    def __init__(self, index: Index) -> None:
        self.entries: list[Entry] = []
        self.extents: list[int] = []
        self._index = index

    def adopt(self, space: Space, digest: bytes, extents: Sequence[int], first_position: int, *, leased: bool) -> None:
        """Take over a sealed chunk that is not in the space yet. Call with the deepest chunks first.

        Args:
            extents: the address of each cell; already taken, see :meth:`Extents.take`.
            leased: a client of the earlier life may still read it.
        """
        entry = self._index.add(space, digest, "", first_position, EntryState.ADOPTED)
        self._index.adopt(entry, extents)
        entry.written = space.all_cells
        entry.sealed = True
        if leased:
            entry.holds += 1
            self.entries.append(entry)
        else:
            self._index.policy.insert(entry, entry.tick)

    def quarantine(self, address: int) -> None:
        """Keep memory out of use (already taken) that a client of the earlier life may still write to."""
        self._index.extents.quarantine(address)
        self.extents.append(address)

    def end(self) -> None:
        """No client of the earlier life reads or writes the pool any more."""
        entries, self.entries = self.entries, []
        addresses, self.extents = self.extents, []
        for address in addresses:
            self._index.extents.free(address)
        for entry in entries:
            self._index.drop(entry)
