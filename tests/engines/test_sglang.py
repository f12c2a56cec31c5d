"""SGLang through the scenarios of the engine matrix: ``pytest tests/engines --engine sglang``."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import pytest

from lmcache_sdk.testing.engines import EngineTests, Start
from lmcache_sdk.testing.harness import EngineHarness
from tests.daemon.daemon_process import until
from tests.engines.test_matrix import ServedWithTier, model  # noqa: F401 - a fixture
from tests.sglang.process import engine


class Awaited(ServedWithTier):
    """Started again, it waits for its clients: SGLang's scheduler has one that the harness cannot ask."""

    def __init__(self) -> None:
        super().__init__()
        self.clients = 0

    def start(self, *arguments: object, pool: str = "96MiB", **variables: str) -> None:
        super().start(*arguments, pool=pool, **variables)
        until(lambda: len(self.status()["clients"]) >= self.clients, 20.0, "that all clients are back")

    def stop(self, number: int = signal.SIGTERM) -> int:
        self.clients = len(self.status()["clients"])
        return super().stop(number)


@pytest.fixture(scope="class")
def daemon() -> Iterator[ServedWithTier]:
    served = Awaited()
    served.start()
    yield served
    served.close()


class TestSGLangHiCache(EngineTests):
    """Behind SGLang's hierarchical cache; its scheduler and detokenizer are processes of their own."""

    engine_name: ClassVar[str] = "sglang"
    has_own_cache: ClassVar[bool] = True
    runs_together: ClassVar[bool] = True
    restored_from: ClassVar[str] = "storage"

    @pytest.fixture(scope="class")
    @classmethod
    def start(cls, model: Path) -> Start:  # noqa: F811
        def start(url: str | None, memory_tokens: int) -> EngineHarness:
            return engine(model, url, memory_tokens=memory_tokens)

        return start

    def test_a_shared_prefix(self, engine: EngineHarness) -> None:
        """KV is rounded by the number of tokens that are computed with it: 192 that were computed with 58 others differ
        in some bits from the same with 78 others, enough for another logprob of some prompts, and another token of a
        few. So a hit is held against SGLang's own of the same 192, which it equals to the last bit.
        """
        shared = self.prompt(200)
        first, ids = shared + self.prompt(50), shared + self.prompt(70)
        self.run(engine, first, cache_salt="own")
        own = self.run(engine, ids, cache_salt="own")
        assert own["cached_details"]["device"] == self.hit(engine, 270, 200)
        self.run(engine, first)
        self.only_cache(engine)
        warm = self.run(engine, ids)
        assert warm["cached_tokens"] == warm["cached_details"][self.restored_from] == self.hit(engine, 270, 200)
        self.same(warm, own)

    def test_chat_turns(self, engine: EngineHarness) -> None:
        """KV that was computed token by token is not that of a prefill, so a hit is held against SGLang's own."""
        conversation = self.prompt(150)
        for _ in range(3):
            reply = self.run(engine, conversation, max_new_tokens=40)
            conversation += [*reply["token_ids"], *self.prompt(20)]
            known = len(conversation) - 21  # the last token of a reply is never computed
            own = self.run(engine, conversation)
            assert own["cached_details"]["device"] == self.hit(engine, len(conversation), known)
            self.only_cache(engine)
            warm = self.run(engine, conversation)
            assert warm["cached_tokens"] == warm["cached_details"][self.restored_from] > 0
            assert warm["cached_tokens"] >= own["cached_tokens"]
            self.same(warm, own)

    def test_preemption(self, engine: EngineHarness) -> None:
        pytest.skip("SGLang admits no more than fits here: none of its requests is retracted")
