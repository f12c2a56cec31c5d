"""Credentials from the file that AWS's own tools keep. All other places the client looks at by itself."""

from __future__ import annotations

import configparser
import os
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from lmcache_sdk.errors import ConfigError

Provider = Callable[[], dict[str, Any]]

_REREAD = timedelta(minutes=15)  # what rotates credentials rewrites the file; the client asks again minutes before


def from_file(profile: str) -> Provider | None:
    """What gives the client the credentials of a profile; None to leave that to the client.

    Args:
        profile: by default ``AWS_PROFILE`` or ``default``, unless the environment has credentials.

    Raises:
        ConfigError: there is no such profile, or it has no keys of its own.
    """
    if not profile and os.environ.get("AWS_ACCESS_KEY_ID"):
        return None
    asked = profile or os.environ.get("AWS_PROFILE", "")
    path = Path(os.environ.get("AWS_SHARED_CREDENTIALS_FILE") or "~/.aws/credentials").expanduser()

    def read() -> dict[str, Any]:
        return _read(path, asked or "default")

    try:
        read()
    except ConfigError:
        if asked:
            raise
        return None
    return read


def _read(path: Path, profile: str) -> dict[str, Any]:
    parser = configparser.RawConfigParser()
    try:
        parser.read_string(path.read_text())
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"no credentials for profile {profile!r}: cannot read {path}: {error}") from error
    except configparser.Error as error:  # its message may quote the line
        raise ConfigError(f"{path} is not a file of credentials ({type(error).__name__})") from None
    if not parser.has_section(profile):
        raise ConfigError(f"{path} has no profile {profile!r}")
    section = parser[profile]
    try:
        keys = {"access_key_id": section["aws_access_key_id"], "secret_access_key": section["aws_secret_access_key"]}
    except KeyError as error:
        raise ConfigError(
            f"profile {profile!r} of {path} has no {error.args[0]}; a profile that assumes a role or signs on is not "
            f"read: export its credentials as AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and AWS_SESSION_TOKEN"
        ) from None
    return {**keys, "token": section.get("aws_session_token"), "expires_at": datetime.now(UTC) + _REREAD}
