"""Text generation with Transformers, where a prompt's known prefix comes from the cache instead of being computed."""

from __future__ import annotations

import itertools
import logging
import os
import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

import torch

from lmcache_adapters.hf.memory import KVMemory
from lmcache_adapters.hf.model import Model, Prompt, load_model
from lmcache_adapters.hf.reuse import Restored, ReusableMemory
from lmcache_adapters.hf.sampling import GREEDY, Sampler, Sampling
from lmcache_adapters.hf.text import TextStream
from lmcache_sdk.api import Cache
from lmcache_sdk.errors import ConfigError
from lmcache_sdk.keys import Chain, Tokens
from lmcache_sdk.open import open_cache
from lmcache_sdk.spec import DEFAULT_CHUNK_TOKENS

logger = logging.getLogger("lmcache_sdk.hf")

LONGEST_DEFAULT_CONTEXT = 32768


@dataclass(frozen=True, slots=True)
class Result:
    """One reply.

    Attributes:
        text: without special tokens, cut before a stop string.
        token_ids: what was generated, an ending token included.
        prompt_ids: what it was generated for, uint32 [n].
        cached_tokens: tokens of the prompt whose KV came from the cache.
        ttft_s: from the call to the first token, tokenisation included.
        finish_reason: ``stop`` (an ending token or a stop string) or ``length``.
        sources: chunks of the lookup by the tier they came from.
        logits: after the last token of the prompt, float32 [vocabulary]; None unless asked for.
    """

    text: str
    token_ids: list[int]
    prompt_ids: Tokens
    cached_tokens: int
    ttft_s: float
    finish_reason: str
    sources: Mapping[str, int] = field(default_factory=dict)
    logits: Any = None

    @property
    def prompt_tokens(self) -> int:
        """The length of the prompt."""
        return int(self.prompt_ids.size)


class Runner:
    """A model, its KV memory and a cache. Thread-safe: requests run one after another.

    Args:
        model: a model directory, a hub id, or a loaded :class:`Model`.
        cache: a URL (``lmdb:///path?size=10GiB``; the runner opens and closes it), an open cache (which stays
            the caller's), or None.
        device, dtype, chunk_tokens: for loading the model, see :func:`load_model`; a loaded one has its own.
        context_tokens: the longest prompt and reply together; by default the model's own limit, at most
            32,768. On CPU only what is used takes memory.
        pool_bytes: host memory for the cache that a URL opens.
        share: whose KV that cache gives beside this engine's own: ``verified``, ``any`` or ``own``.
        timeout_s: how long a request waits at most for the cache (lookup, then load) before it computes instead.
        always_wait: so long, also where computing is sooner done. By default a request waits for a slow tier only
            while that is sooner there than computed, by what both have taken so far.

    Raises:
        ConfigError, UnsupportedError: see :func:`load_model`; or a cache of another model.
        BackendError: the store cannot be opened.
    """

    def __init__(
        self,
        model: str | os.PathLike[str] | Model,
        cache: str | Cache | None = None,
        *,
        device: str | None = None,
        dtype: str | None = None,
        chunk_tokens: int | None = None,
        context_tokens: int | None = None,
        pool_bytes: int = 1 << 30,
        share: str = "verified",
        timeout_s: float = 10.0,
        always_wait: bool = False,
    ) -> None:
        if not isinstance(model, Model):
            model = load_model(
                model,
                device=device or "cpu",
                dtype=dtype,
                chunk_tokens=DEFAULT_CHUNK_TOKENS if chunk_tokens is None else chunk_tokens,
            )
        elif (device, dtype, chunk_tokens) != (None, None, None):
            raise ConfigError("device, dtype and chunk_tokens belong to load_model() when a loaded model is given")
        self.model = model
        self.context_tokens = _context(model, context_tokens)
        self._owns_cache = isinstance(cache, str)
        self.cache = _open(cache, model, pool_bytes, share) if isinstance(cache, str) else cache
        try:
            _check_same_model(self.cache, model)
            self._reuse = ReusableMemory(model, self.cache, self.context_tokens, timeout_s, always_wait=always_wait)
        except BaseException:
            self._close_cache()
            raise
        self._lock = threading.Lock()
        self._closed = False
        self._name = uuid.uuid4().hex[:8]
        self._numbers = itertools.count()

    def generate(
        self,
        prompt: Prompt,
        *,
        max_new_tokens: int = 128,
        sampling: Sampling = GREEDY,
        stop: str | Sequence[str] = (),
        stream: Callable[[str], None] | None = None,
        cache_salt: str | None = None,
        load: bool = True,
        store: bool = True,
        keep_logits: bool = False,
    ) -> Result:
        """Generate a reply.

        Args:
            prompt: text, chat messages (``[{"role": …, "content": …}]``), or token ids.
            max_new_tokens: at most this many; at least 1.
            stop: strings that end the reply.
            stream: called with each piece of text as soon as it is certain.
            cache_salt: only requests with the same salt share KV.
            load, store: whether to use the cache for this request, either way.
            keep_logits: return those after the last token of the prompt, too.

        Raises:
            ConfigError: the prompt is empty or does not fit, or a setting is out of range.
        """
        begin = time.perf_counter()
        stops = (stop,) if isinstance(stop, str) else tuple(stop)
        if stops and self.model.tokenizer is None:
            raise ConfigError("stop strings need a tokenizer, and this model has none")
        if any(not text for text in stops):
            raise ConfigError("a stop string is empty")
        ids = self.model.encode(prompt)
        self._check_length(ids.size, max_new_tokens)
        chain = Chain(ids, self.model.namespace.spec.chunk_tokens, cache_salt=cache_salt)
        rid = f"hf-{self._name}-{next(self._numbers)}"
        sampler, text = Sampler(sampling), TextStream(self.model.tokenizer, stops)

        with self._lock, torch.inference_mode():
            if self._closed:
                raise ConfigError("this runner is closed; make another one")
            try:
                # One token is always computed: it is its logits that choose the first new token.
                usable = (ids.size - 1) // chain.chunk_tokens if load else 0
                restored = self._reuse.restore(rid, chain, usable)
                first = restored.chunks * chain.chunk_tokens
                computing = time.perf_counter()
                logits = self._forward(ids[first:])
                token = sampler(logits)  # which waits for the device
                now = time.perf_counter()
                ttft_s = now - begin
                self._reuse.speed.add(first, ids.size - first, now - computing)
                kept = logits.float().cpu().numpy() if keep_logits else None
                if store:
                    self._reuse.save(rid, chain, restored.chunks)
                generated, reason = self._decode(token, max_new_tokens, sampler, text, stream)
                if store:
                    known = len(chain)
                    chain.extend(generated)
                    self._reuse.save(rid, chain, known)
            finally:
                self._reuse.forget(rid)
        self._log(ids.size, restored, chain.chunk_tokens, ttft_s, len(generated))
        return Result(
            text=text.text,
            token_ids=generated,
            prompt_ids=ids,
            cached_tokens=restored.chunks * chain.chunk_tokens,
            ttft_s=ttft_s,
            finish_reason=reason,
            sources=restored.sources,
            logits=kept,
        )

    @property
    def memory(self) -> KVMemory:
        """The engine memory, as the last request left it."""
        return self._reuse.memory

    def drain(self, timeout_s: float = 60.0) -> bool:
        """Wait until all KV computed so far has reached the store; False if that took too long."""
        return self._reuse.drain(timeout_s)

    def close(self) -> None:
        """Finish what is being stored and let go of the memory. Idempotent."""
        with self._lock:
            self._closed = True
            self._reuse.close()
            self._close_cache()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _forward(self, tokens: Sequence[int] | Tokens) -> torch.Tensor:
        return self.model.forward(tokens, self.memory.cache)

    def _decode(
        self,
        token: int,
        max_new_tokens: int,
        sampler: Sampler,
        text: TextStream,
        stream: Callable[[str], None] | None,
    ) -> tuple[list[int], str]:
        show = stream or _discard
        generated = [token]
        while token not in self.model.end_ids:
            show(text.push(token))
            if text.stopped or len(generated) == max_new_tokens:
                break
            token = sampler(self._forward([token]))
            generated.append(token)
        show(text.finish())
        ended = text.stopped or token in self.model.end_ids
        return generated, "stop" if ended else "length"

    def _check_length(self, prompt_tokens: int, max_new_tokens: int) -> None:
        if max_new_tokens != int(max_new_tokens) or max_new_tokens < 1:
            raise ConfigError(f"max_new_tokens must be a whole number from 1, got {max_new_tokens!r}")
        if prompt_tokens + max_new_tokens > self.context_tokens:
            raise ConfigError(
                f"{prompt_tokens} tokens of prompt and {max_new_tokens} new ones do not fit the context of "
                f"{self.context_tokens}; shorten the prompt or ask for at most "
                f"{max(0, self.context_tokens - prompt_tokens)} new tokens"
            )

    def _log(self, prompt: int, restored: Restored, chunk_tokens: int, ttft_s: float, generated: int) -> None:
        tiers = ",".join(f"{tier}:{chunks}" for tier, chunks in restored.sources.items() if chunks) or "-"
        logger.info(
            "prompt=%d hit=%d tiers=%s lookup_load_ms=%.1f ttft_ms=%.1f generated=%d",
            prompt,
            restored.chunks * chunk_tokens,
            tiers,
            restored.seconds * 1e3,
            ttft_s * 1e3,
            generated,
        )

    def _close_cache(self) -> None:
        if self._owns_cache and self.cache is not None:
            self.cache.close()


def _open(url: str, model: Model, pool_bytes: int, share: str) -> Cache:
    return open_cache(url, namespace=model.namespace, producer=model.producer, pool_bytes=pool_bytes, share=share)


def _check_same_model(cache: Cache | None, model: Model) -> None:
    if cache is None:
        return
    for opened, ours in ((cache.namespace, model.namespace), (cache.producer, model.producer)):
        if opened.id != ours.id:
            raise ConfigError(f"the cache was opened for another model or in another way: {opened}, not {ours}")


def _context(model: Model, asked: int | None) -> int:
    if asked is None:
        return min(model.context_tokens, LONGEST_DEFAULT_CONTEXT)
    if not 1 <= asked <= model.context_tokens:
        raise ConfigError(f"context_tokens must be within 1 .. {model.context_tokens} for this model, got {asked}")
    return asked


def _discard(_: str) -> None:
    pass
