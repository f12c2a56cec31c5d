"""``kv_connector_extra_config``, and what a request may ask for in its ``kv_transfer_params``."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lmcache_adapters.settings import Settings, read_config
from lmcache_sdk.observe.logs import logger

_log = logger("vllm")


@dataclass(frozen=True, slots=True)
class VLLMSettings(Settings):
    """Of one engine; a store gets a daemon of the engine's own."""

    @property
    def has_own_daemon(self) -> bool:
        return not self.url.startswith("unix://")


def read_settings(extra: Mapping[str, Any]) -> VLLMSettings:
    """From ``kv_connector_extra_config``, over ``LMCACHE_SDK_*`` and the configuration file.

    Raises:
        ConfigError: unknown names or wrong values.
    """
    return VLLMSettings(read_config(extra, "kv_connector_extra_config"))


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
