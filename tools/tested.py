"""The tables of engine versions in docs/, written from what the suites recorded; never by hand.

    make nox ARGS="-s vllm -- --record docs/tested.json"    run a suite whole, and keep what passed
    tested.py                                              write the tables

Only the standard library: the tables are checked wherever tests run.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RECORD = ROOT / "docs" / "tested.json"
PAGES = {engine: ROOT / "docs" / f"{engine}.md" for engine in ("vllm", "sglang")}
HEAD = "| version | torch | Python | machine | tests passed | skipped |\n|---|---|---|---|---|---|\n"
PLACE = re.compile(r"(<!-- tested -->\n).*?(<!-- /tested -->)", re.DOTALL)


def add(record: Path, row: dict[str, Any]) -> None:
    """Keep a run; an earlier one of the same versions is forgotten."""
    rows = json.loads(record.read_text()) if record.exists() else []
    rows = [other for other in rows if _versions(other) != _versions(row)] + [row]
    record.write_text(json.dumps(sorted(rows, key=_versions, reverse=True), indent=1) + "\n")


def table(engine: str, rows: list[dict[str, Any]]) -> str:
    """Markdown, one line a run."""
    return HEAD + "".join(_line(row) for row in rows if row["engine"] == engine)


def with_table(engine: str, rows: list[dict[str, Any]]) -> str:
    """The engine's page with its table brought up to date."""
    text = table(engine, rows)
    return PLACE.sub(lambda found: found[1] + text + found[2], PAGES[engine].read_text())


def _line(row: dict[str, Any]) -> str:
    passed = ", ".join(f"{name} {count}" for name, count in row["passed"].items())
    skipped = ", ".join(f"{name} {count}" for name, count in row["skipped"].items()) or "none"
    cells = (f"`{row['package']}` {row['version']}", row["torch"], row["python"], row["machine"])
    return f"| {' | '.join(cells)} | {sum(row['passed'].values())}: {passed} | {skipped} |\n"


def _versions(row: dict[str, Any]) -> tuple[str, ...]:
    return tuple(row[name] for name in ("engine", "package", "version", "torch", "python", "machine"))


def main() -> None:
    rows = json.loads(RECORD.read_text())
    for engine, page in PAGES.items():
        page.write_text(with_table(engine, rows))


if __name__ == "__main__":
    main()
