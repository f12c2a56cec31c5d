"""vLLM's engine process with two more ops: one takes its connector out between requests and puts it back.

Two processes of one program differ by some per cent for as long as they run. A connector costs less than that, so it is
measured within a process: the engine without it has the same memory, the same threads and the same model.
"""

from __future__ import annotations

import sys
import time
from typing import Any

from lmcache_adapters.process import Answer
from lmcache_adapters.vllm import engine

_kept: dict[str, tuple[Any, Any]] = {}


def connect(self: engine.Engine, connector: str) -> Answer:
    """Op ``connect``: from now on with ``ours``, with ``none``, or with ``idle``, which does nothing."""
    from vllm.distributed.kv_transfer import kv_transfer_state as worker

    scheduler = self._engine.engine_core.engine_core.scheduler
    if not _kept:
        _kept.update(ours=(scheduler.connector, worker._KV_CONNECTOR_AGENT), none=(None, None))
    if connector == "idle" and connector not in _kept:
        _kept[connector] = _idle(scheduler)
    scheduler.connector, worker._KV_CONNECTOR_AGENT = _kept[connector]
    return {"connector": connector}


def cpu(self: engine.Engine) -> Answer:
    """Op ``cpu``: time that this process has taken from the processors."""
    del self
    return {"cpu_s": time.process_time()}


def _idle(scheduler: Any) -> tuple[Any, Any]:
    """A connector that does nothing: what vLLM itself spends on having any."""
    from vllm.distributed.kv_transfer.kv_connector.v1.base import (
        KVConnectorBase_V1,
        KVConnectorMetadata,
        KVConnectorRole,
        SupportsHMA,
    )

    class Idle(KVConnectorBase_V1, SupportsHMA):
        requires_kv_delivery = False

        def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int, bool]:
            return 0, False

        def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
            pass

        def build_connector_meta(self, scheduler_output: Any) -> KVConnectorMetadata:
            return KVConnectorMetadata()

        def request_finished_all_groups(self, request: Any, block_ids: Any) -> tuple[bool, None]:
            return False, None

        def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
            pass

        def wait_for_layer_load(self, layer_name: str) -> None:
            pass

        def save_kv_layer(self, layer_name: str, kv_layer: Any, attn_metadata: Any, **kwargs: Any) -> None:
            pass

        def wait_for_save(self) -> None:
            pass

    config = scheduler.vllm_config, scheduler.kv_cache_config
    return tuple(Idle(config[0], role, config[1]) for role in (KVConnectorRole.SCHEDULER, KVConnectorRole.WORKER))


if __name__ == "__main__":
    engine._OPS.update(connect=connect, cpu=cpu)
    sys.exit(engine.main())
