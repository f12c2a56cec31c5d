"""Models for the HF suite."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

# Before torch is loaded: idle OpenMP threads must not spin, and nothing here needs the network.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest

from lmcache_adapters.hf import Model, Runner, load_model
from tests.hf.tiny import make_model


@pytest.fixture(scope="session")
def tiny_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("models") / "tiny-llama")


@pytest.fixture(scope="session")
def tiny(tiny_directory: Path) -> Model:
    return load_model(tiny_directory)


@pytest.fixture(scope="session")
def real_directory() -> Path:
    directory = os.environ.get("LMCACHE_SDK_TEST_MODEL")
    if not directory:
        pytest.skip("LMCACHE_SDK_TEST_MODEL names no model directory")
    return Path(directory)


@pytest.fixture
def store_url(tmp_path: Path) -> str:
    return f"lmdb://{tmp_path}/store?size=256MiB"


@pytest.fixture
def runner(tiny: Model, store_url: str) -> Iterator[Runner]:
    with Runner(tiny, store_url) as runner:
        yield runner


@pytest.fixture
def plain(tiny: Model) -> Iterator[Runner]:
    """Without a cache: the reference."""
    with Runner(tiny) as runner:
        yield runner
