"""``kv_connector_extra_config``, and what a request may ask for in its ``kv_transfer_params``."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lmcache_sdk.config import Config, default_socket, load_config
from lmcache_sdk.errors import ConfigError
from lmcache_sdk.observe.logs import logger
from lmcache_sdk.spec import CellGrid

_log = logger("vllm")

ON_ERROR = ("degrade", "refuse")
SETTINGS = ("url", "pool_bytes", "chunk_tokens", "layers_per_cell", "heads_per_cell", "log_level")


@dataclass(frozen=True, slots=True)
class Settings:
    """Of one engine.

    Attributes:
        config: where and how; ``url`` is never empty.
    """

    config: Config

    @property
    def url(self) -> str:
        """A daemon (``unix://``) or a store, which gets a daemon of the engine's own."""
        return self.config.url or f"unix://{default_socket()}"

    @property
    def has_own_daemon(self) -> bool:
        return not self.url.startswith("unix://")

    @property
    def grid(self) -> CellGrid:
        return CellGrid(self.config.layers_per_cell, self.config.heads_per_cell)


def on_error(extra: Mapping[str, Any]) -> str:
    """What becomes of an engine whose cache cannot be used: ``degrade`` (serve without it) or ``refuse`` to start.

    Raises:
        ConfigError: it is neither.
    """
    chosen = extra.get("on_error", ON_ERROR[0])
    if chosen not in ON_ERROR:
        raise ConfigError(f"on_error is {' or '.join(ON_ERROR)}, got {chosen!r}")
    return str(chosen)


def read_settings(extra: Mapping[str, Any]) -> Settings:
    """From ``kv_connector_extra_config``, over ``LMCACHE_SDK_*`` and the configuration file.

    Raises:
        ConfigError: unknown names or wrong values.
    """
    given = {name: value for name, value in extra.items() if name != "on_error"}
    unknown = sorted(set(given) - set(SETTINGS))
    if unknown:
        known = ", ".join((*SETTINGS, "on_error"))
        raise ConfigError(f"unknown setting {unknown[0]!r} in kv_connector_extra_config; known are: {known}")
    return Settings(load_config(given))


@dataclass(frozen=True, slots=True)
class Wishes:
    """Of one request.

    Attributes:
        load, store: whether to use the cache, either way.
        pin_s: keep what the request stores or finds from eviction for so many seconds; 0 = do not.
        tenant: whose quota its chunks count against.
    """

    load: bool = True
    store: bool = True
    pin_s: float = 0.0
    tenant: str = ""


def read_wishes(params: Mapping[str, Any] | None) -> Wishes:
    """From ``kv_transfer_params``: ``no_load``, ``no_store``, ``pin`` (seconds), ``tenant``; others are other people's.

    A value that makes no sense is logged, and read as the most careful one: the scheduler is no place to raise.
    """
    if not params:
        return Wishes()
    pin, tenant = params.get("pin", 0.0), params.get("tenant", "")
    if isinstance(pin, bool) or not isinstance(pin, int | float) or not math.isfinite(pin) or pin < 0:
        _log.warning("kv_transfer_params: pin is a number of seconds, got %r; nothing is pinned", pin)
        pin = 0.0
    if not isinstance(tenant, str):
        _log.warning("kv_transfer_params: tenant is a name, got %r; it is left out", tenant)
        tenant = ""
    return Wishes(not _flag(params, "no_load"), not _flag(params, "no_store"), float(pin), tenant)


def _flag(params: Mapping[str, Any], name: str) -> bool:
    value = params.get(name, False)
    if not isinstance(value, bool):
        _log.warning("kv_transfer_params: %s is true or false, got %r; taken as true", name, value)
    return value is not False
