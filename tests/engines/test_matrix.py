"""HF and vLLM through the same scenarios, each with a tiny model: ``pytest tests/engines --engine vllm``."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import pytest

from lmcache_sdk.pool.shared import SharedPool
from lmcache_sdk.testing.engines import EngineTests, Start
from lmcache_sdk.testing.harness import EngineHarness
from tests.core.served import Served
from tests.vllm.process import TOKEN_BYTES, engine
from tests.vllm.tiny import make_model


class ServedWithTier(Served):
    """A daemon over a store, at a place where it can be started again."""

    def __init__(self) -> None:
        super().__init__()
        self.tier = f"lmdb://{self.folder}/store?size=256MiB"

    def start(self, *arguments: object, pool: str = "96MiB", **variables: str) -> None:
        super().start("--tier", self.tier, *arguments, pool=pool, **variables)

    def forget_pool(self) -> None:
        SharedPool.remove(self.pool)


@pytest.fixture(scope="class")
def daemon() -> Iterator[ServedWithTier]:
    served = ServedWithTier()
    served.start()
    yield served
    served.close()


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("models") / "tiny-llama")


class TestHF(EngineTests):
    """One request after another, in one process, with no cache of its own."""

    engine_name: ClassVar[str] = "hf"

    @pytest.fixture(scope="class")
    @classmethod
    def start(cls, model: Path) -> Start:
        def start(url: str | None, memory_tokens: int) -> EngineHarness:
            cache = ["--cache", url] if url else []
            return EngineHarness([sys.executable, "-m", "lmcache_adapters.hf.engine", "--model", str(model), *cache])

        return start


class TestVLLM(EngineTests):
    """All of vLLM in one process; ``test_server.py`` has it in its own three."""

    engine_name: ClassVar[str] = "vllm"
    has_own_cache: ClassVar[bool] = True
    runs_together: ClassVar[bool] = True

    @pytest.fixture(scope="class")
    @classmethod
    def start(cls, model: Path) -> Start:
        def start(url: str | None, memory_tokens: int) -> EngineHarness:
            return engine(model, url, memory_bytes=(memory_tokens + 32) * TOKEN_BYTES)

        return start
