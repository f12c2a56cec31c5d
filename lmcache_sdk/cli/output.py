"""What commands print."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
import typer


def print_json(value: Any) -> None:
    """One JSON value, indented."""
    typer.echo(msgspec.json.format(msgspec.json.encode(value), indent=2).decode())


def print_table(heads: Sequence[str], rows: Sequence[Sequence[str]], *, right: Sequence[str] = ()) -> None:
    """Columns as wide as their content, whatever the terminal: what is cut off cannot be read or copied.

    Args:
        right: the heads of columns that are flush right.
    """
    widths = [max(map(len, column)) for column in zip(heads, *rows, strict=True)]
    for row in (heads, *rows):
        cells = [
            text.rjust(width) if head in right else text.ljust(width)
            for head, text, width in zip(heads, row, widths, strict=True)
        ]
        typer.echo("  ".join(cells).rstrip())


def counted(count: int, noun: str) -> str:
    """``1 record``, ``1,024 records``."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"
