"""SGLang: a storage backend of its hierarchical cache, and a linker of its prefix cache; prefixes outlive the engine.

    python -m sglang.launch_server --model-path MODEL --page-size 64 --enable-hierarchical-cache
        --hicache-storage-backend dynamic --hicache-storage-backend-extra-config '{"backend_name": "lmcache-sdk",
        "module_path": "lmcache_adapters.sglang", "class_name": "HiCacheBackend", "interface_v1": 1,
        "hicache_storage_pass_prefix_keys": true, "url": "unix:///run/user/1000/lmcache-sdk.sock"}'

or, without SGLang's host memory in between (experimental),

    python -m sglang.launch_server --model-path MODEL --page-size 64 --enable-unified-cache-external-linker
        --unified-cache-external-linker-backend dynamic --unified-cache-external-linker-config '{"linker": "Linker",
        "linker_module_path": "lmcache_adapters.sglang", "linker_extra_config": {"url": "unix:///…"}}'

``lmcache-sdk launch-args sglang`` prints these flags. Importing this package imports neither torch nor SGLang; the
first use of a class does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lmcache_adapters.sglang.hicache import HiCacheBackend
    from lmcache_adapters.sglang.linker import Linker

__all__ = ["HiCacheBackend", "Linker", "register"]


def register() -> None:
    """Watch for new weights; SGLang calls this in each of its processes (``sglang.srt.plugins``)."""
    from lmcache_adapters.sglang.weights import watch

    watch()


def __getattr__(name: str) -> Any:
    if name == "HiCacheBackend":
        from lmcache_adapters.sglang.hicache import HiCacheBackend

        return HiCacheBackend
    if name == "Linker":
        from lmcache_adapters.sglang.interface import linker_base

        linker_base()  # a class for another interface would be abstract, and SGLang could not say why
        from lmcache_adapters.sglang.linker import Linker

        return Linker
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
