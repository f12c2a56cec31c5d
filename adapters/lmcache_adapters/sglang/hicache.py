"""The backend as SGLang's hierarchical cache sees it: pages of its host memory, by their keys.

SGLang asks from threads of its own, one for each kind of call, up to 128 pages at once, and knows no request: a batch
of keys is looked up, claimed and copied for itself. Nothing here raises once it is registered, and nothing waits
without a bound.
"""

from __future__ import annotations

import functools
import itertools
import logging
import threading
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
import torch
from sglang.srt.mem_cache.hicache_storage import HiCacheStorage, PoolTransferResult

from lmcache_adapters.settings import on_error
from lmcache_adapters.sglang import weights
from lmcache_adapters.sglang.attach import open_engine_cache
from lmcache_adapters.sglang.host import FlatPages, HostMemory
from lmcache_adapters.sglang.identity import EngineFacts, digests_of
from lmcache_adapters.sglang.settings import SGLangSettings, read_settings
from lmcache_sdk.api import Cache, Chain, LookupState
from lmcache_sdk.connector import CopyTransfer, GPUConnector
from lmcache_sdk.errors import LMCacheSDKError, UnsupportedError
from lmcache_sdk.observe.logs import ROOT, log_to_stderr, logger

_log = logger("sglang")
_T = TypeVar("_T")

# SGLang's one thread for queries serves all requests: a tier that has not said by now what it has, has nothing.
_QUERY_S = 0.25
# And so does the one for reads. What has not come by now is computed.
_READ_S = 1.5
_CLOSE_S = 10.0
# Of memory of our own, where SGLang hands over tensors instead of places.
_FLAT_PAGES = 8
# Found and not yet read; a query that SGLang drops is never read.
_MOST_HELD = 64


class HiCacheBackend(HiCacheStorage):
    """Pages from an lmcache-sdk cache, and to it. Its settings are in ``docs/sglang.md``.

    Args:
        storage_config: SGLang's ``HiCacheStorageConfig`` of this rank.

    Raises:
        LMCacheSDKError: in ``on_host_pools_registered``, if something is wrong and ``on_error`` is ``refuse``.
    """

    def __init__(self, storage_config: Any, kwargs: Any = None) -> None:
        del kwargs
        self._config = storage_config
        self._extra: dict[str, Any] = dict(storage_config.extra_config or {})
        self._pools: dict[str, Any] = {}
        self._cache: Cache | None = None
        self._connector: GPUConnector | None = None
        self._flat: FlatPages | None = None
        self._settings: SGLangSettings
        self._numbers = itertools.count(1)
        self._lock = threading.Lock()
        self._copying = threading.Lock()
        self._held: dict[bytes, tuple[str, int]] = {}  # by the last digest found: the request, and how many pages
        if not logging.getLogger(ROOT).hasHandlers():  # SGLang's own processes have a log
            log_to_stderr()
        self._refuse = on_error(self._extra) == "refuse"

    # Start and end

    def register_mem_host_pool_v2(self, host_pool: Any, host_pool_name: Any) -> None:
        self._pools[str(host_pool_name)] = host_pool
        if self._cache is not None and str(host_pool_name) != "kv":  # a draft model's, after the start
            _log.error("SGLang serves WITHOUT the cache: KV of kind %s is not served", host_pool_name)
            self.close()

    def on_host_pools_registered(self) -> None:
        try:
            self._begin()
        except Exception as error:
            self.close()
            if self._refuse or not isinstance(error, LMCacheSDKError | OSError):
                raise
            _log.error(
                "SGLang serves WITHOUT the cache: %s: %s (on_error=refuse would have ended it here)",
                type(error).__name__,
                error,
            )

    def _begin(self) -> None:
        config, pool = self._config, self.mem_pool_host
        self._settings = read_settings(self._extra, int(pool.page_size))
        logging.getLogger(ROOT).setLevel(self._settings.config.log_level)
        others = sorted(set(self._pools) - {"kv"})
        if others:
            raise UnsupportedError(f"models with KV of kind {', '.join(others)} are not served; served is kv alone")
        if not self._settings.zero_copy:
            _log.warning(
                'SGLang copies each page once more, and tells no positions; set "interface_v1": 1 in the extra config'
            )
        facts = EngineFacts.of_this_process(config.tp_size, config.tp_rank)
        dtype = str(pool.dtype).removeprefix("torch.")
        cache, group, part = open_engine_cache(facts, self._settings, int(pool.page_size), dtype)
        try:
            memory = HostMemory(pool, group)
            # Each rank claims for itself, so its tickets have one part, the first.
            with memory.kept():
                if self._settings.zero_copy:
                    self._connector = GPUConnector(cache, memory.layout, part, write_op=memory.write)
                else:
                    self._flat = flat = FlatPages(memory, min(_FLAT_PAGES, int(pool.page_num)))
                    self._connector = GPUConnector(cache, flat.layout, part, write_op=flat.write)
        except BaseException:
            cache.close(1.0)
            raise
        self._cache = cache

    def close(self) -> None:
        """SGLang calls this when the backend is detached."""
        with self._lock:
            cache, self._cache = self._cache, None
            connector, self._connector = self._connector, None
        if connector is not None:
            connector.close(_CLOSE_S)
        if cache is not None:
            cache.close(_CLOSE_S)

    def clear(self) -> None:
        """Remove this model's KV, as this engine computes it, from the cache and its tiers."""
        if self._cache is not None:
            removed = self._cache.clear()
            if removed is None:
                _log.warning("not everything could be cleared: do it again")
            else:
                _log.info("cleared: %d chunks", removed)

    def get_stats(self) -> Any:
        """SGLang's figures are its own; ours are the daemon's, see ``docs/metrics.md``."""
        return None

    # Pages

    def exists(self, key: str) -> bool:
        return self.batch_exists([key]) == 1

    def batch_exists(self, keys: list[str], extra_info: Any = None) -> int:
        """How many pages from the front there are, here or on their way. They are held for a read that follows."""
        return self._safely(0, lambda cache, _: self._find(cache, keys))

    def batch_get_v1(self, keys: list[str], host_indices: torch.Tensor, extra_info: Any = None) -> list[bool]:
        """Copy pages to their places.

        Args:
            host_indices: int64 [pages * page_size]; the place of every token.
        """
        missing = [False] * len(keys)
        return self._safely(missing, lambda cache, connector: self._read(cache, connector, keys, host_indices))

    def batch_set_v1(self, keys: list[str], host_indices: torch.Tensor, extra_info: Any = None) -> list[bool]:
        """Offer pages to the cache. True: it has them, or has no room for them; False: it cannot be reached."""
        before = getattr(extra_info, "prefix_keys", None)
        lost = [False] * len(keys)
        return self._safely(lost, lambda cache, connector: self._write(cache, connector, keys, host_indices, before))

    # The interface of pages that are copied once more: one flat tensor each.

    def get(self, key: str, target_location: Any = None, target_sizes: Any = None) -> torch.Tensor | None:
        return self.batch_get([key], [target_location])[0]

    def batch_get(
        self, keys: list[str], target_locations: Any = None, target_sizes: Any = None
    ) -> list[torch.Tensor | None]:
        """Fill one tensor a page; None from the first that is missing."""
        targets = list(target_locations or ())
        found: list[torch.Tensor | None] = []
        for some in _some(keys):
            theirs = targets[len(found) : len(found) + len(some)]
            missing: list[torch.Tensor | None] = [None] * len(some)
            found += self._safely(missing, functools.partial(self._read_flat, keys=some, targets=theirs))
            if None in found:
                break
        return [*found, *[None] * (len(keys) - len(found))]

    def set(self, key: str, value: Any = None, target_location: Any = None, target_sizes: Any = None) -> bool:
        return self.batch_set([key], [value])

    def batch_set(
        self, keys: list[str], values: Any = None, target_locations: Any = None, target_sizes: Any = None
    ) -> bool:
        """Offer pages, one tensor each; as ``batch_set_v1``."""
        given = list(values or ())
        return len(given) == len(keys) and all(
            self._safely(False, functools.partial(self._write_flat, keys=some, values=given[at : at + len(some)]))
            for at, some in zip(range(0, len(keys), _FLAT_PAGES), _some(keys), strict=True)
        )

    # Other kinds of KV are refused at start, so this is never used.

    def batch_exists_v2(self, keys: list[str], pool_transfers: Any = None, extra_info: Any = None) -> Any:
        return PoolTransferResult.empty()

    def batch_get_v2(self, transfers: Any, extra_info: Any = None) -> dict[str, list[bool]]:
        return {transfer.name: [False] * len(transfer.keys or ()) for transfer in transfers}

    def batch_set_v2(self, transfers: Any, extra_info: Any = None) -> dict[str, list[bool]]:
        return {transfer.name: [False] * len(transfer.keys or ()) for transfer in transfers}

    # How

    def _safely(self, otherwise: _T, task: Callable[[Cache, GPUConnector], _T]) -> _T:
        with self._lock:
            cache, connector = self._cache, self._connector
        if cache is None or connector is None or weights.replaced():
            return otherwise
        try:
            return task(cache, connector)
        except Exception:  # noqa: BLE001 - SGLang's threads must live
            _log.exception("a batch of pages is served without the cache")
            return otherwise

    def _find(self, cache: Cache, keys: list[str]) -> int:
        digests = digests_of(keys)
        rid = f"sglang-{self._config.tp_rank}-q{next(self._numbers)}"
        found = cache.lookup(rid, self._chain(digests))
        if found.state == LookupState.PENDING:
            found = cache.wait(rid, _QUERY_S, settle=False)
        pages = found.chunks if found.state == LookupState.READY else found.found
        if pages:
            self._hold(cache, digests[pages - 1], rid, pages)
        else:
            cache.forget(rid)
        return pages

    def _read(self, cache: Cache, connector: GPUConnector, keys: list[str], places: torch.Tensor) -> list[bool]:
        digests = digests_of(keys)
        held, pages = self._unhold(digests)
        rid = held or f"sglang-{self._config.tp_rank}-r{next(self._numbers)}"
        try:
            # What the query has found is claimed as it is, if that is what is read, and has come.
            ticket = cache.claim(rid, pages) if held and pages == len(keys) else None
            if ticket is None:
                found = cache.lookup(rid, self._chain(digests))
                if found.state == LookupState.PENDING:
                    found = cache.wait(rid, _READ_S)
                ticket = cache.claim(rid, found.chunks) if found.chunks else None
            if ticket is None:
                return [False] * len(keys)
            transfer = connector.load(ticket, _slots(places)[: ticket.boundary * self._width])
            _end(transfer)
            failed = set(transfer.failed_chunks())
            return [page < ticket.boundary and page not in failed for page in range(len(keys))]
        finally:
            cache.forget(rid)

    def _write(
        self, cache: Cache, connector: GPUConnector, keys: list[str], places: torch.Tensor, before: list[str] | None
    ) -> list[bool]:
        chain = self._chain(digests_of([*(before or ()), *keys]), positions_known=before is not None)
        first = len(before or ())
        rid = f"sglang-{self._config.tp_rank}-w{next(self._numbers)}"
        transfer = connector.store(rid, chain, first, _slots(places))
        _end(transfer)
        connector.completed()  # which would otherwise keep all that have ended
        if not getattr(cache, "connected", True):
            return [False] * len(keys)
        failed = set(transfer.failed_chunks())
        return [first + page not in failed for page in range(len(keys))]

    def _read_flat(
        self, cache: Cache, connector: GPUConnector, keys: list[str], targets: list[torch.Tensor]
    ) -> list[torch.Tensor | None]:
        flat = self._flat
        if flat is None or len(targets) != len(keys):
            return [None] * len(keys)
        with self._copying:  # one scratch memory for reads and writes
            there = self._read(cache, connector, keys, torch.arange(len(keys) * self._width))
            for number, target in enumerate(targets):
                if there[number]:
                    target.copy_(flat.page(number).reshape(-1))
        return [target if found else None for found, target in zip(there, targets, strict=True)]

    def _write_flat(self, cache: Cache, connector: GPUConnector, keys: list[str], values: list[torch.Tensor]) -> bool:
        flat = self._flat
        if flat is None:
            return False
        with self._copying:
            for number, value in enumerate(values):
                flat.put(number, value)
            return all(self._write(cache, connector, keys, torch.arange(len(keys) * self._width), None))

    @property
    def _width(self) -> int:
        return int(self.mem_pool_host.page_size)

    def _chain(self, digests: list[bytes], *, positions_known: bool = False) -> Chain:
        return Chain.from_digests(digests, self._width, positions_known=positions_known)

    def _hold(self, cache: Cache, last: bytes, rid: str, pages: int) -> None:
        with self._lock:
            dropped = [self._held.pop(last)] if last in self._held else []
            self._held[last] = rid, pages
            while len(self._held) > _MOST_HELD:
                dropped.append(self._held.pop(next(iter(self._held))))
        for one, _ in dropped:
            cache.forget(one)

    def _unhold(self, digests: list[bytes]) -> tuple[str, int]:
        with self._lock:
            return self._held.pop(digests[-1], ("", 0)) if digests else ("", 0)


def _some(keys: list[str]) -> list[list[str]]:
    return [keys[at : at + _FLAT_PAGES] for at in range(0, len(keys), _FLAT_PAGES)]


def _slots(places: torch.Tensor) -> np.ndarray[Any, np.dtype[np.int64]]:
    return np.ascontiguousarray(places.cpu().numpy(), np.int64)


def _end(transfer: CopyTransfer) -> None:
    """It ends by itself: it copies memory, and asks the cache with a deadline. Until then the pages are not SGLang's to
    give away.
    """
    while not transfer.wait(1.0):
        pass
