"""What a request's KV depends on beside its tokens, in whole engines: a LoRA adapter, a sound."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lmcache_sdk.testing.harness import EngineHarness
from tests.core.served import Served
from tests.vllm.process import engine
from tests.vllm.tiny import SOUND, make_lora, make_model_that_hears


def prompt(tokens: int, seed: int) -> list[int]:
    return np.random.default_rng([13, seed]).integers(10, 1000, tokens).tolist()


def run(harness: EngineHarness, ids: list[int], **fields: Any) -> tuple[int, Any]:
    """Cached tokens, and what was said."""
    answer = harness.generate(ids, 8, logits=True, **fields)
    return answer["cached_tokens"], (answer["token_ids"], answer["top"])


def only_cache(harness: EngineHarness) -> None:
    assert harness.flush()
    assert harness.call("forget", 60)["forgotten"]


@pytest.mark.timeout(180)
def test_lora_adapters_are_apart_and_found_again(tiny_directory: Path, served: Served, tmp_path: Path) -> None:
    """By the content of their files, so that it does not matter what they are called in this engine or the next."""
    one, other = (str(make_lora(tmp_path / name, seed)) for name, seed in (("one", 1), ("other", 2)))
    moved = str(shutil.copytree(one, tmp_path / "moved"))
    ids = prompt(300, 1)
    options = {"enable_lora": True, "max_loras": 2, "max_lora_rank": 8}
    with engine(tiny_directory, served.url, **options) as harness:
        for lora in (one, other, moved):
            run(harness, prompt(100, 2), lora=lora)  # while its files are being read it may be computed, and not stored
        only_cache(harness)
        cold: dict[str | None, Any] = {}
        for lora in (None, one, other):
            cached, cold[lora] = run(harness, ids, lora=lora)
            assert cached == 0, "nobody else's"
            only_cache(harness)
        assert cold[None] != cold[one] != cold[other] != cold[None]
        for lora, first in ((None, None), (one, one), (other, other), (moved, one)):
            assert run(harness, ids, lora=lora) == (256, cold[first])
            only_cache(harness)
        assert harness.stop() == 0


@pytest.mark.timeout(180)
def test_sounds_are_apart_and_found_again(served: Served, tmp_path: Path) -> None:
    model = make_model_that_hears(tmp_path / "tiny-qwen2-audio")
    sounds = [str(tmp_path / f"{number}.npy") for number in range(2)]
    for number, file in enumerate(sounds):
        np.save(file, np.random.default_rng(number).standard_normal(16_000).astype(np.float32) / 10)
    ids = [*prompt(100, 2), SOUND, *prompt(199, 3)]
    hit = (len(ids) - 1 + 25) // 64 * 64  # a second is 25 tokens
    with engine(model, served.url, limit_mm_per_prompt={"audio": 1}) as harness:
        cold = {}
        for file, known in zip(sounds, (0, 64), strict=True):
            cached, cold[file] = run(harness, ids, audio=file)
            assert cached == known, "only the chunk in front of it is the other's too"
            only_cache(harness)
        assert cold[sounds[0]] != cold[sounds[1]]
        for file in sounds:
            assert run(harness, ids, audio=file) == (hit, cold[file])
            only_cache(harness)
        assert harness.stop() == 0
