"""Programs that the tests start. Those of Debian packages are in the environment `backends`, which has them on PATH."""

from __future__ import annotations

import os
import shutil
import socket
from typing import NoReturn

import pytest


def program(name: str) -> str:
    """The path of a program. Without it the test is skipped, but fails where ``CI`` is ``true``."""
    path = shutil.which(name)
    if path is None:
        reason = f"no {name} on PATH; the environment `backends` of tools/environments.py has it where apt does"
        lacking(reason)
    return path


def lacking(reason: str) -> NoReturn:
    """Skip the test, but fail it where ``CI`` is ``true``."""
    if os.environ.get("CI") == "true":
        pytest.fail(reason)
    pytest.skip(reason)


def free_port(below: int = 65_536) -> int:
    """A TCP port of the loopback interface that is free now, and under a bound that the program sets."""
    while True:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = int(probe.getsockname()[1])
        if port < below:
            return port
