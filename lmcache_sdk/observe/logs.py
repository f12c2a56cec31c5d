"""Loggers. A library does not configure logging; the command line and engine processes call :func:`log_to_stderr`."""

from __future__ import annotations

import logging
import sys
from typing import TextIO

ROOT = "lmcache_sdk"


def logger(name: str) -> logging.Logger:
    """``logger("store")`` is ``lmcache_sdk.store``."""
    return logging.getLogger(f"{ROOT}.{name}")


class _Stderr(logging.StreamHandler[TextIO]):
    """Writes to what ``sys.stderr`` is now, not to what it was when logging was set up."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> TextIO:  # type: ignore[override]
        return sys.stderr


def log_to_stderr(level: str = "INFO") -> None:
    """One line a message on stderr. Raises ValueError for an unknown level."""
    root = logging.getLogger(ROOT)
    root.setLevel(level.upper())
    if not any(isinstance(handler, _Stderr) for handler in root.handlers):
        handler = _Stderr()
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s", "%H:%M:%S"))
        root.addHandler(handler)
