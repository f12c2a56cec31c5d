"""The engine process: its protocol, and what a crash leaves behind."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from lmcache_adapters.hf import Runner
from lmcache_sdk.testing.harness import EngineError, EngineHarness
from tests.hf.tiny import digest, engine, some_ids, split_logits


@pytest.fixture(scope="module")
def process(tiny_directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[EngineHarness]:
    folder = tmp_path_factory.mktemp("engine")
    with engine(tiny_directory, "--cache", f"lmdb://{folder}/store?size=64MiB") as harness:
        yield harness
        assert harness.stop() == 0


def test_it_says_what_it_is(process: EngineHarness) -> None:
    assert process.hello["engine"] == "hf"
    assert process.hello["chunk_tokens"] == 64
    assert process.hello["context_tokens"] == 2048
    assert len(process.hello["namespace"]) == 32
    assert len(process.hello["producer"]) == 16


def test_it_generates_and_finds_again(process: EngineHarness) -> None:
    ids = some_ids(300)
    cold = process.generate(ids, 6, logits=True)
    assert process.flush()
    warm = process.generate(ids, 6, logits=True)
    assert (cold["cached_tokens"], warm["cached_tokens"]) == (0, 256)
    assert warm["token_ids"] == cold["token_ids"]
    assert cold["prompt_tokens"] == 300
    assert cold["ttft_s"] > 0
    assert len(cold["top"]) == 20
    assert cold["top"][0][0] == cold["token_ids"][0]
    stats = process.stats()
    assert stats is not None
    assert stats["chunks"] >= 4


def test_it_samples_and_salts(process: EngineHarness) -> None:
    ids = some_ids(100, seed=9)
    settings = {"temperature": 1.0, "seed": 4, "cache_salt": "s", "load": False, "store": False}
    assert process.generate(ids, 5, **settings)["token_ids"] == process.generate(ids, 5, **settings)["token_ids"]


def test_it_tokenizes(process: EngineHarness) -> None:
    assert len(process.call("tokenize", 30, text="Hello")["token_ids"]) == 5
    messages = [{"role": "user", "content": "Hello"}]
    assert process.call("tokenize", 30, messages=messages)["token_ids"][0] == 1


@pytest.mark.parametrize(
    ("op", "fields", "message"),
    [
        ("generate", {"ids": [], "max_new_tokens": 1}, "ConfigError: the prompt is empty"),
        ("generate", {"ids": [3] * 2048, "max_new_tokens": 1}, "context of 2048"),
        ("generate", {"ids": [3], "max_new_tokens": 1, "colour": "red"}, "colour"),
        ("generate", {"ids": 3, "max_new_tokens": 1}, "ConfigError"),
        ("dance", {}, "unknown op 'dance'"),
    ],
)
def test_a_bad_request_is_answered_and_the_next_one_works(
    process: EngineHarness, op: str, fields: dict[str, object], message: str
) -> None:
    with pytest.raises(EngineError, match=message):
        process.call(op, 30, **fields)
    assert process.generate([3, 4], 1)["token_ids"]


def test_a_store_that_another_process_has_open_is_refused(process: EngineHarness, tiny_directory: Path) -> None:
    url = process.command[process.command.index("--cache") + 1]
    with pytest.raises(EngineError, match="BackendLocked"):
        engine(tiny_directory, "--cache", url).start()


@pytest.mark.timeout(180)
def test_killed_in_the_middle_the_next_process_is_exact(tiny_directory: Path, store_url: str, plain: Runner) -> None:
    prompts = [some_ids(700, seed=number) for number in range(30)]
    with engine(tiny_directory, "--cache", store_url) as first:
        numbers = [first.send("generate", ids=ids, max_new_tokens=4) for ids in prompts]
        for number in numbers[:12]:
            first.receive(number, 60)
        first.kill()  # -9, with requests to go and stores under way

    with engine(tiny_directory, "--cache", store_url) as second:
        hits = 0
        for ids in prompts:
            answer = second.generate(ids, 4, logits=True)
            hits += answer["cached_tokens"] > 0
            assert answer["logits_sha256"] == digest(split_logits(plain, ids, answer["cached_tokens"]))
        assert 0 < hits < len(prompts)
        assert second.flush()
        assert all(second.generate(ids, 1)["cached_tokens"] == 640 for ids in prompts)
        assert second.stop() == 0
