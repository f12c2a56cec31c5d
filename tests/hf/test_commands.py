"""The commands, as a user calls them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, ClassVar

import pytest
import typer
from typer.testing import CliRunner, Result

from lmcache_adapters.hf import commands, demo
from lmcache_sdk.errors import ConfigError

FIELDS = [
    "cold_ttft_s",
    "warm_ttft_s",
    "speedup",
    "prompt_tokens",
    "cached_tokens",
    "tokens_equal",
    "store_bytes",
]


def call(*arguments: object, stdin: str | None = None) -> Result:
    app = typer.Typer()
    app.command()(commands.demo)
    app.command()(commands.run)
    return CliRunner().invoke(app, [str(argument) for argument in arguments], input=stdin)


@pytest.mark.timeout(180)
def test_demo_shows_a_hit_in_a_new_process(tmp_path: Path, tiny_directory: Path) -> None:
    figures, picture = tmp_path / "demo.json", tmp_path / "demo.png"
    arguments = ("demo", "--model", tiny_directory, "--tokens", 1200, "--new-tokens", 3)
    result = call(*arguments, "--json", figures, "--plot", picture)
    assert result.exit_code == 0, result.output
    summary = json.loads(figures.read_bytes())
    assert list(summary) == FIELDS
    assert summary["tokens_equal"] is True
    assert summary["cached_tokens"] == (summary["prompt_tokens"] - 1) // 64 * 64
    assert summary["store_bytes"] >= summary["cached_tokens"] * 4 * 2 * 2 * 16 * 4
    assert result.stdout.count("yes") == 5, "three questions, and one after two kills"
    assert "daemon killed, new daemon" in result.stdout
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.timeout(180)
def test_demo_with_the_real_model(tmp_path: Path, real_directory: Path) -> None:
    figures = tmp_path / "demo.json"
    arguments = ("demo", "--model", real_directory, "--tokens", 800, "--new-tokens", 4)
    result = call(*arguments, "--no-daemon", "--json", figures, "--store", f"lmdb://{tmp_path}/store?size=1GiB")
    assert result.exit_code == 0, result.output
    assert json.loads(figures.read_bytes())["speedup"] > 1.5


@pytest.mark.parametrize(
    ("warm", "passed"),
    [
        (demo.Answer(0.1, 64, [1], "a"), True),
        (demo.Answer(0.1, 64, [2], "b"), False),
        (demo.Answer(1.0, 0, [1], "a"), False),
    ],
)
def test_demo_fails_if_an_answer_differs_or_nothing_was_cached(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, warm: demo.Answer, passed: bool
) -> None:
    row = demo.Row("why?", 100, demo.Answer(1.0, 0, [1], "a"), warm)
    monkeypatch.setattr(demo, "measure", lambda *_, **__: demo.Report([row], 1000))
    assert call("demo", "--model", "m").exit_code == (0 if passed else 1)


class OneTokenALetter:
    """Stands for an engine that only tokenizes."""

    hello: ClassVar = {"context_tokens": 100_000}

    def call(self, op: str, timeout_s: float, *, text: str = "", messages: list[dict[str, str]] = []) -> Any:  # noqa: B006
        return {"token_ids": [ord(letter) for letter in text or messages[0]["content"]]}


def test_the_document_is_whole_paragraphs_and_long_enough() -> None:
    prompts = demo._prompts(OneTokenALetter(), 5000, 10)  # type: ignore[arg-type]
    shared = len(os.path.commonprefix(prompts))  # noqa: RUF071 -- of token ids
    assert shared >= 5000
    assert max(len(prompt) for prompt in prompts) < 6000
    assert len({tuple(prompt) for prompt in prompts}) == 3


@pytest.mark.parametrize(
    ("tokens", "message"),
    [(99_900, "context of 100000; lower --tokens"), (0, "--tokens must be within"), (10**7, "--tokens must be")],
)
def test_a_document_that_does_not_fit_is_named(tokens: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        demo._prompts(OneTokenALetter(), tokens, 10)  # type: ignore[arg-type]


def test_demo_names_a_bad_option(tiny_directory: Path) -> None:
    result = call("demo", "--model", tiny_directory, "--new-tokens", 0)
    assert isinstance(result.exception, ConfigError)
    assert "--new-tokens must be at least 1, got 0" in str(result.exception)


def test_a_conversation_through_a_pipe(tiny_directory: Path, store_url: str) -> None:
    arguments = ("run", "--model", tiny_directory, "--cache", store_url, "--max-new-tokens", 8)
    messages = "tell me about the manual of a language, please\n" * 2
    result = call(*arguments, stdin=messages + "\n/new\n/help\nhi\n/quit\nnever read\n")
    assert result.exit_code == 0, result.output
    lines = [line for line in result.stderr.splitlines() if "prompt tokens cached" in line]
    assert len(lines) == 3
    assert lines[0].startswith("[0 of ")
    assert lines[1].startswith("[64 of ")
    assert "unknown command /help" in result.stderr


def test_a_conversation_without_a_message_says_so(tiny_directory: Path, store_url: str) -> None:
    result = call("run", "--model", tiny_directory, "--cache", store_url, stdin="")
    assert result.exit_code == 0, result.output
    assert "No message: type one, or pipe one into stdin." in result.stderr


def test_the_commands_load_without_an_engine() -> None:
    code = (
        "import sys, lmcache_adapters.hf.commands, lmcache_adapters.hf.demo\n"
        "print([m for m in ('torch', 'transformers', 'numpy.testing', 'matplotlib') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert out.strip() == "[]"
