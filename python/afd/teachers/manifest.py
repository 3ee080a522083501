"""The manifest of a folder of videos, which maps each video to its prompt.

Formats, by file ending; video paths are relative to the folder and must stay inside it:

- `.jsonl`: one object a line, {"file": "000123.mp4", "prompt": "a red ball ..."}
- `.csv`: a header with the columns `file` and `prompt`; other columns are not read
- `.txt`: one video a line, file and prompt separated by a tab
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from afd.errors import TeacherError
from afd.files import Rows, csv_rows, json_rows, read_text
from afd.listing import few, listed

_log = logging.getLogger("afd")
MANIFESTS = ("prompts.jsonl", "prompts.csv", "prompts.txt")


def read_manifest(
    folder: Path, manifest: Path | str | None = None
) -> tuple[Path, list[tuple[str, str, str]], list[str]]:
    """Read a manifest: its path; (place, file, prompt) of the valid entries; and the problems of
    the invalid ones.

    No video is opened. Raises TeacherError if the folder or a readable manifest is missing.
    """
    if not folder.is_dir():
        raise TeacherError(f"teacher folder {folder}: does not exist")
    path = Path(manifest) if manifest is not None else _find(folder)
    readers = {".jsonl": json_rows, ".csv": _csv, ".txt": _txt}
    if path.suffix not in readers:
        raise TeacherError(f"teacher manifest {path}: needs the ending .jsonl, .csv or .txt")
    try:
        text = read_text(path)
    except ValueError as error:
        raise TeacherError(f"teacher manifest {path}: {error}") from None
    entries, problems = [], []
    for line, row in readers[path.suffix](text):
        if isinstance(row, str):
            problems.append(f"line {line}: {row}")
            continue
        file, prompt = row.get("file"), row.get("prompt")
        if isinstance(file, str) and file and isinstance(prompt, str):
            entries.append((f"line {line}", file, prompt))
        else:
            problems.append(f"line {line}: needs a file and a prompt")
    return path, entries, problems


def wrong_manifest(manifest: Path, problems: Sequence[str]) -> TeacherError:
    """The error of a manifest with problems: the first of them, the log's DEBUG lines all."""
    for problem in problems if len(few(problems)) < len(problems) else ():
        _log.debug("teacher manifest %s: %s", manifest, problem)
    return TeacherError(f"teacher manifest {manifest}: {len(problems)} wrong:\n{listed(problems)}")


def _find(folder: Path) -> Path:
    for name in MANIFESTS:
        if (folder / name).is_file():
            return folder / name
    raise TeacherError(f"teacher folder {folder}: contains none of {', '.join(MANIFESTS)}")


def _csv(text: str) -> Rows:
    return csv_rows(text, ("file", "prompt"))


def _txt(text: str) -> Rows:
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        file, tab, prompt = line.partition("\t")
        if tab and file:
            yield number, {"file": file, "prompt": prompt}
        else:
            yield number, "needs file and prompt with a tab between them"
