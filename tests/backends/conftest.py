from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.backends.redis_server import Certificates, Cluster, Server, make_certificates
from tests.backends.seaweed import SeaweedFS, serving


@pytest.fixture(scope="session")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return make_certificates(tmp_path_factory.mktemp("tls"))


@pytest.fixture(scope="session")
def redis_server() -> Iterator[Server]:
    with Server() as server:
        yield server


@pytest.fixture(scope="session")
def valkey_server() -> Iterator[Server]:
    with Server(kind="valkey") as server:
        yield server


@pytest.fixture(scope="session")
def tls_server(certificates: Certificates) -> Iterator[Server]:
    with Server(tls=certificates) as server:
        yield server


@pytest.fixture(scope="session")
def locked_server() -> Iterator[Server]:
    """One with a password: that of the default user is ``admin``."""
    with Server(password="admin") as server:
        yield server


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    with Cluster() as cluster:
        yield cluster


@pytest.fixture(scope="session")
def seaweed(tmp_path_factory: pytest.TempPathFactory, certificates: Certificates) -> Iterator[SeaweedFS]:
    with serving(tmp_path_factory.mktemp("seaweed"), certificates) as server:
        yield server
