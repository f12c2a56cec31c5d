"""What the adapter relies on in vLLM, against the vLLM that is installed. A failure names what has moved."""

from __future__ import annotations

import dataclasses
import inspect
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import create_autospec

import pytest
import vllm.config as config
from vllm import SamplingParams
from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
from vllm.distributed.kv_transfer.kv_connector.utils import KVOutputAggregator
from vllm.distributed.kv_transfer.kv_connector.v1 import base, metrics
from vllm.lora.request import LoRARequest
from vllm.multimodal.inputs import MultiModalFeatureSpec, PlaceholderRange
from vllm.v1.attention.backend import MLAAttentionImpl
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackendImpl, _get_attn_isa
from vllm.v1.core.kv_cache_manager import KVCacheBlocks
from vllm.v1.core.sched.output import CachedRequestData, NewRequestData, SchedulerOutput
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec, MLAAttentionSpec
from vllm.v1.outputs import EMPTY_MODEL_RUNNER_OUTPUT, KVConnectorOutput, ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus
from vllm.v1.worker import kv_connector_model_runner_mixin
from vllm.v1.worker.gpu import kv_connector as gpu_kv_connector
from vllm.v1.worker.gpu_model_runner import GPUModelRunner
from vllm.v1.worker.kv_connector_model_runner_mixin import KVConnectorModelRunnerMixin

from lmcache_adapters.vllm import LMCacheSDKConnector
from lmcache_adapters.vllm.messages import StepMeta, StepReport
from tests.vllm.pretend import PretendEngine

# Of the base class: what vLLM calls. All that take part in a load or a store, with their parameters.
CALLED = {
    "__init__": ["vllm_config", "role", "kv_cache_config"],
    "register_kv_caches": ["kv_caches"],
    "handle_preemptions": ["kv_connector_metadata"],
    "bind_connector_metadata": ["connector_metadata"],
    "clear_connector_metadata": [],
    "start_load_kv": ["forward_context", "kwargs"],
    "wait_for_layer_load": ["layer_name"],
    "save_kv_layer": ["layer_name", "kv_layer", "attn_metadata", "kwargs"],
    "wait_for_save": [],
    "get_finished": ["finished_req_ids"],
    "get_block_ids_with_load_errors": [],
    "build_connector_worker_meta": [],
    "get_kv_connector_stats": [],
    "get_num_new_matched_tokens": ["request", "num_computed_tokens"],
    "update_state_after_alloc": ["request", "blocks", "num_external_tokens"],
    "build_connector_meta": ["scheduler_output"],
    "update_connector_output": ["connector_output"],
    "request_finished": ["request", "block_ids"],
    "has_pending_block_frees": [],
    "reset_cache": [],
    "set_xfer_handshake_metadata_pp_aware": ["metadata"],
    "build_kv_connector_stats": ["data"],
    "build_prom_metrics": ["vllm_config", "metric_types", "labelnames", "per_engine_labelvalues"],
    "shutdown": [],
}
FIELDS = {
    config.VllmConfig: "model_config cache_config parallel_config scheduler_config speculative_config load_config "
    "kv_transfer_config compilation_config attention_config weight_transfer_config",
    config.CacheConfig: "block_size cache_dtype enable_prefix_caching",
    config.ParallelConfig: "pipeline_parallel_size tensor_parallel_size decode_context_parallel_size "
    "prefill_context_parallel_size nnodes worker_extension_cls",
    config.ModelConfig: "model revision dtype quantization hf_overrides max_model_len",
    config.LoadConfig: "load_format download_dir",
    config.CompilationConfig: "static_forward_context",
    config.KVTransferConfig: "engine_id kv_connector_extra_config kv_load_failure_policy kv_role",
    KVCacheConfig: "kv_cache_groups",
    KVCacheGroupSpec: "kv_cache_spec layer_names",
    FullAttentionSpec: "sliding_window attention_chunk_size block_size num_kv_heads head_size",
    MLAAttentionSpec: "block_size head_size",
    SchedulerOutput: "scheduled_new_reqs scheduled_cached_reqs num_scheduled_tokens preempted_req_ids "
    "has_sync_kv_loads",
    NewRequestData: "req_id block_ids num_computed_tokens",
    CachedRequestData: "req_ids new_block_ids num_computed_tokens resumed_req_ids",
    KVConnectorOutput: "finished_sending finished_recving invalid_block_ids kv_connector_worker_meta",
    MultiModalFeatureSpec: "identifier modality mm_position",
    PlaceholderRange: "offset length",
}


def parameters(function: Any) -> list[str]:
    return [name for name in inspect.signature(function).parameters if name not in ("self", "cls")]


@pytest.mark.parametrize("name", CALLED)
def test_what_vllm_calls(name: str) -> None:
    theirs = getattr(base.KVConnectorBase_V1, name)
    assert parameters(theirs) == CALLED[name], f"KVConnectorBase_V1.{name} has changed"
    ours = parameters(getattr(LMCacheSDKConnector, name))
    assert ours == CALLED[name], f"{name} is not what vLLM calls"


def test_nothing_is_abstract_or_new() -> None:
    assert not inspect.isabstract(LMCacheSDKConnector)
    assert base.supports_hma(LMCacheSDKConnector)
    assert isinstance(base.KVConnectorBase_V1.requires_kv_delivery, property)
    assert parameters(base.SupportsHMA.request_finished_all_groups) == ["request", "block_ids"]
    assert {role.name for role in base.KVConnectorRole} == {"SCHEDULER", "WORKER"}


@pytest.mark.parametrize("kind", FIELDS, ids=lambda kind: kind.__name__)
def test_fields(kind: Any) -> None:
    has = {field.name for field in dataclasses.fields(kind)}
    missing = [name for name in FIELDS[kind].split() if name not in has]
    assert not missing, f"{kind.__name__} has lost {missing}"


def test_the_rest_that_is_read() -> None:
    request = Request("r", [1, 2, 3], SamplingParams(max_tokens=1), None)
    read = (
        "request_id",
        "all_token_ids",
        "num_tokens",
        "num_computed_tokens",
        "num_in_flight_tokens",
        "cache_salt",
        "lora_request",
        "mm_features",
        "prompt_embeds",
        "kv_transfer_params",
        "skip_reading_prefix_cache",
        "resumable",
    )
    missing = [name for name in read if not hasattr(request, name)]
    assert not missing, f"Request has lost {missing}"
    assert list(request.all_token_ids[1:3]) == [2, 3]
    assert {"is_kv_producer", "is_kv_consumer"} <= set(dir(config.KVTransferConfig))
    assert hasattr(config.ModelConfig, "hf_text_config") or "hf_text_config" in config.ModelConfig.__annotations__
    assert "lora_path" in LoRARequest.__struct_fields__
    assert hasattr(KVCacheBlocks, "get_block_ids")
    assert hasattr(KVConnectorFactory, "_registry")


def test_hit_sources() -> None:
    sources = pytest.importorskip("vllm.v1.metrics.cache_hit_source", reason="older than hit sources")
    assert {"HOST", "DISK", "EXTERNAL_UNSPECIFIED"} <= set(sources.CacheHitSource.__members__)
    assert parameters(base.KVConnectorBase_V1.get_external_cache_hit_sources) == ["request", "num_external_tokens"]


def test_operations_that_write_kv() -> None:
    assert parameters(CPUAttentionBackendImpl.do_kv_cache_update) == [
        "layer",
        "key",
        "value",
        "kv_cache",
        "slot_mapping",
    ]
    assert parameters(MLAAttentionImpl.do_kv_cache_update) == [
        "kv_c_normed",
        "k_pe",
        "kv_cache",
        "slot_mapping",
        "kv_cache_dtype",
        "k_scale",
    ]
    assert parameters(_get_attn_isa)[:3] == ["dtype", "block_size", "head_size"]


def test_metrics() -> None:
    assert parameters(metrics.KVConnectorPromMetrics.observe) == [
        "transfer_stats_data",
        "engine_idx",
    ]
    assert {"reset", "aggregate", "reduce", "is_empty"} <= set(dir(metrics.KVConnectorStats))


def recorder(**answers: Any) -> Any:
    """In the connector's place: keeps what it is asked, which must fit the connector's own methods."""
    connector = create_autospec(LMCacheSDKConnector, instance=True)
    connector.requires_kv_delivery = connector.supports_divergent_local_hybrid_hits = False
    usual = {
        "get_num_new_matched_tokens": (0, False),
        "build_connector_meta": StepMeta(),
        "request_finished_all_groups": (False, None),
        "has_pending_block_frees": False,
        "has_pending_push_work": False,
        "get_kv_connector_stats": None,
        "take_events": (),
    }
    for name, answer in {**usual, **answers}.items():
        if hasattr(connector, name):
            getattr(connector, name).return_value = answer
    return connector


def calls_of(connector: Any) -> list[str]:
    """Since the last time; without those of which we take vLLM's own."""
    names = [name for name, *_ in connector.mock_calls if name in CALLED or name in OTHER_CALLS]
    connector.reset_mock()
    return names


OTHER_CALLS = ("get_transfer_results", "request_finished_all_groups")
AFTER_FORWARD = [
    "start_load_kv",
    "wait_for_save",
    "get_transfer_results",
    "get_block_ids_with_load_errors",
    "get_kv_connector_stats",
    "build_connector_worker_meta",
    "clear_connector_metadata",
]
STEP = SimpleNamespace(kv_connector_metadata=StepMeta(), has_sync_kv_loads=False, finished_req_ids={"r"})


@pytest.fixture
def worker(monkeypatch: pytest.MonkeyPatch) -> Any:
    """What a worker has in the connector's place."""
    connector = recorder(
        get_transfer_results=base.KVConnectorTransferResults({"sent"}, {"received"}),
        get_block_ids_with_load_errors={3},
        build_connector_worker_meta=StepReport(step=7),
    )
    for module in (kv_connector_model_runner_mixin, gpu_kv_connector):
        monkeypatch.setattr(module, "get_kv_transfer_group", lambda: connector)
        monkeypatch.setattr(module, "get_forward_context", lambda: None)
    monkeypatch.setattr(gpu_kv_connector, "is_forward_context_available", lambda: True)
    return connector


def told(output: Any) -> None:
    """What the scheduler's half gets to hear."""
    assert (output.finished_sending, output.finished_recving) == ({"sent"}, {"received"})
    assert output.invalid_block_ids == {3}
    assert output.kv_connector_worker_meta == StepReport(step=7)


def test_the_order_of_a_step(worker: Any) -> None:
    """Loads that nobody waits for begin after the forward pass, stores after them, and reports come last."""
    with KVConnectorModelRunnerMixin._get_kv_connector_output(STEP) as output:
        assert calls_of(worker) == ["bind_connector_metadata"]
    assert calls_of(worker) == AFTER_FORWARD
    told(output)
    text = inspect.getsource(GPUModelRunner.execute_model)
    assert -1 < text.find("handle_preemptions(") < text.find("maybe_get_kv_connector_output("), "blocks are overwritten"


def test_the_order_of_a_step_of_the_newer_model_runner(worker: Any) -> None:
    """It has not run here: it needs Triton."""
    runner = gpu_kv_connector.ActiveKVConnector(None, {})
    assert calls_of(worker) == ["register_kv_caches"]
    runner.pre_forward(STEP)
    assert calls_of(worker) == ["handle_preemptions", "bind_connector_metadata"]
    runner.finish_forward()
    told(runner.post_forward({"r"}))
    assert calls_of(worker) == AFTER_FORWARD
    told(runner.no_forward(STEP).kv_connector_output)
    assert calls_of(worker) == ["handle_preemptions", "bind_connector_metadata", *AFTER_FORWARD]
    text = Path(gpu_kv_connector.__file__).with_name("model_runner.py").read_text()
    executes = text[text.index("    def execute_model(") :]
    calls = ["kv_connector.no_forward(", "kv_connector.pre_forward(", "self.model(**", "kv_connector.post_forward("]
    places = [executes.find(call) for call in calls]
    assert -1 not in places and places == sorted(places), dict(zip(calls, places, strict=True))


def test_what_has_finished_is_named_once_by_every_worker() -> None:
    """Until then vLLM keeps the blocks of a load or a store; a report is put together from all."""
    assert LMCacheSDKConnector.get_transfer_results is base.KVConnectorBase_V1.get_transfer_results
    half = create_autospec(LMCacheSDKConnector, instance=True)
    half.get_finished.return_value = (None, {"r"})
    results = base.KVConnectorBase_V1.get_transfer_results(half, set())
    assert results == base.KVConnectorTransferResults(set(), {"r"}, set())
    aggregator, report = KVOutputAggregator(2), StepReport(stored={"s": 1})
    both = [KVConnectorOutput(None, {"r"}, kv_connector_worker_meta=report), KVConnectorOutput({"s"}, None)]
    first = aggregator.aggregate([_ran(output) for output in both]).kv_connector_output
    assert not first.finished_sending and not first.finished_recving
    assert first.kv_connector_worker_meta == report
    both = [KVConnectorOutput({"s"}, None, kv_connector_worker_meta=report), KVConnectorOutput(None, {"r"}, None)]
    both[1].kv_connector_worker_meta = report
    second = aggregator.aggregate([_ran(output) for output in both]).kv_connector_output
    assert (second.finished_sending, second.finished_recving) == ({"s"}, {"r"})
    assert second.kv_connector_worker_meta == StepReport(stored={"s": 2})


def _ran(output: KVConnectorOutput) -> ModelRunnerOutput:
    return dataclasses.replace(EMPTY_MODEL_RUNNER_OUTPUT, kv_connector_output=output)


IDS = list(range(10, 110))


class Scheduled:
    """vLLM's scheduler, a recorder in the connector's place, and workers of which a test says what has finished."""

    def __init__(self, model: Path, blocks: int = 64, **answers: Any) -> None:
        self.engine = PretendEngine(model, "unix:///no/daemon", blocks=blocks, on_error="degrade")
        self.engine.close()
        self.engine.scheduler.connector = self.connector = recorder(**answers)
        self.sent, self.received = set[str](), set[str]()
        self.engine.ranks[0].connector.get_finished = lambda _: (self.sent, self.received)

    def step(self, meanwhile: Any = lambda: None) -> list[str]:
        self.engine.step(meanwhile)
        self.sent, self.received = set(), set()
        return calls_of(self.connector)

    def abort(self) -> list[str]:
        calls_of(self.connector)
        self.engine.scheduler.finish_requests("r", RequestStatus.FINISHED_ABORTED)
        self.connector.request_finished_all_groups.assert_called_once()
        request, blocks = self.connector.request_finished_all_groups.call_args.args
        assert request.request_id == "r"
        self.blocks = blocks[0]
        return calls_of(self.connector)

    @property
    def known(self) -> bool:
        """Whether vLLM keeps the request, and goes on stepping for it."""
        known = "r" in self.engine.scheduler.requests
        assert not known or self.engine.scheduler.has_requests(), "vLLM does not step until blocks are free"
        return known


ASKED = ["get_num_new_matched_tokens", "update_state_after_alloc", "build_connector_meta"]
HEARD = ["update_connector_output", "get_kv_connector_stats"]


def test_an_abort_before_there_are_blocks(tiny_directory: Path) -> None:
    run = Scheduled(tiny_directory, get_num_new_matched_tokens=(None, False))
    run.engine.add("r", IDS)
    for _ in range(2):  # asked again in each step, and no blocks are taken
        assert run.step() == ["get_num_new_matched_tokens", "build_connector_meta", *HEARD]
    assert run.abort() == ["request_finished_all_groups"]
    assert list(run.blocks) == []
    assert not run.known


def test_an_abort_while_blocks_are_stored(tiny_directory: Path) -> None:
    """Within a step: it is heard of before what that step's workers report."""
    run = Scheduled(tiny_directory, request_finished_all_groups=(True, None))
    run.engine.add("r", IDS, max_tokens=9)
    aborted: list[str] = []
    assert run.step(lambda: aborted.extend(run.abort())) == HEARD
    assert aborted == ["request_finished_all_groups"]
    assert len(run.blocks) == 4
    assert run.known
    run.engine.scheduler.finish_requests("r", RequestStatus.FINISHED_ABORTED)
    assert calls_of(run.connector) == [], "an abort is heard of once"
    assert run.step() == ["build_connector_meta", *HEARD]
    assert run.known
    run.sent = {"r"}
    assert run.step() == ["build_connector_meta", *HEARD]
    assert not run.known


def test_an_abort_while_a_load_is_under_way(tiny_directory: Path) -> None:
    """vLLM itself keeps its blocks until it is received, whatever the connector says: so that is said once only."""
    run = Scheduled(tiny_directory, get_num_new_matched_tokens=(64, True))
    request = run.engine.add("r", IDS)
    assert run.step() == [*ASKED, *HEARD]
    assert request.status == RequestStatus.WAITING_FOR_REMOTE_KVS
    assert run.abort() == ["request_finished_all_groups"]
    assert len(run.blocks) >= 2
    assert run.known
    run.received = {"r"}
    assert run.step() == ["build_connector_meta", *HEARD]
    assert not run.known


@pytest.mark.parametrize("pending", [True, False])
def test_blocks_that_will_soon_be_free_are_waited_for(tiny_directory: Path, pending: bool) -> None:
    """Rather than to preempt a request."""
    run = Scheduled(tiny_directory, blocks=8, has_pending_block_frees=pending)
    for name, ids in (("a", IDS[:91]), ("b", IDS[9:])):
        run.engine.add(name, ids, max_tokens=60)
    for _ in range(12):
        run.step()
    assert run.engine.preempted == (0 if pending else 1), "preemption does not ask has_pending_block_frees"


def test_it_is_found_by_its_name_alone() -> None:
    from lmcache_adapters.vllm import register

    register()
    register()
    assert KVConnectorFactory.get_connector_class_by_name("LMCacheSDKConnector") is LMCacheSDKConnector
