"""The real model in four engines on one daemon, each a process of its own environment."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from lmcache_sdk.testing.harness import EngineHarness
from tests.sglang import process as sglang
from tests.vllm import process as vllm

# HiCache and the linker are SGLang's two doors.
NAMES = ("hf", "vllm", "hicache", "linker")
CHUNK = 64
# Of the engine's own memory: the longest prompt, three times.
MEMORY_TOKENS = 4096
TOKEN_BYTES = 23_040


def missing() -> str:
    """What must be set for these tests, and is not; empty if they can run."""
    names = ("LMCACHE_SDK_TEST_MODEL", "LMCACHE_SDK_TEST_PYTHON_VLLM", "LMCACHE_SDK_TEST_PYTHON_SGLANG")
    return ", ".join(name for name in names if not os.environ.get(name))


def engine(name: str, model: Path, url: str, share: str) -> EngineHarness:
    """Not started yet.

    Args:
        name: one of ``NAMES``.
        url: the daemon's.
        share: whose KV it uses beside its own.
    """
    if name == "hf":
        line = [sys.executable, "-m", "lmcache_adapters.hf.engine", "--model", str(model)]
        return EngineHarness([*line, "--cache", url, "--share", share, "--chunk-tokens", str(CHUNK)])
    kind = "vllm" if name == "vllm" else "sglang"
    python = os.environ[f"LMCACHE_SDK_TEST_PYTHON_{kind.upper()}"]
    # Compilers and the like that come with the environment are found beside its Python.
    variables = {"PATH": os.pathsep.join([str(Path(python).parent), os.environ["PATH"]]), "OMP_NUM_THREADS": "2"}
    extra = {"share": share, "chunk_tokens": CHUNK}
    if name == "vllm":
        harness = vllm.engine(model, url, memory_bytes=MEMORY_TOKENS * TOKEN_BYTES, extra=extra, variables=variables)
    else:
        # The machine may be busy, and a tier be asked.
        extra |= {"lookup_timeout_s": 1.0} if name == "linker" else {}
        harness = sglang.engine(
            model,
            url,
            memory_tokens=MEMORY_TOKENS,
            linker=name == "linker",
            extra=extra,
            variables=variables,
            dtype="bfloat16",
            sleep_on_idle=True,  # the others have work to do meanwhile
        )
    harness.command[0] = python
    return harness
