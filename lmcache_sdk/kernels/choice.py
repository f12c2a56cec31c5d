"""Which kernel package serves a device.

A package announces itself as an entry point of the group ``lmcache_sdk.kernels``, named after the device type that it
serves. Announcements are read from package metadata; a package is imported when memory of its device type is first
registered. Several may be in use at once, one for each type.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Mapping
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import NamedTuple

from lmcache_sdk.config import load_config
from lmcache_sdk.errors import ConfigError, LayoutError, LMCacheSDKError
from lmcache_sdk.kernels.interface import Kernels

ENTRY_POINTS = "lmcache_sdk.kernels"

# The CPU's own are there without any metadata, so a source tree works uninstalled.
_BUILT_IN = EntryPoint("cpu", "lmcache_sdk.kernels:CPUKernels", ENTRY_POINTS)
_OURS = {"cpu": "lmcache-sdk", "cuda": "lmcache-kernels-cuda", "npu": "lmcache-kernels-ascend"}


class Choice(NamedTuple):
    """The kernels of a device type, and the reason for them."""

    entry: EntryPoint
    why: str

    @property
    def package(self) -> str:
        """The distribution that they come with."""
        return _package(self.entry)

    def __str__(self) -> str:
        version = f" {self.entry.dist.version}" if self.entry.dist else ""
        return f"{self.entry.value} ({self.package}{version}): {self.why}"


def _package(entry: EntryPoint) -> str:
    return _canonical(entry.dist.name) if entry.dist else _OURS["cpu"]


def _canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _announced() -> dict[str, dict[str, EntryPoint]]:
    """By device type, then by package."""
    found: dict[str, dict[str, EntryPoint]] = {_BUILT_IN.name: {_package(_BUILT_IN): _BUILT_IN}}
    for entry in entry_points(group=ENTRY_POINTS):
        found.setdefault(entry.name, {})[_package(entry)] = entry
    return found


def choose(kind: str, settings: Mapping[str, str] | None = None) -> Choice:
    """The kernels for a device type; nothing is imported.

    Args:
        kind: ``cpu``, ``cuda``, ``npu`` …
        settings: device type -> package; by default the setting ``kernels``.

    Raises:
        LayoutError: no package serves it, and the message names the one to install.
        ConfigError: the package that the setting names does not serve it, or several do and none is named.
    """
    found = _announced().get(kind, {})
    names = ", ".join(sorted(found))
    wanted = (load_config().kernels if settings is None else settings).get(kind)
    if wanted is not None:
        if entry := found.get(_canonical(wanted)):
            return Choice(entry, "the setting kernels names it")
        have = f"installed are: {names}" if found else "no installed package does"
        raise ConfigError(f"kernels names {wanted!r} for {kind!r}, which does not announce that device type; {have}")
    if not found:
        package = _OURS.get(kind, f"a kernel package that announces {kind!r} in {ENTRY_POINTS}")
        raise LayoutError(f"no kernels for memory on {kind!r}; install {package}")
    if len(found) == 1:
        (entry,) = found.values()
        return Choice(entry, "the only one installed")
    if entry := found.get(_OURS.get(kind, "")):
        others = ", ".join(sorted(found.keys() - {_package(entry)}))
        return Choice(entry, f"the project's own; the setting kernels may name {others}")
    raise ConfigError(f"several packages announce kernels for {kind!r}: {names}; name one in the setting kernels")


_loading = threading.Lock()


@cache
def _load(entry: EntryPoint) -> Kernels:
    try:
        kernels: Kernels = entry.load()()
    except LMCacheSDKError:
        raise
    except Exception as error:
        what = f"{type(error).__name__}: {error}"
        raise LayoutError(f"the kernels {entry.value!r} for {entry.name} do not load: {what}") from error
    return kernels


def kernels_for(device: str) -> Kernels:
    """The kernels for memory on a device, imported at the first call; no other package is imported.

    Args:
        device: ``cpu``, ``cuda:0``, ``npu:0`` …

    Raises:
        LayoutError: no package serves it, and the message names the one to install; or it does not load.
        ConfigError: see :func:`choose`.
    """
    entry = choose(device.partition(":")[0]).entry
    with _loading:  # one for all: they count what is pinned
        return _load(entry)


def describe_kernels() -> dict[str, str]:
    """By device type, what is chosen and why, or what stands in the way. Imports nothing."""
    answer = {}
    for kind in sorted(_announced()):
        try:
            answer[kind] = str(choose(kind))
        except ConfigError as error:
            answer[kind] = str(error)
    return answer
