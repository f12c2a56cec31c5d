"""Whether the installed SGLang has the linker interface that is served here: what it calls, with which arguments."""

from __future__ import annotations

import importlib
import inspect
from importlib import metadata
from typing import Any

from lmcache_sdk.errors import UnsupportedError

MODULE = "sglang.srt.mem_cache.unified_cache.unified_cache_linker"

# Methods that SGLang calls, and their parameters, as of 0.5.23.
CALLED: dict[str, tuple[str, ...]] = {
    "lookup": ("rid", "transfers"),
    "load": ("rid", "transfers"),
    "start_layer_wise_loading": (),
    "finish_layer_wise_loading": ("counter_index",),
    "cancel_queued_load": ("rid",),
    "offload": ("transfers", "session_id"),
    "num_completed_offloads": (),
    "pop_completed_offload": (),
    "reset": (),
    "close": (),
}


def linker_base() -> Any:
    """SGLang's ``UnifiedCacheLinker``.

    Raises:
        UnsupportedError: this SGLang has none, or another one than is served; what differs, by name.
    """
    other = "use its hierarchical cache instead (HiCacheBackend)"
    try:
        version = metadata.version("sglang")
    except metadata.PackageNotFoundError:
        raise UnsupportedError("SGLang is not installed here") from None
    try:
        base = importlib.import_module(MODULE).UnifiedCacheLinker
    except (ImportError, AttributeError) as error:
        raise UnsupportedError(f"SGLang {version} has no external cache linker ({error}); {other}") from None
    differs = [f"{name} is new" for name in sorted(set(base.__abstractmethods__) - set(CALLED))]
    for name, wanted in CALLED.items():
        method = getattr(base, name, None)
        if method is None:
            differs.append(f"{name} is gone")
            continue
        found = tuple(inspect.signature(method).parameters)[1:]
        if found != wanted:
            differs.append(f"{name} takes ({', '.join(found)}), not ({', '.join(wanted)})")
    if differs:
        raise UnsupportedError(
            f"the external cache linker of SGLang {version} is not the one that is served (0.5.23's): "
            f"{'; '.join(differs)}; {other}"
        )
    return base
