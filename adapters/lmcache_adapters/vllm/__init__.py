"""vLLM: a KV connector whose prefixes come from the cache, across restarts, processes and replicas.

    vllm serve MODEL --kv-transfer-config '{"kv_connector": "LMCacheSDKConnector", "kv_role": "kv_both",
        "kv_connector_module_path": "lmcache_adapters.vllm", "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": {"url": "unix:///run/user/1000/lmcache-sdk.sock"}}'

Importing this package imports neither torch nor vLLM; the first use of the connector does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lmcache_adapters.vllm.connector import LMCacheSDKConnector

__all__ = ["LMCacheSDKConnector", "register"]


def register() -> None:
    """Make the connector known by its name alone; vLLM calls this in each of its processes (``general_plugins``)."""
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

    if "LMCacheSDKConnector" not in KVConnectorFactory._registry:  # plugins are loaded more than once in a process
        KVConnectorFactory.register_connector("LMCacheSDKConnector", __name__, "LMCacheSDKConnector")


def __getattr__(name: str) -> Any:
    if name != "LMCacheSDKConnector":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from lmcache_adapters.vllm.connector import LMCacheSDKConnector

    return LMCacheSDKConnector
