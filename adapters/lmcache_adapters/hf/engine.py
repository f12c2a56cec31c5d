"""The runner as an engine process that speaks JSON lines; the protocol is in ``lmcache_sdk.testing.harness``.

Usage::

    python -m lmcache_adapters.hf.engine --model DIR [--cache URL] [--device cpu] [--dtype bfloat16]
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from lmcache_adapters.process import TOP, Answer, take_stdout
from lmcache_sdk.errors import ConfigError, LMCacheSDKError
from lmcache_sdk.observe.logs import log_to_stderr

# Idle OpenMP threads that spin take the cores from those that work. Read when torch is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")


class Engine:
    """Answers requests; one method an op."""

    def __init__(self, runner: Any) -> None:
        self._runner = runner

    def hello(self) -> Answer:
        """The first line."""
        import msgspec

        model = self._runner.model
        return {
            "event": "ready",
            "engine": "hf",
            "namespace": model.namespace.id,
            "producer": model.producer.id,
            "chunk_tokens": model.namespace.spec.chunk_tokens,
            "context_tokens": self._runner.context_tokens,
            "identity": msgspec.to_builtins([model.namespace, model.producer]),
        }

    def serve(self, requests: Iterable[str], answer: Callable[[Answer], None]) -> None:
        """Answer until a ``stop``, or until there are no more requests."""
        for line in requests:
            number: Any = None
            try:
                request = json.loads(line)
                number = request.pop("id", None)
                op = request.pop("op", None)
                if op == "stop":
                    answer({"id": number, "stopped": True})
                    return
                if op not in _OPS:
                    raise ConfigError(f"unknown op {op!r}; there are: {', '.join(_OPS)}, stop")
                answer({"id": number, **_OPS[op](self, **request)})
            except (LMCacheSDKError, ValueError, TypeError, AttributeError) as error:
                answer({"id": number, "error": f"{type(error).__name__}: {error}"})

    def generate(
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
    ) -> Answer:
        """Op ``generate``."""
        from lmcache_adapters.hf.sampling import Sampling

        result = self._runner.generate(
            ids,
            max_new_tokens=max_new_tokens,
            sampling=Sampling(temperature, top_p, top_k, seed),
            cache_salt=cache_salt,
            load=load,
            store=store,
            keep_logits=logits,
        )
        answer = {
            "token_ids": result.token_ids,
            "text": result.text,
            "prompt_tokens": result.prompt_tokens,
            "cached_tokens": result.cached_tokens,
            "ttft_s": result.ttft_s,
            "finish_reason": result.finish_reason,
        }
        if logits:
            answer |= _describe(result.logits)
        return answer

    def tokenize(self, text: str = "", messages: Sequence[dict[str, str]] = ()) -> Answer:
        """Op ``tokenize``."""
        return {"token_ids": self._runner.model.encode(messages or text).tolist()}

    def flush(self, timeout_s: float = 60.0) -> Answer:
        """Op ``flush``."""
        return {"flushed": self._runner.drain(timeout_s)}

    def stats(self) -> Answer:
        """Op ``stats``."""
        import msgspec

        cache = self._runner.cache
        return {"stats": None if cache is None else msgspec.to_builtins(cache.stats())}


_OPS: dict[str, Callable[..., Answer]] = {
    "generate": Engine.generate,
    "tokenize": Engine.tokenize,
    "flush": Engine.flush,
    "stats": Engine.stats,
}


def _describe(logits: Any) -> Answer:
    """float32 [vocabulary] -> a digest for "the same bits", and log probabilities for "how far apart"."""
    import torch

    chances = torch.from_numpy(logits).log_softmax(-1)
    top = chances.topk(min(TOP, chances.numel()))
    return {
        "logits_sha256": hashlib.sha256(logits.tobytes()).hexdigest(),
        "top": list(zip(top.indices.tolist(), top.values.tolist(), strict=True)),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Run until told to stop; the answer is the exit status."""
    parser = argparse.ArgumentParser(prog="lmcache_adapters.hf.engine", description="HF runner on JSON lines.")
    parser.add_argument("--model", required=True, help="model directory or hub id")
    parser.add_argument("--cache", help="URL of the store; without it there is no cache")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", help="of weights and KV; by default the model's own")
    parser.add_argument("--chunk-tokens", type=int)
    parser.add_argument("--share", default="verified", help="whose KV it uses beside its own: verified, any or own")
    parser.add_argument("--context-tokens", type=int, help="longest prompt and reply together")
    options = parser.parse_args(arguments)
    log_to_stderr()
    answer = take_stdout()
    from lmcache_adapters.hf.runner import Runner

    try:
        runner = Runner(
            options.model,
            options.cache,
            device=options.device,
            dtype=options.dtype,
            chunk_tokens=options.chunk_tokens,
            context_tokens=options.context_tokens,
            share=options.share,
        )
    except LMCacheSDKError as error:
        answer({"error": f"{type(error).__name__}: {error}"})
        return 2
    with runner:
        engine = Engine(runner)
        answer(engine.hello())
        engine.serve(sys.stdin, answer)
    return 0


if __name__ == "__main__":
    sys.exit(main())
