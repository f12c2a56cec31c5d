"""What the cross-engine suite needs: a real model, real text, and the environments of all engines."""

from __future__ import annotations

import os
from pathlib import Path

# Before torch is loaded: idle OpenMP threads must not spin, and nothing here needs the network.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from pydoc_data.topics import topics

import pytest

from lmcache_adapters.hf import Model, load_model
from tests.backends.programs import lacking
from tests.cross import starts
from tests.cross.starts import CHUNK


@pytest.fixture(scope="session")
def directory() -> Path:
    missing = starts.missing()
    if missing:
        lacking(f"{missing} must be set; `make nox ARGS='-s cross'` does")
    return Path(os.environ["LMCACHE_SDK_TEST_MODEL"])


@pytest.fixture(scope="session")
def model(directory: Path) -> Model:
    """In this process, for text and for a second opinion."""
    return load_model(directory, chunk_tokens=CHUNK)


@pytest.fixture(scope="session")
def text(model: Model) -> Text:
    return Text(model)


class Text:
    """Prose, as token ids."""

    def __init__(self, model: Model) -> None:
        self._model = model

    def __call__(self, *names: str, tokens: int) -> list[int]:
        """The beginning of some pages of Python's own manual."""
        ids = self._model.encode("\n".join(topics[name] for name in names)).tolist()[:tokens]
        assert len(ids) == tokens
        return list(map(int, ids))
