"""The prompts that a paid service is asked for; reading them needs no HTTP client."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from afd.errors import TeacherError
from afd.files import Rows, csv_rows, json_rows, read_text

_log = logging.getLogger("afd")


def read_prompts(path: Path) -> list[str]:
    """Read the distinct prompts of a .txt (one per line), .jsonl or .csv (field `prompt`) file."""
    try:
        text = read_text(path)
    except ValueError as error:
        raise TeacherError(f"teacher.api.prompts {path}: {error}") from None
    rows: Rows
    if path.suffix == ".txt":
        rows = ((n, {"prompt": line}) for n, line in enumerate(text.split("\n"), 1))
    elif path.suffix == ".csv":
        rows = csv_rows(text, ("prompt",))
    elif path.suffix == ".jsonl":
        rows = json_rows(text)
    else:
        raise TeacherError(f"teacher.api.prompts {path}: needs the ending .txt, .jsonl or .csv")
    there = [prompt for number, row in rows if (prompt := _prompt(path, number, row))]
    once = list(dict.fromkeys(there))
    if not once:
        raise TeacherError(f"teacher.api.prompts {path}: contains no prompt")
    if len(once) < len(there):
        _log.warning("%s: %d prompts are repeated and count once", path, len(there) - len(once))
    return once


def _prompt(path: Path, number: int, row: dict[str, Any] | str) -> str:
    if isinstance(row, str):
        raise TeacherError(f"teacher.api.prompts {path}: line {number}: {row}")
    prompt = row.get("prompt")
    # A row of a .csv may end before its column.
    if path.suffix == ".jsonl" and not isinstance(prompt, str):
        raise TeacherError(f'teacher.api.prompts {path}: line {number} needs {{"prompt": "..."}}')
    return (prompt or "").strip()
