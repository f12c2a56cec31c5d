"""Loggers. A library does not configure logging; the command line and engine processes call :func:`log_to_stderr`."""

from __future__ import annotations

import logging
import sys

ROOT = "lmcache_sdk"


def logger(name: str) -> logging.Logger:
    """``logger("store")`` is ``lmcache_sdk.store``."""
    return logging.getLogger(f"{ROOT}.{name}")


def log_to_stderr(level: str = "INFO") -> None:
    """One line a message on stderr. Raises ValueError for an unknown level."""
    root = logging.getLogger(ROOT)
    root.setLevel(level.upper())
    if not root.handlers:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s", "%H:%M:%S"))
        root.addHandler(handler)
        root.propagate = False
