"""The connector as vLLM sees it: both roles in one class, each in its own process. What it does is in its halves."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1, KVConnectorRole, SupportsHMA

from lmcache_adapters.deployment import part_of
from lmcache_adapters.settings import on_error
from lmcache_adapters.vllm.cache import open_for_scheduler, open_for_worker
from lmcache_adapters.vllm.identity import namespace_and_producer, refuse_unserved_engine
from lmcache_adapters.vllm.layout import EngineMemory
from lmcache_adapters.vllm.messages import StepMeta, StepReport
from lmcache_adapters.vllm.scheduler import Scheduler
from lmcache_adapters.vllm.settings import VLLMSettings, read_settings
from lmcache_adapters.vllm.stats import ConnectorPromMetrics, ConnectorStats
from lmcache_adapters.vllm.worker import Worker
from lmcache_sdk.connector import GPUConnector
from lmcache_sdk.errors import LMCacheSDKError
from lmcache_sdk.observe.logs import ROOT, log_to_stderr, logger
from lmcache_sdk.spec import Namespace, Producer, Share

try:
    from vllm.v1.metrics.cache_hit_source import CacheHitSource
except ImportError:  # a vLLM that does not tell hits apart
    CacheHitSource = None

_log = logger("vllm")

# How long the cache may take to end with the engine.
_CLOSE_S = 10.0
_HOST_TIERS = ("pool", "memory")
_DISK_TIERS = ("lmdb", "file")


class LMCacheSDKConnector(KVConnectorBase_V1, SupportsHMA):
    """Prefixes from an lmcache-sdk cache, and to it. Its settings are in ``docs/vllm.md``.

    Raises:
        LMCacheSDKError: something is wrong, and ``on_error`` is ``refuse``.
    """

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        if not logging.getLogger(ROOT).handlers:
            log_to_stderr()  # nobody else can, in vLLM's processes
        self._refuse = on_error(self._kv_transfer_config.kv_connector_extra_config) == "refuse"
        self._trouble = ""
        self._scheduler: Scheduler | None = None
        self._worker: Worker | None = None
        self._settings: VLLMSettings
        self._namespace: Namespace
        self._producer: Producer
        self._worker_cache: Any = None
        self._guard(self._begin)

    def _begin(self) -> None:
        transfer = self._kv_transfer_config
        self._settings = read_settings(transfer.kv_connector_extra_config)
        log_to_stderr(self._settings.config.log_level, self._settings.config.log_format)
        refuse_unserved_engine(self._vllm_config, self._kv_cache_config)
        self._namespace, self._producer = namespace_and_producer(self._vllm_config, self._settings)
        if self._role == KVConnectorRole.SCHEDULER:
            if transfer.kv_load_failure_policy != "recompute":
                _log.warning(
                    "kv_load_failure_policy is %r: a load that fails ends its request with an error; set "
                    '"kv_load_failure_policy": "recompute" in kv_transfer_config, and it is computed instead',
                    transfer.kv_load_failure_policy,
                )
            self._scheduler = Scheduler(
                open_for_scheduler(self._settings, transfer.engine_id, self._namespace, self._producer),
                block_tokens=self._block_tokens,
                ranks=self._ranks,
                loads=transfer.is_kv_consumer,
                stores=transfer.is_kv_producer,
                # A worker that cannot load costs the first request nothing, then; or the engine does not start.
                unheard=self._refuse or transfer.kv_load_failure_policy == "recompute",
            )
            chunk_tokens = self._namespace.spec.chunk_tokens
            if self._settings.config.share != Share.OWN and self._block_tokens % chunk_tokens:
                _log.info(
                    "a block of %d tokens is no multiple of a chunk, %d: once this engine has loaded another one's KV, "
                    "what it stores is of no use to others; with a --block-size that is one, it is",
                    self._block_tokens,
                    chunk_tokens,
                )
            _log.info("namespace %s, producer %s, %s", self._namespace.id, self._producer.name, self._settings.url)

    def _guard(self, begin: Callable[[], None]) -> None:
        """Run a part of the start; if it fails, the engine has no cache, or does not start."""
        try:
            begin()
        except Exception as error:
            self._trouble = f"{type(error).__name__}: {error}"
            if self._refuse:
                raise
            _log.error(
                "vLLM serves WITHOUT the cache: %s (on_error=refuse would have ended it here)",
                self._trouble,
                exc_info=not isinstance(error, LMCacheSDKError | OSError),  # nobody has thought of it
            )

    @property
    def _block_tokens(self) -> int:
        return int(self._vllm_config.cache_config.block_size)

    @property
    def _ranks(self) -> int:
        return int(self._vllm_config.parallel_config.tensor_parallel_size)

    @property
    def requires_kv_delivery(self) -> bool:
        return False  # a store that is lost is a miss some day

    # The scheduler's role

    def set_xfer_handshake_metadata_pp_aware(self, metadata: dict[tuple[int, int], Any]) -> None:
        """Another connector's (MultiConnector); what our workers have to say is in their first report."""

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int | None, bool]:
        return self._scheduler.matched(request, num_computed_tokens) if self._scheduler else (0, False)

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        if self._scheduler:
            self._scheduler.allocated(request, blocks.get_block_ids()[0], num_external_tokens)

    def build_connector_meta(self, scheduler_output: Any) -> StepMeta:
        return self._scheduler.build_step(scheduler_output) if self._scheduler else StepMeta()

    def update_connector_output(self, connector_output: Any) -> None:
        if self._scheduler:
            self._scheduler.heard(
                getattr(connector_output, "kv_connector_worker_meta", None),
                connector_output.finished_recving or (),
                connector_output.finished_sending or (),
            )

    def request_finished(self, request: Any, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        return bool(self._scheduler and self._scheduler.finished(request, block_ids)), None

    def request_finished_all_groups(
        self, request: Any, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        return self.request_finished(request, block_ids[0])

    def has_pending_block_frees(self) -> bool:
        return bool(self._scheduler and self._scheduler.holds_blocks())

    def reset_cache(self) -> bool | None:
        return self._scheduler.reset() if self._scheduler else None

    def get_external_cache_hit_sources(self, request: Any, num_external_tokens: int) -> dict[Any, int]:
        """By the slowest tier first: what came from there is what was not nearer."""
        if CacheHitSource is None or num_external_tokens == 0 or self._scheduler is None:
            return {}
        left, found = num_external_tokens, {}
        chunks = dict.fromkeys((CacheHitSource.EXTERNAL_UNSPECIFIED, CacheHitSource.DISK), 0)
        for tier, count in self._scheduler.sources(request).items():
            if tier in _DISK_TIERS:
                chunks[CacheHitSource.DISK] += count
            elif tier not in _HOST_TIERS:
                chunks[CacheHitSource.EXTERNAL_UNSPECIFIED] += count
        for source, count in chunks.items():
            tokens = min(left, count * self._settings.config.chunk_tokens)
            if tokens:
                found[source] = tokens
            left -= tokens
        return {**found, CacheHitSource.HOST: left} if left else found

    # The worker's role

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        if not self._trouble:
            self._guard(lambda: self._register(kv_caches))
        if self._worker is None:
            self._worker = Worker(None, 1, self._block_tokens, trouble=self._trouble)

    def _register(self, kv_caches: dict[str, torch.Tensor]) -> None:
        spec = self._namespace.spec
        layers = self._vllm_config.compilation_config.static_forward_context
        memory = EngineMemory(kv_caches, layers, spec.groups[0])
        rank = _tensor_rank() if self._ranks > 1 else 0
        part = part_of(spec.groups[0], self._ranks, rank)
        engine_id = self._kv_transfer_config.engine_id
        cache = open_for_worker(self._settings, engine_id, self._namespace, self._producer, self._block_tokens)
        try:
            connector = GPUConnector(cache, memory.layout, part, write_op=memory.write, rank=rank)
        except BaseException:
            cache.close(1.0)
            raise
        self._worker_cache = cache
        self._worker = Worker(connector, spec.chunk_tokens, self._block_tokens, memory.now)

    def handle_preemptions(self, kv_connector_metadata: Any) -> None:
        if self._worker:
            self._worker.before_forward(kv_connector_metadata)

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        if self._worker:
            self._worker.start_loads(self._metadata())

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Loads end before their request is computed: there is nothing to wait for."""

    def save_kv_layer(self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: Any, **kwargs: Any) -> None:
        """Stores begin when the forward pass has ended."""

    def wait_for_save(self) -> None:
        if self._worker:
            self._worker.start_stores(self._metadata())

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        if self._worker is None:
            return None, None
        sent, received = self._worker.finished()
        return sent or None, received or None

    def get_block_ids_with_load_errors(self) -> set[int]:
        return self._worker.lost_blocks() if self._worker else set()

    def build_connector_worker_meta(self) -> StepReport | None:
        return self._worker.report() if self._worker else None

    def _metadata(self) -> StepMeta:
        metadata = self._get_connector_metadata()
        assert isinstance(metadata, StepMeta)
        return metadata

    # Both

    def get_kv_connector_stats(self) -> ConnectorStats | None:
        half = self._scheduler or self._worker
        figures = half.take_figures() if half else {}
        return ConnectorStats(data=figures) if figures else None

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> ConnectorStats:
        return ConnectorStats(data=data or {})

    @classmethod
    def build_prom_metrics(
        cls,
        vllm_config: Any,
        metric_types: dict[Any, Any],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> ConnectorPromMetrics:
        return ConnectorPromMetrics(vllm_config, metric_types, labelnames, per_engine_labelvalues)

    def shutdown(self) -> None:
        if self._scheduler is not None:
            self._scheduler.close(_CLOSE_S)
            self._scheduler = None
        if self._worker is not None:
            self._worker.close(_CLOSE_S)
            self._worker = None
        if self._worker_cache is not None:
            self._worker_cache.close(_CLOSE_S)
            self._worker_cache = None


def _tensor_rank() -> int:
    from vllm.distributed.parallel_state import get_tensor_model_parallel_rank

    return int(get_tensor_model_parallel_rank())
