"""What is set for one engine: our part of SGLang's extra configs, over ``LMCACHE_SDK_*`` and the configuration file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lmcache_adapters.settings import Settings, read_config
from lmcache_sdk.config import Config
from lmcache_sdk.errors import ConfigError

# SGLang's own, in the same object.
_THEIRS = ("backend_name", "module_path", "class_name", "interface_v1")
_LOOKUP_TIMEOUT_S = 0.05
_LONGEST_LOOKUP_S = 2.0


@dataclass(frozen=True, slots=True)
class SGLangSettings(Settings):
    """Of one engine.

    Attributes:
        zero_copy: whether SGLang was told to use the interface without copies.
    """

    zero_copy: bool = True


def read_settings(extra: Mapping[str, Any], page_size: int) -> SGLangSettings:
    """From the extra config, over ``LMCACHE_SDK_*`` and the configuration file.

    Args:
        page_size: SGLang's. Its pages are our chunks, since its keys are those of pages.

    Raises:
        ConfigError: unknown names or wrong values; a ``chunk_tokens`` that is not the page size.
    """
    config = _read_config(extra, "the extra config", _THEIRS, page_size)
    return SGLangSettings(config, bool(extra.get("interface_v1", 0)))


@dataclass(frozen=True, slots=True)
class LinkerSettings(Settings):
    """Of one engine with a linker.

    Attributes:
        lookup_timeout_s: how long SGLang's scheduler may be kept waiting for the answer to one question.
    """

    lookup_timeout_s: float = _LOOKUP_TIMEOUT_S


def read_linker_settings(extra: Mapping[str, Any], page_size: int) -> LinkerSettings:
    """From ``linker_extra_config``; otherwise as :func:`read_settings`."""
    given = extra.get("lookup_timeout_s", _LOOKUP_TIMEOUT_S)
    if isinstance(given, bool) or not isinstance(given, int | float) or not 0 < given <= _LONGEST_LOOKUP_S:
        raise ConfigError(f"lookup_timeout_s is a number of seconds up to {_LONGEST_LOOKUP_S:g}, got {given!r}")
    config = _read_config(extra, "linker_extra_config", ("lookup_timeout_s",), page_size)
    return LinkerSettings(config, float(given))


def _read_config(extra: Mapping[str, Any], where: str, theirs: Sequence[str], page_size: int) -> Config:
    config = read_config(extra, where, theirs)
    if config.chunk_tokens != page_size:
        raise ConfigError(
            f"chunk_tokens is {config.chunk_tokens}, SGLang's page has {page_size} tokens, and its keys are those of "
            f"pages: start it with --page-size {config.chunk_tokens}, or set chunk_tokens to {page_size} for all who "
            "share this cache"
        )
    return config
