"""The linker as SGLang's prefix cache sees it: pages of its device memory, straight from our pool and into it.

All of it but the copies is called on the scheduler's thread, in lockstep on all ranks: what one rank answers
differently from another must not change what SGLang does next. So ``offload`` always accepts and tells later how it
went, and ``load`` agrees with the other ranks. Nothing here raises once it is constructed, and nothing waits without a
bound.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from sglang.srt.mem_cache.hicache_storage import PoolName
from sglang.srt.mem_cache.unified_cache.component_type import ComponentType
from sglang.srt.mem_cache.unified_cache.unified_cache_linker import UnifiedCacheLinker

from lmcache_adapters.settings import on_error
from lmcache_adapters.sglang import weights
from lmcache_adapters.sglang.attach import open_engine_cache
from lmcache_adapters.sglang.device import DeviceMemory
from lmcache_adapters.sglang.finder import Finder
from lmcache_adapters.sglang.identity import EngineFacts, digests_of
from lmcache_adapters.sglang.loads import LayerLoads
from lmcache_adapters.sglang.settings import read_linker_settings
from lmcache_sdk.api import Cache, Chain
from lmcache_sdk.connector import CopyTransfer, GPUConnector, Taken
from lmcache_sdk.errors import LMCacheSDKError, UnsupportedError
from lmcache_sdk.observe.logs import ROOT, log_to_stderr, logger

_log = logger("sglang")
_T = TypeVar("_T")

# A copy of memory that is there; a machine on which that takes longer serves nobody.
_COPY_S = 10.0
_CLOSE_S = 10.0


class _Attached(NamedTuple):
    """What there is while the cache can be used.

    Two connectors, each with a thread of its own: a store asks the daemon before it copies, and a load that was
    promised must not wait for one that hangs. SGLang keeps order between them: a load's places are nobody else's until
    it has ended, and none is given away while it is stored.
    """

    cache: Cache
    finder: Finder
    loader: GPUConnector
    storer: GPUConnector


class _Queued(NamedTuple):
    taken: Taken
    slots: npt.NDArray[np.int64]


class Linker(UnifiedCacheLinker):
    """Pages from an lmcache-sdk cache, and to it. Its settings are in ``docs/sglang.md``.

    Args:
        server_args: SGLang's arguments, as published in this process.
        params: SGLang's ``CacheInitParams`` of this rank.
        components: kinds of KV that the model has; served is full attention alone.
        extra_config: ``linker_extra_config``.
        forward_stream: the stream that writes KV; None on a CPU.

    Raises:
        LMCacheSDKError: if something is wrong and ``on_error`` is ``refuse``.
    """

    def __init__(
        self,
        server_args: Any,
        params: Any,
        *,
        components: set[ComponentType],
        extra_config: dict[str, Any] | None = None,
        forward_stream: Any = None,
        **later: Any,
    ) -> None:
        del server_args
        extra = dict(extra_config or {})
        pool = params.token_to_kv_pool_allocator.get_kvcache()
        self.forward_stream = forward_stream
        self.pools = {PoolName.KV: pool}
        self.layer_done_counter = LayerLoads(int(getattr(pool, "layer_num", 0)), _COPY_S)
        self._width = int(params.page_size)
        self._group = _group(params)
        self._queued: dict[str, _Queued] = {}
        self._offloads: deque[CopyTransfer | None] = deque()
        self._attached: _Attached | None = None
        if not logging.getLogger(ROOT).hasHandlers():  # SGLang's own processes have a log
            log_to_stderr()
        refuse = on_error(extra) == "refuse"
        if later:
            _log.info("SGLang gives the linker what is not used here: %s", ", ".join(sorted(later)))
        try:
            self._attached = self._attach(extra, params, components)
        except Exception as error:
            if refuse or not isinstance(error, LMCacheSDKError | OSError):
                raise
            _log.error(
                "SGLang serves WITHOUT the cache: %s: %s (on_error=refuse would have ended it here)",
                type(error).__name__,
                error,
            )

    def _attach(self, extra: dict[str, Any], params: Any, components: set[ComponentType]) -> _Attached:
        settings = read_linker_settings(extra, self._width)
        logging.getLogger(ROOT).setLevel(settings.config.log_level)
        others = sorted(component.name.lower() for component in components - {ComponentType.FULL})
        if others:
            raise UnsupportedError(f"models with KV of kind {', '.join(others)} are not served; served is full alone")
        drafts = (*params.mtp_draft_device_pools, *params.sidecar_draft_device_pools)
        if drafts:
            raise UnsupportedError("draft models with KV of their own are not served")
        pool = self.pools[PoolName.KV]
        if torch.device(pool.device).type != "cpu":
            raise UnsupportedError(
                f"KV on {pool.device}: the linker has been tried with a CPU's only; use --enable-hierarchical-cache "
                "with HiCacheBackend"
            )
        facts = EngineFacts.of_this_process(*_ranks(self._group))
        mode = facts.server.disaggregation_mode
        if mode != "null":
            raise UnsupportedError(f"prefill and decode apart are not served (disaggregation_mode={mode})")
        opened = open_engine_cache(facts, settings, self._width, str(pool.dtype).removeprefix("torch."))
        cache = opened.cache
        try:
            memory = DeviceMemory(pool, opened.group)
            # Each rank claims for itself, so its tickets have one part, the first.
            loader = GPUConnector(cache, memory.layout, opened.part, write_op=memory.write)
            storer = GPUConnector(cache, memory.layout, opened.part, write_op=memory.write)
        except BaseException:
            cache.close(1.0)
            raise
        finder = Finder(cache, loader, timeout_s=settings.lookup_timeout_s)
        return _Attached(cache, finder, loader, storer)

    # Loads

    def lookup(self, rid: str, transfers: list[Any]) -> list[int]:
        """All lengths in pages, from the front of what is asked for, that can be loaded. Bounded to milliseconds."""
        return self._safely([], lambda attached: self._find(attached, rid, transfers))

    def load(self, rid: str, transfers: list[Any]) -> bool:
        """Whether the pages are going to be in place. Once all ranks have said so they lie in memory that nobody takes
        away, verified; the copy begins with ``start_layer_wise_loading``.
        """
        queued = self._safely(None, lambda attached: self._take(attached, rid, transfers))
        if self._all_are(queued is not None) and queued is not None:
            self._queued[rid] = queued
            return True
        self._give_back(queued)
        return False

    def start_layer_wise_loading(self) -> int:
        batch, self._queued = self._queued, {}
        if not batch:
            return -1
        return self.layer_done_counter.start([self._start(queued) for queued in batch.values()])

    def finish_layer_wise_loading(self, counter_index: int) -> bool:
        return self.layer_done_counter.finish(counter_index)

    def cancel_queued_load(self, rid: str) -> bool:
        queued = self._queued.pop(rid, None)
        self._give_back(queued)
        return queued is not None

    # Stores

    def offload(self, transfers: list[Any], session_id: str | None = None) -> bool:
        """Copy pages to the cache, what it lacks of them; how that went ``pop_completed_offload`` tells. Always True:
        the ranks' lists of what is under way must not differ.
        """
        del session_id
        self._offloads.append(self._safely(None, lambda attached: self._store(attached, transfers)))
        return True

    def num_completed_offloads(self) -> int:
        """Of those that ended, how many ended before the first that has not."""
        count = 0
        for transfer in self._offloads:
            if transfer is not None and not transfer.done():
                break
            count += 1
        return count

    def pop_completed_offload(self) -> bool:
        """Whether the cache has the pages, or has no room for them. False: SGLang offers them again."""
        transfer = self._offloads.popleft()
        reachable = self._attached is not None and getattr(self._attached.cache, "connected", True)
        return transfer is not None and reachable and not transfer.failed_chunks()

    # Start and end

    def reset(self) -> None:
        """SGLang empties its prefix cache, and may use all memory otherwise when this returns."""
        for rid in list(self._queued):
            self.cancel_queued_load(rid)
        self.layer_done_counter.end()
        for transfer in self._offloads:
            if transfer is not None:
                transfer.cancel()
        if self._attached is not None:
            self._attached.storer.fence()
            self._attached.finder.forget_all()
        self._offloads.clear()

    def close(self) -> None:
        self.reset()
        attached, self._attached = self._attached, None
        if attached is not None:
            attached.finder.close(_CLOSE_S)
            attached.loader.close(_CLOSE_S)
            attached.storer.close(_CLOSE_S)
            attached.cache.close(_CLOSE_S)

    # How

    def _safely(self, otherwise: _T, task: Callable[[_Attached], _T]) -> _T:
        attached = self._attached
        if attached is None or weights.replaced():
            return otherwise
        try:
            return task(attached)
        except Exception:  # noqa: BLE001 - the scheduler must live
            _log.exception("served without the cache")
            return otherwise

    def _find(self, attached: _Attached, rid: str, transfers: list[Any]) -> list[int]:
        (pages,) = transfers
        return list(range(1, attached.finder.find(rid, list(pages.keys)) + 1))

    def _take(self, attached: _Attached, rid: str, transfers: list[Any]) -> _Queued | None:
        (pages,) = transfers
        slots = self._slots(pages)
        taken = attached.finder.take(rid, list(pages.keys))
        return _Queued(taken, slots) if taken is not None else None

    def _start(self, queued: _Queued) -> CopyTransfer:
        """A load that was promised: if it cannot begin it has failed, which SGLang must hear of."""

        def start(attached: _Attached) -> CopyTransfer:
            attached.loader.completed()  # which would otherwise keep all that have ended
            return attached.loader.load(queued.taken, queued.slots)

        return self._safely(None, start) or self._failed(queued.taken)

    def _failed(self, taken: Taken) -> CopyTransfer:
        transfer = CopyTransfer(range(taken.ticket.first, taken.ticket.boundary), self.layer_done_counter.num_layers)
        transfer.fail_all()
        transfer.finish()
        return transfer

    def _store(self, attached: _Attached, transfers: list[Any]) -> CopyTransfer:
        (pages,) = transfers
        attached.storer.completed()
        chain = Chain.from_digests(digests_of(list(pages.keys)), self._width)
        return attached.storer.store("offload", chain, 0, self._slots(pages))

    def _slots(self, pages: Any) -> npt.NDArray[np.int64]:
        """[pages * page_size]: the place of every token."""
        slots = np.ascontiguousarray(pages.device_indices.cpu().numpy(), np.int64)
        if slots.shape != (len(pages.keys) * self._width,):
            raise UnsupportedError(f"{slots.shape} places for {len(pages.keys)} pages of {self._width} tokens")
        return slots

    def _give_back(self, queued: _Queued | None) -> None:
        if queued is not None and self._attached is not None:
            self._attached.finder.give_back(queued.taken)

    def _all_are(self, ready: bool) -> bool:
        """Whether all ranks are: what some load others must not compute."""
        if self._group is None:
            return ready
        least = torch.tensor([int(ready)], dtype=torch.int)
        torch.distributed.all_reduce(least, op=torch.distributed.ReduceOp.MIN, group=self._group)
        return bool(least.item())


def _group(params: Any) -> Any:
    """The ranks that share the heads of a model; None if there is one."""
    group = params.attn_tp_cache_group or params.tp_cache_group
    if group is None or torch.distributed.get_world_size(group=group) == 1:
        return None
    return group


def _ranks(group: Any) -> tuple[int, int]:
    """(how many, which of them this one is)."""
    if group is None:
        return 1, 0
    return torch.distributed.get_world_size(group=group), torch.distributed.get_rank(group=group)
