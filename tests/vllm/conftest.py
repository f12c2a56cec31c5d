"""What the vLLM suite needs: a model, a daemon."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

# Before torch and vLLM are loaded: idle OpenMP threads must not spin, and nothing here needs the network.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")

import pytest

from tests.core.served import Served
from tests.vllm.tiny import make_model


@pytest.fixture(scope="session")
def tiny_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("models") / "tiny-llama")


@pytest.fixture(scope="session")
def shared_daemon() -> Iterator[Served]:
    """For tests whose prompts are their own."""
    served = Served()
    served.start(pool="128MiB")
    yield served
    served.close()


@pytest.fixture
def served() -> Iterator[Served]:
    """For tests that kill it, or count what is in it."""
    served = Served()
    served.start()
    yield served
    served.close()
