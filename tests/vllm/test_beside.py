"""The connector beside another one, under vLLM's MultiConnector."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from lmcache_adapters.vllm.scheduler import Scheduler
from lmcache_sdk.testing.harness import EngineHarness
from tests.core.served import Served
from tests.vllm.process import engine
from tests.vllm.test_patience import SlowCache


def together(model: Path, url: str, folder: Path, *, ours_first: bool) -> EngineHarness:
    ours = {"kv_connector": "LMCacheSDKConnector", "kv_role": "kv_both", "kv_load_failure_policy": "recompute"}
    ours |= {"kv_connector_extra_config": {"url": url, "on_error": "refuse"}}
    theirs = {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}
    theirs |= {"kv_connector_extra_config": {"shared_storage_path": str(folder)}}
    both = [ours, theirs] if ours_first else [theirs, ours]
    transfer = {
        "kv_connector": "MultiConnector",
        "kv_connector_module_path": None,
        "kv_connector_extra_config": {"connectors": both},
    }
    harness = engine(model, url)
    for name, value in transfer.items():
        harness.command += ["--transfer", f"{name}={json.dumps(value)}"]
    return harness


@pytest.mark.timeout(180)
@pytest.mark.parametrize("ours_first", [True, False])
def test_with_vllms_example_connector(tiny_directory: Path, served: Served, tmp_path: Path, ours_first: bool) -> None:
    """Whichever has a prefix first gives it. What the other one gave is stored here as what was computed is."""
    ids, other = (np.random.default_rng([17, seed]).integers(10, 1000, 300).tolist() for seed in range(2))
    with together(tiny_directory, served.url, tmp_path, ours_first=ours_first) as harness:
        cold = harness.generate(ids, 8, logits=True)
        theirs = harness.generate(other, 8, logits=True, params={"no_store": True})
        for prompt, first, stored in ((ids, cold, True), (other, theirs, True)):
            assert harness.flush()
            assert harness.call("forget", 60)["forgotten"]
            warm = harness.generate(prompt, 8, logits=True)
            assert (warm["token_ids"], warm["top"]) == (first["token_ids"], first["top"])
            assert warm["cached_tokens"] in ((256, 288) if stored else (288,))
        assert harness.flush()
        assert served.status()["stats"]["chunks"] == 8
        assert harness.stop() == 0


def test_what_another_connector_loads_within_a_step_is_stored_when_that_has_ended() -> None:
    """It may turn out not to have come."""
    scheduler = Scheduler(SlowCache(100.0), block_tokens=32)
    request = SimpleNamespace(
        request_id="r",
        num_tokens=200,
        all_token_ids=list(range(200)),
        num_computed_tokens=128,
        num_in_flight_tokens=0,
        cache_salt=None,
        lora_request=None,
        mm_features=[],
        prompt_embeds=None,
        kv_transfer_params=None,
    )
    scheduler.allocated(request, list(range(7)), 0)
    first = SimpleNamespace(req_id="r", block_ids=[list(range(7))], num_computed_tokens=128)

    def step(*, new: Any = (), computed: int = 0, tokens: int, loads: bool) -> int:
        running = SimpleNamespace(req_ids=[], new_block_ids=[], num_computed_tokens=[], resumed_req_ids=set())
        if not new:
            running.req_ids, running.new_block_ids, running.num_computed_tokens = ["r"], [None], [computed]
        output = SimpleNamespace(
            scheduled_new_reqs=list(new),
            scheduled_cached_reqs=running,
            num_scheduled_tokens={"r": tokens},
            has_sync_kv_loads=loads,
            preempted_req_ids=None,
        )
        return len(scheduler.build_step(output).stores)

    assert step(new=[first], tokens=64, loads=True) == 0
    request.num_in_flight_tokens = 64
    assert step(computed=192, tokens=8, loads=False) == 0  # scheduled before the first step has come back
    request.num_in_flight_tokens = 0
    assert step(computed=192, tokens=8, loads=False) == 1
