"""What is set for one engine: our part of SGLang's extra configs, over ``LMCACHE_SDK_*`` and the configuration file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lmcache_adapters.settings import Settings, read_config
from lmcache_sdk.errors import ConfigError

# SGLang's own, in the same object.
_THEIRS = ("backend_name", "module_path", "class_name", "interface_v1")


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
    config = read_config(extra, "the extra config", _THEIRS)
    if config.chunk_tokens != page_size:
        raise ConfigError(
            f"chunk_tokens is {config.chunk_tokens}, SGLang's page has {page_size} tokens, and its keys are those of "
            f"pages: start it with --page-size {config.chunk_tokens}, or set chunk_tokens to {page_size} for all who "
            "share this cache"
        )
    return SGLangSettings(config, bool(extra.get("interface_v1", 0)))
