"""What is set for one engine: our part of SGLang's extra configs, over ``LMCACHE_SDK_*`` and the configuration file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lmcache_sdk.config import Config, default_socket, load_config
from lmcache_sdk.errors import ConfigError
from lmcache_sdk.spec import CellGrid

ON_ERROR = ("degrade", "refuse")
SETTINGS = ("url", "pool_bytes", "layers_per_cell", "heads_per_cell", "log_level")
# SGLang's own, in the same object.
_THEIRS = ("backend_name", "module_path", "class_name", "interface_v1")


@dataclass(frozen=True, slots=True)
class Settings:
    """Of one engine.

    Attributes:
        config: where and how; ``url`` is never empty.
        zero_copy: whether SGLang was told to use the interface without copies.
    """

    config: Config
    zero_copy: bool = True

    @property
    def url(self) -> str:
        """A daemon (``unix://``), or a store in this process."""
        return self.config.url or f"unix://{default_socket()}"

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


def read_settings(extra: Mapping[str, Any], page_size: int) -> Settings:
    """From the extra config, over ``LMCACHE_SDK_*`` and the configuration file.

    Args:
        page_size: SGLang's. Its pages are our chunks, since its keys are those of pages.

    Raises:
        ConfigError: unknown names or wrong values; a ``chunk_tokens`` that is not the page size.
    """
    given = {name: value for name, value in extra.items() if name not in ("on_error", *_THEIRS)}
    unknown = sorted(set(given) - {*SETTINGS, "chunk_tokens"})
    if unknown:
        known = ", ".join((*SETTINGS, "chunk_tokens", "on_error"))
        raise ConfigError(f"unknown setting {unknown[0]!r} in the extra config; known are: {known}")
    config = load_config(given)
    if config.chunk_tokens != page_size:
        raise ConfigError(
            f"chunk_tokens is {config.chunk_tokens}, SGLang's page has {page_size} tokens, and its keys are those of "
            f"pages: start it with --page-size {config.chunk_tokens}, or set chunk_tokens to {page_size} for all who "
            "share this cache"
        )
    return Settings(config, bool(extra.get("interface_v1", 0)))
