"""``backend``: which backends there are, and whether a store does what a backend must."""

from __future__ import annotations

import os
import signal
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import EntryPoint, entry_points
from importlib.util import find_spec
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import typer

from lmcache_sdk.backend import ENTRY_POINTS, install_command, load_backend
from lmcache_sdk.cli.live import LiveStore, existence, plain_way, throughput
from lmcache_sdk.cli.output import print_table
from lmcache_sdk.config import hide_secrets
from lmcache_sdk.errors import BackendError, ConfigError

PLUGIN = "lmcache-sdk-live-store"  # by this name the suite finds the store
_LINES = 4  # of a failure
_OK, _FAILED = typer.style("ok     ", fg="green"), typer.style("failed ", fg="red")
_SKIPPED, _LEFT = typer.style("skipped", fg="yellow"), typer.style("left   ", fg="yellow")

backend = typer.Typer(no_args_is_help=True, help="Look at storage backends.")


@backend.command("list")
def list_backends() -> None:
    """List the backends that installed packages announce, by URL scheme."""
    points = sorted(entry_points(group=ENTRY_POINTS), key=lambda point: point.name)
    print_table(
        ("SCHEME", "PACKAGE", "STATE"), [(f"{point.name}://", _package(point), _state(point)) for point in points]
    )


def _package(point: EntryPoint) -> str:
    return f"{point.dist.name} {point.dist.version}" if point.dist else "unknown"


def _state(point: EntryPoint) -> str:
    try:
        load_backend(point)
    except ConfigError as error:
        return install_command(point) or str(error)
    return "installed"


@backend.command()
def check(
    url: Annotated[str, typer.Argument(help="The store, as a tier has it: URL[#options].")],
    measure: Annotated[bool, typer.Option(help="Measure throughput too; takes seconds.")] = True,
) -> None:
    """Hold a live store to what a backend must do, under a random prefix that is removed in the end.

    Ends with status 1 if it fails. Needs pytest and Hypothesis: pip install 'lmcache-sdk[testing]'.
    """
    for package in ("pytest", "hypothesis"):
        if not find_spec(package):
            raise ConfigError(f"this needs the package {package!r}: pip install 'lmcache-sdk[testing]'")
    failed = True
    store = LiveStore(url)
    try:
        with store:
            typer.echo(f"{hide_secrets(url)}, under the prefix {store.prefix}/")
            if store.alone:
                typer.echo(f"what is written is looked at by the client that wrote it: {store.alone}")
            failed = not _conforms(store)
            if measure and store.stores:
                _measure(store)
    except BackendError as error:
        failed = True
        typer.echo(f"{_FAILED}  {error}")
    finally:
        if store.left:
            typer.echo(f"{_LEFT}  under {store.prefix}/ something may be left: {store.left}")
    if failed:
        raise typer.Exit(1)


def _conforms(store: LiveStore) -> bool:
    """Run the suite; whether it ran whole, and nothing failed."""
    import pytest

    spec = find_spec("lmcache_sdk.testing")
    assert spec and spec.submodule_search_locations
    suite = Path(spec.submodule_search_locations[0]) / "live.py"
    report = _Report(store)
    with tempfile.TemporaryDirectory(prefix="lmcache-sdk-check-") as folder, _plain_pytest():
        arguments = [str(suite), "-c", os.devnull, "--rootdir", folder, "--basetemp", f"{folder}/tests"]
        plugins = ["no:terminal", "no:cacheprovider"]
        with _interrupts() as interrupted:
            status = pytest.main([*arguments, *(f"-p{plugin}" for plugin in plugins)], plugins=[report])
    if interrupted or status == pytest.ExitCode.INTERRUPTED:
        raise KeyboardInterrupt
    typer.echo(f"{report.passed} passed, {report.failed} failed, {report.skipped} skipped")
    return status == pytest.ExitCode.OK


@contextmanager
def _interrupts() -> Iterator[list[int]]:
    """Those that come meanwhile. The exception alone may be lost, where it meets code that runs for the collector."""
    came: list[int] = []
    before = signal.getsignal(signal.SIGINT)

    def note(number: int, frame: FrameType | None) -> None:
        came.append(number)
        if callable(before):
            before(number, frame)

    signal.signal(signal.SIGINT, note)
    try:
        yield came
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def _plain_pytest() -> Iterator[None]:
    """Without what the user's environment adds to pytest."""
    before = dict(os.environ)
    os.environ.pop("PYTEST_ADDOPTS", None)
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


class _Report:
    """A plugin of pytest: hands the store to the suite, and prints a line for each test."""

    def __init__(self, store: LiveStore) -> None:
        self._store = store
        self.passed = self.failed = self.skipped = 0

    def pytest_configure(self, config: Any) -> None:
        config.pluginmanager.register(self._store, PLUGIN)

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.passed and report.when != "call":
            return
        name = report.nodeid.rpartition("::")[2].removeprefix("test_").replace("_", " ")
        if report.passed:
            self.passed += 1
            typer.echo(f"{_OK}  {name}")
        elif report.skipped:
            self.skipped += 1
            why = report.longrepr[2].removeprefix("Skipped: ")
            typer.echo(f"{_SKIPPED}  {name}: {why}")
        else:
            self.failed += 1
            crash = getattr(report.longrepr, "reprcrash", None)
            why = crash.message if crash else str(report.longrepr)
            typer.echo(f"{_FAILED}  {name}")
            for must in (value for key, value in report.user_properties if key == "must"):
                typer.echo(f"           breaks MUST {must}")
            for line in why.splitlines()[:_LINES]:
                typer.echo(f"           {line}")


def _measure(store: LiveStore) -> None:
    typer.echo(
        f"\nThroughput, MB/s: calls of up to 8 MiB, one that writes, two that read at once, as the cache does.\n"
        f"plain: {plain_way(store.url)}"
    )
    heads = ("record", "put", "plain put", "put/plain", "get", "plain get", "get/plain")
    rows = [
        (
            f"{speed.nbytes >> 20} MiB",
            *(f"{rate / 1e6:,.0f}" for rate in (speed.put, speed.plain_put)),
            f"{speed.put / speed.plain_put:.0%}",
            *(f"{rate / 1e6:,.0f}" for rate in (speed.get, speed.plain_get)),
            f"{speed.get / speed.plain_get:.0%}",
        )
        for speed in throughput(store)
    ]
    print_table(heads, rows, right=heads)
    contains, prefix_len = existence(store)
    typer.echo(f"of 500 keys: contains {contains * 1e3:.1f} ms, prefix_len {prefix_len * 1e3:.1f} ms")
