"""Engine memory joined to a cache: restores a prompt's prefix into slots, and saves what has been computed there.

This is all that the runner knows of the cache, and the place where cache trouble ends: whatever happens here,
the answer is at worst "nothing restored", and the memory is safe to compute in.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from lmcache_adapters.hf.memory import KVMemory
from lmcache_adapters.hf.model import Model
from lmcache_sdk.api import Cache, Lookup, LookupState, Transfer
from lmcache_sdk.connector import GPUConnector
from lmcache_sdk.keys import Chain
from lmcache_sdk.patience import PrefillSpeed, worth_waiting

logger = logging.getLogger("lmcache_sdk.hf")

_LOOK_S = 0.01  # how often a request that waits asks whether that is still worth while


@dataclass(frozen=True, slots=True)
class Restored:
    """What a prompt's lookup and load gave.

    Attributes:
        chunks: how many chunks are in the memory now, from the first on.
        seconds: how long lookup and load took together.
        sources: chunks of the lookup by the tier they came from.
    """

    chunks: int = 0
    seconds: float = 0.0
    sources: Mapping[str, int] = field(default_factory=dict)


class ReusableMemory:
    """The KV memory of one sequence at a time, and the cache behind it (None = no cache: the same code, all misses).

    Args:
        slots: tokens that the memory holds.
        timeout_s: how long a request waits at most for its lookup, and again for its load, before it computes instead.
        always_wait: so long, also where computing is sooner done.

    Attributes:
        speed: how fast this engine computes; told by its owner.

    Raises:
        LayoutError: the connector's proof at registration failed.
    """

    def __init__(
        self, model: Model, cache: Cache | None, slots: int, timeout_s: float, *, always_wait: bool = False
    ) -> None:
        self.speed = PrefillSpeed()
        self._always_wait = always_wait
        self._model = model
        self._cache = cache
        self._timeout_s = timeout_s
        self.memory = KVMemory(model.group, slots, model.device)
        self._connector = None
        if cache is not None:
            self._connector = GPUConnector(cache, self.memory.layout(), write_op=self.memory.write)
            self.memory.rewind(0)

    def restore(self, rid: str, chain: Chain, usable_chunks: int) -> Restored:
        """Start a request: its memory then holds the longest prefix that the cache has, at most ``usable_chunks``."""
        restored = Restored()
        if self._connector is not None:
            # The last request's chunks may still be on their way out of these slots.
            self._connector.fence(None)
            try:
                restored = self._restore(rid, chain, usable_chunks) if usable_chunks else restored
            except Exception as error:  # noqa: BLE001 -- a cache that fails is a slower engine, never a broken one
                self._give_up(error)
        self.memory.rewind(restored.chunks * chain.chunk_tokens)
        return restored

    def save(self, rid: str, chain: Chain, first_chunk: int) -> None:
        """Store the full chunks from ``first_chunk`` on, in the background, while the request goes on."""
        count = min(len(chain), self.memory.length // chain.chunk_tokens) - first_chunk
        if self._connector is None or count <= 0:
            return
        try:
            chain.digests()  # here, since the chain may grow while the copy thread reads it
            self._connector.store(rid, chain, first_chunk, _slots(first_chunk, first_chunk + count, chain))
        except Exception as error:  # noqa: BLE001 -- as above
            self._give_up(error)

    def forget(self, rid: str) -> None:
        """The request has ended."""
        if self._cache is not None and self._connector is not None:
            self._cache.forget(rid)

    def drain(self, timeout_s: float) -> bool:
        """Wait until everything saved so far has reached the store; False if that took too long."""
        if self._cache is None:
            return True
        if self._connector is None:
            return False
        deadline = time.monotonic() + timeout_s
        return self._connector.drain(timeout_s) and self._cache.drain(max(0.0, deadline - time.monotonic()))

    def close(self) -> None:
        """Let go of the memory. The cache stays open."""
        if self._connector is not None:
            self._connector.close()
            self._connector = None

    def _restore(self, rid: str, chain: Chain, usable_chunks: int) -> Restored:
        cache, connector = self._cache, self._connector
        assert cache is not None
        assert connector is not None
        begin = time.perf_counter()
        lookup = self._look(cache, rid, chain, usable_chunks)
        boundary = max((chunks for chunks in lookup.boundaries if chunks <= usable_chunks), default=0)
        ticket = cache.claim(rid, boundary) if boundary else None
        if ticket is None:
            return Restored(seconds=time.perf_counter() - begin)
        transfer = connector.load(ticket, _slots(0, boundary, chain))
        try:
            transfer.wait(self._timeout_s)
        finally:  # also when the user interrupts
            if not transfer.done():
                self._stop(transfer)
        chunks = min(transfer.failed_chunks(), default=boundary)
        return Restored(chunks, time.perf_counter() - begin, lookup.sources)

    def _look(self, cache: Cache, rid: str, chain: Chain, usable_chunks: int) -> Lookup:
        """Look up, and wait for what is on its way for as long as that is sooner here than computed."""
        begin = time.perf_counter()
        lookup = cache.lookup(rid, chain)
        saves_s = promised_s = None
        while lookup.state == LookupState.PENDING:
            waited_s = time.perf_counter() - begin
            left_s = self._timeout_s - waited_s
            if not self._always_wait:
                if promised_s is None:  # both are as they were at the first estimate, to see whether the end recedes
                    saves_s = self._saves_s(lookup, usable_chunks, chain.chunk_tokens)
                    promised_s = waited_s + lookup.eta_s if lookup.eta_s is not None else None
                if not worth_waiting(waited_s, saves_s=saves_s, eta_s=lookup.eta_s, promised_s=promised_s):
                    left_s = 0.0
            lookup = cache.wait(rid, max(0.0, min(left_s, _LOOK_S)), settle=left_s <= _LOOK_S)
        return lookup

    def _saves_s(self, lookup: Lookup, usable_chunks: int, chunk_tokens: int) -> float | None:
        """How long computing what is on its way would take; of all that could be while nobody knows yet."""
        found = min(lookup.found, usable_chunks) if lookup.missing else usable_chunks
        missing = min(lookup.missing, found) if lookup.missing else usable_chunks
        return self.speed.seconds((found - missing) * chunk_tokens, missing * chunk_tokens)

    def _stop(self, transfer: Transfer) -> None:
        """Nothing may be computed in slots that a late copy still writes to."""
        transfer.cancel()
        if not transfer.wait(self._timeout_s):
            raise TimeoutError(f"a load did not stop within {self._timeout_s} s of being cancelled")

    def _give_up(self, error: Exception) -> None:
        """Go on without the cache, in fresh memory: nobody can say what still reads or writes the old one."""
        logger.error("the cache failed in a way it must not; this runner goes on without it", exc_info=error)
        self._connector = None
        length, old = self.memory.length, self.memory
        self.memory = KVMemory(self._model.group, old.slots, self._model.device)
        self.memory.rows[:, :, :length] = old.rows[:, :, :length]
        self.memory.rewind(length)


def _slots(first_chunk: int, end_chunk: int, chain: Chain) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """One sequence at a time lies from slot 0 on, so a token's slot is its position."""
    return np.arange(first_chunk * chain.chunk_tokens, end_chunk * chain.chunk_tokens, dtype=np.int64)
