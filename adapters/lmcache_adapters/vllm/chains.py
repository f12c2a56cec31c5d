"""A vLLM request's chain of digests: its tokens, and all else that its KV depends on."""

from __future__ import annotations

from concurrent.futures import Future
from functools import lru_cache
from typing import Any

from lmcache_adapters.vllm.lora import NO_ADAPTER
from lmcache_sdk.keys import Chain, Overlay
from lmcache_sdk.observe.logs import logger

_log = logger("vllm")


def chain_of(request: Any, chunk_tokens: int, tenant: str = "", lora: Future[str | None] = NO_ADAPTER) -> Chain | None:
    """The chain of all tokens that a request has so far; None if its KV cannot be named, and so not be kept.

    Args:
        lora: the key of its adapter, which is done.
    """
    if getattr(request, "prompt_embeds", None) is not None:
        return None  # there are no token ids that would tell one prompt from another
    try:
        return Chain(
            list(request.all_token_ids),
            chunk_tokens,
            cache_salt=request.cache_salt,
            extra_key=lora.result(),
            tenant=tenant,
            overlays=[_overlay(feature) for feature in request.mm_features or ()],
        )
    except Exception as error:  # noqa: BLE001 - this is vLLM's scheduler, where nothing may raise
        _warn_once(f"{type(error).__name__}: {error}")
        return None


@lru_cache(maxsize=256)
def _warn_once(reason: str) -> None:
    """All requests of an adapter have the same."""
    _log.warning("requests are served without the cache: %s", reason)


def _overlay(feature: Any) -> Overlay:
    """An image or the like, by the identifier that vLLM's own prefix cache goes by."""
    place = feature.mm_position
    return Overlay(place.offset, place.offset + place.length, f"{feature.modality}:{feature.identifier}")
