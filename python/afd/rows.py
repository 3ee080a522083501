"""Rows of the .jsonl and .csv files that a user names. Whatever stands there, a line is named."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Sequence
from typing import Any

# Line number, from 1, and the row as an object's or a header's keys give it; or why it is none.
Rows = Iterator[tuple[int, "dict[str, Any] | str"]]


def parse_json(text: str) -> Any:
    """What a JSON text holds. ValueError for whatever is wrong with it, also for halves of
    characters, which JSON can write and no file or tokenizer takes."""
    try:
        value = json.loads(text)
        json.dumps(value, ensure_ascii=False).encode()
    except RecursionError as error:
        raise ValueError(str(error)) from None
    return value


def json_rows(text: str) -> Rows:
    """One JSON object a line; empty lines are passed over."""
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = parse_json(line)
        except ValueError as error:
            yield number, f"not JSON ({error})"
            continue
        yield number, row if isinstance(row, dict) else f"{type(row).__name__}, not an object"


def csv_rows(text: str, columns: Sequence[str] = ()) -> Rows:
    """Rows under a header, which must have the `columns`; None where a row is too short."""
    rows = csv.DictReader(io.StringIO(text, newline=""))
    try:
        header = rows.fieldnames
        if not set(columns) <= set(header or ()):
            yield 1, f"the header is {header}, needs {' and '.join(columns)}"
            return
        for row in rows:
            yield rows.line_num, row
    except csv.Error as error:
        yield rows.line_num, f"not CSV ({error})"
