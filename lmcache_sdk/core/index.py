"""The chunks in the pool: who holds them, which one follows which, and room for more by eviction."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence

from lmcache_sdk.core.actions import Action, Removed
from lmcache_sdk.core.entries import Entry, EntryState, Mark, Space
from lmcache_sdk.core.extents import Extents, Note, round_up
from lmcache_sdk.eviction import Policy

_ANCESTORS = 4096  # how far back is looked before a chunk that has followers gets a parent


class Index:
    """All entries, and the extents that they lie in. An entry that nobody holds and nothing follows may be evicted.

    Args:
        eviction_factor: see :class:`~lmcache_sdk.core.tiers.Limits`.
        actions, counters: the core's.

    Attributes:
        usage: tenant -> bytes.
        tick: counts uses.
        leave: asked with a chunk that is to be evicted, and the time: True = it is written first, and held by that.
    """

    def __init__(
        self,
        extents: Extents,
        policy: Policy[Entry],
        eviction_factor: int,
        actions: list[Action],
        counters: Counter[str],
    ) -> None:
        self.extents = extents
        self.policy = policy
        self.usage: Counter[str] = Counter()
        self._eviction_factor = eviction_factor
        self._actions = actions
        self._counters = counters
        self.tick = 0
        self.leave: Callable[[Entry, float], bool] = lambda entry, now: False

    def add(self, space: Space, digest: bytes, tenant: str, first_position: int, state: EntryState) -> Entry:
        """A new entry without extents."""
        entry = Entry(space, digest, tenant, first_position, state)
        self.touch(entry)
        space.entries[digest] = entry
        return entry

    def link(self, entry: Entry, parent: Entry | None) -> None:
        """Tell an entry its parent, if it has none that lives."""
        if parent is None or entry.parent is parent:
            return
        if entry.parent is not None and entry.parent.state is not EntryState.DEAD:
            return
        # Digests are what clients say, and none of a circle would ever be evicted.
        if parent is entry or (entry.children and not self._ends_without(parent, entry)):
            return
        entry.parent = parent
        parent.children += 1
        self.policy.discard(parent)

    def hold(self, entry: Entry) -> None:
        """Keep an entry's memory until :meth:`drop`, and the entry from eviction."""
        entry.holds += 1
        if entry.holds == 1:
            self.policy.discard(entry)

    def drop(self, entry: Entry) -> None:
        """End one hold."""
        entry.holds -= 1
        if entry.holds == 0:
            if entry.state is EntryState.DEAD:
                self._free(entry)
            elif entry.children == 0:
                self.policy.insert(entry, entry.tick)

    def touch(self, entry: Entry) -> None:
        """Mark as just used; the entry is new or held by the caller, so the policy does not have it."""
        self.tick += 1
        entry.tick = 0 if entry.marks & Mark.PASSING else self.tick

    def set_sealed(self, entry: Entry) -> None:
        """Its records are complete."""
        if not entry.sealed:
            entry.sealed = True
            if entry.state is not EntryState.DEAD:
                self.note(entry, Note.SEALED)

    def note(self, entry: Entry, what: Note) -> None:
        """Log it for each of the entry's extents."""
        if self.extents.log is not None:
            for address in entry.extents:
                if address is not None:
                    self.extents.note(address, what)

    def remove(self, entry: Entry, reason: str) -> None:
        """Take an entry out of the index; its memory is freed, or quarantined until the last hold is dropped."""
        del entry.space.entries[entry.digest]
        entry.state = EntryState.DEAD
        self.policy.discard(entry)
        self._counters[f"removed_chunks.{reason}"] += 1
        self._actions.append(Removed(entry.space.origin, entry.digest, reason, entry.readable_since))
        parent, entry.parent = entry.parent, None
        if parent is not None:
            parent.children -= 1
            parent.tick = max(parent.tick, entry.tick)
            if parent.children == 0 and parent.holds == 0 and parent.state is not EntryState.DEAD:
                self.policy.insert(parent, parent.tick)
        if entry.holds:
            for address in entry.extents:
                if address is not None:
                    self.extents.quarantine(address)
        else:
            self._free(entry)

    def unwrite(self, entry: Entry, cells: Sequence[int]) -> None:
        """Reserved cells were not written; ends the writer's hold."""
        if entry.state is not EntryState.DEAD:
            for cell in cells:
                self._free_cell(entry, cell)
            if all(address is None for address in entry.extents):
                self.remove(entry, "aborted")
        self.drop(entry)

    def adopt(self, entry: Entry, extents: Sequence[int]) -> None:
        """Give an entry extents that are allocated already."""
        entry.extents = list(extents)
        self._charge(entry.tenant, self._bytes_of(entry))

    def give(self, entry: Entry, tenant: str) -> None:
        """What an earlier life left is nobody's; it becomes the first asker's, as far as that one's quota goes.

        The entry is held, so the policy does not have it.
        """
        nbytes = self._bytes_of(entry)
        if entry.tenant == "" != tenant and not self.policy.full(tenant, nbytes):
            self._charge("", -nbytes)
            entry.tenant = tenant
            self._charge(tenant, nbytes)

    def allocate(self, entry: Entry, cells: Iterable[int], now: float) -> str:
        """Extents for the cells, evicting as needed; all or nothing. The answer is what is lacking, if anything."""
        done: list[int] = []
        for cell in cells:
            nbytes = round_up(entry.space.cell_bytes[cell])
            address = self._room(entry.tenant, nbytes, now)
            if address is None:
                lack = "quota" if self.policy.full(entry.tenant, nbytes) else "pool_full"
                for earlier in done:
                    self._free_cell(entry, earlier)
                return lack
            entry.extents[cell] = address
            self._charge(entry.tenant, nbytes)
            done.append(cell)
        return ""

    def _ends_without(self, last: Entry, entry: Entry) -> bool:
        """Whether the way up from ``last`` is known not to lead to the entry."""
        ancestor: Entry | None = last
        for _ in range(_ANCESTORS):
            if ancestor is None or ancestor is entry:
                return ancestor is None
            ancestor = ancestor.parent
        return False

    def _room(self, tenant: str, nbytes: int, now: float) -> int | None:
        budget = self._eviction_factor * nbytes
        while True:
            full = self.policy.full(tenant, nbytes)
            address = None if full else self.extents.allocate(nbytes)
            if address is not None:
                return address
            victim = self.policy.victim(tenant, nbytes) if budget > 0 else None
            if victim is None:
                return None
            budget -= victim.space.chunk_bytes
            if not self.leave(victim, now):
                self.remove(victim, "quota" if full else "evicted")

    def _free(self, entry: Entry) -> None:
        for cell in range(len(entry.extents)):
            self._free_cell(entry, cell)

    def _free_cell(self, entry: Entry, cell: int) -> None:
        address, entry.extents[cell] = entry.extents[cell], None
        if address is not None:
            self._charge(entry.tenant, -self.extents.size_of(address))
            self.extents.free(address)

    def _bytes_of(self, entry: Entry) -> int:
        return sum(self.extents.size_of(address) for address in entry.extents if address is not None)

    def _charge(self, tenant: str, nbytes: int) -> None:
        self.usage[tenant] += nbytes
        if not self.usage[tenant]:
            del self.usage[tenant]  # tenants come from requests: nothing is kept of those that have nothing
        self.policy.charge(tenant, nbytes)
