"""SGLang through the scenarios of the engine matrix: ``pytest tests/engines --engine sglang``."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import pytest

from lmcache_sdk.testing.engines import EngineTests, Start
from lmcache_sdk.testing.harness import EngineHarness
from tests.engines.test_matrix import daemon, model  # noqa: F401 - fixtures
from tests.sglang.process import engine


class TestSGLangHiCache(EngineTests):
    """Behind SGLang's hierarchical cache; its scheduler and detokenizer are processes of their own."""

    engine_name: ClassVar[str] = "sglang"
    has_own_cache: ClassVar[bool] = True
    runs_together: ClassVar[bool] = True

    @pytest.fixture(scope="class")
    @classmethod
    def start(cls, model: Path) -> Start:  # noqa: F811
        def start(url: str | None, memory_tokens: int) -> EngineHarness:
            return engine(model, url, memory_tokens=memory_tokens)

        return start

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
            assert warm["cached_tokens"] == warm["cached_details"]["storage"] > 0
            assert warm["cached_tokens"] >= own["cached_tokens"]
            self.same(warm, own)

    def test_preemption(self, engine: EngineHarness) -> None:
        pytest.skip("SGLang admits no more than fits here: none of its requests is retracted")
