"""Loggers. A library does not configure logging; the command line and engine processes call :func:`log_to_stderr`.

Messages name keys, sizes and processes; never token ids. URLs may hold passwords, which are masked as a line is
written.
"""

from __future__ import annotations

import logging
import re
import sys
from datetime import UTC, datetime
from typing import Any, TextIO

import msgspec

ROOT = "lmcache_sdk"
FORMATS = ("text", "json")

# As config.hide_secrets, but in the midst of a text.
_PASSWORD = re.compile(r"(://[^/?#@:\s]*):[^?#\s]*@")
_SECRET_PARAMETER = re.compile(
    r"([?&][\w.-]*(?:password|passphrase|secret|token|credential|key)[\w.-]*)=[^&#\s'\"]+", re.IGNORECASE
)
_STANDARD = frozenset(logging.makeLogRecord({}).__dict__) | {"message", "asctime", "taskName"}


def logger(name: str) -> logging.Logger:
    """``logger("store")`` is ``lmcache_sdk.store``."""
    return logging.getLogger(f"{ROOT}.{name}")


def masked(text: str) -> str:
    """Text as it may be shown: its URLs without passwords and secret parameters."""
    return _SECRET_PARAMETER.sub(r"\1=***", _PASSWORD.sub(r"\1:***@", text))


def log_to_stderr(level: str = "INFO", style: str = "text") -> None:
    """One line a message on stderr, for people (``text``) or programs (``json``).

    Raises:
        ValueError: an unknown level.
    """
    root = logging.getLogger(ROOT)
    root.setLevel(level.upper())
    handler = next((handler for handler in root.handlers if isinstance(handler, _Stderr)), None)
    if handler is None:
        handler = _Stderr()
        root.addHandler(handler)
    handler.setFormatter(_Json() if style == "json" else _Text())


class _Stderr(logging.StreamHandler[TextIO]):
    """Writes to what ``sys.stderr`` is now, not to what it was when logging was set up."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> TextIO:  # type: ignore[override]
        return sys.stderr


class _Text(logging.Formatter):
    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(message)s", "%H:%M:%S")

    def format(self, record: logging.LogRecord) -> str:
        return masked(super().format(record))


class _Json(logging.Formatter):
    """One object a line: ts, level, logger, message; exception; and whatever was given as ``extra``."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "ts": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "message": masked(record.getMessage()),
        }
        for name, value in record.__dict__.items():
            if name not in _STANDARD:
                line[name] = value if isinstance(value, int | float) else masked(str(value))
        if record.exc_info:
            line["exception"] = masked(self.formatException(record.exc_info))
        return msgspec.json.encode(line).decode()
