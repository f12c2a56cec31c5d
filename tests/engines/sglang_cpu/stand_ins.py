"""Packages that can be imported, and of which nothing works: for those that are imported and not used."""

from __future__ import annotations

import enum
import importlib.abc
import importlib.machinery
import sys
import types
from collections.abc import Sequence
from typing import Any


class _Anything:
    """A class to inherit from, or to make an instance of."""

    def __init__(self, *_: Any, **__: Any) -> None: ...


# Its members are iterated over while transformers is imported.
_InterpolationMode = enum.Enum(
    "InterpolationMode",
    {name: name.lower() for name in ("NEAREST", "NEAREST_EXACT", "BILINEAR", "BICUBIC", "BOX", "HAMMING", "LANCZOS")},
)


class _StandIn(types.ModuleType):
    """Has every attribute: one with a capital is a class, others are modules, and decorators that do nothing."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__path__: list[str] = []
        self.__file__ = __file__
        self.__version__ = "0"

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        value: Any
        if name == "InterpolationMode":
            value = _InterpolationMode
        elif name[0].isupper():
            value = type(name, (_Anything,), {"__module__": self.__name__})
        else:
            value = importlib.import_module(f"{self.__name__}.{name}")
        setattr(self, name, value)
        return value

    def __call__(self, *given: Any, **_: Any) -> Any:
        return given[0] if len(given) == 1 and callable(given[0]) else lambda decorated: decorated


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def __init__(self, names: Sequence[str]) -> None:
        self._names = frozenset(names)

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if fullname.partition(".")[0] not in self._names:
            return None
        return importlib.machinery.ModuleSpec(fullname, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return _StandIn(spec.name)

    def exec_module(self, module: types.ModuleType) -> None: ...


def install(*names: str) -> None:
    """Stand in for packages that are not installed."""
    sys.meta_path.append(_Finder(names))
