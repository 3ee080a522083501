"""Tables of results: on a terminal, as several under each other if one is too wide; in Markdown."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

# Columns of the terminal that a table's column takes beside its text: padding and a rule.
_EDGE = 3


def print_table(header: Sequence[str], body: Sequence[Sequence[str]], console: Console) -> None:
    """Print rows of text; columns that do not fit beside the first follow in further tables.

    Each table repeats the first column, which names the rows.
    """
    widths = [max(map(len, column)) + _EDGE for column in zip(header, *body, strict=True)]
    shown: list[int] = []
    for column in range(1, len(header)):
        used = widths[0] + sum(widths[i] for i in shown) + 1
        if shown and used + widths[column] > console.width:
            _print(header, body, [0, *shown], console)
            shown = []
        shown.append(column)
    _print(header, body, [0, *shown], console)


def _print(
    header: Sequence[str], body: Sequence[Sequence[str]], shown: Sequence[int], console: Console
) -> None:
    table = Table()
    for column in shown:
        table.add_column(header[column], justify="right" if column else "left", overflow="fold")
    for row in body:
        table.add_row(*(row[column] for column in shown))
    console.print(table)


def markdown_table(header: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    rows = [header, ["---"] * len(header), *body]
    return "".join("| " + " | ".join(row) + " |\n" for row in rows)
