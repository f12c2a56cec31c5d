"""``config show`` and ``config check``: what is in effect and where it comes from; what is wrong with a file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import msgspec
import typer

from lmcache_sdk.backend import schemes
from lmcache_sdk.cli.output import counted, print_json, print_table
from lmcache_sdk.config import Config, Settled, default_socket, default_url, format_size, hide_secrets, settle
from lmcache_sdk.errors import ConfigError
from lmcache_sdk.tiers import parse_tier

config = typer.Typer(
    no_args_is_help=True, add_completion=False, rich_markup_mode=None, help="Show and check the configuration."
)


@config.command()
def show(
    file: Annotated[Path | None, typer.Option("--config", help="A YAML file, instead of the configured one.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Print every setting that is in effect, and where it comes from."""
    settled = settle(file=file)
    if settled.problems:
        raise ConfigError("; ".join(settled.problems))
    if json:
        values = msgspec.to_builtins(settled.config)
        values |= {"url": hide_secrets(values["url"]), "tiers": [hide_secrets(url) for url in values["tiers"]]}
        print_json({name: {"value": value, "source": settled.sources[name]} for name, value in values.items()})
        return
    rows = [(name, text, settled.sources[name]) for name, text in setting_texts(settled.config).items()]
    print_table(("SETTING", "VALUE", "FROM"), rows)


@config.command()
def check(file: Annotated[Path, typer.Argument(help="A YAML file of settings.")]) -> None:
    """Check a file alone, without environment and flags. Prints all that is wrong, and ends with status 2."""
    settled = settle(file=file, environment={})
    problems = [*settled.problems, *daemon_problems(settled)]
    for problem in problems:
        typer.echo(f"lmcache-sdk: {' '.join(problem.split())}", err=True)
    if problems:
        raise typer.Exit(2)
    chosen = sum(source != "default" for source in settled.sources.values())
    typer.echo(f"{file} is in order: {counted(chosen, 'setting')}")


def daemon_problems(settled: Settled) -> list[str]:
    """What a daemon would refuse on this machine, beside what is wrong anywhere."""
    found, known = [], schemes()
    for text in settled.config.tiers:
        try:
            scheme = parse_tier(text).url.partition("://")[0]
        except ConfigError as error:
            found.append(str(error))
            continue
        if scheme not in known:
            shown = hide_secrets(text)
            found.append(f"unknown scheme {scheme!r} in tiers ({shown}); installed are: {', '.join(known)}")
    for name in ("metrics_token_file", "metrics_cert", "metrics_key"):
        place = getattr(settled.config, name)
        if place and not Path(place).is_file():
            found.append(f"{name}: there is no file {place}")
    try:
        group_id(settled.config.group)
    except ConfigError as error:
        found.append(str(error))
    return found


def group_id(name: str) -> int | None:
    """The number of a group; None for no name. Raises ConfigError."""
    import grp

    if not name:
        return None
    try:
        return grp.getgrnam(name).gr_gid
    except KeyError:
        raise ConfigError(f"there is no group {name!r} on this machine; create it, or name another one") from None


def setting_texts(config: Config) -> dict[str, str]:
    """All settings as people read them."""
    texts = {}
    for name, value in msgspec.structs.asdict(config).items():
        if name == "url":
            text = hide_secrets(value or default_url())
        elif name == "socket":
            text = value or str(default_socket())
        elif name == "tiers":
            text = " ".join(map(hide_secrets, value))
        else:
            text = format_size(value) if name.endswith("_bytes") else str(value)
        texts[name] = text or "-"
    return texts
