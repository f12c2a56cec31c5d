"""vLLM as an engine process that speaks JSON lines; the protocol is in ``lmcache_sdk.testing.harness``.

Usage::

    python -m lmcache_adapters.vllm.engine --model DIR [--cache URL] [--option block_size=32] [--extra chunk_tokens=64]

``--option`` is any of vLLM's engine arguments, ``--extra`` one of the connector's settings, values as JSON. One loop
takes requests and steps the engine, so requests that are sent without waiting run together.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import IO, Any

from lmcache_adapters.launch import vllm_transfer
from lmcache_adapters.process import TOP, Answer, margin, pairs, take_stdout
from lmcache_sdk.errors import ConfigError, LMCacheSDKError
from lmcache_sdk.observe.logs import log_to_stderr

# Idle OpenMP threads that spin take the cores from those that work. Read when torch is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# One process, unless the caller wants vLLM's own three: they start in a fifth of the time.
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")


class WorkerExtension:
    """Methods that vLLM adds to its workers, for what the protocol asks and vLLM does not offer."""

    def drain_cache(self, timeout_s: float) -> bool:
        """Wait until this rank's copies have ended."""
        from vllm.distributed.kv_transfer import get_kv_transfer_group

        from lmcache_adapters.vllm.connector import LMCacheSDKConnector

        group = get_kv_transfer_group()
        ours = [one for one in getattr(group, "sub_connectors", [group]) if isinstance(one, LMCacheSDKConnector)]
        return all(one._worker is None or one._worker.drain(timeout_s) for one in ours)


@dataclass
class _Running:
    number: Any
    began: float
    ttft_s: float | None = None
    top: list[list[float]] | None = None


class Engine:
    """Answers requests; one method an op."""

    def __init__(self, engine: Any, cache: Any, answer: Callable[[Answer], None]) -> None:
        self._engine = engine
        self._config = engine.vllm_config
        self._cache = cache
        self._answer = answer
        self._running: dict[str, _Running] = {}
        self._loras: dict[str, int] = {}
        self._in_process = os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0"
        self._count = 0

    def hello(self) -> Answer:
        """The first line."""
        answer = {"event": "ready", "engine": "vllm", "context_tokens": self._config.model_config.max_model_len}
        if self._cache is not None:
            spec = self._cache.namespace.spec
            answer |= {"namespace": self._cache.namespace.id, "producer": self._cache.producer.id}
            answer |= {"chunk_tokens": spec.chunk_tokens, "identity": _identity(self._cache)}
        return {**answer, "block_tokens": self._config.cache_config.block_size}

    def serve(self, lines: IO[str]) -> None:
        """Answer until a ``stop``, or until there are no more requests."""
        arrived: queue.SimpleQueue[str | None] = queue.SimpleQueue()

        def read() -> None:
            for line in lines:
                arrived.put(line)
            arrived.put(None)

        threading.Thread(target=read, daemon=True).start()
        while True:
            try:
                line = arrived.get(block=not self._running)
            except queue.Empty:
                self._step()
                continue
            if line is None or not self._take(line):
                return

    def _take(self, line: str) -> bool:
        number: Any = None
        try:
            request = json.loads(line)
            number = request.pop("id", None)
            op = request.pop("op", None)
            if op == "stop":
                self._answer({"id": number, "stopped": True})
                return False
            if op == "generate":
                self._generate(number, **request)
            elif op in _OPS:
                self._answer({"id": number, **_OPS[op](self, **request)})
            else:
                raise ConfigError(f"unknown op {op!r}; there are: generate, {', '.join(_OPS)}, stop")
        except (LMCacheSDKError, OSError, ValueError, TypeError, AttributeError) as error:
            self._answer({"id": number, "error": f"{type(error).__name__}: {error}"})
        return True

    def _generate(
        self,
        number: Any,
        ids: Sequence[int],
        max_new_tokens: int,
        temperature: float = 0.0,
        top_p: float = 1.0,
        top_k: int = 0,
        seed: int | None = None,
        cache_salt: str | None = None,
        load: bool = True,
        store: bool = True,
        logits: bool = False,
        params: dict[str, Any] | None = None,
        lora: str | None = None,
        audio: str | None = None,
    ) -> None:
        """Op ``generate``; also with an adapter's directory, and a sound (an .npy file at the model's rate)."""
        from vllm import SamplingParams

        wishes = {"no_load": not load, "no_store": not store, **(params or {})}
        sampling = SamplingParams(
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            seed=seed,
            max_tokens=max_new_tokens,
            ignore_eos=True,
            logprobs=TOP if logits else None,
            extra_args={"kv_transfer_params": wishes},
        )
        prompt: dict[str, Any] = {"prompt_token_ids": list(ids)}
        if cache_salt is not None:
            prompt["cache_salt"] = cache_salt
        if audio is not None:
            import numpy as np

            prompt["multi_modal_data"] = {"audio": np.load(audio)}
        self._count += 1
        rid = f"harness-{self._count}"
        self._running[rid] = _Running(number, time.perf_counter())
        try:
            self._engine.add_request(rid, prompt, sampling, lora_request=self._lora(lora))
        except BaseException:
            del self._running[rid]
            raise

    def _lora(self, directory: str | None) -> Any:
        from vllm.lora.request import LoRARequest

        if directory is None:
            return None
        number = self._loras.setdefault(directory, len(self._loras) + 1)
        return LoRARequest(f"lora-{number}", number, directory)

    def _step(self) -> None:
        for output in self._engine.step():
            running = self._running.get(output.request_id)
            if running is None:
                continue
            reply = output.outputs[0]
            if running.ttft_s is None and reply.token_ids:
                running.ttft_s = time.perf_counter() - running.began
                if reply.logprobs:
                    running.top = [[token, entry.logprob] for token, entry in reply.logprobs[0].items()]
            if output.finished:
                del self._running[output.request_id]
                answer = {
                    "token_ids": list(reply.token_ids),
                    "text": reply.text,
                    "prompt_tokens": len(output.prompt_token_ids),
                    "cached_tokens": output.num_cached_tokens or 0,
                    "ttft_s": running.ttft_s,
                    "finish_reason": reply.finish_reason,
                }
                if running.top is not None:
                    answer["top"] = running.top
                    answer["margins"] = [margin([one.logprob for one in top.values()]) for top in reply.logprobs]
                self._answer({"id": running.number, **answer})

    def tokenize(self, text: str = "", messages: Sequence[dict[str, str]] = ()) -> Answer:
        """Op ``tokenize``."""
        tokenizer = self._engine.get_tokenizer()
        if messages:
            text = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
        return {"token_ids": tokenizer.encode(text)}

    def abort(self, target: Any) -> Answer:
        """Op ``abort``: of a ``generate`` by its id, which is answered with an error."""
        for rid, running in list(self._running.items()):
            if running.number == target:
                del self._running[rid]
                self._engine.abort_request([rid])
                self._answer({"id": target, "error": "aborted"})
                return {"aborted": True}
        return {"aborted": False}

    def forget(self, timeout_s: float = 30.0, cache: bool = False) -> Answer:
        """Op ``forget``: empty the engine's own prefix cache; with ``cache`` also this model's part of the cache."""
        deadline = time.monotonic() + timeout_s
        while not (done := bool(self._engine.reset_prefix_cache(reset_connector=cache))):
            if time.monotonic() > deadline:
                break
            self._settle()
        return {"forgotten": done}

    def flush(self, timeout_s: float = 60.0) -> Answer:
        """Op ``flush``."""
        if self._cache is None:
            return {"flushed": True}
        deadline = time.monotonic() + timeout_s
        drained = self._engine.collective_rpc("drain_cache", args=(timeout_s,))
        self._settle()
        return {"flushed": all(drained) and self._cache.drain(max(0.0, deadline - time.monotonic()))}

    def stats(self) -> Answer:
        """Op ``stats``; ``engine`` has vLLM's own counters, of its prefix cache, and the connector's."""
        import msgspec

        metrics = {metric.name: metric.value for metric in self._engine.get_metrics() if hasattr(metric, "value")}
        figures = {name: value for name, value in metrics.items() if "prefix_cache" in name or "lmcache" in name}
        preemptions = metrics.get("vllm:num_preemptions", 0)
        stats = None if self._cache is None else msgspec.to_builtins(self._cache.stats())
        return {"stats": stats, "preemptions": preemptions, "engine": figures}

    def _settle(self) -> None:
        """Let vLLM take back the blocks of requests whose stores have ended; in its own process it does by itself."""
        if self._in_process and not self._running:
            self._engine.step()
        else:
            time.sleep(0.01)


_OPS: dict[str, Callable[..., Answer]] = {
    "tokenize": Engine.tokenize,
    "abort": Engine.abort,
    "forget": Engine.forget,
    "flush": Engine.flush,
    "stats": Engine.stats,
}


def _identity(cache: Any) -> Any:
    import msgspec

    return msgspec.to_builtins([cache.namespace, cache.producer])


def _start(options: argparse.Namespace) -> tuple[Any, Any]:
    """vLLM's engine, and a client of the same cache."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.engine.llm_engine import LLMEngine

    arguments: dict[str, Any] = {
        "model": options.model,
        "enforce_eager": True,
        "disable_log_stats": False,
        "worker_extension_cls": "lmcache_adapters.vllm.engine.WorkerExtension",
        **pairs(options.option),
    }
    if options.cache is not None or options.transfer:
        arguments["kv_transfer_config"] = {
            **vllm_transfer(options.cache, **{"on_error": "refuse", **pairs(options.extra)}),
            **pairs(options.transfer),
        }
        from vllm.config import KVTransferConfig

        arguments["kv_transfer_config"] = KVTransferConfig(**arguments["kv_transfer_config"])
    engine = LLMEngine.from_engine_args(EngineArgs(**arguments))
    if options.cache is None:
        return engine, None
    from lmcache_adapters.vllm.cache import open_for_worker
    from lmcache_adapters.vllm.identity import namespace_and_producer
    from lmcache_adapters.vllm.settings import read_settings

    config = engine.vllm_config
    try:
        settings = read_settings({"url": options.cache, **pairs(options.extra)})
        identity = namespace_and_producer(config, settings)
        block_tokens = config.cache_config.block_size
        return engine, open_for_worker(settings, config.kv_transfer_config.engine_id, *identity, block_tokens)
    except LMCacheSDKError:  # the connector has said why, and `on_error` lets the engine serve without it
        return engine, None


def main(arguments: Sequence[str] | None = None) -> int:
    """Run until told to stop; the answer is the exit status."""
    parser = argparse.ArgumentParser(prog="lmcache_adapters.vllm.engine", description="vLLM on JSON lines.")
    parser.add_argument("--model", required=True, help="model directory or hub id")
    parser.add_argument("--cache", help="URL of a daemon or store; without it there is no connector")
    parser.add_argument("--option", action="append", default=[], help="an engine argument of vLLM: NAME=JSON")
    parser.add_argument("--extra", action="append", default=[], help="a setting of the connector: NAME=JSON")
    parser.add_argument("--transfer", action="append", default=[], help="a field of kv_transfer_config: NAME=JSON")
    options = parser.parse_args(arguments)
    log_to_stderr()
    answer = take_stdout()
    try:
        engine, cache = _start(options)
    except Exception as error:  # noqa: BLE001 - whatever it is, the caller must hear of it
        answer({"error": f"{type(error).__name__}: {error}"})
        return 2
    served = Engine(engine, cache, answer)
    answer(served.hello())
    served.serve(sys.stdin)
    if cache is not None:
        cache.close()
    engine.engine_core.shutdown()
    return 0


if __name__ == "__main__":
    sys.exit(main())
