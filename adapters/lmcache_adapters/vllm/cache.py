"""The cache of one engine, for the process of its scheduler and for each of its workers."""

from __future__ import annotations

import hashlib
import os
import tempfile
from pathlib import Path

from lmcache_adapters.vllm.settings import VLLMSettings
from lmcache_sdk.api import Cache
from lmcache_sdk.daemon.client import DaemonCache
from lmcache_sdk.daemon.private import PrivateCache, start_private
from lmcache_sdk.lineage import Lineage
from lmcache_sdk.open import open_cache
from lmcache_sdk.spec import Namespace, Producer


def open_for_scheduler(settings: VLLMSettings, engine_id: str, namespace: Namespace, producer: Producer) -> Cache:
    """A daemon's cache. For a store's URL a daemon is started, which ends with this process.

    Raises:
        ConfigError, BackendError: see :func:`lmcache_sdk.open.open_cache`.
    """
    if not settings.has_own_daemon:
        return open_cache(settings.url, namespace=namespace, producer=producer, share=settings.config.share)
    private = start_private(settings.url.split(), settings.config.pool_bytes, socket=_own_socket(engine_id))
    return PrivateCache(private, namespace, producer, share=settings.config.share)


def open_for_worker(
    settings: VLLMSettings, engine_id: str, namespace: Namespace, producer: Producer, block_tokens: int
) -> Cache:
    """The same cache. A daemon of the engine's own may not be there yet: workers come first.

    Args:
        block_tokens: vLLM's own cache gives whole blocks to other requests.
    """
    share = settings.config.share
    lineage = Lineage(splits_chunks=block_tokens % settings.config.chunk_tokens != 0)
    if not settings.has_own_daemon:
        return open_cache(settings.url, namespace=namespace, producer=producer, share=share, lineage=lineage)
    socket = _own_socket(engine_id)
    return DaemonCache(socket, namespace, producer, share=share, lineage=lineage, starts_later=True)


def _own_socket(engine_id: str) -> Path:
    """Where all processes of one engine find its daemon: vLLM gives each engine an id of its own."""
    name = hashlib.sha256(engine_id.encode()).hexdigest()[:16]
    return Path(tempfile.gettempdir()) / f"lmcache-sdk-{os.getuid()}-{name}" / "socket"
