"""Weights that are replaced in a running engine: from then on its KV belongs to no namespace that it knows.

SGLang does not tell a cache. Its plugin mechanism lets us stand in front of the methods that replace weights.
"""

from __future__ import annotations

import threading
from typing import Any

from lmcache_sdk.observe.logs import logger

_log = logger("sglang")

_OWNER = "sglang.srt.managers.scheduler_components.weight_updater.SchedulerWeightUpdaterManager"
UPDATES = (
    "update_weights_from_disk",
    "update_weights_from_distributed",
    "update_weights_from_tensor",
    "update_weights_from_ipc",
    "begin_weight_update",
)

_watched = threading.Event()
_replaced = threading.Event()


def watch() -> None:
    """Notice updates in this process. Before SGLang applies its hooks, and once."""
    if _watched.is_set():
        return
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    for name in UPDATES:
        HookRegistry.register(f"{_OWNER}.{name}", note_update, HookType.BEFORE)
    HookRegistry.register(f"{_OWNER}.check_weights", note_check, HookType.BEFORE)
    _watched.set()


def watched() -> bool:
    """Whether updates are noticed in this process."""
    return _watched.is_set()


def replaced() -> bool:
    """Whether the weights are no longer those that the engine was started with."""
    return _replaced.is_set()


def note_update(*_: Any, **__: Any) -> None:
    """The weights are about to be replaced."""
    if not _replaced.is_set():
        _log.warning("weights are being replaced: SGLang serves WITHOUT the cache until it is started again")
    _replaced.set()


def note_check(_: Any, request: Any) -> None:
    """The weights are about to be looked at; one way to do that overwrites them."""
    if getattr(request, "action", None) == "reset_tensors":
        note_update()
