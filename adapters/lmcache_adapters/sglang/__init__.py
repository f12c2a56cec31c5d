"""SGLang: a storage backend of its hierarchical cache, whose prefixes outlive the engine.

    python -m sglang.launch_server --model-path MODEL --page-size 64 --enable-hierarchical-cache
        --hicache-storage-backend dynamic --hicache-storage-backend-extra-config '{"backend_name": "lmcache-sdk",
        "module_path": "lmcache_adapters.sglang", "class_name": "HiCacheBackend", "interface_v1": 1,
        "hicache_storage_pass_prefix_keys": true, "url": "unix:///run/user/1000/lmcache-sdk.sock"}'

``lmcache-sdk launch-args sglang`` prints these flags. Importing this package imports neither torch nor SGLang; the
first use of the backend does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lmcache_adapters.sglang.hicache import HiCacheBackend

__all__ = ["HiCacheBackend", "register"]


def register() -> None:
    """Watch for new weights; SGLang calls this in each of its processes (``sglang.srt.plugins``)."""
    from lmcache_adapters.sglang.weights import watch

    watch()


def __getattr__(name: str) -> Any:
    if name != "HiCacheBackend":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from lmcache_adapters.sglang.hicache import HiCacheBackend

    return HiCacheBackend
