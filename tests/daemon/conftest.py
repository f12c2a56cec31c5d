from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.daemon.daemon_process import Daemon


@pytest.fixture
def daemon() -> Iterator[Daemon]:
    """A daemon that runs."""
    with Daemon() as place:
        place.start()
        yield place
