"""Hugging Face Transformers: a runner whose prompts are prefilled from the cache.

    from lmcache_adapters.hf import Runner

    with Runner("path/to/model", "lmdb:///var/tmp/kv?size=10GiB") as runner:
        print(runner.generate("Once upon a time", max_new_tokens=32).text)

Importing this package imports neither torch nor transformers; the first use of a name below does.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lmcache_adapters.hf.chat import Chat
    from lmcache_adapters.hf.model import Model, load_model
    from lmcache_adapters.hf.runner import Result, Runner
    from lmcache_adapters.hf.sampling import Sampling

__all__ = ["Chat", "Model", "Result", "Runner", "Sampling", "load_model"]

_HOMES = {
    "Chat": "chat",
    "Model": "model",
    "Result": "runner",
    "Runner": "runner",
    "Sampling": "sampling",
    "load_model": "model",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
