"""Which store a command is about, and opening it without making one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from lmcache_sdk.backend import Backend, Scan, Url, schemes
from lmcache_sdk.config import default_url, load_config
from lmcache_sdk.errors import ConfigError, UnsupportedError
from lmcache_sdk.tiers import open_tier

CLOSE_TIMEOUT_S = 60.0


class Listed(Backend, Scan, Protocol):
    """A backend that can list its records: what the commands for stores need."""


def target(url: str | None) -> str:
    """The URL that was given, else the configured one, else this user's store."""
    return url or load_config().url or default_url()


def address(url: str) -> Url:
    """The backend's part of a tier, ``URL[#options]``."""
    return Url(url.partition("#")[0])


def local_path(url: Url) -> Path | None:
    """The directory that a URL without a host names."""
    return Path(url.path) if not url.host and len(url.path) > 1 else None


def is_shared(url: str) -> bool:
    """Whether other machines may use the store: all that is not a disk of this one, and of one process at a time."""
    return address(url).scheme != "lmdb"


def missing_store(url: Url) -> Path | None:
    """The local directory in which opening this URL would make a store; None if it would not."""
    place = local_path(url)
    if place is None or url.scheme not in schemes():
        return None
    try:
        return None if any(place.iterdir()) else place
    except FileNotFoundError:
        return place
    except OSError:  # opening says what is wrong with it
        return None


@contextmanager
def existing_store(url: str) -> Iterator[Listed]:
    """Open a store that is there already, for looking at all of it.

    Raises:
        ConfigError: there is none at that path, so that looking would create one; or the URL is wrong.
        UnsupportedError: the backend cannot list its records.
        BackendError: it cannot be opened.
    """
    if place := missing_store(address(url)):
        raise ConfigError(f"there is no store in {place}; give the URL that the cache was used with")
    backend = open_tier(url).backend
    try:
        if not isinstance(backend, Scan):
            raise UnsupportedError(f"{url.partition(':')[0]}:// cannot list its records")
        yield backend
    finally:
        backend.close(CLOSE_TIMEOUT_S)
