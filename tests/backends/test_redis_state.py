"""Random calls on a Redis and on a cluster, against a dict."""

from __future__ import annotations

from pathlib import Path

from hypothesis import HealthCheck, settings
from hypothesis.stateful import run_state_machine_as_test

from lmcache_backends.redis import RedisBackend
from lmcache_sdk.backend import open_backend
from lmcache_sdk.testing.backends import BackendTests, backend_state_machine
from tests.backends.redis_server import Cluster, Server

SETTINGS = settings(
    max_examples=40,
    stateful_step_count=40,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


class Opened(BackendTests):
    durable = True

    def __init__(self, server: Server | Cluster) -> None:
        self.server = server

    def open(self, place: Path) -> RedisBackend:
        mark = place / "opened"
        if not mark.exists():
            self.server.flush()
            mark.touch()
        return open_backend(self.server.url())


def test_random_calls(redis_server: Server) -> None:
    run_state_machine_as_test(backend_state_machine(Opened(redis_server)), settings=SETTINGS)


def test_random_calls_on_a_cluster(cluster: Cluster) -> None:
    run_state_machine_as_test(backend_state_machine(Opened(cluster)), settings=SETTINGS)
