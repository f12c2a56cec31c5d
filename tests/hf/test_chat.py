"""Conversations."""

from __future__ import annotations

from typing import Any

import pytest

from lmcache_adapters.hf import Chat, Runner, Sampling
from lmcache_sdk.errors import ConfigError

CHUNK = 64


def test_each_turn_finds_the_one_before_with_its_reply(runner: Runner) -> None:
    chat = Chat(runner, system="You answer in bytes." * 4, max_new_tokens=50, sampling=Sampling(1.0, seed=1))
    for turn in range(4):
        known = len(chat.token_ids)
        result = chat.say(f"Message {turn}: " + "tell me more. " * 5)
        # All but the last token of the reply has been computed with.
        assert result.cached_tokens == max(0, known - 1) // CHUNK * CHUNK
        assert runner.drain()
    assert known > 5 * CHUNK


@pytest.mark.parametrize("reason", ["length", "stop"])
def test_the_ids_are_those_of_the_rendered_conversation(
    runner: Runner, monkeypatch: pytest.MonkeyPatch, reason: str
) -> None:
    """Whether a reply was cut or ended by itself, the template's end comes once. Bytes tokenise in one way only."""
    generate = runner.generate
    replies = iter([b"Good.", b"Yes."])

    def scripted(prompt: Any, **settings: Any) -> Any:
        result = generate(prompt, **settings)
        tokens = runner.model.tokenize(next(replies).decode())
        result.token_ids[:] = [*tokens, 2] if reason == "stop" else tokens
        return result

    monkeypatch.setattr(runner, "generate", scripted)
    chat = Chat(runner, system="Be brief.", max_new_tokens=1)
    chat.say("How are you?")
    chat.say("Really?")
    expected = (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHow are you?<|im_end|>\n"
        "<|im_start|>assistant\nGood.<|im_end|>\n<|im_start|>user\nReally?<|im_end|>\n"
        "<|im_start|>assistant\nYes."
    )
    assert runner.model.tokenizer.decode(chat.token_ids) == expected
    assert chat.token_ids.tolist() == runner.model.tokenize(expected)


def test_a_turn_that_fails_leaves_the_conversation_as_it_was(runner: Runner) -> None:
    chat = Chat(runner, max_new_tokens=4)
    chat.say("Hello")
    before = chat.token_ids.tolist()
    with pytest.raises(ConfigError, match="context"):
        chat.say("word " * 1000)
    assert chat.token_ids.tolist() == before
    chat.say("Hello again")
    assert chat.token_ids.tolist()[: len(before)] == before


def test_a_template_that_drops_replies_is_refused(runner: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    template = "{% for m in messages %}{% if m['role'] == 'user' %}{{ m['content'] }}{% endif %}{% endfor %}"
    monkeypatch.setattr(runner.model.tokenizer, "chat_template", template)
    chat = Chat(runner, max_new_tokens=2)
    chat.say("Hello")
    with pytest.raises(ConfigError, match="leaves earlier replies out"):
        chat.say("And?")


def test_a_model_without_a_template_is_told(runner: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner.model.tokenizer, "chat_template", None)
    with pytest.raises(ConfigError, match="no chat template"):
        Chat(runner).say("Hello")
