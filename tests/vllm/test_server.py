"""vLLM's OpenAI server as users run it, in its default three processes, and a real HTTP client."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any, Self

import numpy as np
import pytest

from tests.core.served import Served, free_port

READY_S = 180.0
IDS = np.random.default_rng(5).integers(10, 1000, 300).tolist()
HIT = 256


class Server:
    """``vllm serve`` on a port of its own."""

    def __init__(self, model: Path, url: str, folder: Path, *arguments: str) -> None:
        self.port = free_port()
        self.log = folder / "server.log"
        transfer = {
            "kv_connector": "LMCacheSDKConnector",  # by its name alone: the plugin is installed
            "kv_role": "kv_both",
            "kv_load_failure_policy": "recompute",
            "kv_connector_extra_config": {"url": url, "on_error": "refuse"},
        }
        line = [
            *(sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(model)),
            *("--host", "127.0.0.1", "--port", str(self.port), "--served-model-name", "tiny", "--enforce-eager"),
            *("--max-model-len", "2048", "--max-num-seqs", "4", "--block-size", "32", "--dtype", "bfloat16"),
            *("--kv-cache-memory-bytes", str(64 << 20), "--kv-transfer-config", json.dumps(transfer), *arguments),
        ]
        variables = {"VLLM_SERVER_DEV_MODE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "1", "OMP_NUM_THREADS": "1"}
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                line, stdout=log, stderr=log, env=os.environ | variables, start_new_session=True
            )

    def __enter__(self) -> Self:
        started = time.monotonic()
        while True:
            try:
                self.get("/health")
                return self
            except (urllib.error.URLError, OSError):
                late = time.monotonic() - started > READY_S
                if self.process.poll() is not None or late:
                    self.kill()
                    raise AssertionError(self.log.read_text()[-6000:]) from None
                time.sleep(0.2)

    def __exit__(self, *_: object) -> None:
        self.kill()

    def kill(self) -> None:
        """All of its processes at once, as when a machine's memory is short."""
        os.killpg(self.process.pid, signal.SIGKILL) if self.process.poll() is None else None
        self.process.wait()

    def get(self, path: str) -> str:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=30) as reply:
            return reply.read().decode()

    def post(self, path: str, **body: Any) -> Any:
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{path}", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=120) as reply:
            text = reply.read()
        return json.loads(text) if text else None

    def complete(self, ids: list[int], **fields: Any) -> tuple[Any, Any]:
        """Text and log probabilities."""
        reply = self.post(
            "/v1/completions",
            model="tiny",
            prompt=ids,
            max_tokens=8,
            temperature=0,
            logprobs=5,
            ignore_eos=True,
            **fields,
        )
        choice = reply["choices"][0]
        return choice["text"], choice["logprobs"]["token_logprobs"]

    def metric(self, name: str) -> float:
        found = re.findall(rf"^vllm:{name}(?:_total)?\{{[^}}]*\}} ([0-9.e+]+)$", self.get("/metrics"), re.MULTILINE)
        return sum(map(float, found))

    def forget(self, **query: str) -> None:
        """Blocks of a request whose stores have not ended are still in use: asked again until they are not."""
        path = "/reset_prefix_cache" + "".join(f"?{name}={value}" for name, value in query.items())
        self.post(path)


@pytest.mark.timeout(600)
def test_hits_after_a_reset_and_after_a_crash(tiny_directory: Path, served: Served, tmp_path: Path) -> None:
    with Server(tiny_directory, served.url, tmp_path) as server:
        cold = server.complete(IDS)
        salted = server.complete(IDS, cache_salt="tenant")
        assert salted == cold
        assert server.metric("external_prefix_cache_hits") == 0
        _until_stored(served, 2 * (HIT // 64))
        server.forget()
        assert server.complete(IDS) == cold
        assert server.metric("external_prefix_cache_hits") == HIT
        assert server.metric("lmcache_sdk_loaded_tokens") == HIT
        assert server.metric("lmcache_sdk_load_failures") == 0
        server.kill()
    with Server(tiny_directory, served.url, tmp_path) as server:
        assert server.complete(IDS) == cold
        assert server.metric("external_prefix_cache_hits") == HIT
        served.stop(signal.SIGKILL)
        server.forget()
        assert server.complete(IDS) == cold
        assert server.metric("external_prefix_cache_hits") == HIT


def _until_stored(served: Served, chunks: int) -> None:
    started = time.monotonic()
    while (found := served.status()["stats"]["chunks"]) < chunks:
        assert time.monotonic() - started < 30, f"{found} of {chunks} chunks are stored"
        time.sleep(0.1)
