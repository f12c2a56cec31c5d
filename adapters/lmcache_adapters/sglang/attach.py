"""The cache of one rank of an engine: what both doors do at their start."""

from __future__ import annotations

from typing import NamedTuple

from lmcache_adapters.deployment import part_of
from lmcache_adapters.settings import Settings
from lmcache_adapters.sglang import weights
from lmcache_adapters.sglang.identity import EngineFacts, namespace_and_producer, refuse_unserved_engine
from lmcache_sdk.api import Cache, Part
from lmcache_sdk.errors import ConfigError
from lmcache_sdk.lineage import Lineage
from lmcache_sdk.observe.logs import logger
from lmcache_sdk.open import DAEMON_SCHEME, open_cache
from lmcache_sdk.spec import Group

_log = logger("sglang")


class Opened(NamedTuple):
    """``group``: the namespace's only one; ``part``: what of it this rank holds."""

    cache: Cache
    group: Group
    part: Part


def open_engine_cache(facts: EngineFacts, settings: Settings, page_size: int, dtype: str) -> Opened:
    """Open the cache that the settings name.

    Args:
        page_size: SGLang's.
        dtype: of the KV memory.

    Raises:
        LMCacheSDKError: an engine, model or setting that is not served.
    """
    refuse_unserved_engine(facts)
    if facts.tp_size > 1 and not settings.url.startswith(f"{DAEMON_SCHEME}:"):
        raise ConfigError(
            f"{facts.tp_size} ranks cannot share a store in one process; start a daemon over it (lmcache-sdk "
            "serve --tier …), and give its socket as url"
        )
    if not weights.watched():
        _log.warning(
            "SGLang's plugins are not loaded here: replace no weights of this engine while it runs, its keys would "
            "not change (SGLANG_PLUGINS, if set, must name lmcache_sdk)"
        )
    namespace, producer = namespace_and_producer(facts, page_size, dtype, settings.grid)
    group = namespace.spec.groups[0]
    cache = open_cache(
        settings.url.split(),
        namespace=namespace,
        producer=producer,
        share=settings.config.share,
        lineage=Lineage.of_process(namespace.id),  # SGLang keeps its pages when the backend is detached
        pool_bytes=settings.config.pool_bytes,
    )
    _log.info("namespace %s, producer %s, %s", namespace.id, producer.name, settings.url)
    _log.info("SGLang tells neither tokens nor tenants: no quotas here, and a daemon with require_salt serves nothing")
    return Opened(cache, group, part_of(group, facts.tp_size, facts.tp_rank))
