"""What the backends for tests have in common: each goes around another one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from lmcache_sdk.backend import Buffer, Item, Miss, Scan, Stat, Touch, Usage, UsageReport
from lmcache_sdk.wrappers import Wrapper

_T = TypeVar("_T")


class Around(Wrapper):
    """Leads every call through :meth:`around`, ``scan``, ``usage`` and ``touch`` too where the inner backend has them.
    Closing closes the inner backend.
    """

    def around(self, call: str, keys: Sequence[str], work: Callable[[], _T]) -> _T:
        """One call, by its name: ``work`` does it."""
        return work()

    def get(self, keys: Sequence[str], buffers: Sequence[Buffer]) -> list[int | Miss]:
        return self.around("get", keys, lambda: self.inner.get(keys, buffers))

    def put(self, items: Sequence[Item], *, if_absent: bool = True) -> list[bool]:
        keys = [item.key for item in items]
        return self.around("put", keys, lambda: self.inner.put(items, if_absent=if_absent))

    def contains(self, keys: Sequence[str]) -> list[bool]:
        return self.around("contains", keys, lambda: self.inner.contains(keys))

    def prefix_len(self, keys: Sequence[str]) -> int:
        return self.around("prefix_len", keys, lambda: self.inner.prefix_len(keys))

    def delete(self, keys: Sequence[str]) -> int:
        return self.around("delete", keys, lambda: self.inner.delete(keys))

    def _usage(self, inner: Usage) -> UsageReport:
        return self.around("usage", [], inner.usage)

    def _touch(self, inner: Touch, keys: Sequence[str]) -> None:
        self.around("touch", keys, lambda: inner.touch(keys))

    def _scan(self, inner: Scan, prefix: str) -> Iterator[Stat]:
        return self.around("scan", [prefix], lambda: inner.scan(prefix))
