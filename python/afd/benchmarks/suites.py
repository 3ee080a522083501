"""Common parts of all benchmarks: prompts read from the user's files, and scores."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from afd import files
from afd.errors import ConfigError
from afd.files import write_bytes


@dataclass(frozen=True)
class Prompt:
    """A benchmark's prompt. `index`: its position in the file; `generate`: the text its videos are
    generated from; `dimensions`: the VBench dimensions it is rated on."""

    index: int
    text: str
    generate: str
    samples: int
    dimensions: tuple[str, ...] = ()


@dataclass(frozen=True)
class Clip:
    """A video of a benchmark. `name`: its file name in videos/, without the suffix."""

    suite: str
    prompt: Prompt
    sample: int
    seed: int
    name: str

    @property
    def file(self) -> str:
        return f"{self.name}.mp4"


@dataclass(frozen=True)
class Score:
    """A metric's mean over `videos` (None: not reported) of its `of` available videos."""

    suite: str
    metric: str
    value: float
    videos: int | None
    of: int


def need(path: Path | None, key: str, what: str) -> Path:
    """Return a path that the configuration must set, or raise ConfigError."""
    if path is None:
        raise ConfigError(f"{key}: not given; needed: {what}")
    return path


def read_text(path: Path, key: str) -> str:
    """Read the text file set by a key, or raise ConfigError; see `files.read_text`."""
    try:
        return files.read_text(path)
    except ValueError as error:
        raise ConfigError(f"{key} {path}: {error}") from error


def read_lines(path: Path, key: str) -> list[str]:
    """The non-blank lines of a .txt file, stripped."""
    lines = [line.strip() for line in read_text(path, key).split("\n")]
    if not any(lines):
        raise ConfigError(f"{key} {path}: contains no prompts")
    return [line for line in lines if line]


def read_rows(path: Path, key: str, columns: Sequence[str]) -> list[dict[str, str]]:
    """The rows of a .csv or .jsonl, all `columns` present as non-empty text; in a .txt, each line
    is the first column."""
    if path.suffix == ".txt":
        if len(columns) > 1:
            raise ConfigError(f"{key} {path}: a .txt has no column {columns[1]}")
        return [{columns[0]: line} for line in read_lines(path, key)]
    readers = {".csv": files.csv_rows, ".jsonl": files.json_rows}
    if path.suffix not in readers:
        raise ConfigError(f"{key} {path}: needs the ending .csv, .jsonl or .txt")
    found = []
    for number, row in readers[path.suffix](read_text(path, key)):
        if isinstance(row, str):
            raise ConfigError(f"{key} {path}:{number}: {row}")
        for column in columns:
            if not isinstance(row.get(column), str) or not row[column].strip():
                there = ", ".join(map(str, row))[:200] or "nothing"
                raise ConfigError(f"{key} {path}:{number}: no text in {column}; it has {there}")
        found.append({column: row[column] for column in columns})
    if not found:
        raise ConfigError(f"{key} {path}: contains no prompts")
    return found


def write_csv(path: Path, header: Sequence[str], lines: Sequence[Sequence[object]]) -> None:
    """Write a CSV file atomically."""
    held = io.StringIO(newline="")
    writer = csv.writer(held)
    writer.writerow(header)
    writer.writerows(lines)
    write_whole(path, held.getvalue())


def write_whole(path: Path, text: str) -> None:
    """Write a text atomically; undecodable bytes of paths are preserved."""
    write_bytes(path, text.encode("utf-8", "surrogateescape"))
