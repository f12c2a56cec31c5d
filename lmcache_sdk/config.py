"""One configuration: flags over environment (``LMCACHE_SDK_*``) over a YAML file. Sizes as people write them."""

from __future__ import annotations

import difflib
import ipaddress
import logging
import os
import re
import stat
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote, urlencode

import msgspec

from lmcache_sdk.errors import ConfigError

ENVIRONMENT_PREFIX = "LMCACHE_SDK_"

_UNITS = {"": 1, "B": 1}
for _power, _letter in enumerate("KMGT", start=1):
    _UNITS |= {f"{_letter}IB": 1024**_power, f"{_letter}B": 1000**_power, _letter: 1024**_power}

_SECONDS = {"": 1.0, "ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


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


def parse_seconds(text: str) -> float:
    """Seconds of ``30s``, ``200ms``, ``10m``, ``2h``, ``7d`` or a plain number.

    Raises:
        ConfigError: it is no duration.
    """
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)([a-z]*)", text)
    if match is None or match[2] not in _SECONDS:
        raise ConfigError(f"{text!r} is not a duration; write it like 30s, 200ms, 10m, 2h or 7d")
    return float(match[1]) * _SECONDS[match[2]]


def format_size(nbytes: float) -> str:
    """``1536`` -> ``1.5 KiB``."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(nbytes) < 1024:
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1024
    return f"{nbytes:.1f} TiB"


_SECRETS = re.compile(
    # Up to the last @, since a password may hold what was not escaped; all the rest, if there is none and no port.
    r"(?<=://)(?P<user>[^/?#@:\[]*):(?:.*@|(?!\d*(?:[/?#]|$)).*)"
    r"|(?P<name>[?&#][^=&#]*(?:password|passphrase|secret|token|credential|key)[^=&#]*)=[^&#]*",
    re.IGNORECASE,
)


def hide_secrets(url: str) -> str:
    """The URL as messages and logs may show it."""

    def hidden(found: re.Match[str]) -> str:
        if found["name"]:
            return f"{found['name']}=***"
        return f"{found['user']}:***" + ("@" if found[0].endswith("@") else "")

    return _SECRETS.sub(hidden, url)


def cache_home() -> Path:
    """Where this user's store is by default: ``$XDG_CACHE_HOME/lmcache-sdk``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lmcache-sdk"


def default_url() -> str:
    """The store of this user. Without a size: an existing store keeps its own."""
    return f"lmdb://{quote(str(cache_home() / 'store'))}"


def default_socket() -> Path:
    """Where this user's daemon listens: ``$XDG_RUNTIME_DIR/lmcache-sdk.sock``, or in a folder of this user in ``/tmp``.

    Raises:
        ConfigError: that folder is somebody else's, who could be the daemon then.
    """
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    if runtime and Path(runtime).is_dir():
        return Path(runtime) / "lmcache-sdk.sock"
    folder = Path("/tmp") / f"lmcache-sdk-{os.getuid()}"  # noqa: S108 - checked here, by who listens and who connects
    try:
        status = folder.lstat()
    except FileNotFoundError:
        pass
    else:
        if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or stat.S_IMODE(status.st_mode) & 0o077:
            raise ConfigError(
                f"{folder} is not a folder of this user alone; remove it, or set XDG_RUNTIME_DIR or LMCACHE_SDK_SOCKET"
            )
    return folder / "lmcache-sdk.sock"


class Tenant(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a tenant may have of a pool.

    Attributes:
        quota: bytes at most; 0 = no bound.
        weight: of its share, a whole number.
    """

    quota: int = 0
    weight: int = 1


class Config(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """All settings.

    Attributes:
        url: where the cache is: a daemon or a store.
        pool_bytes: host memory for chunks: a daemon's, or this process's where it has a pool of its own.
        chunk_tokens: tokens in a chunk; all who share a store must agree on it.
        layers_per_cell, heads_per_cell: the cell grid, 0 = do not cut.
        share: whose KV an engine uses beside its own: ``verified`` = of producers that agree with it, by comparison;
            ``any`` = of all; ``own`` = of nobody.
        wait_s: how long a request waits for chunks that only a tier has, before it computes them itself.
        log_level: of the ``lmcache_sdk`` loggers.
        log_format: ``text`` for people, ``json`` for programs.
        socket: where a daemon listens; by default :func:`default_socket`.
        tiers: of a daemon: URLs of stores, fastest first; with options behind ``#``, see ``docs/tiers.md``.
        eviction: what gives room first: ``lru`` = what was not used for longest, or ``s3fifo`` = what was used once.
        group: of a daemon: the members of this group may use it too; by default only its own user.
        require_salt: of a daemon: requests without a cache salt neither find nor store anything.
        tenants: of a daemon: quota and weight by name; those of ``*`` are for all who are not named.
        kernels: device type -> the package whose kernels serve it, where several are installed.
        pinning: whether an engine on an accelerator registers the pool's memory with it: ``direct``, ``staged`` (copies
            go through a small pinned ring), or ``auto``, as the kernels prefer.
        keep_pool: of a daemon: leave the pool for the next start.
        metrics_port: of a daemon: where ``/metrics`` and ``/healthz`` are served; 0 = nowhere.
        metrics_host: the address for it. Other than loopback only with a token and TLS.
        metrics_token_file: a file with the token that must be sent as ``Authorization: Bearer TOKEN``.
        metrics_cert, metrics_key: PEM files, for TLS.
    """

    url: str = ""
    pool_bytes: int = 1 << 30
    chunk_tokens: int = 64
    layers_per_cell: int = 0
    heads_per_cell: int = 0
    share: str = "verified"
    wait_s: float = 10.0
    log_level: str = "INFO"
    log_format: str = "text"
    socket: str = ""
    tiers: tuple[str, ...] = ()
    eviction: str = "lru"
    group: str = ""
    require_salt: bool = False
    tenants: dict[str, Tenant] = {}
    kernels: dict[str, str] = {}
    pinning: str = "auto"
    keep_pool: bool = True
    metrics_port: int = 0
    metrics_host: str = "127.0.0.1"
    metrics_token_file: str = ""
    metrics_cert: str = ""
    metrics_key: str = ""


class Settled(NamedTuple):
    """The effective configuration, where each setting came from (``default``, ``flag``, the variable or the file), and
    what is wrong; settings that are wrong have their defaults.
    """

    config: Config
    sources: dict[str, str]
    problems: list[str]


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
        ConfigError: unknown names (with the nearest known one), wrong values, or an unreadable file.
    """
    config, _, problems = settle(flags, file=file, environment=environment)
    if problems:
        raise ConfigError("; ".join(problems))
    return config


def settle(
    flags: Mapping[str, Any] | None = None,
    *,
    file: str | os.PathLike[str] | None = None,
    environment: Mapping[str, str] | None = None,
) -> Settled:
    """See :func:`load_config`; finds all that is wrong, and raises nothing."""
    environment = os.environ if environment is None else environment
    names = [field.name for field in msgspec.structs.fields(Config)]
    problems: list[str] = []
    given: dict[str, tuple[Any, str]] = {}  # name -> value, source

    path = file or environment.get(f"{ENVIRONMENT_PREFIX}CONFIG")
    if path:
        try:
            given.update({str(name): (value, str(path)) for name, value in _read_yaml(Path(path)).items()})
        except ConfigError as error:
            problems.append(str(error))
    for name in names:
        variable = ENVIRONMENT_PREFIX + name.upper()
        if variable in environment:
            given[name] = environment[variable], variable
    problems += filter(None, (_misspelt(variable, names) for variable in environment))
    given.update({name: (value, "flag") for name, value in (flags or {}).items() if value is not None})

    settings: dict[str, Any] = {}
    for name, (value, source) in given.items():
        try:
            if name not in names:
                raise ConfigError(_unknown(name, names, "flags" if source == "flag" else source))
            settings[name] = _converted(name, value, source)
        except ConfigError as error:
            problems.append(str(error))
    config = Config(**settings)
    problems += _exposure(config)
    sources = {name: given[name][1] if name in settings else "default" for name in names}
    return Settled(config, sources, problems)


def _not_negative(value: float) -> str:
    return "" if value >= 0 else "must not be negative"  # nor is it a number if it is NaN


def _one_of(*values: str) -> Callable[[str], str]:
    return lambda value: "" if value in values else f"must be one of {', '.join(values)}"


_RULES: dict[str, Callable[[Any], str]] = {
    "chunk_tokens": lambda value: "" if value >= 1 else "must be at least 1",
    "layers_per_cell": _not_negative,
    "heads_per_cell": _not_negative,
    "share": _one_of("verified", "any", "own"),
    "wait_s": _not_negative,
    "log_level": lambda value: _one_of(*logging.getLevelNamesMapping())(value.upper()),
    "log_format": _one_of("text", "json"),
    "eviction": _one_of("lru", "s3fifo"),
    "pinning": _one_of("auto", "direct", "staged"),
    "metrics_port": lambda value: "" if 0 <= value < 1 << 16 else "must be a port, 0 .. 65535",
    "tenants": lambda tenants: "" if all(t.weight >= 1 for t in tenants.values()) else "must have weights from 1",
    "tiers": lambda urls: next(
        (
            f"must be URLs like lmdb:///var/lib/kv?size=50GiB, and number {number} has no ://"
            for number, url in enumerate(urls, 1)
            if "://" not in url
        ),
        "",
    ),
}


_WITH_SECRETS = ("url", "tiers")


def _converted(name: str, value: Any, source: str) -> Any:
    """A setting's value in its type. Raises ConfigError."""
    if name == "pool_bytes":
        try:
            value = parse_size(value)
        except ConfigError as error:
            raise ConfigError(f"{name}: {error}") from None
    if name == "tiers":
        value = value.split() if isinstance(value, str) else _tiers(value)
    if name == "tenants":
        value = _tenants(_mapping(value, "tenants", "{team: {quota: 2GiB, weight: 2}}"))
    if name == "kernels":
        value = _mapping(value, "kernels", "{cuda: lmcache-kernels-cuda}")
    try:
        # Through the whole structure, all of whose settings have defaults: the message then names the setting.
        found = getattr(msgspec.convert({name: value}, Config, strict=False), name)
    except msgspec.ValidationError as error:
        got = f"a {type(value).__name__}" if name in _WITH_SECRETS else repr(value)
        raise ConfigError(f"bad setting: {error} ({got} in {source})") from error
    wrong = _RULES[name](found) if name in _RULES else ""
    if wrong:
        if name in _WITH_SECRETS:  # and what is no URL cannot be shown as one
            raise ConfigError(f"{name} {wrong} (in {source})")
        raise ConfigError(
            f"{name} {wrong}, got {value!r}" if isinstance(found, str) else f"{name} {wrong}, got {found}"
        )
    return found


def _tiers(value: Any) -> Any:
    """A tier may be a mapping as well: ``{url: …, write: back}`` for ``…#write=back``."""
    if not isinstance(value, list | tuple):
        return value
    return [_tier(tier) if isinstance(tier, Mapping) else tier for tier in value]


def _tier(tier: Mapping[str, Any]) -> str:
    options = {str(name): option for name, option in tier.items()}
    url = options.pop("url", None)
    if not isinstance(url, str) or "#" in url:
        raise ConfigError("a tier as a mapping needs a url, with its options beside it: {url: …, write: back}")
    yes = {True: "yes", False: "no"}  # what YAML makes of yes and no
    texts = {name: yes[option] if isinstance(option, bool) else str(option) for name, option in options.items()}
    return f"{url}#{urlencode(texts, quote_via=quote)}" if texts else url


def _mapping(value: Any, name: str, example: str) -> Any:
    """A mapping may be text as well, as it is in the environment."""
    if not isinstance(value, str):
        return value
    import yaml

    try:
        return yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise ConfigError(f"{name} must be like {example}, got {value!r}") from error


def _tenants(value: Any) -> Any:
    """Quotas as people write them; what is no mapping is for msgspec to name."""
    if not isinstance(value, Mapping):
        return value
    return {
        name: tenant | {"quota": parse_size(tenant["quota"])}
        if isinstance(tenant, dict) and tenant.get("quota")
        else tenant
        for name, tenant in value.items()
    }


def _exposure(config: Config) -> Iterator[str]:
    """What is wrong with who could read the metrics."""
    if bool(config.metrics_cert) != bool(config.metrics_key):
        yield "metrics_cert and metrics_key belong together; give both, or none"
    if not is_loopback(config.metrics_host):
        missing = [name for name in ("metrics_token_file", "metrics_cert", "metrics_key") if not getattr(config, name)]
        if missing:
            yield (
                f"metrics_host {config.metrics_host} can be reached from elsewhere, which needs a token and TLS; "
                f"set {', '.join(missing)}, or use 127.0.0.1"
            )


def is_loopback(host: str) -> bool:
    """Whether nobody outside this machine can reach the address. A name other than localhost is not looked up."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _read_yaml(path: Path) -> dict[Any, Any]:
    """Raises ConfigError."""
    import yaml

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read the configuration {path}: {error.strerror}") from error
    except yaml.MarkedYAMLError as error:  # whose own text quotes the line, with whatever password is in it
        mark = error.problem_mark
        where = f" in line {mark.line + 1}, column {mark.column + 1}" if mark is not None else ""
        raise ConfigError(f"{path} is not YAML: {error.problem}{where}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not YAML: {error}") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(f"{path} must be a mapping of settings, it is a {type(content).__name__}")
    return content


def _misspelt(variable: str, names: list[str]) -> str:
    """What is wrong with a variable that is nearly a setting's. Others with the prefix are other programs' affair."""
    name = variable.removeprefix(ENVIRONMENT_PREFIX).lower()
    if name == variable.lower() or name in names:
        return ""
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.8)
    if not close:
        return ""
    meant = ENVIRONMENT_PREFIX + close[0].upper()
    return f"unknown setting {variable!r} in the environment; did you mean {meant!r}?"


def _unknown(name: str, names: list[str], where: str) -> str:
    close = difflib.get_close_matches(name, names, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else f"; known are: {', '.join(names)}"
    return f"unknown setting {name!r} in {where}{hint}"
