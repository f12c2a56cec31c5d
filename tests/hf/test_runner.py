"""Generation: what goes in, what comes out, and what the cache does to it."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import DynamicCache

from lmcache_adapters.hf import Model, Runner, Sampling
from lmcache_sdk.errors import ConfigError
from lmcache_sdk.open import open_cache
from tests.hf.tiny import CONTEXT, some_ids

CHUNK = 64


def test_without_a_cache_it_is_what_transformers_generates(plain: Runner) -> None:
    import torch

    ids = some_ids(150)
    network = plain.model.network
    expected = network.generate(
        torch.tensor([ids]),
        past_key_values=DynamicCache(config=network.config),
        max_new_tokens=20,
        do_sample=False,
        pad_token_id=0,
    )[0, 150:].tolist()
    result = plain.generate(ids, max_new_tokens=20)
    assert result.token_ids == expected
    assert result.cached_tokens == 0
    assert result.prompt_tokens == 150
    assert plain.drain()


def test_a_prompt_is_text_or_messages_or_ids(plain: Runner) -> None:
    by_text = plain.generate("Hello, world", max_new_tokens=4)
    by_ids = plain.generate(plain.model.tokenize("Hello, world"), max_new_tokens=4)
    by_array = plain.generate(by_text.prompt_ids, max_new_tokens=4)
    assert by_text.token_ids == by_ids.token_ids == by_array.token_ids
    message = {"role": "user", "content": "Hello"}
    by_messages = plain.generate([message], max_new_tokens=4)
    rendered = "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
    assert by_messages.prompt_ids.tolist() == plain.model.tokenize(rendered)


@pytest.mark.parametrize(
    ("prompt", "settings", "message"),
    [
        ("", {}, "prompt is empty"),
        ([], {}, "prompt is empty"),
        ([600], {}, "600 is outside the model's vocabulary of 512"),
        ([-1], {}, "token ids must be within"),
        ([3], {"max_new_tokens": 0}, "max_new_tokens must be a whole number from 1, got 0"),
        ([3], {"max_new_tokens": 2.5}, "max_new_tokens must be a whole number from 1, got 2.5"),
        ([3] * 2000, {"max_new_tokens": 49}, "context of 2048; .* at most 48 new tokens"),
        ([3] * 3000, {"max_new_tokens": 1}, "at most 0 new tokens"),
        ([3], {"stop": ("",)}, "stop string is empty"),
    ],
)
def test_bad_input_is_named(plain: Runner, prompt: Any, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        plain.generate(prompt, **settings)
    assert plain.generate([3, 4], max_new_tokens=1).token_ids  # and the next request works


@pytest.mark.parametrize(("field", "value"), [("temperature", -1), ("top_p", 0.0), ("top_p", 1.5), ("top_k", -1)])
def test_bad_sampling_is_named(field: str, value: float) -> None:
    with pytest.raises(ConfigError, match=f"{field} must .*{value}"):
        Sampling(**{field: value})  # type: ignore[arg-type]


def test_the_whole_context_can_be_used(runner: Runner) -> None:
    result = runner.generate(some_ids(CONTEXT - 40), max_new_tokens=40)
    assert len(result.token_ids) <= 40
    assert runner.drain()
    assert runner.generate(some_ids(CONTEXT - 40), max_new_tokens=1).cached_tokens == (CONTEXT - 41) // CHUNK * CHUNK


@pytest.mark.parametrize(
    ("tokens", "cached"), [(1, 0), (CHUNK - 1, 0), (CHUNK, 0), (CHUNK + 1, CHUNK), (2 * CHUNK, CHUNK)]
)
def test_one_token_is_always_computed(runner: Runner, tokens: int, cached: int) -> None:
    ids = some_ids(tokens, seed=tokens)
    cold = runner.generate(ids, max_new_tokens=3)
    assert runner.drain()
    warm = runner.generate(ids, max_new_tokens=3)
    assert (cold.cached_tokens, warm.cached_tokens) == (0, cached)
    assert warm.token_ids == cold.token_ids


def test_generated_tokens_are_stored_too(runner: Runner) -> None:
    first = runner.generate(some_ids(100), max_new_tokens=60, sampling=Sampling(1.0, seed=1))
    assert runner.drain()
    longer = [*first.prompt_ids.tolist(), *first.token_ids, 7]
    # The last generated token was never computed with.
    computed = 100 + len(first.token_ids) - 1
    cached = runner.generate(longer, max_new_tokens=1).cached_tokens
    assert cached == computed // CHUNK * CHUNK > 100


def test_prefixes_are_shared(runner: Runner, plain: Runner) -> None:
    document = some_ids(300)
    runner.generate([*document, *some_ids(30, seed=1)], max_new_tokens=1)
    assert runner.drain()
    other = [*document, *some_ids(30, seed=2)]
    warm = runner.generate(other, max_new_tokens=4)
    assert warm.cached_tokens == 256
    assert sum(warm.sources.values()) >= 4
    assert warm.token_ids == plain.generate(other, max_new_tokens=4).token_ids


def test_a_salt_keeps_requests_apart(runner: Runner) -> None:
    ids = some_ids(200)
    for salt in ("alice", "bob", None):
        assert runner.generate(ids, max_new_tokens=1, cache_salt=salt).cached_tokens == 0
        assert runner.drain()
        assert runner.generate(ids, max_new_tokens=1, cache_salt=salt).cached_tokens == 192


def test_a_request_can_leave_the_cache_out(runner: Runner) -> None:
    ids = some_ids(200)
    runner.generate(ids, max_new_tokens=1, store=False)
    assert runner.drain()
    assert runner.generate(ids, max_new_tokens=1).cached_tokens == 0
    assert runner.drain()
    assert runner.generate(ids, max_new_tokens=1, load=False).cached_tokens == 0
    assert runner.generate(ids, max_new_tokens=1).cached_tokens == 192


def test_many_requests_one_after_another_stay_exact(runner: Runner, plain: Runner) -> None:
    """Slots are reused at once, while the stores of the request before may still read them."""
    prompts = [some_ids(150 + 64 * (number % 5), seed=number % 7) for number in range(40)]
    expected = {tuple(ids): plain.generate(ids, max_new_tokens=2).token_ids for ids in prompts}
    for ids in prompts:
        assert runner.generate(ids, max_new_tokens=2).token_ids == expected[tuple(ids)]
    assert runner.drain()
    for ids in prompts:
        warm = runner.generate(ids, max_new_tokens=2)
        assert warm.cached_tokens == (len(ids) - 1) // CHUNK * CHUNK
        assert warm.token_ids == expected[tuple(ids)]


def test_a_seed_gives_the_same_tokens_again(plain: Runner) -> None:
    def tokens(**settings: Any) -> list[int]:
        return plain.generate([5, 6, 7], max_new_tokens=12, sampling=Sampling(**settings)).token_ids

    assert tokens(temperature=1.5, seed=1) == tokens(temperature=1.5, seed=1)
    assert tokens(temperature=1.5, seed=1) != tokens(temperature=1.5, seed=2)
    greedy = tokens()
    assert tokens(temperature=1.5, top_k=1) == greedy
    assert tokens(temperature=1.5, top_p=1e-6) == greedy


def test_streamed_pieces_add_up_to_the_text(plain: Runner) -> None:
    pieces: list[str] = []
    result = plain.generate("Hello", max_new_tokens=40, stream=pieces.append)
    assert "".join(pieces) == result.text
    assert len(pieces) > 1


def test_a_stop_string_ends_the_text_and_is_never_shown(plain: Runner) -> None:
    whole = plain.generate("Hello", max_new_tokens=40, sampling=Sampling(1.0, seed=5))
    stop = whole.text[10:13]
    pieces: list[str] = []
    cut = plain.generate("Hello", max_new_tokens=40, sampling=Sampling(1.0, seed=5), stop=stop, stream=pieces.append)
    assert cut.text == whole.text[: whole.text.index(stop)]
    assert "".join(pieces) == cut.text
    assert cut.finish_reason == "stop"
    assert len(cut.token_ids) < len(whole.token_ids)


def test_an_ending_token_ends_the_reply(plain: Runner) -> None:
    for seed in range(200):
        result = plain.generate("x", max_new_tokens=30, sampling=Sampling(3.0, seed=seed))
        if result.finish_reason == "stop":
            break
    assert result.token_ids[-1] in plain.model.end_ids
    assert "<|im_end|>" not in result.text


def test_one_line_says_what_a_request_got(runner: Runner, caplog: pytest.LogCaptureFixture) -> None:
    ids = some_ids(200)
    runner.generate(ids, max_new_tokens=2)
    assert runner.drain()
    caplog.clear()
    with caplog.at_level(logging.INFO, "lmcache_sdk.hf"):
        runner.generate(ids, max_new_tokens=2)
    (line,) = [record.getMessage() for record in caplog.records if record.name == "lmcache_sdk.hf"]
    assert line.startswith("prompt=200 hit=192 tiers=pool:3 lookup_load_ms=")
    assert "ttft_ms=" in line


def test_an_open_cache_stays_the_callers(tiny: Model) -> None:
    cache = open_cache("memory://", namespace=tiny.namespace, producer=tiny.producer)
    ids = some_ids(200)
    with Runner(tiny, cache) as runner:
        runner.generate(ids, max_new_tokens=1)
        assert runner.drain()
    with Runner(tiny, cache) as runner:
        assert runner.generate(ids, max_new_tokens=1).cached_tokens == 192
    cache.close()


def test_a_cache_of_another_model_is_refused(tiny: Model, tiny_directory: Path) -> None:
    from lmcache_adapters.hf import load_model

    other = load_model(tiny_directory, chunk_tokens=16)
    cache = open_cache("memory://", namespace=tiny.namespace, producer=tiny.producer)
    with pytest.raises(ConfigError, match="the cache was opened for another model"):
        Runner(other, cache)
    cache.close()


def test_settings_of_loading_do_not_go_with_a_loaded_model(tiny: Model) -> None:
    with pytest.raises(ConfigError, match="load_model"):
        Runner(tiny, dtype="bfloat16")


@pytest.mark.parametrize("tokens", [0, CONTEXT + 1])
def test_the_context_has_bounds(tiny: Model, tokens: int) -> None:
    with pytest.raises(ConfigError, match=f"within 1 .. {CONTEXT} .* got {tokens}"):
        Runner(tiny, context_tokens=tokens)


@pytest.mark.parametrize("broken", ["lookup", "claim", "reserve"])
def test_a_cache_that_breaks_its_word_does_not_break_generation(
    tiny: Model, plain: Runner, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    """The protocol never raises; a bug in someone's cache may."""
    ids = some_ids(300)
    expected = plain.generate(ids, max_new_tokens=4)
    cache = open_cache("memory://", namespace=tiny.namespace, producer=tiny.producer)
    with Runner(tiny, cache) as runner:
        runner.generate(ids, max_new_tokens=1)
        assert runner.drain()

        def fail(*_: Any, **__: Any) -> None:
            raise RuntimeError("a bug")

        monkeypatch.setattr(cache, broken, fail)
        for salt in (None, "other"):
            result = runner.generate(ids, max_new_tokens=4, cache_salt=salt, keep_logits=True)
            assert result.token_ids == expected.token_ids
            assert np.isfinite(result.logits).all()
    monkeypatch.undo()
    cache.close()


class Late:
    """A load that has not ended when it is waited for; it ends when it is cancelled, or never."""

    def __init__(self, stops: bool) -> None:
        self._stops = stops
        self._cancelled = False

    def done(self) -> bool:
        return self._cancelled and self._stops

    def wait(self, timeout_s: float) -> bool:
        return self.done()

    def cancel(self) -> None:
        self._cancelled = True

    def failed_chunks(self) -> list[int]:
        return [0, 1, 2, 3]


@pytest.mark.parametrize("stops", [True, False])
def test_a_load_that_is_late_is_computed_instead(
    runner: Runner, plain: Runner, monkeypatch: pytest.MonkeyPatch, stops: bool
) -> None:
    ids = some_ids(300)
    expected = plain.generate(ids, max_new_tokens=4).token_ids
    runner.generate(ids, max_new_tokens=1)
    assert runner.drain()
    memory = runner.memory
    monkeypatch.setattr(runner._reuse._connector, "load", lambda *_: Late(stops))
    result = runner.generate(ids, max_new_tokens=4)
    assert (result.cached_tokens, result.token_ids) == (0, expected)
    # Memory that a copy may still write to is not computed in.
    assert (runner.memory is memory) == stops
    assert runner.generate(ids, max_new_tokens=4).token_ids == expected


def test_only_what_lies_before_a_failed_chunk_counts(
    runner: Runner, plain: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = some_ids(300)
    runner.generate(ids, max_new_tokens=1)
    assert runner.drain()
    connector = runner._reuse._connector
    assert connector is not None
    load = connector.load

    def fail_chunk_2(*arguments: Any) -> Any:
        transfer = load(*arguments)
        assert transfer.wait(10)
        runner.memory.rows[:, :, 2 * CHUNK :] = np.nan
        transfer.fail([2])
        return transfer

    monkeypatch.setattr(connector, "load", fail_chunk_2)
    result = runner.generate(ids, max_new_tokens=4)
    assert result.cached_tokens == 2 * CHUNK
    assert result.token_ids == plain.generate(ids, max_new_tokens=4).token_ids


def test_a_pool_smaller_than_the_prompt_only_means_fewer_hits(tiny: Model, plain: Runner, store_url: str) -> None:
    ids = some_ids(900)
    with Runner(tiny, store_url, pool_bytes=5 * tiny.namespace.spec.chunk_bytes) as small:
        expected = plain.generate(ids, max_new_tokens=4).token_ids
        for _ in range(3):
            assert small.generate(ids, max_new_tokens=4).token_ids == expected
            assert small.drain()


def test_whose_chunks_are_used_must_be_said_right(tiny: Model, store_url: str) -> None:
    with pytest.raises(ConfigError, match="share is 'all'; it is one of: verified, any, own"):
        Runner(tiny, store_url, share="all")
