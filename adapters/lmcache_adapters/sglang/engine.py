"""SGLang as an engine process that speaks JSON lines; the protocol is in ``lmcache_sdk.testing.harness``.

Usage::

    python -m lmcache_adapters.sglang.engine --model DIR [--cache URL] [--linker] [--option page_size=64]
        [--extra NAME=JSON]

``--option`` is any of SGLang's server arguments, ``--extra`` one of the settings of its backend, or, with ``--linker``,
of the linker, values as JSON. Requests that are sent without waiting run together.

SGLang lets no request choose what is loaded: one that must not load anything gets a salt that nobody else has, and so
stores nothing that others find. ``store: false`` alone has no meaning here.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import secrets
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import IO, Any

from lmcache_adapters.launch import sglang_extra, sglang_linker
from lmcache_adapters.process import TOP, Answer, margin, pairs, take_stdout
from lmcache_sdk.errors import ConfigError, LMCacheSDKError
from lmcache_sdk.observe.logs import log_to_stderr

# Idle OpenMP threads that spin take the cores from those that work. Read when torch is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

_POLL_S = 0.01


class Engine:
    """Answers requests; one method an op."""

    def __init__(self, engine: Any, cache: Any, answer: Callable[[Answer], None]) -> None:
        self._engine = engine
        self._server = engine.server_args
        self._cache = cache
        self._answer = answer
        self._rids: dict[Any, str] = {}
        self._numbers = itertools.count(1)
        self._expected: list[Any] = []  # chains that requests have left
        self._retractions = 0

    def hello(self) -> Answer:
        """The first line."""
        width = int(self._server.page_size)
        answer = {"event": "ready", "engine": "sglang", "context_tokens": int(self._server.context_length or 0)}
        if self._cache is not None:
            import msgspec

            answer |= {"namespace": self._cache.namespace.id, "producer": self._cache.producer.id}
            answer |= {"identity": msgspec.to_builtins([self._cache.namespace, self._cache.producer])}
        return {**answer, "chunk_tokens": width, "block_tokens": width}

    async def serve(self, lines: IO[str]) -> None:
        """Answer until a ``stop``, or until there are no more requests."""
        loop = asyncio.get_running_loop()
        running: set[asyncio.Task[None]] = set()
        while line := await loop.run_in_executor(None, lines.readline):
            number: Any = None
            try:
                request = json.loads(line)
                number, op = request.pop("id", None), request.pop("op", None)
                if op == "stop":
                    self._answer({"id": number, "stopped": True})
                    return
                if op not in _OPS:
                    raise ConfigError(f"unknown op {op!r}; there are: {', '.join(_OPS)}, stop")
                task = loop.create_task(self._run(number, op, request))
                running.add(task)
                task.add_done_callback(running.discard)
                if op != "generate":
                    await task
            except (LMCacheSDKError, ValueError) as error:
                self._answer({"id": number, "error": f"{type(error).__name__}: {error}"})

    async def _run(self, number: Any, op: str, request: dict[str, Any]) -> None:
        try:
            if op == "generate":
                request["number"] = number
            answer = await _OPS[op](self, **request)
        except Exception as error:  # noqa: BLE001 - whatever it is, the caller must hear of it
            answer = {"error": f"{type(error).__name__}: {error}"}
        self._answer({"id": number, **answer})

    async def generate(
        self,
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
        number: Any = None,
    ) -> Answer:
        """Op ``generate``."""
        del store
        salt = cache_salt if load else secrets.token_hex(8)
        sampling: dict[str, Any] = {"temperature": temperature, "top_p": top_p, "max_new_tokens": max_new_tokens}
        sampling |= {"ignore_eos": True, **({"top_k": top_k} if top_k else {})}
        if seed is not None:
            sampling["sampling_seed"] = seed
        rid = f"harness-{next(self._numbers)}"
        self._rids[number] = rid
        began, ttft = time.perf_counter(), None
        last: Any = None
        try:
            async for part in await self._engine.async_generate(
                input_ids=list(ids),
                sampling_params=sampling,
                return_logprob=logits,
                top_logprobs_num=TOP if logits else None,
                cache_salt=salt,
                rid=rid,
                stream=True,
            ):
                ttft = ttft if ttft is not None else time.perf_counter() - began
                last = part
        finally:
            del self._rids[number]
        return self._reply(list(ids), salt, last, ttft, logits)

    def _reply(self, ids: list[int], salt: str | None, last: Any, ttft: float | None, logits: bool) -> Answer:
        meta = last["meta_info"]
        reason = (meta.get("finish_reason") or {}).get("type")
        if reason == "abort":
            return {"error": f"aborted: {meta['finish_reason'].get('message')}"}
        self._retractions += int(meta.get("num_retractions") or 0)
        if self._cache is not None:
            from lmcache_sdk.keys import Chain

            known = [*ids, *last["output_ids"]][:-1]  # the last token is never computed
            self._expected.append(Chain(known, int(self._server.page_size), cache_salt=salt))
        answer = {
            "token_ids": last["output_ids"],
            "text": last.get("text", ""),
            "prompt_tokens": meta["prompt_tokens"],
            "cached_tokens": meta["cached_tokens"],
            "cached_details": meta.get("cached_tokens_details"),
            "ttft_s": ttft,
            "finish_reason": reason,
        }
        if logits:
            tops = meta["output_top_logprobs"]
            answer["top"] = [[token, chance] for chance, token, *_ in tops[0]]
            answer["margins"] = [margin([chance for chance, *_ in top]) for top in tops]
        return answer

    async def tokenize(self, text: str = "", messages: Sequence[dict[str, str]] = ()) -> Answer:
        """Op ``tokenize``."""
        tokenizer = self._engine.tokenizer_manager.tokenizer
        if messages:
            text = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
        return {"token_ids": tokenizer.encode(text)}

    async def abort(self, target: Any) -> Answer:
        """Op ``abort``."""
        rid = self._rids.get(target)
        if rid is not None:
            self._engine.tokenizer_manager.abort_request(rid=rid)
        return {"aborted": rid is not None}

    async def forget(self, timeout_s: float = 30.0) -> Answer:
        """Op ``forget``: empty SGLang's own caches, on the device and in host memory."""
        deadline = time.monotonic() + timeout_s
        while True:
            done = await self._engine.tokenizer_manager.flush_cache()
            if done.success or time.monotonic() > deadline:
                self._expected.clear()  # what has not been stored by now was in those caches
                return {"forgotten": bool(done.success)}
            await asyncio.sleep(_POLL_S)

    async def flush(self, timeout_s: float = 60.0) -> Answer:
        """Op ``flush``: until the pages of all requests have arrived, which SGLang stores in threads of its own."""
        if self._cache is None:
            return {"flushed": True}
        deadline = time.monotonic() + timeout_s
        while self._expected:
            self._expected = [chain for chain in self._expected if not self._has(chain)]
            if time.monotonic() > deadline:
                self._expected.clear()  # said once: they may have been deleted
                return {"flushed": False}
            await asyncio.sleep(_POLL_S)
        drained = await asyncio.to_thread(self._cache.drain, max(0.1, deadline - time.monotonic()))
        return {"flushed": drained}

    def _has(self, chain: Any) -> bool:
        rid = f"flush-{next(self._numbers)}"
        found = self._cache.lookup(rid, chain, prefetch=False)
        self._cache.forget(rid)
        return bool(found.chunks >= len(chain))

    async def stats(self) -> Answer:
        """Op ``stats``."""
        import msgspec

        stats = None if self._cache is None else msgspec.to_builtins(self._cache.stats())
        return {"stats": stats, "preemptions": self._retractions}


_OPS: dict[str, Callable[..., Awaitable[Answer]]] = {
    "generate": Engine.generate,
    "tokenize": Engine.tokenize,
    "abort": Engine.abort,
    "forget": Engine.forget,
    "flush": Engine.flush,
    "stats": Engine.stats,
}


def _start(options: argparse.Namespace) -> tuple[Any, Any]:
    """SGLang's engine, and a client of the same cache."""
    import sglang

    arguments: dict[str, Any] = {"model_path": options.model, "page_size": 64, "enable_cache_report": True}
    given = pairs(options.extra)
    if options.linker:
        arguments |= {
            "enable_unified_cache_external_linker": True,
            "unified_cache_external_linker_backend": "dynamic",
            "unified_cache_external_linker_config": sglang_linker(options.cache, **{"on_error": "refuse", **given}),
        }
    elif options.cache is not None:
        extra = {**sglang_extra(options.cache, threshold=1), "on_error": "refuse", **given}
        arguments |= {
            "enable_hierarchical_cache": True,
            "hicache_storage_backend": "dynamic",
            "hicache_storage_prefetch_policy": "wait_complete",
            "hicache_write_policy": "write_through",
            "hicache_storage_backend_extra_config": json.dumps(extra),
        }
    arguments |= pairs(options.option)
    engine = sglang.Engine(**arguments)
    if options.cache is None:
        return engine, None
    return engine, _client(engine.server_args, options.cache, given, linker=options.linker)


def _client(server: Any, url: str, extra: dict[str, Any], *, linker: bool) -> Any:
    from sglang.srt.arg_groups.model_override_base import resolved_view
    from sglang.srt.configs.model_config import ModelConfig

    from lmcache_adapters.sglang.identity import EngineFacts, namespace_and_producer
    from lmcache_adapters.sglang.settings import read_linker_settings, read_settings
    from lmcache_sdk.open import open_cache

    view = resolved_view(server)
    facts = EngineFacts(view, ModelConfig.from_server_args(server), int(view.tp_size), 0)
    width = int(view.page_size)
    read = read_linker_settings if linker else read_settings
    settings = read({**extra, "chunk_tokens": width}, width)
    dtype = str(facts.model.dtype).removeprefix("torch.")
    namespace, producer = namespace_and_producer(facts, width, dtype, settings.grid)
    return open_cache(url, namespace=namespace, producer=producer, share=settings.config.share)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run until told to stop; the answer is the exit status."""
    parser = argparse.ArgumentParser(prog="lmcache_adapters.sglang.engine", description="SGLang on JSON lines.")
    parser.add_argument("--model", required=True, help="model directory or hub id")
    parser.add_argument("--cache", help="URL of a daemon or store; without it there is no hierarchical cache")
    parser.add_argument("--linker", action="store_true", help="with a linker instead of a hierarchical cache")
    parser.add_argument("--option", action="append", default=[], help="a server argument of SGLang: NAME=JSON")
    parser.add_argument("--extra", action="append", default=[], help="a setting of ours: NAME=JSON")
    options = parser.parse_args(arguments)
    if options.linker and options.cache is None:
        parser.error("--linker needs --cache")
    log_to_stderr()
    answer = take_stdout()
    try:
        engine, cache = _start(options)
    except Exception as error:  # noqa: BLE001 - whatever it is, the caller must hear of it
        answer({"error": f"{type(error).__name__}: {error}"})
        return 2
    served = Engine(engine, cache, answer)
    answer(served.hello())
    engine.loop.run_until_complete(served.serve(sys.stdin))
    if cache is not None:
        cache.close()
    engine.shutdown()
    return 0


if __name__ == "__main__":
    sys.exit(main())
