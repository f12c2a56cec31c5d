"""The conformance suite of eviction policies."""

from __future__ import annotations

import random
from collections.abc import Sized
from dataclasses import dataclass

from lmcache_sdk.eviction import Policy

TENANTS = ("", "a", "b", "c")


@dataclass(eq=False, slots=True)
class Item:
    """Something that may be evicted. ``uses`` is how often it was used since it came, and the policy's to change."""

    name: str
    tenant: str = ""
    uses: int = 0

    @property
    def digest(self) -> bytes:
        """A name that outlives it."""
        return self.name.encode()


class PolicyTests:
    """Subclass it, say how to make a policy, and pytest holds it to the MUSTs of :class:`Policy`.

    What the policies have in common is tested with items that have been used once; how much another use counts, and
    what is remembered of items that have gone, is where they differ.
    """

    def make(self, pool_bytes: int = 1 << 20) -> Policy[Item]:
        """A policy that has nothing yet and sets no tenant a quota."""
        raise NotImplementedError

    def test_nothing_is_evicted_where_nothing_was_inserted(self) -> None:
        policy = self.make()
        assert policy.victim("", 1) is None
        assert len(policy) == 0

    def test_each_item_is_evicted_once_the_least_recently_used_first(self) -> None:
        policy = self.make()
        items = [Item(str(number)) for number in range(9)]
        for tick in (3, 1, 4, 0, 5, 8, 2, 6, 7):
            policy.insert(items[tick], tick)
        assert len(policy) == 9
        assert [policy.victim("", 1) for _ in range(10)] == [*items, None]
        assert len(policy) == 0

    def test_an_item_may_come_back_to_its_old_place(self) -> None:
        policy = self.make()
        old, young = Item("old"), Item("young")
        policy.insert(young, 2)
        policy.insert(old, 1)
        policy.discard(old)
        assert old not in policy
        policy.insert(old, 1)
        assert policy.victim("", 1) is old

    def test_what_was_used_again_is_younger(self) -> None:
        policy = self.make()
        first, second = Item("first"), Item("second")
        policy.insert(first, 1)
        policy.insert(second, 2)
        policy.discard(first)
        policy.insert(first, 3)
        assert policy.victim("", 1) is second

    def test_an_unknown_item_and_tenant_are_no_trouble(self) -> None:
        policy = self.make()
        policy.discard(Item("never inserted", "nobody"))
        assert Item("never inserted", "nobody") not in policy
        assert not policy.full("nobody", 1 << 40)
        assert policy.victim("nobody", 1 << 40) is None

    def test_in_any_order_it_evicts_what_it_has_and_nothing_else(self) -> None:
        """Against a set, with tenants that come and go."""
        for seed in range(60):
            r = random.Random(seed)  # noqa: S311
            policy, has, usage = self.make(1000), set[Item](), dict.fromkeys(TENANTS, 0)
            for tick in range(300):
                tenant = r.choice(TENANTS)
                kind = r.randint(0, 3)
                if kind == 0:
                    item = Item(f"{tenant}{tick}", tenant)
                    policy.charge(tenant, 10)
                    usage[tenant] += 10
                    policy.insert(item, tick)
                    has.add(item)
                elif kind == 1 and has:
                    item = r.choice(sorted(has, key=lambda item: item.name))
                    policy.discard(item)
                    has.discard(item)
                    if r.random() < 0.5:
                        policy.charge(item.tenant, -10)
                        usage[item.tenant] -= 10
                elif kind == 2 and usage[tenant]:
                    policy.charge(tenant, -usage[tenant])  # what is gone may be anything that was held
                    usage[tenant] = 0
                elif kind == 3:
                    victim = policy.victim(tenant, 10)
                    assert victim is None or victim in has
                    has.discard(victim) if victim else None
                assert len(policy) == len(has)
                assert all(item in policy for item in has)

    def test_nothing_is_kept_of_tenants_that_have_nothing(self) -> None:
        policy = self.make()
        for number in range(1000):
            tenant = f"tenant{number}"
            item = Item("item", tenant)
            policy.charge(tenant, 64)
            policy.insert(item, number)
            policy.discard(item)
            policy.charge(tenant, -64)
        kept = [value for value in vars(policy).values() if isinstance(value, Sized)]
        assert sum(map(len, kept)) < 300
