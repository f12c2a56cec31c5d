"""A seeded world around the core: tiers that fail, forget and answer late, under any rules; engines that come and go,
tenants that flood a small pool.

The pool's memory is modelled as address -> what was last written there, so that a use of memory under a lease by
somebody else shows as wrong content.
"""

from __future__ import annotations

import os
import random
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from lmcache_sdk.backend import leading
from lmcache_sdk.core import (
    Core,
    DeleteRecords,
    Derived,
    Entry,
    EntryState,
    Job,
    JobKind,
    Limits,
    Probe,
    Request,
    RequestState,
    Reserved,
    Resolved,
    Source,
    Space,
    StartJob,
)
from lmcache_sdk.core.extents import Extents
from lmcache_sdk.core.rules import Admit, TierRules, Write
from lmcache_sdk.eviction import LRU, S3FIFO, Fair
from lmcache_sdk.keys import Chain, Origin

CHUNK = 2
BASE_SEED = int(os.environ.get("LMCACHE_SDK_SEED", "20261124"))


@dataclass
class Leased:
    id: int
    parts: set[int]
    contents: list[tuple[int, tuple[bytes, int]]]  # address -> (digest, cell) that must be there
    earlier: bool = False  # given by a daemon that has died since


class WatchedFair(Fair[Entry]):
    """Holds every eviction to the rules between tenants, computed from the core's own state."""

    core: Core

    def __init__(
        self, pool_bytes: int, weights: dict[str, int], quotas: dict[str, int], queue: type[LRU[Entry] | S3FIFO[Entry]]
    ) -> None:
        super().__init__(pool_bytes, weights=weights, quotas=quotas, queue=queue)
        self.pool_bytes, self.weights, self.quotas = pool_bytes, weights, quotas

    def victim(self, tenant: str, nbytes: int) -> Entry | None:
        usage = self.core.usage
        present = {*usage, tenant}
        level = self.pool_bytes / sum(self.weights.get(name, 1) for name in present)

        def above(name: str, more: int = 0) -> bool:
            return (usage[name] + more) / self.weights.get(name, 1) > level

        evictable = {e.tenant for s in self.core.spaces.values() for e in s.entries.values() if e in self}
        victim = super().victim(tenant, nbytes)
        giver = victim.tenant if victim is not None else None
        if usage[tenant] + nbytes > self.quotas.get(tenant, self.pool_bytes):
            assert giver in (None, tenant), "room beyond a quota is one's own"
        elif giver is None:
            assert tenant not in evictable and not any(above(name) for name in evictable)
        elif giver != tenant and not above(giver):
            assert not above(tenant, nbytes), "who is above its share took from who is not"
            assert not any(above(name) for name in evictable), "somebody else is above its share"
        return victim


class Simulator:
    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        r = self.random
        self.now = 0.0
        self.sizes = [r.choice([640, 1024, 4096]) for _ in range(r.randint(1, 3))]
        self.tier_names = [(f"tier{i}", r.random() < 0.5) for i in range(r.randint(0, 3))]
        self.limits = Limits(
            hold_s=r.choice([1.0, 20.0]),
            fetch_s=2.0,
            put_s=4.0,
            batch_bytes=r.choice([1, 600]),
            queue_bytes=0,
        )
        self.rules = [
            TierRules(
                write=r.choice(list(Write)),
                back_s=2.0,
                admit=r.choice(list(Admit)),
                min_tokens=r.choice([0, 0, 3 * CHUNK]),
                promote=r.random() < 0.7,
                missing_s=r.choice([0.0, 2.0]),
                probe_s=2.0,
            )
            for _ in self.tier_names
        ]
        self.queue: type[LRU[Entry] | S3FIFO[Entry]] = r.choice([LRU, S3FIFO])
        self.seal = bool(self.tier_names) or r.random() < 0.5
        self.flooded = r.random() < 0.5
        self.tenants = ["", "a", "b", "c"][: r.randint(1, 4)]
        self.weights = {"a": r.choice([1, 3])}
        self.quotas = {"b": r.choice([256, 512])} if r.random() < 0.5 else {}
        self.core = self.new_core()
        cells = [[64], [64, 64], [64, 192]]
        shared = r.choice(cells) if r.random() < 0.5 else None  # producers that read each other's chunks
        self.spaces = [
            self.core.open_space(Origin(f"{i:032x}", f"{i:016x}"), shared or r.choice(cells), CHUNK)
            for i in range(r.randint(1, 4 if shared else 2))
        ]
        self.tiers: list[set[tuple[Origin, bytes]]] = [set() for _ in self.tier_names]
        for tier in self.tiers:  # what an earlier life has left
            for space in self.spaces:
                for _ in range(r.randint(0, 4)):
                    tier.update((space.origin, digest) for digest in self.chain().digests())
        self.memory: dict[int, tuple[bytes, int] | None] = {}
        self.jobs: list[Job] = []
        self.unsure: set[Entry] = set()  # given to a tier though nobody has verified them
        self.flushing = False
        self.uses: Counter[bytes] = Counter()  # of a chunk: sealed, or found by a request
        self.lacked: dict[tuple[int, Origin, bytes], float] = {}  # when a tier said so
        self.probes: list[Probe] = []
        self.reservations: list[tuple[int, Reserved, tuple[int, ...]]] = []
        self.leases: list[Leased] = []
        self.deletions: list[DeleteRecords] = []
        self.steps = 0
        self.gone: dict[tuple[Origin, bytes], int] = {}  # deleted in that step, and not stored since
        self.asked: dict[Request, int] = {}  # when it was looked up last
        self.chains: dict[str, Chain] = {}  # what each request id asked for last
        self.late: list[int] = []  # addresses that a client of a dead daemon may still write to
        self.rids: list[str] = []
        self.resolved: set[Request] = set()

    def new_core(self) -> Core:
        policy = WatchedFair(sum(self.sizes), self.weights, self.quotas, self.queue)
        core = policy.core = Core(
            Extents(self.sizes),
            self.tier_names,
            rules=self.rules,
            limits=self.limits,
            policy=policy,
            seal=self.seal,
        )
        return core

    def chain(self) -> Chain:
        """Prefixes of few texts that share beginnings; and what no honest engine would ask."""
        r = self.random
        tenant = r.choice(self.tenants)
        tokens = [0] * (CHUNK * r.randint(0, 3)) + [r.randint(1, 2)] * (CHUNK * r.randint(0, 6))
        if r.random() < 0.1:
            digests = Chain(tokens, CHUNK).digests()
            digests = digests[r.randint(0, len(digests)) :]
            if r.random() < 0.3:
                digests = r.choice([digests[::-1], digests * 2, digests[1:] + digests[:1]])
            return Chain.from_digests(digests, CHUNK, tenant=tenant)
        return Chain(tokens, CHUNK, tenant=tenant)

    def step(self) -> None:
        r = self.random
        action = r.choice(
            [self.lookup] * 5
            + [self.claim] * 4
            + [self.store] * 5
            + [self.finish_store] * 5
            + [self.finish_job] * 8
            + [self.answer_probe] * 8
            + [self.end_deletion] * 2
            + [self.flood] * (6 * self.flooded)
            + [
                self.release,
                self.release,
                self.forget,
                self.hurry,
                self.time,
                self.time,
                self.delete,
                self.pin,
                self.lose,
                self.crash,
                self.earlier_gone,
                self.late_write,
                self.rot,
                self.flush,
                self.withdraw,
            ]
        )
        self.steps += 1
        action()
        self.carry_out()
        self.check()

    def carry_out(self) -> None:
        for action in self.core.actions:
            if isinstance(action, StartJob):
                self.jobs.append(action.job)
                if action.job.kind is JobKind.SEAL:
                    self.uses.update(entry.digest for entry in action.job.entries)
                elif action.job.kind is JobKind.PUT:
                    self.check_write(action.job)
            elif isinstance(action, Probe):
                self.probes.append(action)
            elif isinstance(action, DeleteRecords):
                self.deletions.append(action)
            elif isinstance(action, Resolved):
                assert action.request not in self.resolved, "resolved twice"
                self.resolved.add(action.request)
        self.core.actions.clear()

    def check_write(self, job: Job) -> None:
        """A tier is given what its rules say, when they say it."""
        rules = self.rules[job.tier]
        assert len({entry.space for entry in job.entries}) == 1
        for entry in job.entries:
            assert rules.admit is Admit.ALWAYS or self.uses[entry.digest] >= 2, "used once"
            if rules.write is Write.BACK:
                assert self.flushing or entry.readable_since + rules.back_s <= self.now, "too early"
            if entry.state is EntryState.ADOPTED:
                self.unsure.add(entry)
        assert self.flushing or (rules.write is Write.EVICT) == (job.leaving is not None)

    def check(self) -> None:
        self.core.check_integrity()
        largest = max(space.chunk_bytes for space in self.spaces)
        leaving = self.core.writing.leaving_bytes
        assert leaving <= len(self.tier_names) * (self.core.extents.total_bytes // 4 + largest)
        for request in self.core.requests.values():
            if request.state is RequestState.PENDING:
                assert request.goals, "it waits for reads"
                assert (self.core.eta_s(request, self.now) or 0.0) >= 0.0
            if request.state is RequestState.READY:
                found = request.chain.digests(request.limit)[: request.limit]
                asked = self.chains[request.rid].digests(request.limit)
                assert found == asked[: request.limit], "an answer to what was asked before"
                for position, digest in enumerate(found):
                    origin = request.space_of(position).origin
                    deleted = self.gone.get((origin, digest), self.steps)
                    assert deleted >= self.asked[request], "it was deleted before it was asked for"
        for tier, state in enumerate(self.core.tiers):
            for (origin, digest), until in state._missing.items():
                assert self.lacked[tier, origin, digest] + state.rules.missing_s >= until, "nobody said so"
        awaited = {entry for job in self.core.jobs.values() if not job.abandoned for entry in job.entries}
        for space in self.spaces:
            for entry in space.entries.values():
                assert entry.state is not EntryState.LOADING or entry in awaited, "nobody will ever load this"
        for lease in self.leases:
            for address, content in lease.contents:
                assert self.memory.get(address) == content, f"lease {lease.id}: other bytes at {address:#x}"
        assert all(self.core.usage[tenant] <= quota for tenant, quota in self.quotas.items())

    # What engines do

    def lookup(self) -> None:
        rid = f"r{self.random.randint(0, 5)}"
        self.rids.append(rid)
        space = self.random.choice(self.spaces)
        chain = self.chain()
        earlier = self.core.requests.get(rid)
        if earlier is not None and self.random.random() < 0.2:  # the same request with another end
            space, digests = earlier.space, earlier.chain.digests()
            kept = self.random.randint(0, len(digests))
            others = Chain([3] * (CHUNK * (len(digests) - kept)), CHUNK).digests()
            chain = Chain.from_digests([*digests[:kept], *others], CHUNK, tenant=chain.tenant)
        others = [Source(other, self.random.randint(1, len(chain))) for other in self.others(space) if len(chain)]
        request = self.core.lookup(
            space,
            rid,
            chain,
            self.now,
            prefetch=self.random.random() < 0.9,
            others=self.random.sample(others, self.random.randint(0, len(others))),
            leave_out=self.random.choice([0, 0, 3]),
        )
        self.chains[rid] = chain
        again = self.core.lookup(space, rid, chain, self.now)
        assert again is request, "a repeated lookup is answered from memory"
        self.asked[request] = self.steps

    def claim(self) -> None:
        ready = [q for q in self.core.requests.values() if q.state is RequestState.READY]
        if not ready:
            assert self.core.claim("nobody", 1, 0, 1, self.now) is None
            return
        request = self.random.choice(ready)
        boundary = self.random.randint(1, request.limit + 1)
        first, parts = self.random.randint(0, boundary), self.random.randint(1, 2)
        claimed = self.core.claim(request.rid, boundary, first, parts, self.now)
        if claimed is None:
            return
        lease, entries = claimed
        assert len(entries) == boundary - first
        for used in request.last_of_runs(boundary):
            entry: Entry | None = used
            while entry is not None:  # and those before it, which the chain may not name
                self.uses[entry.digest] += 2
                entry = entry.parent
        digests = self.chains[request.rid].digests(boundary)[first:]  # what was asked for, not what the core made of it
        contents = []
        for entry, digest in zip(entries, digests, strict=True):
            for cell, address in enumerate(entry.extents):
                assert address is not None
                contents.append((address, (digest, cell)))
        self.leases.append(Leased(lease, set(range(parts)), contents))

    def release(self) -> None:
        if not self.leases:
            return
        lease = self.random.choice(self.leases)
        if lease.earlier:
            return
        part = self.random.choice([0, 1])
        self.core.release(lease.id, part)
        self.core.release(lease.id, part)
        lease.parts.discard(part)
        if not lease.parts:
            self.leases.remove(lease)

    def forget(self) -> None:
        self.core.forget(f"r{self.random.randint(0, 5)}")

    def hurry(self) -> None:
        rid = f"r{self.random.randint(0, 5)}"
        self.core.hurry(rid, self.now)
        request = self.core.requests.get(rid)
        assert request is None or request.state not in (RequestState.WALKING, RequestState.PENDING)

    def store(self) -> None:
        r = self.random
        space, chain = r.choice(self.spaces), self.chain()
        cells = tuple(range(len(space.cell_bytes)))
        if r.random() < 0.3:
            cells = (r.choice(cells),)
        first = r.randint(0, max(0, len(chain) - 1)) if r.random() < 0.3 else 0
        digests = chain.digests()
        parent = digests[first - 1] if first else None
        some = digests[first : first + r.randint(0, 9)]
        answer = self.core.reserve(
            space,
            some,
            first,
            cells,
            self.now,
            parent=parent,
            tenant=chain.tenant,
            chunk_tokens=CHUNK * (r.random() < 0.7),
            derived=self.derived(space, first),
        )
        if answer is not None:
            number, reserved = answer
            self.stored(reserved)
            for chunk, entry in reserved.entries.items():
                assert entry.digest == chain.digests()[chunk]
                self.write(entry, reserved.cells[chunk], good=False)
            self.reservations.append((number, reserved, cells))

    def others(self, space: Space) -> list[Space]:
        """Those with the same cells."""
        return [other for other in self.spaces if other is not space and other.cell_bytes == space.cell_bytes]

    def derived(self, space: Space, first: int) -> Derived | None:
        others = self.others(space)
        if not others or self.random.random() < 0.7:
            return None
        return Derived(self.random.randint(0, first + 9), self.random.choice(others), [space])

    def withdraw(self) -> None:
        space = self.random.choice(self.spaces)
        self.core.withdraw({space})
        assert not any(
            request.others and request.space is space and request.state is not RequestState.CLAIMED
            for request in self.core.requests.values()
        )

    def stored(self, reserved: Reserved) -> None:
        for entry in reserved.entries.values():
            self.gone.pop((entry.space.origin, entry.digest), None)

    def flood(self) -> None:
        """One tenant stores texts that nobody else has, one after another."""
        tenant, space = self.random.choice(self.tenants), self.random.choice(self.spaces)
        cells = tuple(range(len(space.cell_bytes)))
        for _ in range(self.random.randint(1, 6)):
            text = [self.random.randint(3, 1 << 30)] * (CHUNK * 2)
            answer = self.core.reserve(space, Chain(text, CHUNK).digests(), 0, cells, self.now, tenant=tenant)
            if answer is not None:
                number, reserved = answer
                for entry in reserved.entries.values():
                    self.write(entry, cells, good=True)
                self.core.publish(number, None, self.now)

    def finish_store(self) -> None:
        if not self.reservations:
            return
        at = self.random.randrange(len(self.reservations))
        number, reserved, _ = self.reservations.pop(at)
        for chunk, entry in reserved.entries.items():
            self.write(entry, reserved.cells[chunk], good=True)
        kind = self.random.randint(0, 3)
        if kind == 0:
            self.core.abort(number)
        elif kind == 1:
            some = [chunk for chunk in reserved.entries if self.random.random() < 0.7]
            self.core.publish(number, some, self.now)
        else:
            self.core.publish(number, None, self.now)
        self.core.abort(number)

    def write(self, entry: Entry, cells: tuple[int, ...], *, good: bool) -> None:
        for cell in cells:
            address = entry.extents[cell]
            if address is not None:
                self.memory[address] = (entry.digest, cell) if good else None

    def delete(self) -> None:
        space = self.random.choice(self.spaces)
        if self.random.random() < 0.1:
            digests = list(space.entries)
            digests += [digest for tier in self.tiers for origin, digest in tier if origin == space.origin]
            self.core.clear(space)
            assert not space.entries
        else:
            digests = self.chain().digests()
            self.core.delete(space, digests)
        self.gone.update({(space.origin, digest): self.steps for digest in digests})

    def end_deletion(self) -> None:
        """The tiers have deleted what they were told to; each by its writer, so after all writes before it."""
        if not self.deletions:
            return
        action = self.deletions.pop(0)
        for tier in self.tiers:
            tier -= {
                (origin, digest)
                for origin, digest in tier
                if origin == action.origin and (action.digests is None or digest in action.digests)
            }
            self.core.records_deleted(action)

    def pin(self) -> None:
        self.core.pin(
            self.random.choice(self.spaces), self.chain().digests(), self.now + self.random.choice([0.5, 5.0])
        )

    # What tiers and time do

    def answer_probe(self) -> None:
        if not self.probes:
            return
        probe = self.random.choice(self.probes)
        request = probe.request
        if not self.core.tiers[probe.tier].instant and not probe.started:
            if not self.core.probe_started(probe, self.now):
                self.probes.remove(probe)
                return
            if self.random.random() < 0.3:
                return
        self.probes.remove(probe)
        if self.random.random() < 0.1:
            self.core.probed(probe, 0, self.now, failed=True)
            return
        origin, tier = probe.source.space.origin, self.tiers[probe.tier]
        digests = request.chain.digests()[probe.start :]
        count = leading((origin, digest) in tier for digest in digests)
        if self.random.random() < 0.1:
            count = self.random.randint(0, 20)  # a tier that promises what it does not have
        if count < len(digests):
            self.lacked[probe.tier, origin, digests[count]] = self.now
        self.core.probed(probe, count, self.now)

    def finish_job(self) -> None:
        if not self.jobs:
            return
        job = self.random.choice(self.jobs)
        if job.id not in self.core.jobs:
            assert job.abandoned and not job.started
            self.jobs.remove(job)
            return
        if not job.started:
            self.core.job_started(job, self.now)
            if self.random.random() < 0.3:
                return
        self.jobs.remove(job)
        trouble = self.random.random() < 0.15
        results = []
        for entry in job.entries:
            origin = entry.space.origin
            ok = not trouble and self.random.random() < 0.95
            if job.kind is JobKind.VERIFY:
                ok = all(
                    self.memory[a] == (entry.digest, cell) for cell, a in enumerate(entry.extents) if a is not None
                )
            elif job.kind is JobKind.FETCH:
                ok = ok and (origin, entry.digest) in self.tiers[job.tier]
                # A call may have written into its buffers whether it succeeds or not, and however late it returns.
                self.write(entry, tuple(range(len(entry.extents))), good=ok)
            else:
                mine = {address: (entry.digest, cell) for cell, address in enumerate(entry.extents)}
                assert None not in mine
                good = all(self.memory[address] == content for address, content in mine.items())
                assert good or entry in self.unsure, "a tier was given other bytes"
                if ok and job.kind is JobKind.PUT and entry.state is not EntryState.DEAD and good:
                    self.tiers[job.tier].add((origin, entry.digest))
            results.append(ok)
        self.core.job_done(job, results, self.now, failed=trouble)

    # Daemons that die

    def crash(self) -> None:
        """The daemon dies at this point, clients live on; the next one finds the pool and its journal."""
        if self.random.random() < 0.65:
            return
        old = self.core
        sealed: dict[int, Entry] = {}
        for space in self.spaces:
            for entry in space.entries.values():
                if entry.sealed:
                    sealed |= {address: entry for address in entry.extents if address is not None}
        leased = {address for lease in self.leases for address, _ in lease.contents}
        for _, reserved, _ in self.reservations:
            for chunk, entry in reserved.entries.items():
                self.late += [a for a in (entry.extents[cell] for cell in reserved.cells[chunk]) if a is not None]
        for lease in self.leases:
            lease.earlier = True
        self.jobs, self.probes, self.reservations = [], [], []
        self.lacked = {}
        for action in self.deletions:  # the tiers have these for ever
            for origin, digest in list(self.gone):
                if origin == action.origin and (action.digests is None or digest in action.digests):
                    del self.gone[origin, digest]
        self.deletions = []
        self.core = self.new_core()
        self.spaces = [self.core.open_space(space.origin, space.cell_bytes, CHUNK) for space in self.spaces]
        adopted: set[Entry] = set()
        for address, nbytes in sorted(old.extents.allocations()):
            assert self.core.extents.take(address, nbytes)
            if address in sealed:
                adopted.add(sealed[address])
            else:
                self.core.earlier.quarantine(address)
        for entry in sorted(adopted, key=lambda entry: (-entry.first_position, entry.digest)):
            extents = [address for address in entry.extents if address is not None]
            self.core.earlier.adopt(
                self.core.spaces[entry.space.origin],
                entry.digest,
                extents,
                entry.first_position,
                leased=not leased.isdisjoint(extents),
            )

    def earlier_gone(self) -> None:
        """The clients of the dead daemon have ended their copies, and said so."""
        self.late = []
        self.leases = [lease for lease in self.leases if not lease.earlier]
        self.core.earlier.end()

    def late_write(self) -> None:
        for address in self.late:
            if self.random.random() < 0.5:
                self.memory[address] = None

    def rot(self) -> None:
        """A bit flips in memory that an earlier life left and nobody has verified yet."""
        leased = {address for lease in self.leases for address, _ in lease.contents}
        for space in self.spaces:
            for entry in space.entries.values():
                if entry.state is EntryState.ADOPTED and self.random.random() < 0.5:
                    for address in entry.extents:
                        if address is not None and address not in leased:
                            self.memory[address] = None

    def time(self) -> None:
        self.now += self.random.choice([0.1, 1.0, 3.0])
        self.core.tick(self.now)

    def flush(self) -> None:
        """A drain; or the end of a daemon whose pool goes with it."""
        self.flushing = True
        if self.random.random() < 0.2:
            self.core.writing.leave_all(self.spaces)
        self.core.writing.flush(self.now)
        self.carry_out()
        self.flushing = False

    def lose(self) -> None:
        for tier in self.tiers:
            if tier and self.random.random() < 0.3:
                tier.discard(self.random.choice(sorted(tier, key=lambda item: (item[0].namespace, item[1]))))

    def finish(self) -> None:
        """Everybody goes home: all memory must come back."""
        self.earlier_gone()
        while self.jobs or self.probes or self.reservations or self.deletions or self.core.writing.waiting:
            self.flush()
            self.end_deletion()
            self.finish_job()
            self.answer_probe()
            self.finish_store()
            self.carry_out()
            self.check()
        for lease in self.leases:
            for part in lease.parts:
                self.core.release(lease.id, part)
        self.leases.clear()
        for rid in list(self.core.requests):
            self.core.forget(rid)
        self.core.tick(self.now + 1e6)
        for space in self.spaces:
            self.core.clear(space)
            assert not space.entries and not space.deleting
        self.carry_out()
        self.check()
        assert not self.core.leases and not self.core.reservations and not self.core.jobs and not self.core.probes
        assert self.core.extents.free_bytes == self.core.extents.total_bytes


def play_all(schedules: Iterable[int], steps: int = 80) -> None:
    """Each from its own seed, which a failure names."""
    for seed in (BASE_SEED + number for number in schedules):
        simulator = Simulator(seed)
        try:
            for _ in range(steps):
                simulator.step()
            simulator.finish()
        except BaseException as error:
            error.add_note(f"simulator seed {seed}; repeat with LMCACHE_SDK_SEED={seed}")
            raise
