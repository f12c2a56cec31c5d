"""What is set for one engine: our part of its own options, over ``LMCACHE_SDK_*`` and the configuration file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lmcache_sdk.config import Config, default_socket, load_config
from lmcache_sdk.errors import ConfigError
from lmcache_sdk.spec import CellGrid

SETTINGS = ("url", "pool_bytes", "chunk_tokens", "layers_per_cell", "heads_per_cell", "share", "log_level")
_ON_ERROR = ("degrade", "refuse")


@dataclass(frozen=True, slots=True)
class Settings:
    """Of one engine.

    Attributes:
        config: where and how.
    """

    config: Config

    @property
    def url(self) -> str:
        """A daemon (``unix://``) or a store; never empty."""
        return self.config.url or f"unix://{default_socket()}"

    @property
    def grid(self) -> CellGrid:
        return CellGrid(self.config.layers_per_cell, self.config.heads_per_cell)


def on_error(extra: Mapping[str, Any]) -> str:
    """What becomes of an engine whose cache cannot be used: ``degrade`` (serve without it) or ``refuse`` to start.

    Raises:
        ConfigError: it is neither.
    """
    chosen = extra.get("on_error", _ON_ERROR[0])
    if chosen not in _ON_ERROR:
        raise ConfigError(f"on_error is {' or '.join(_ON_ERROR)}, got {chosen!r}")
    return str(chosen)


def read_config(extra: Mapping[str, Any], where: str, theirs: Sequence[str] = ()) -> Config:
    """The configuration, with what stands in ``extra`` over the rest.

    Args:
        where: what the engine calls ``extra``.
        theirs: names in it that are the engine's own.

    Raises:
        ConfigError: unknown names or wrong values.
    """
    given = {name: value for name, value in extra.items() if name not in ("on_error", *theirs)}
    unknown = sorted(set(given) - set(SETTINGS))
    if unknown:
        known = ", ".join((*SETTINGS, "on_error"))
        raise ConfigError(f"unknown setting {unknown[0]!r} in {where}; known are: {known}")
    return load_config(given)
