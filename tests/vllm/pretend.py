"""vLLM without a model: its real scheduler, the connector's two halves, and real KV memory in the CPU backend's form.

A forward pass writes rows that are a function of the whole prefix, through vLLM's own operation. Then all rows that its
requests attend to are read back, by a formula of its own, and compared: whatever was loaded wrong, into the wrong
place, or was overwritten by somebody, fails there.
"""

from __future__ import annotations

import pickle
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import vllm.config as config
from vllm import SamplingParams
from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
from vllm.distributed.kv_transfer.kv_connector.utils import KVOutputAggregator
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole
from vllm.platforms import current_platform
from vllm.utils.hashing import sha256
from vllm.v1.attention.backend import AttentionType
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackendImpl, _get_attn_isa
from vllm.v1.core import kv_cache_utils
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import KVConnectorOutput, ModelRunnerOutput
from vllm.v1.request import Request
from vllm.v1.structured_output import StructuredOutputManager

import lmcache_adapters.vllm.connector as connector_module
from tests.vllm.tiny import DIM, KV_HEADS, LAYERS

current_platform.import_kernels()

NAMES = [f"model.layers.{layer}.self_attn.attn" for layer in range(LAYERS)]


class Layer:
    """What of an attention layer the connector uses; the write operation is vLLM's."""

    def __init__(self, memory: torch.Tensor, isa: str) -> None:
        self.kv_cache = memory
        self.isa = isa
        self._k_scale_float = self._v_scale_float = 1.0
        self.impl = SimpleNamespace(attn_type=AttentionType.DECODER, kv_cache_dtype="auto")
        self.impl.do_kv_cache_update = lambda *args: CPUAttentionBackendImpl.do_kv_cache_update(self.impl, *args)


class Rank:
    """One worker: its KV memory, and the connector's half."""

    def __init__(self, blocks: int, block_tokens: int, heads: range) -> None:
        self.heads = heads
        self.width = block_tokens
        shape = (blocks, len(heads), block_tokens, 2 * DIM)
        self.memory = [torch.zeros(shape, dtype=torch.bfloat16) for _ in NAMES]
        isa = _get_attn_isa(torch.bfloat16, block_tokens, DIM)
        self.layers = {name: Layer(memory, isa) for name, memory in zip(NAMES, self.memory, strict=True)}
        self.connector: Any = None

    def rows(self, layer: int, states: np.ndarray) -> list[torch.Tensor]:
        """K and V of tokens whose prefixes have these states, bf16 [n, heads, dim]."""
        heads = np.asarray(self.heads)[None, :, None]
        found = []
        for role in range(2):
            numbers = states[:, None, None] * 7 + 31 * layer + 977 * role + heads * 5 + np.arange(DIM)
            found.append(torch.from_numpy((numbers % 30000).astype(np.uint16)).view(torch.bfloat16))
        return found

    def write(self, states: np.ndarray, slots: np.ndarray) -> None:
        for layer, name in enumerate(NAMES):
            k, v = self.rows(layer, states)
            module = self.layers[name]
            module.impl.do_kv_cache_update(module, k, v, self.memory[layer], torch.from_numpy(slots))

    def read(self, layer: int, blocks: Sequence[int], tokens: int) -> list[torch.Tensor]:
        """K and V as they are in the memory, bf16 [n, heads, dim]."""
        flat = self.memory[layer][list(blocks)].reshape(len(blocks), len(self.heads), 2, self.width * DIM)
        k = flat[:, :, 0].reshape(-1, len(self.heads), DIM, self.width).permute(0, 3, 1, 2)
        v = flat[:, :, 1].reshape(-1, len(self.heads), self.width, DIM).permute(0, 2, 1, 3)
        return [side.reshape(-1, len(self.heads), DIM)[:tokens] for side in (k, v)]

    def check(self, states: np.ndarray, blocks: Sequence[int], what: str) -> None:
        for layer in range(LAYERS):
            for role, found, wanted in zip(
                "kv", self.read(layer, blocks, len(states)), self.rows(layer, states), strict=True
            ):
                same = (found.view(torch.uint16) == wanted.view(torch.uint16)).flatten(1).all(1)
                wrong = torch.nonzero(~same).flatten().tolist()
                assert not wrong, f"{what}: {role} of layer {layer} is wrong at tokens {wrong[:8]} ({len(wrong)})"


def until(true: Callable[[], Any], seconds: float = 10.0) -> None:
    """Wait for something that another thread or process does."""
    started, pause = time.monotonic(), threading.Event()
    while not true():
        assert time.monotonic() - started < seconds
        pause.wait(0.005)


def states_of(tokens: Sequence[int]) -> np.ndarray:
    """A number for each position, which depends on all tokens up to it."""
    return np.cumsum(np.asarray(tokens, np.int64) * 2654435761 % 65521) % 65521


class PretendEngine:
    """One engine. ``loaded`` are external tokens by request, ``computed`` those that were computed."""

    def __init__(
        self,
        model: Path,
        url: str,
        *,
        block_tokens: int = 32,
        blocks: int = 64,
        ranks: int = 1,
        budget: int = 512,
        asynchronous: bool = False,
        role: str = "kv_both",
        policy: str = "recompute",
        change: Callable[[Any], None] = lambda _: None,
        **extra: Any,
    ) -> None:
        cache = config.CacheConfig(block_size=block_tokens, enable_prefix_caching=True)
        cache.num_gpu_blocks = blocks
        cache.kv_cache_layout = "LBHNC"
        self.config = config.VllmConfig(
            model_config=config.ModelConfig(model=str(model), dtype="bfloat16", seed=0),
            cache_config=cache,
            device_config=config.DeviceConfig("cpu"),
            scheduler_config=config.SchedulerConfig(
                max_num_seqs=8,
                max_num_batched_tokens=budget,
                max_model_len=4096,
                enable_chunked_prefill=True,
                is_encoder_decoder=False,
                async_scheduling=asynchronous,
            ),
            kv_transfer_config=config.KVTransferConfig(
                kv_connector="LMCacheSDKConnector",
                kv_connector_module_path="lmcache_adapters.vllm",
                kv_role=role,
                kv_load_failure_policy=policy,
                kv_connector_extra_config={"url": url, "on_error": "refuse", **extra},
            ),
        )
        self.config.parallel_config.tensor_parallel_size = ranks
        change(self.config)
        shard = KV_HEADS // ranks
        spec = FullAttentionSpec(block_size=block_tokens, num_kv_heads=shard, head_size=DIM, dtype=torch.bfloat16)
        groups = KVCacheConfig(
            num_blocks=blocks, kv_cache_tensors=[], kv_cache_groups=[KVCacheGroupSpec(list(NAMES), spec)]
        )
        self.width = block_tokens
        self.ranks = [Rank(blocks, block_tokens, range(r * shard, (r + 1) * shard)) for r in range(ranks)]
        try:
            for number, rank in enumerate(self.ranks):
                self.config.compilation_config.static_forward_context = rank.layers
                rank.connector = KVConnectorFactory.create_connector(self.config, KVConnectorRole.WORKER, groups)
                connector_module._tensor_rank = lambda number=number: number
                rank.connector.register_kv_caches(dict(zip(NAMES, rank.memory, strict=True)))
            kv_cache_utils.init_none_hash(sha256)
            kind = AsyncScheduler if asynchronous else Scheduler
            self.scheduler = kind(
                self.config, groups, StructuredOutputManager(self.config), block_size=block_tokens, log_stats=True
            )
        except BaseException:
            for rank in self.ranks:
                if rank.connector is not None:
                    rank.connector.shutdown()
            raise
        self.connector = self.scheduler.connector
        self.aggregator = KVOutputAggregator(ranks)
        self.asynchronous = asynchronous
        self.tokens: dict[str, list[int]] = {}
        self.requests: dict[str, Any] = {}
        self.finished: dict[str, Any] = {}
        self.computed: dict[str, int] = {}
        self.loaded: dict[str, int] = {}
        self.preempted = 0
        self.steps = 0
        self.blocks: dict[str, list[int]] = {}
        self._waiting: list[tuple[Any, ModelRunnerOutput]] = []

    # What a test does

    def add(
        self,
        rid: str,
        prompt: Sequence[int],
        *,
        max_tokens: int = 1,
        salt: str | None = None,
        params: dict[str, Any] | None = None,
        **fields: Any,
    ) -> Any:
        sampling = SamplingParams(
            max_tokens=max_tokens, ignore_eos=True, extra_args={"kv_transfer_params": params} if params else None
        )
        sampling.update_from_generation_config({}, 2)
        request = Request(
            rid,
            prompt_token_ids=list(prompt),
            sampling_params=sampling,
            pooling_params=None,
            cache_salt=salt,
            block_hasher=kv_cache_utils.get_request_block_hasher(self.width, sha256),
            **fields,
        )
        self.tokens[rid], self.computed[rid], self.loaded[rid] = list(prompt), 0, 0
        self.requests[rid] = request
        self.scheduler.add_request(request)
        return request

    def run(self, rid: str, prompt: Sequence[int], **fields: Any) -> int:
        """One request to its end; the answer is how many tokens came from the cache."""
        self.add(rid, prompt, **fields)
        self.settle()
        assert rid in self.finished
        return self.loaded[rid]

    def settle(self, steps: int = 20_000) -> None:
        """Step until nothing is left to do, stores included."""
        for _ in range(steps):
            if not self.scheduler.has_requests() and not self._waiting:
                return
            self.step()
        raise AssertionError(f"not settled after {steps} steps: {list(self.scheduler.requests)}")

    def flush(self) -> None:
        """As reset_prefix_cache, with all stores where they belong."""
        self.settle()
        for rank in self.ranks:
            assert rank.connector._worker.drain(10)
        assert self.scheduler.reset_prefix_cache()

    def step(self, meanwhile: Callable[[], object] = lambda: None) -> Any:
        """One step; with asynchronous scheduling the answer to the one before is taken in after it was scheduled.

        Args:
            meanwhile: done when the workers have been told what to do, and no answer has been taken in.
        """
        self.steps += 1
        output = self.scheduler.schedule()
        self.preempted += len(output.preempted_req_ids or ())
        answer = self._execute(output)
        meanwhile()
        self._waiting.append((output, answer))
        if len(self._waiting) > int(self.asynchronous):
            self._update()
        if self.asynchronous and not output.total_num_scheduled_tokens:
            while self._waiting:
                self._update()
        return output

    def close(self) -> None:
        self.connector.shutdown()
        for rank in self.ranks:
            rank.connector.shutdown()

    # The workers

    def _update(self) -> None:
        output, answer = self._waiting.pop(0)
        for outputs in self.scheduler.update_from_output(output, answer).values():
            for one in outputs.outputs:
                if one.finish_reason is not None:
                    self.finished[one.request_id] = one.finish_reason

    def _execute(self, output: Any) -> ModelRunnerOutput:
        meta = pickle.dumps(output.kv_connector_metadata)
        for load in output.kv_connector_metadata.loads:
            self.loaded[load.rid] += load.end - load.start
        for rank in self.ranks:
            rank.connector.handle_preemptions(pickle.loads(meta))
        sampled = self._forward(output)
        reports = [self._after_forward(rank, pickle.loads(meta), output) for rank in self.ranks]
        ids = list(output.num_scheduled_tokens)
        answers = [
            ModelRunnerOutput(
                req_ids=ids,
                req_id_to_index={rid: at for at, rid in enumerate(ids)},
                sampled_token_ids=[sampled[rid] for rid in ids],
                logprobs=None,
                prompt_logprobs_dict={},
                pooler_output=None,
                kv_connector_output=pickle.loads(pickle.dumps(report)),
            )
            for report in reports
        ]
        return self.aggregator.aggregate(answers)

    def _after_forward(self, rank: Rank, meta: Any, output: Any) -> KVConnectorOutput:
        connector, report = rank.connector, KVConnectorOutput()
        connector.bind_connector_metadata(meta)
        assert not output.has_sync_kv_loads
        connector.start_load_kv(None)
        connector.wait_for_save()
        results = connector.get_transfer_results(output.finished_req_ids)
        report.finished_sending, report.finished_recving = results.finished_sending, results.finished_recving
        report.invalid_block_ids = connector.get_block_ids_with_load_errors()
        report.kv_connector_stats = connector.get_kv_connector_stats()
        report.kv_connector_worker_meta = connector.build_connector_worker_meta()
        connector.clear_connector_metadata()
        return report

    def _forward(self, output: Any) -> dict[str, list[int]]:
        spans: dict[str, int] = {}
        for new in output.scheduled_new_reqs:
            self.blocks[new.req_id] = list(new.block_ids[0])
            spans[new.req_id] = new.num_computed_tokens
        cached = output.scheduled_cached_reqs
        for rid, blocks, computed in zip(cached.req_ids, cached.new_block_ids, cached.num_computed_tokens, strict=True):
            if rid in cached.resumed_req_ids:
                self.blocks[rid] = list(blocks[0])
                # What was on its way when the request was preempted may have been dropped.
                self.tokens[rid] = list(cached.all_token_ids[rid])
            elif blocks:
                self.blocks[rid] += blocks[0]
            spans[rid] = computed
        # All write before any reads, as in each layer: blocks that one fills in this step may be another's prefix.
        for rid, start in spans.items():
            self._write(rid, start, output.num_scheduled_tokens[rid])
        for rid, start in spans.items():
            self._read(rid, start + output.num_scheduled_tokens[rid])
        return {rid: self._sample(rid, start + output.num_scheduled_tokens[rid]) for rid, start in spans.items()}

    def _write(self, rid: str, start: int, count: int) -> None:
        tokens, blocks = self.tokens[rid], self.blocks[rid]
        states = states_of(tokens)
        positions = np.arange(start, start + count)
        slots = np.asarray(blocks)[positions // self.width] * self.width + positions % self.width
        for rank in self.ranks:
            rank.write(states[start : start + count], slots)
        self.computed[rid] += count

    def _read(self, rid: str, end: int) -> None:
        states, blocks = states_of(self.tokens[rid][:end]), self.blocks[rid][: -(-end // self.width)]
        for rank in self.ranks:
            rank.check(states, blocks, f"{rid} at {end}")

    def _sample(self, rid: str, end: int) -> list[int]:
        tokens = self.tokens[rid]
        if end < len(tokens):
            return []  # a piece of the prompt
        token = int(states_of(tokens)[-1]) % 900 + 10
        tokens.append(token)
        return [token]
