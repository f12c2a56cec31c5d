"""The command group: built-in commands, those of installed packages, and what an error becomes."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib.metadata import EntryPoint, entry_points
from typing import Annotated, Any

import typer
import typer.core

from lmcache_sdk import __version__
from lmcache_sdk.cli.backend import backend
from lmcache_sdk.cli.daemon import reopen, serve, status, top
from lmcache_sdk.cli.doctor import doctor
from lmcache_sdk.cli.settings import config
from lmcache_sdk.cli.stores import clear, du, gc, ls
from lmcache_sdk.errors import ConfigError, LMCacheSDKError, UnsupportedError
from lmcache_sdk.observe.logs import masked

ENTRY_POINTS = "lmcache_sdk.commands"

# Plain text instead of boxes: it reads the same in a terminal, a log and a pipe, and loads faster.
_PLAIN: dict[str, Any] = {
    "add_completion": False,
    "rich_markup_mode": None,
    "pretty_exceptions_enable": False,
    "context_settings": {"help_option_names": ["-h", "--help"]},
}


class CommandGroup(typer.core.TyperGroup):
    """The built-in commands, and those that packages contribute: each is loaded when it is called or listed."""

    def list_commands(self, ctx: Any) -> list[str]:
        built_in = super().list_commands(ctx)
        return sorted({*built_in, *(entry.name for entry in entry_points(group=ENTRY_POINTS))})

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        built_in = super().get_command(ctx, cmd_name)
        if built_in is not None:
            return built_in
        for entry in entry_points(group=ENTRY_POINTS, name=cmd_name):
            return _contributed(entry)
        return None

    def invoke(self, ctx: Any) -> Any:
        """Run the command. An error of ours becomes one line, the rest is a defect and keeps its traceback."""
        try:
            result = super().invoke(ctx)
            sys.stdout.flush()  # a closed pipe is noticed here, where it is handled, not at exit
            return result
        except LMCacheSDKError as error:
            typer.echo(f"lmcache-sdk: {masked(' '.join(str(error).split()))}", err=True)
            raise typer.Exit(2 if isinstance(error, ConfigError | UnsupportedError) else 1) from error


def _contributed(entry: EntryPoint) -> Any:
    """A package's command: a function, or a Typer app with commands of its own."""
    try:
        command = _command(entry.name, entry.load())
    except Exception as error:  # noqa: BLE001  other people's code: it must not take the other commands along
        command = _unavailable(entry, error)
    return command


def _command(name: str, target: typer.Typer | Callable[..., Any]) -> Any:
    if not isinstance(target, typer.Typer):
        function, target = target, typer.Typer(**_PLAIN)
        target.command(name)(function)
    command = typer.main.get_command(target)
    command.name = name
    return command


def _unavailable(entry: EntryPoint, error: Exception) -> Any:
    """Stands in for a command that does not load: takes whatever it is given, and says why."""
    package = entry.dist.name if entry.dist else "an unknown package"
    why = f"{entry.value!r} of {package} does not load: {type(error).__name__}: {error}"

    def unavailable() -> None:
        raise LMCacheSDKError(f"the command {entry.name!r} is unavailable: {why}")

    app = typer.Typer(**_PLAIN)
    anything = {"ignore_unknown_options": True, "allow_extra_args": True}
    app.command(entry.name, help=f"(unavailable: {why})", context_settings=anything)(unavailable)
    return typer.main.get_command(app)


app = typer.Typer(cls=CommandGroup, no_args_is_help=True, **_PLAIN)
for _command_function in (serve, status, top, reopen, doctor, ls, du, clear, gc):
    app.command()(_command_function)
app.add_typer(config, name="config")
app.add_typer(backend, name="backend")


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"lmcache-sdk {__version__}")
        raise typer.Exit


@app.callback()
def _group(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """A KV cache that outlives the inference engine, and that every engine can read."""
