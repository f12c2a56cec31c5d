"""A tier as people write it: ``URL#option=value&option=value``.

What stands before ``#`` is the backend's, what stands behind it is the store's, the same for every backend.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from difflib import get_close_matches
from enum import StrEnum
from typing import Any
from urllib.parse import unquote

from lmcache_sdk.backend import RangeGet, Scan, Url, open_backend
from lmcache_sdk.codecs import RawCodec, codec_by_name
from lmcache_sdk.config import parse_seconds, parse_size
from lmcache_sdk.core.rules import Admit, TierRules, Write
from lmcache_sdk.errors import ConfigError
from lmcache_sdk.jobs import Tier
from lmcache_sdk.wrappers import wrapping

ENCRYPTING = ("encrypt_key_file", "encrypt_key_env")
WRAPPERS = ("prefix", *ENCRYPTING)


@dataclass(frozen=True)
class TierOptions:
    """A tier that is not open yet.

    Attributes:
        url: the backend's.
        name: in metrics and answers.
        pack_bytes: the most for one record of several chunks, 0 = do not pack; None = as the backend has it.
        wrappers: the arguments of :func:`~lmcache_sdk.wrappers.wrapping`.
        size, ttl_s: bytes and seconds that the store keeps the tier to by deleting the oldest records; 0 = it does not.
    """

    url: str
    name: str
    codec: str = RawCodec.name
    size: int = 0
    ttl_s: float = 0.0
    pack_bytes: int | None = None
    rules: TierRules = field(default_factory=TierRules)
    wrappers: dict[str, str] = field(default_factory=dict)


def parse_tier(text: str) -> TierOptions:
    """The options of a tier. Raises ConfigError: an unknown option or a wrong value; it never shows a secret."""
    address, _, fragment = text.partition("#")
    url = Url(address)
    chosen: dict[str, Any] = {}
    rules: dict[str, Any] = {}
    wrappers: dict[str, str] = {}
    for name, _, value in (part.partition("=") for part in fragment.split("&") if part):
        option = _OPTIONS.get(name)
        if option is None:
            if "@" in fragment:
                raise ConfigError(
                    f"tier {url.shown}: what stands behind # are options, and there is an @ among them; "
                    f"a # that is part of a password is written %23"
                )
            raise ConfigError(f"tier {url.shown}: unknown option {name!r}{_meant(name)}")
        into = wrappers if name in WRAPPERS else rules if option.of_rules else chosen
        if option.attribute in into:
            raise ConfigError(f"tier {url.shown}: option {name!r} is given twice")
        if not value:
            raise ConfigError(f"tier {url.shown}: option {name!r} has no value; leave it out, or give it one")
        try:
            into[option.attribute] = option.parse(unquote(value))
        except ValueError as error:  # ConfigError is one
            raise ConfigError(f"tier {url.shown}: {name}: {error}") from None
    if chosen.get("pack_bytes") and not wrappers.keys().isdisjoint(ENCRYPTING):
        raise ConfigError(
            f"tier {url.shown}: an encrypted record can only be read as a whole, so several chunks cannot be packed "
            f"into one; leave out pack, or the encryption"
        )
    chosen.setdefault("name", url.scheme)
    return TierOptions(address, rules=TierRules(**rules), wrappers=wrappers, **chosen)


def open_tier(text: str) -> Tier:
    """Open the tier that a text describes.

    Raises:
        ConfigError: as :func:`parse_tier`; or what was chosen does not go with this backend.
        BackendError: it cannot be opened.
    """
    options = parse_tier(text)
    codec = codec_by_name(options.codec)
    try:
        wrap = wrapping(**options.wrappers)
    except ConfigError as error:
        raise ConfigError(f"tier {Url(options.url).shown}: {error}") from error
    backend = wrap(open_backend(options.url))
    if (options.size or options.ttl_s) and not (isinstance(backend, Scan) and getattr(backend, "dated", False)):
        backend.close(1.0)
        raise ConfigError(
            f"tier {Url(options.url).shown}: size and ttl need a store that can list its records and tell when each "
            f"was written, which {Url(options.url).scheme}:// cannot; use its own bounds (parameters before #)"
        )
    pack_bytes, packs = options.pack_bytes, isinstance(backend, RangeGet) and codec.identity
    if pack_bytes is None:
        pack_bytes = getattr(backend, "pack_bytes", 0) if packs else 0
    elif pack_bytes and not packs:
        backend.close(1.0)
        raise ConfigError(
            f"tier {Url(options.url).shown} cannot pack: that needs a store that reads parts of records, and records "
            f"that are not encoded; leave pack= out"
        )
    return Tier(options.name, backend, codec, options.rules, options.size, options.ttl_s, pack_bytes)


def open_tiers(texts: Sequence[str]) -> list[Tier]:
    """Open tiers in their order; if one does not open, those that did are closed. Raises as :func:`open_tier`."""
    names = [parse_tier(text).name for text in texts]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"two tiers are called {name!r}; give one another name, by #name=TEXT behind its URL")
    tiers = []
    with ExitStack() as failed:
        for text in texts:
            tier = open_tier(text)
            failed.callback(tier.backend.close, 1.0)
            tiers.append(tier)
        failed.pop_all()
    return tiers


@dataclass(frozen=True)
class _Option:
    attribute: str
    parse: Callable[[str], Any]
    of_rules: bool = True


def _meant(name: str) -> str:
    close = get_close_matches(name, _OPTIONS, n=1)
    return f"; did you mean {close[0]!r}?" if close else f"; known are: {', '.join(_OPTIONS)}"


def _one_of(choices: type[StrEnum]) -> Callable[[str], StrEnum]:
    def parse(text: str) -> StrEnum:
        try:
            return choices(text)
        except ValueError:
            raise ConfigError(f"{text!r} is none of {', '.join(choices)}") from None

    return parse


def _yes(text: str) -> bool:
    if text not in ("yes", "no"):
        raise ConfigError(f"{text!r} is neither yes nor no")
    return text == "yes"


def _count(least: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if not text.isascii() or not text.isdigit() or int(text) < least:
            raise ConfigError(f"{text!r} is not a whole number from {least}")
        return int(text)

    return parse


def _positive_seconds(text: str) -> float:
    seconds = parse_seconds(text)
    if not seconds:
        raise ConfigError(f"a duration must be positive here, got {text!r}")
    return seconds


def _name(text: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9_-]{1,40}", text) or text in ("pool", "none"):
        raise ConfigError(f"{text!r} cannot be a tier's name; use up to 40 letters, digits, - and _ (not pool, none)")
    return text


_OPTIONS = {
    "name": _Option("name", _name, of_rules=False),
    "write": _Option("write", _one_of(Write)),
    "back": _Option("back_s", _positive_seconds),
    "admit": _Option("admit", _one_of(Admit)),
    "min_tokens": _Option("min_tokens", _count(0)),
    "promote": _Option("promote", _yes),
    "missing": _Option("missing_s", parse_seconds),
    "probe": _Option("probe_s", _positive_seconds),
    "failures": _Option("failures", _count(1)),
    "retry": _Option("retry_s", _positive_seconds),
    "size": _Option("size", parse_size, of_rules=False),
    "pack": _Option("pack_bytes", lambda text: 0 if text == "no" else parse_size(text), of_rules=False),
    "ttl": _Option("ttl_s", _positive_seconds, of_rules=False),
    **{name: _Option(name, str, of_rules=False) for name in WRAPPERS},
    "codec": _Option("codec", lambda text: codec_by_name(text).name, of_rules=False),
}
