"""The engine matrix: one suite of scenarios, run for the engine that ``--engine`` names."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest

ENGINES = ("hf", "vllm", "sglang")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--engine", choices=ENGINES, help="the engine whose scenarios are run")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    chosen = config.getoption("--engine")
    others = [item for item in items if getattr(getattr(item, "cls", None), "engine_name", chosen) != chosen]
    config.hook.pytest_deselected(items=others)
    items[:] = [item for item in items if item not in others]
