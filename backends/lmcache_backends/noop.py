"""``noop://``: stores nothing. What the rest costs without storage; the smallest legal backend."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Self

from lmcache_sdk.backend import Buffer, Item, Miss, Url
from lmcache_sdk.calls import Calls
from lmcache_sdk.errors import ConfigError


class NoopBackend:
    """Accepts every record and forgets it at once."""

    instant: ClassVar[bool] = True

    def __init__(self) -> None:
        self._calls = Calls("noop://", lambda: None)

    @classmethod
    def from_url(cls, url: Url) -> Self:
        """``noop://``. Raises ConfigError for anything more."""
        if url.host or url.path not in ("", "/"):
            raise ConfigError(f"noop:// takes no host or path, got {url.shown!r}")
        url.finish()
        return cls()

    def get(self, keys: Sequence[str], buffers: Sequence[Buffer]) -> list[int | Miss]:
        self._calls.check()
        return [Miss.ABSENT] * len(keys)

    def put(self, items: Sequence[Item], *, if_absent: bool = True) -> list[bool]:
        self._calls.check()
        return [True] * len(items)

    def contains(self, keys: Sequence[str]) -> list[bool]:
        self._calls.check()
        return [False] * len(keys)

    def prefix_len(self, keys: Sequence[str]) -> int:
        self._calls.check()
        return 0

    def delete(self, keys: Sequence[str]) -> int:
        self._calls.check()
        return 0

    def close(self, timeout_s: float) -> None:
        self._calls.close(timeout_s)
