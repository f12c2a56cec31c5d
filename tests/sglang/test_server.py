"""SGLang's server as users run it, with the flags that ``lmcache-sdk launch-args`` prints, and a real HTTP client."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import secrets
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import numpy as np
import pytest

from lmcache_sdk.backend import open_backend
from lmcache_sdk.keys import Chain
from lmcache_sdk.records import UNKNOWN_POSITION, read_header
from tests.core.served import Served, command, free_port
from tests.daemon.daemon_process import until
from tests.sglang.process import STAND_INS
from tests.vllm.tiny import make_model

READY_S = 150.0
PAGE = 64
LONG = np.random.default_rng(6).integers(10, 1000, 500).tolist()
SHORT = LONG[:300]
OTHER = LONG[:299:-1] + LONG[:100]
HIT = 256


class Server:
    """``sglang.launch_server`` on a port of its own. Its flags are those of a user, and what a CPU needs."""

    def __init__(self, model: Path, url: str, folder: Path, *, linker: bool = False) -> None:
        self.port = free_port()
        self.log = folder / f"server-{self.port}.log"
        self._key = secrets.token_hex(8)  # without one SGLang attaches and detaches nothing
        self.flags = shlex.split(
            command("launch-args", "sglang", "--url", url, *(["--linker"] if linker else [])).stdout
        )
        if linker:  # two cores, and two servers
            config = json.loads(self.flags[-1])
            config["linker_extra_config"]["lookup_timeout_s"] = 0.5
            self.flags[-1] = json.dumps(config)
        line = [
            *(sys.executable, "-m", "sglang.launch_server", "--model-path", str(model), *self.flags),
            *("--host", "127.0.0.1", "--port", str(self.port), "--admin-api-key", self._key),
            *("--device", "cpu", "--attention-backend", "torch_native", "--sampling-backend", "pytorch"),
            *("--grammar-backend", "none", "--max-total-tokens", "2400", "--context-length", "2048"),
            *("--cuda-graph-backend-decode", "disabled", "--cuda-graph-backend-prefill", "disabled"),
            *("--skip-server-warmup", "--enable-cache-report", "--mem-fraction-static", "0.3"),
            *([] if linker else ["--hicache-storage-prefetch-policy", "wait_complete"]),  # the last one counts
        ]
        variables = {"SGLANG_USE_CPU_ENGINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(STAND_INS)}
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                line, stdout=log, stderr=log, env=os.environ | variables, start_new_session=True
            )

    def __enter__(self) -> Self:
        started = time.monotonic()
        while self._status("GET", "/health") != 200:
            if self.process.poll() is not None or time.monotonic() - started > READY_S:
                self.kill()
                raise AssertionError(self.log.read_text()[-6000:])
            time.sleep(0.2)
        return self

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(20)
        self.kill()

    def kill(self) -> None:
        """What is left of its processes."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def call(self, method: str, path: str, **body: Any) -> str:
        status, text = self._request(method, path, body)
        assert status == 200, text
        return text

    def _status(self, method: str, path: str) -> int:
        try:
            return self._request(method, path, {})[0]
        except OSError:
            return 0

    def _request(self, method: str, path: str, body: dict[str, Any]) -> tuple[int, str]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {self._key}"}
        try:
            connection.request(method, path, json.dumps(body) if body else None, headers)
            reply = connection.getresponse()
            return reply.status, reply.read().decode()
        finally:
            connection.close()

    def generate(self, ids: list[int]) -> tuple[list[Any], dict[str, Any]]:
        """(log probability, token) of each, and where the prefix came from."""
        sampling = {"temperature": 0.0, "max_new_tokens": 8, "ignore_eos": True}
        answer = json.loads(
            self.call("POST", "/generate", input_ids=ids, sampling_params=sampling, return_logprob=True)
        )
        meta = answer["meta_info"]
        tokens = meta["output_token_logprobs"]
        assert [token for _, token, *_ in tokens] == answer["output_ids"] and len(tokens) == 8
        return tokens, meta.get("cached_tokens_details") or {}

    def forget(self) -> None:
        """Of SGLang's own caches; as soon as nothing is on its way from them."""
        until(lambda: self._status("POST", "/flush_cache") == 200, 20.0, "that SGLang empties its caches")

    def attach(self) -> None:
        extra = self.flags[self.flags.index("--hicache-storage-backend-extra-config") + 1]
        self.call(
            "PUT",
            "/hicache/storage-backend",
            hicache_storage_backend="dynamic",
            hicache_storage_backend_extra_config_json=extra,
            hicache_storage_prefetch_policy="wait_complete",
            hicache_write_policy="write_through",
        )


@pytest.fixture
def tiered() -> Iterator[Served]:
    served = Served()
    served.start("--tier", f"lmdb://{served.folder}/store?size=64MiB", pool="32MiB")
    yield served
    served.close()


def stored(served: Served) -> int:
    """Chunks in the daemon's pool."""
    return int(served.status()["stats"]["chunks"])


@pytest.mark.timeout(400)
def test_attached_detached_cleared_and_other_weights(
    tiny_directory: Path, tiered: Served, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    others = make_model(tmp_path_factory.mktemp("models") / "others", seed=1)
    with Server(tiny_directory, tiered.url, tmp_path) as server:
        cold, details = server.generate(SHORT)
        assert not details.get("storage")
        until(lambda: stored(tiered) == HIT // PAGE, 20.0, "four chunks")
        # With a prefix that SGLang has: only what is behind it is stored.
        longer, details = server.generate(LONG)
        assert details["device"] == HIT
        until(lambda: stored(tiered) == len(LONG) // PAGE, 20.0, "the others")

        def restored(ids: list[int], tokens: list[Any], hit: int) -> None:
            server.forget()
            found, details = server.generate(ids)
            assert found == tokens
            assert details.get("storage", 0) == hit

        restored(SHORT, cold, HIT)
        restored(LONG, longer, len(LONG) // PAGE * PAGE)
        server.call("DELETE", "/hicache/storage-backend")
        restored(SHORT, cold, 0)
        server.attach()
        restored(SHORT, cold, HIT)

        assert positions(tiered, LONG) == list(range(0, len(LONG) // PAGE * PAGE, PAGE))

        server.call("POST", "/hicache/storage-backend/clear")
        assert stored(tiered) == 0
        restored(SHORT, cold, 0)
        until(lambda: stored(tiered) == HIT // PAGE, 20.0, "four chunks")
        restored(SHORT, cold, HIT)

        with Server(tiny_directory, tiered.url, tmp_path, linker=True) as second:
            changed = replaced_in_one_of_two(server, second, cold, tiered, others)

        # In the other as well: nothing is found or stored under the old weights' name any more.
        chunks = stored(tiered)
        server.call("POST", "/update_weights_from_disk", model_path=str(others))
        restored(SHORT, changed, 0)
        restored(SHORT, changed, 0)
        assert stored(tiered) == chunks
        log = server.log.read_text()
        assert "weights are being replaced" in log
        assert "no quotas" in log and "require_salt" in log


def replaced_in_one_of_two(first: Server, second: Server, cold: list[Any], tiered: Served, weights: Path) -> list[Any]:
    """Two servers on one daemon, by either way in: a new one finds at its first request what the other has stored, and
    the other what it stores, to the last bit. Then it gets other weights; the answer is its reply with them.
    """
    found, details = second.generate(SHORT)
    assert (found, details["host"]) == (cold, HIT)
    computed, details = second.generate(OTHER)
    assert not details.get("host")
    until(lambda: stored(tiered) == 2 * HIT // PAGE, 20.0, "four more chunks")
    found, details = first.generate(OTHER)
    assert (found, details["storage"]) == (computed, HIT)

    second.call("POST", "/update_weights_from_disk", model_path=str(weights))
    changed, details = second.generate(SHORT)
    assert changed != cold and not details.get("host")
    second.forget()
    found, details = second.generate(SHORT)
    assert found == changed and not details.get("host")
    assert "weights are being replaced" in second.log.read_text()

    assert stored(tiered) == 2 * HIT // PAGE
    first.forget()
    found, details = first.generate(SHORT)
    assert (found, details["storage"]) == (cold, HIT)
    return changed


def positions(served: Served, ids: list[int]) -> list[int]:
    """Those of a prompt's chunks, as their records have them. The daemon is stopped for it, and started again."""
    served.stop()
    tier = f"lmdb://{served.folder}/store?size=64MiB"
    backend, found = open_backend(tier), {}
    digests = Chain(ids, PAGE).digests()
    for record in backend.scan():
        if any(digest.hex() in record.key for digest in digests):
            body = bytearray(record.nbytes)
            assert backend.get([record.key], [memoryview(body)]) == [record.nbytes]
            header = read_header(memoryview(body))
            found[header.key.digest] = header.first_position
    backend.close(10.0)
    served.start("--tier", tier, pool="32MiB")
    until(lambda: served.status()["clients"], 20.0, "that the engine is back")
    return [found.get(digest, UNKNOWN_POSITION) for digest in digests]
