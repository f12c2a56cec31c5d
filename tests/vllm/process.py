"""vLLM as a process that speaks the harness's protocol."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from lmcache_sdk.testing.harness import EngineHarness
from tests.vllm.tiny import DIM, KV_HEADS, LAYERS

TOKEN_BYTES = LAYERS * 2 * KV_HEADS * DIM * 2  # of the tiny model


def engine(
    model: Path,
    url: str | None,
    *,
    memory_bytes: int = 16 << 20,
    extra: dict[str, Any] | None = None,
    variables: dict[str, str] | None = None,
    **options: Any,
) -> EngineHarness:
    """Not started yet. ``options`` are vLLM's engine arguments, ``extra`` the connector's settings."""
    options = {
        "block_size": 32,
        "max_model_len": 2048,
        "max_num_seqs": 4,
        "kv_cache_memory_bytes": memory_bytes,
        "dtype": "bfloat16",
        "seed": 0,
        **options,
    }
    line = [sys.executable, "-m", "lmcache_adapters.vllm.engine", "--model", str(model)]
    line += ["--cache", url] if url else []
    for flag, given in (("--option", options), ("--extra", extra or {})):
        line += [part for name, value in given.items() for part in (flag, f"{name}={json.dumps(value)}")]
    threads = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    return EngineHarness(line, env=os.environ | threads | (variables or {}))
