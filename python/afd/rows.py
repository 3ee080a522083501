"""Rows of the .jsonl and .csv files that a user names. Whatever stands there, a line is named."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

# Line number, from 1, and the row as an object's or a header's keys give it; or why it is none.
Rows = Iterator[tuple[int, "dict[str, Any] | str"]]


# A million prompts fit.
MAX_BYTES = 1 << 30
# A zero byte in a text, as JSON writes it; the backslash before it may be the text's own.
_ZERO = re.compile(r"(?<!\\)(?:\\\\)*\\u0000")


def read_text(path: Path) -> str:
    """The text of a UTF-8 file, with or without a byte order mark.

    Raises ValueError, which names no file, where it cannot be read or is not text.
    """
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise ValueError(f"cannot be read ({error.strerror or error})") from error
    if len(data) > MAX_BYTES:
        raise ValueError(f"cannot be read (it has more than {MAX_BYTES} bytes)")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = 1 + data.count(b"\n", 0, error.start)
        wrong = f"line {line}: byte {data[error.start]:#04x} is not UTF-8"
        raise ValueError(f"cannot be read ({wrong})") from error
    if "\0" in text:
        line = 1 + text.count("\n", 0, text.index("\0"))
        raise ValueError(f"cannot be read (line {line}: a zero byte; needed: UTF-8 text)")
    return text


def parse_json(text: str) -> Any:
    """What a JSON text holds. ValueError for whatever is wrong with it, also for zero bytes and
    halves of characters, which JSON can write and no path or tokenizer takes."""
    try:
        value = json.loads(text)
        written = json.dumps(value, ensure_ascii=False)
        written.encode()
    except RecursionError as error:
        raise ValueError(str(error)) from None
    if _ZERO.search(written):
        raise ValueError("a text holds a zero byte")
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
