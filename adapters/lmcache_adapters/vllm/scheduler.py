"""The scheduler's half: what the cache has of a request, its lease, and what the workers are to copy.

Nothing here waits. While a lookup is pending vLLM is told to ask again, for as long as what may still come is worth
the time (:mod:`lmcache_sdk.patience`); whatever the cache does not do, vLLM computes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, TypeVar

from lmcache_adapters.vllm.chains import chain_of
from lmcache_adapters.vllm.lora import LoraKeys
from lmcache_adapters.vllm.messages import Load, StepMeta, StepReport, Store
from lmcache_adapters.vllm.settings import Wishes, read_wishes
from lmcache_sdk.api import Cache, Lookup, LookupState, Ticket
from lmcache_sdk.keys import Chain
from lmcache_sdk.observe.logs import logger
from lmcache_sdk.patience import PrefillSpeed, worth_waiting

# vLLM asks for every waiting request in every step. What was READY is held much longer than this.
_READY_S = 1.0
_PENDING_S = 0.003

_MISS = Lookup(LookupState.MISS, why="the cache failed")
_UNNAMED = Lookup(LookupState.MISS, why="the request cannot be named")
_NOT_YET_NAMED = Lookup(LookupState.PENDING, why="its LoRA adapter is being read")
_T = TypeVar("_T")
_log = logger("vllm")


@dataclass(slots=True)
class _State:
    """Of one request that vLLM has not finished.

    Attributes:
        lora: the key of its adapter, until its chain is made; None also if the request does not use the cache.
        chain: None before that, and if its KV cannot be named.
        known: tokens of the request that are in its chain.
        computed: tokens that vLLM had itself when it last asked.
        lookup, asked_at: the cache's last answer.
        pending_since, promised_s, saves_s: of a lookup that was pending: since when, how long the wait would be by
            the first estimate, and what computing would take.
        stored: chunks that the workers were told to store.
        storing: stores of theirs that have not ended.
        loading: a load was ordered, and the workers have not named it as received.
        filled: tokens whose KV is there when the last planned step is done. vLLM also counts what is being loaded.
        doubtful: another connector loads within a step (MultiConnector) whose end is not known yet; it may fail.
        hopeless: a load has failed; what is left of the request is computed.
    """

    request: Any
    wishes: Wishes
    lora: Future[str | None] | None
    chain: Chain | None = None
    known: int = 0
    blocks: list[int] = field(default_factory=list)
    computed: int = 0
    lookup: Lookup | None = None
    asked_at: float = 0.0
    pending_since: float | None = None
    promised_s: float | None = None
    saves_s: float | None = None
    sources: Mapping[str, int] = field(default_factory=dict)
    stored: int = 0
    storing: int = 0
    loading: bool = False
    filled: int = 0
    doubtful: bool = False
    hopeless: bool = False


class Scheduler:
    """See the module's docstring.

    Args:
        block_tokens: of a block as vLLM's scheduler counts them.
        ranks: workers, each of which copies its own part.
        loads, stores: what this engine does at all.
        unheard: loads are promised before the workers have said, in their first report, that they can.
        clock: for tests.
    """

    def __init__(
        self,
        cache: Cache,
        *,
        block_tokens: int,
        ranks: int = 1,
        loads: bool = True,
        stores: bool = True,
        unheard: bool = True,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._cache = cache
        self._chunk_tokens = cache.namespace.spec.chunk_tokens
        self._block_tokens = block_tokens
        self._ranks = ranks
        self._loads, self._stores = loads, stores
        self._ready = unheard
        self._clock = clock
        self._lora_keys = LoraKeys()
        self._states: dict[str, _State] = {}
        self._held: dict[str, _State] = {}  # finished; their blocks wait for their stores
        self._tickets: dict[str, Ticket] = {}  # until the workers are done
        self._step = StepMeta()
        self._steps = 0
        self._timed: dict[int, tuple[float, int, int]] = {}  # by step: when it began, first token, tokens
        self._last_output = 0.0
        self.speed = PrefillSpeed()
        self.figures: dict[str, float] = {}

    # What vLLM's scheduler calls, in this order

    def matched(self, request: Any, computed: int) -> tuple[int | None, bool]:
        """Tokens beyond ``computed`` that can be loaded, and whether they are; None = ask again."""
        state = self._state(request)
        state.computed = computed
        # One token is always computed: it is its logits that choose the next one.
        usable = self._whole_blocks(request.num_tokens - 1)
        if not self._wants_load(state) or usable <= computed:
            return 0, False
        lookup = self._look(state, usable)
        if lookup is None:
            return None, False
        found = min(self._whole_blocks(lookup.chunks * self._chunk_tokens), usable)
        return (found - computed, True) if found > computed else (0, False)

    def allocated(self, request: Any, blocks: Sequence[int], external: int) -> None:
        """vLLM has taken blocks for the request, ``external`` tokens of them to be loaded."""
        state = self._state(request)
        state.blocks, state.filled = list(blocks), 0
        lookup, state.lookup, state.pending_since = state.lookup, None, None
        if lookup is None or state.chain is None:
            return
        rid = request.request_id
        if external:
            start, end = state.computed, state.computed + external
            first, boundary = start // self._chunk_tokens, -(-end // self._chunk_tokens)
            ticket = self._safely(None, self._cache.claim, rid, boundary, first=first, parts=self._ranks)
            if ticket is not None:
                self._tickets[rid] = ticket
            state.sources = lookup.sources
            used = -(-end // self._block_tokens)
            self._step.loads.append(Load(rid, ticket, start, end, state.blocks[:used]))
            state.loading = True
        self._safely(None, self._cache.forget, rid)

    def build_step(self, output: Any) -> StepMeta:
        """What the workers do in a step, beside computing it."""
        step, self._step = self._step, StepMeta()
        preempted = getattr(output, "preempted_req_ids", None)
        step.preempted = None if preempted is None else {rid for rid in preempted if self._is_storing(rid)}
        scheduled = output.num_scheduled_tokens
        step.idle = not scheduled
        doubtful = getattr(output, "has_sync_kv_loads", False)
        spans: list[tuple[int, int]] = []
        for new in output.scheduled_new_reqs:
            state = self._states.get(new.req_id)
            if state is not None:
                state.blocks = list(new.block_ids[0])
            spans.append((new.num_computed_tokens, scheduled[new.req_id]))
            self._plan_store(step, new.req_id, sum(spans[-1]), doubtful)
        cached = output.scheduled_cached_reqs
        for rid, blocks, computed in zip(cached.req_ids, cached.new_block_ids, cached.num_computed_tokens, strict=True):
            state = self._states.get(rid)
            if state is not None and rid in cached.resumed_req_ids:
                state.blocks = list(blocks[0]) if blocks else []
            elif state is not None and blocks:
                state.blocks += blocks[0]
            spans.append((computed, scheduled[rid]))
            self._plan_store(step, rid, sum(spans[-1]), doubtful)
        self._time(step, spans)
        return step

    def heard(self, report: StepReport | None, received: Iterable[str], sent: Iterable[str]) -> None:
        """What the workers say after a step."""
        now = self._clock()
        if report is not None:
            self._ready = True
            if report.trouble:
                _log.error("vLLM serves WITHOUT the cache, since a worker cannot use it: %s", report.trouble)
                self._loads = self._stores = False
            timed = self._timed.pop(report.step, None) if report.step is not None else None
            if timed is not None:
                began, first, tokens = timed
                self.speed.add(first, tokens, now - max(began, self._last_output))
            for rid, count in report.stored.items():
                state = self._states.get(rid) or self._held.get(rid)
                if state is not None:
                    state.storing -= count
            for rid in report.failed:
                if rid in self._states:
                    self._states[rid].hopeless = True
        self._last_output = now
        for rid in received:
            self._release(rid)
            if rid in self._states:
                self._states[rid].loading = False
        for rid in sent:
            state = self._held.pop(rid, None)
            if state is not None:
                self._pin(state)

    def finished(self, request: Any, blocks: Sequence[int]) -> bool:
        """The request has ended; True: its blocks are still being read, and are named by ``sent`` when they are not."""
        rid = request.request_id
        state = self._states.pop(rid, None)
        if state is None:
            return False
        if state.lookup is not None:
            self._safely(None, self._cache.forget, rid)
        state.blocks = list(blocks)
        # With asynchronous scheduling the last tokens were not known yet when their step was planned.
        processed = request.num_computed_tokens - _in_flight(request)
        self._store(self._step, state, min(processed, state.filled))
        # vLLM itself keeps the blocks of a load until that is received, and ends the request then: it must not be named
        # a second time. Stores from before it was preempted have ended before the load began.
        if state.storing <= 0 or state.loading:
            self._pin(state)
            return False
        self._held[rid] = state
        self._step.held.add(rid)
        return True

    def holds_blocks(self) -> bool:
        """Whether blocks of finished requests will soon be free."""
        return bool(self._held)

    def sources(self, request: Any) -> Mapping[str, int]:
        """Chunks of the request's lookup by the tier they came from."""
        state = self._states.get(request.request_id)
        return state.sources if state is not None else {}

    def reset(self) -> bool:
        """Remove all KV of this model; False if some of it is left, or on its way to the cache: ask again."""
        for rid, state in self._states.items():
            if state.lookup is not None:  # it has found what is being removed
                state.lookup = state.pending_since = None
                self._safely(None, self._cache.forget, rid)
        cleared = self._safely(None, self._cache.clear) is not None
        return cleared and not any(state.storing > 0 for state in (*self._states.values(), *self._held.values()))

    def take_figures(self) -> dict[str, float]:
        """What has been counted since the last call."""
        figures, self.figures = self.figures, {}
        return figures

    def close(self, timeout_s: float = 10.0) -> None:
        """Let go of the cache."""
        for rid in list(self._tickets):
            self._release(rid)
        self._lora_keys.close()
        self._cache.close(timeout_s)

    # Lookups

    def _safely(self, otherwise: _T, call: Callable[..., _T], *arguments: Any, **fields: Any) -> _T:
        """A cache never raises. Should it do so all the same, that is not to be the end of vLLM."""
        try:
            return call(*arguments, **fields)
        except Exception:  # noqa: BLE001 - an exception here ends the whole engine
            _log.exception("the cache failed in a way it must not")
            return otherwise

    def _look(self, state: _State, usable: int) -> Lookup | None:
        """The settled answer; None while it is worth waiting for more."""
        now = self._clock()
        if state.lookup is not None:
            pending = state.lookup.state == LookupState.PENDING
            if now - state.asked_at < (_PENDING_S if pending else _READY_S):
                return None if pending else state.lookup
        lookup = self._safely(_MISS, self._ask, state)
        if lookup.state == LookupState.PENDING:
            if state.pending_since is None:
                state.pending_since, state.promised_s = now, None
            waited_s = now - state.pending_since
            if state.promised_s is None:  # both as at the first estimate, to see whether the end recedes
                state.saves_s = self._saves_s(lookup, state.computed, usable)
                state.promised_s = waited_s + lookup.eta_s if lookup.eta_s is not None else None
            if not worth_waiting(waited_s, saves_s=state.saves_s, eta_s=lookup.eta_s, promised_s=state.promised_s):
                lookup = self._give_up(state)
                self._count("lookups_given_up")
        state.lookup, state.asked_at = lookup, now
        if lookup.state == LookupState.PENDING:
            return None
        state.pending_since = None
        return lookup

    def _ask(self, state: _State) -> Lookup:
        chain = self._chain(state)
        if chain is None:
            return _UNNAMED if state.lora is None else _NOT_YET_NAMED
        return self._cache.lookup(state.request.request_id, chain)

    def _give_up(self, state: _State) -> Lookup:
        """What has come by now."""
        if state.chain is None:
            return _UNNAMED
        return self._safely(_MISS, self._cache.wait, state.request.request_id, 0.0, settle=True)

    def _saves_s(self, lookup: Lookup, computed: int, usable: int) -> float | None:
        """How long computing what is on its way would take; of all that could be while nobody knows yet."""
        first, end = computed, usable
        if lookup.missing:
            end = min(lookup.found * self._chunk_tokens, usable)
            first = max(computed, end - lookup.missing * self._chunk_tokens)
        return self.speed.seconds(first, max(0, end - first))

    def _wants_load(self, state: _State) -> bool:
        return (
            self._loads
            and self._ready
            and state.wishes.load
            and not state.hopeless
            and (state.chain is not None or state.lora is not None)
            and not getattr(state.request, "skip_reading_prefix_cache", False)
        )

    # Requests

    def _state(self, request: Any) -> _State:
        state = self._states.get(request.request_id)
        if state is None:
            wishes = read_wishes(request.kv_transfer_params)
            used = (self._loads and wishes.load) or (self._stores and wishes.store)
            used = used and not getattr(request, "resumable", False)  # tokens of such a session are taken back
            # Of all requests: what any of them computes may be in vLLM's prefix cache.
            lora = self._lora_keys.ask(getattr(request, "lora_request", None))
            state = self._states[request.request_id] = _State(request, wishes, lora if used else None)
        return state

    def _chain(self, state: _State) -> Chain | None:
        """With what has been generated, where that makes a chunk full; None if it cannot be had, or not yet."""
        now = state.request.num_tokens
        if state.lora is not None and state.lora.done():
            state.chain = chain_of(state.request, self._chunk_tokens, state.wishes.tenant, state.lora)
            state.known, state.lora = now, None
        elif state.chain is not None and now // self._chunk_tokens > state.known // self._chunk_tokens:
            state.chain.extend(list(state.request.all_token_ids[state.known : now]))
            state.known = now
        return state.chain

    def _whole_blocks(self, tokens: int) -> int:
        return tokens // self._block_tokens * self._block_tokens

    def _is_storing(self, rid: str) -> bool:
        state = self._states.get(rid)
        return state is not None and state.storing > 0

    def _release(self, rid: str) -> None:
        """The workers have given their parts back; what none of them took is given back here."""
        ticket = self._tickets.pop(rid, None)
        if ticket is not None:
            for part in range(ticket.parts):
                self._safely(None, self._cache.release, ticket, part)

    def _pin(self, state: _State) -> None:
        if state.wishes.pin_s and state.chain is not None:
            self._safely(0, self._cache.pin, state.chain, state.wishes.pin_s)

    # Stores

    def _plan_store(self, step: StepMeta, rid: str, computed: int, doubtful: bool) -> None:
        state = self._states.get(rid)
        if state is None:
            return
        state.filled = computed
        state.doubtful = doubtful or (state.doubtful and _in_flight(state.request) > 0)
        if not state.doubtful:
            self._store(step, state, computed)

    def _store(self, step: StepMeta, state: _State, computed: int) -> None:
        """Chunks that are full when ``computed`` tokens are; also those that came from a cache, which asks before it
        copies: that way a daemon that has lost its pool is filled again.
        """
        if not self._stores or not state.wishes.store:
            return
        # Tokens beyond these are not known yet.
        chunks = min(computed, state.request.num_tokens) // self._chunk_tokens
        if chunks <= state.stored:
            return
        chain = self._chain(state)
        if chain is None:
            return
        blocks = state.blocks[: -(-chunks * self._chunk_tokens // self._block_tokens)]
        if len(blocks) * self._block_tokens < chunks * self._chunk_tokens:
            return
        digests = b"".join(chain.digests(chunks))
        rid = state.request.request_id
        step.stores.append(Store(rid, state.stored, digests, blocks, chain.tenant, chain.salted))
        state.stored = chunks
        state.storing += self._ranks

    def _time(self, step: StepMeta, spans: list[tuple[int, int]]) -> None:
        """Measure steps that compute one prompt and hardly anything else."""
        first, tokens = max(spans, key=lambda span: span[1], default=(0, 0))
        if tokens < 128 or sum(count for _, count in spans) > 1.1 * tokens:
            return
        self._steps += 1
        step.step = self._steps
        self._timed[self._steps] = self._clock(), first, tokens
        for late in [number for number in self._timed if number < self._steps - 16]:
            del self._timed[late]

    def _count(self, name: str, number: float = 1) -> None:
        self.figures[name] = self.figures.get(name, 0) + number


def _in_flight(request: Any) -> int:
    """Tokens of steps that have been scheduled and have not come back."""
    return int(getattr(request, "num_in_flight_tokens", 0))
