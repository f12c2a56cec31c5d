"""SGLang as a process that speaks the harness's protocol."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from lmcache_sdk.testing.harness import EngineHarness

_HICACHE = {"hicache_ratio": 2.0, "hicache_mem_layout": "page_first", "hicache_io_backend": "kernel"}
STAND_INS = Path(__file__).resolve().parents[1] / "engines" / "sglang_cpu"


def engine(
    model: Path,
    url: str | None,
    *,
    memory_tokens: int = 2400,
    linker: bool = False,
    module: str = "lmcache_adapters.sglang.engine",
    extra: dict[str, Any] | None = None,
    variables: dict[str, str] | None = None,
    **options: Any,
) -> EngineHarness:
    """Not started yet. ``options`` are SGLang's server arguments, ``extra`` the backend's settings."""
    options = {
        "device": "cpu",
        "attention_backend": "torch_native",
        "sampling_backend": "pytorch",
        "grammar_backend": "none",
        "disable_cuda_graph": True,
        "skip_server_warmup": True,
        "page_size": 64,
        "context_length": 2048,
        "max_total_tokens": memory_tokens // 64 * 64,
        "max_running_requests": 4,
        "mem_fraction_static": 0.3,
        "random_seed": 0,
        **({} if linker else _HICACHE),
        **options,
    }
    line = [sys.executable, "-m", module, "--model", str(model)]
    line += [*(["--cache", url] if url else []), *(["--linker"] if linker else [])]
    settings = {"chunk_tokens": options["page_size"], **(extra or {})}
    for flag, given in (("--option", options), ("--extra", settings)):
        line += [part for name, value in given.items() for part in (flag, f"{name}={json.dumps(value)}")]
    python_path = os.pathsep.join([str(STAND_INS), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
        "SGLANG_USE_CPU_ENGINE": "1",
        "PYTHONPATH": python_path,
        # With more ranks SGLang compiles the mask of its vocabulary, integers, which takes two of them a dozen seconds.
        "TORCHDYNAMO_DISABLE": "1",
    }
    return EngineHarness(line, env=os.environ | environment | (variables or {}))
