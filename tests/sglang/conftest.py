"""What the SGLang suite needs: SGLang on a CPU, a model, a daemon."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from lmcache_sdk import lineage
from tests.core.served import Served
from tests.sglang import cpu  # noqa: F401 - before SGLang
from tests.sglang.pools import Rank, make_latent_model
from tests.vllm.tiny import make_model


@pytest.fixture(scope="session")
def tiny_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("models") / "tiny-llama")


@pytest.fixture(scope="session")
def latent_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a model with latent KV: its configuration, and weights that nobody computes with."""
    return make_latent_model(tmp_path_factory.mktemp("models") / "tiny-latent")


@pytest.fixture(scope="session")
def shared_daemon() -> Iterator[Served]:
    """For tests whose pages are their own."""
    served = Served()
    served.start(pool="64MiB")
    yield served
    served.close()


@pytest.fixture
def served() -> Iterator[Served]:
    """For tests that kill it, or count what is in it."""
    served = Served()
    served.start(pool="32MiB")
    yield served
    served.close()


@pytest.fixture
def ranks(tiny_directory: Path) -> Iterator[list[Rank]]:
    """To be added to; each is closed in the end."""
    started: list[Rank] = []
    yield started
    for rank in started:
        rank.close()


@pytest.fixture
def stranger(tiny_directory: Path, shared_daemon: Served, ranks: list[Rank], monkeypatch: pytest.MonkeyPatch) -> Rank:
    """Another version: what it has stored is nobody's but its own, or, unless it was compared, anybody's."""
    monkeypatch.setattr(lineage, "_kept", {})  # what the test loads of it is no other test's
    with monkeypatch.context() as earlier:
        earlier.setattr("sglang.__version__", "0.5.22")
        ranks.append(rank := Rank(tiny_directory, shared_daemon.url))
    return rank
