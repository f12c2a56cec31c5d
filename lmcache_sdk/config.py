"""One configuration: flags over environment (``LMCACHE_SDK_*``) over a YAML file. Sizes as people write them."""

from __future__ import annotations

import difflib
import logging
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

import msgspec

from lmcache_sdk.errors import ConfigError

ENVIRONMENT_PREFIX = "LMCACHE_SDK_"

_UNITS = {"": 1, "B": 1}
for _power, _letter in enumerate("KMGT", start=1):
    _UNITS |= {f"{_letter}IB": 1024**_power, f"{_letter}B": 1000**_power, _letter: 1024**_power}


def parse_size(text: str | int) -> int:
    """Bytes of ``20GiB``, ``512M`` (binary), ``30GB`` (decimal) or a plain number.

    Raises:
        ConfigError: it is no size, or not positive.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", str(text))
    if match is None or match[2].upper() not in _UNITS:
        raise ConfigError(f"{text!r} is not a size; write it like 20GiB, 512MiB or 30GB")
    size = int(float(match[1]) * _UNITS[match[2].upper()])
    if size < 1:
        raise ConfigError(f"a size must be positive, got {text!r}")
    return size


def format_size(nbytes: float) -> str:
    """``1536`` -> ``1.5 KiB``."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(nbytes) < 1024:
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1024
    return f"{nbytes:.1f} TiB"


def cache_home() -> Path:
    """Where this user's store is by default: ``$XDG_CACHE_HOME/lmcache-sdk``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lmcache-sdk"


def default_url() -> str:
    """The store of this user. Without a size: an existing store keeps its own."""
    return f"lmdb://{quote(str(cache_home() / 'store'))}"


class Config(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """All settings.

    Attributes:
        url: where the cache is: a daemon or a store.
        pool_bytes: host memory for chunks, where this process has a pool of its own.
        chunk_tokens: tokens in a chunk; all who share a store must agree on it.
        layers_per_cell, heads_per_cell: the cell grid, 0 = do not cut.
        wait_s: how long a request waits for chunks that only a tier has, before it computes them itself.
        log_level: of the ``lmcache_sdk`` loggers.
    """

    url: str = ""
    pool_bytes: int = 1 << 30
    chunk_tokens: int = 64
    layers_per_cell: int = 0
    heads_per_cell: int = 0
    wait_s: float = 10.0
    log_level: str = "INFO"


_SIZES = ("pool_bytes",)


def load_config(
    flags: Mapping[str, Any] | None = None,
    *,
    file: str | os.PathLike[str] | None = None,
    environment: Mapping[str, str] | None = None,
) -> Config:
    """The effective configuration. A flag that is None is not set.

    Args:
        file: a YAML mapping; also named by ``LMCACHE_SDK_CONFIG``.

    Raises:
        ConfigError: an unknown name (with the nearest known one), a wrong value, or an unreadable file.
    """
    environment = os.environ if environment is None else environment
    names = [field.name for field in msgspec.structs.fields(Config)]
    settings: dict[str, Any] = {}
    path = file or environment.get(f"{ENVIRONMENT_PREFIX}CONFIG")
    if path:
        settings.update(_read_yaml(Path(path), names))
    for name in names:
        value = environment.get(ENVIRONMENT_PREFIX + name.upper())
        if value is not None:
            settings[name] = value
    for variable in environment:
        _not_misspelt(variable, names)
    for name, value in (flags or {}).items():
        if value is not None:
            _known(name, names, "flags")
            settings[name] = value
    for name in _SIZES:
        if name in settings:
            settings[name] = parse_size(settings[name])
    try:
        config = msgspec.convert(settings, Config, strict=False)
    except msgspec.ValidationError as error:
        raise ConfigError(f"bad setting: {error}") from error
    if config.chunk_tokens < 1:
        raise ConfigError(f"chunk_tokens must be at least 1, got {config.chunk_tokens}")
    for name in ("layers_per_cell", "heads_per_cell", "wait_s"):
        if not getattr(config, name) >= 0:  # nor is it a number if it is NaN
            raise ConfigError(f"{name} must not be negative, got {getattr(config, name)}")
    if config.log_level.upper() not in (levels := logging.getLevelNamesMapping()):
        raise ConfigError(f"log_level must be one of {', '.join(levels)}, got {config.log_level!r}")
    return config


def _read_yaml(path: Path, names: list[str]) -> dict[str, Any]:
    import yaml

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read the configuration {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not YAML: {error}") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(f"{path} must be a mapping of settings, it is a {type(content).__name__}")
    for name in content:
        _known(str(name), names, str(path))
    return content


def _not_misspelt(variable: str, names: list[str]) -> None:
    """Refuse an environment variable that is nearly a setting's. Others with the prefix are other programs' affair."""
    name = variable.removeprefix(ENVIRONMENT_PREFIX).lower()
    if name == variable.lower() or name in names:
        return
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.8)
    if close:
        meant = ENVIRONMENT_PREFIX + close[0].upper()
        raise ConfigError(f"unknown setting {variable!r} in the environment; did you mean {meant!r}?")


def _known(name: str, names: list[str], where: str) -> None:
    if name not in names:
        close = difflib.get_close_matches(name, names, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else f"; known are: {', '.join(names)}"
        raise ConfigError(f"unknown setting {name!r} in {where}{hint}")
