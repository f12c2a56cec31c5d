"""SGLang with a linker through the scenarios of the engine matrix: ``pytest tests/engines --engine sglang``."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import pytest

from lmcache_sdk.testing.engines import Start
from lmcache_sdk.testing.harness import EngineHarness
from tests.engines import test_sglang
from tests.engines.test_matrix import model  # noqa: F401 - a fixture
from tests.engines.test_sglang import daemon  # noqa: F401 - a fixture
from tests.sglang.process import engine


class TestSGLangLinker(test_sglang.TestSGLangHiCache):
    """Without a hierarchical cache: SGLang calls what the linker loads its host's."""

    restored_from: ClassVar[str] = "host"

    @pytest.fixture(scope="class")
    @classmethod
    def start(cls, model: Path) -> Start:  # noqa: F811
        def start(url: str | None, memory_tokens: int) -> EngineHarness:
            # The machine may be busy, and a tier be asked.
            extra = {"lookup_timeout_s": 0.5}
            return engine(model, url, memory_tokens=memory_tokens, linker=url is not None, extra=extra)

        return start
