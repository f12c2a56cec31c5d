"""The commands ``lmcache-sdk demo`` and ``lmcache-sdk run``. Nothing heavy is imported before one of them runs."""

from __future__ import annotations

import os
import signal
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import msgspec
import typer

from lmcache_sdk.config import Config, cache_home, default_url, load_config
from lmcache_sdk.errors import ConfigError
from lmcache_sdk.observe.logs import log_to_stderr

if TYPE_CHECKING:
    from lmcache_adapters.hf.chat import Chat
    from lmcache_adapters.hf.demo import Report

ModelOption = Annotated[str, typer.Option("--model", help="Model directory, or an id on the Hugging Face hub.")]
DtypeOption = Annotated[str | None, typer.Option(help="bfloat16, float16 or float32; by default the model's own.")]
DeviceOption = Annotated[str, typer.Option(help="A torch device.")]


def demo(
    model: ModelOption,
    store: Annotated[
        str | None,
        typer.Option(help="URL of the store; by default a temporary one that is removed at the end."),
    ] = None,
    tokens: Annotated[int, typer.Option(help="The document has at least this many tokens.")] = 4096,
    new_tokens: Annotated[int, typer.Option(help="Tokens of each answer.")] = 16,
    json: Annotated[Path | None, typer.Option(help="Write the first question's figures to this file.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Write a bar chart to this PNG file.")] = None,
    daemon: Annotated[bool, typer.Option(help="Also through a daemon, with kills and restarts.")] = True,
    dtype: DtypeOption = None,
    device: DeviceOption = "cpu",
) -> None:
    """Ask three questions on a long document: without a cache, then from a store in a new process.

    Then one of them through a daemon: the engine is killed and started again, then the daemon.
    Ends with status 1 if an answer differs or nothing came from store or daemon.
    """
    from rich.console import Console

    from lmcache_adapters.hf import demo as demonstration

    _need_engine()
    if plot and find_spec("matplotlib") is None:
        raise ConfigError("--plot needs matplotlib: pip install 'lmcache-sdk[plot]'")
    if new_tokens < 1:
        raise ConfigError(f"--new-tokens must be at least 1, got {new_tokens}")
    for file in (json, plot):  # told now, not after minutes of measuring
        if file is not None and not file.absolute().parent.is_dir():
            raise ConfigError(f"{file.parent} does not exist, so {file} cannot be written there")
    errors = Console(stderr=True, highlight=False)
    options = ["--device", device, *(["--dtype", dtype] if dtype else [])]
    with _store(store) as url:
        report = demonstration.measure(
            model, url, tokens=tokens, new_tokens=new_tokens, options=options, daemon=daemon, progress=errors.print
        )
    _show(report)
    if json:
        json.write_bytes(msgspec.json.encode(report.summary()) + b"\n")
    if plot:
        demonstration.plot(report, plot)
    if not report.passed:
        errors.print("FAILED: an answer differs, or nothing came from store or daemon", style="bold red")
        raise typer.Exit(1)


def run(
    model: ModelOption,
    cache: Annotated[
        str | None,
        typer.Option(help="URL of the cache; by default the configured one, else a store in the user's cache folder."),
    ] = None,
    system: Annotated[str | None, typer.Option(help="System message.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="The longest reply.")] = 256,
    share: Annotated[
        str | None,
        typer.Option(help="Whose KV is used beside this engine's own: verified (of engines that agree), any or own."),
    ] = None,
    temperature: Annotated[float, typer.Option(help="0 = always the most likely token.")] = 0.0,
    dtype: DtypeOption = None,
    device: DeviceOption = "cpu",
) -> None:
    """Chat with a model, the cache on. /new starts over, /quit ends.

    Replies go to stdout; cached tokens and time to first token of each turn to stderr.
    """
    _need_engine()
    # A service manager's way of ending us: close the store, as at the end of input.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    from lmcache_adapters.hf import Chat, Runner, Sampling

    config = load_config({"share": share})
    log_to_stderr(config.log_level)
    sampling = Sampling(temperature)
    typer.echo(f"Loading {model} …", err=True)
    with Runner(
        model,
        cache or _configured_cache(config),
        device=device,
        dtype=dtype,
        chunk_tokens=config.chunk_tokens,
        pool_bytes=config.pool_bytes,
        share=config.share,
        timeout_s=config.wait_s,
    ) as runner:
        typer.echo("/new starts over, /quit ends.", err=True)
        chat = Chat(runner, system=system, max_new_tokens=max_new_tokens, sampling=sampling)
        turns = 0
        for line in _lines():
            if line == "/quit":
                return
            if line == "/new":
                chat = Chat(runner, system=system, max_new_tokens=max_new_tokens, sampling=sampling)
            elif line.startswith("/"):
                typer.echo(f"unknown command {line}; there are /new and /quit", err=True)
            elif line:
                turns += _turn(chat, line)
        typer.echo("End of input." if turns else "No message: type one, or pipe one into stdin.", err=True)


def _turn(chat: Chat, message: str) -> int:
    """One message and its reply; the answer is how many turns that makes, 0 if it failed."""
    try:
        result = chat.say(message, stream=lambda text: print(text, end="", flush=True))
    except ConfigError as error:
        typer.echo(f"{error}\n/new starts a new conversation", err=True)
        return 0
    except KeyboardInterrupt:
        typer.echo("\n[stopped]", err=True)
        return 0
    print(flush=True)
    typer.echo(
        f"[{result.cached_tokens} of {result.prompt_tokens} prompt tokens cached, "
        f"first token after {result.ttft_s:.2f} s]",
        err=True,
    )
    return 1


def _lines() -> Iterator[str]:
    """What the user types, or what is piped in, to its end."""
    prompt = "> " if sys.stdin.isatty() else ""
    while True:
        try:
            yield input(prompt).strip()
        except (EOFError, KeyboardInterrupt):
            return


def _need_engine() -> None:
    missing = [name for name in ("torch", "transformers") if find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"this command needs {' and '.join(missing)}: pip install 'lmcache-sdk[hf]', and torch for your device"
        )
    # Idle OpenMP threads that spin take the cores from those that work. Read when torch is loaded.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")


@contextmanager
def _store(url: str | None) -> Iterator[str]:
    from lmcache_adapters.hf.demo import STORE_SIZE

    if url is not None:
        yield url
        return
    with tempfile.TemporaryDirectory(prefix="lmcache-sdk-demo-") as folder:
        yield f"lmdb://{folder}/store?size={STORE_SIZE}"


def _configured_cache(config: Config) -> str:
    """The configured cache, else this user's store, whose folder is made where it is missing."""
    if not config.url:
        cache_home().mkdir(parents=True, exist_ok=True)
    return config.url or default_url()


def _show(report: Report) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    from lmcache_sdk.config import format_size

    table = Table("question", box=SIMPLE_HEAD)
    for heading in ("prompt\ntokens", "cached\ntokens", "TTFT\ncold", "TTFT\nwarm", "ratio", "same\nanswer?"):
        table.add_column(heading, justify="right")
    for row in report.rows:
        table.add_row(
            row.question,
            str(row.prompt_tokens),
            str(row.warm.cached_tokens),
            f"{row.cold.ttft_s:.2f} s",
            f"{row.warm.ttft_s:.2f} s",
            f"{row.speedup:.1f}×",
            "yes" if row.tokens_equal else "NO",
        )
    console = Console()
    for row in report.rows:
        console.print(f"{row.question} {row.warm.text!r}", highlight=False, markup=False)
    console.print(table)
    console.print(
        "TTFT: time to first token. Cold: without a cache. Warm: from the store, in a new process. "
        f"The store has {format_size(report.store_bytes)}."
    )
    if not report.restarts:
        return
    first = report.rows[0]
    table = Table("the first question through a daemon", box=SIMPLE_HEAD)
    for heading in ("from its\nmemory", "TTFT", "ratio", "same\nanswer?"):
        table.add_column(heading, justify="right")
    for restart in report.restarts:
        table.add_row(
            restart.event,
            str(restart.answer.cached_tokens),
            f"{restart.answer.ttft_s:.2f} s",
            f"{first.cold.ttft_s / restart.answer.ttft_s:.1f}×",
            "yes" if restart.tokens_equal else "NO",
        )
    console.print(table)
