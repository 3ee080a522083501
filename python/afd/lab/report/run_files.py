"""Read a run folder; missing or damaged files become notes in the report."""

from __future__ import annotations

import math
import os
import re
from collections import Counter
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open

from afd.config.run import read_yaml
from afd.errors import ConfigError, TeacherError
from afd.files import parse_json, read_json_lines
from afd.listing import counted
from afd.teachers.folder import FolderTeacher

COLUMNS = ("teacher", "base", "afd", "sft")
RUNS = ("afd", "sft", "gan", "dmd")
LABELS = {"teacher": "Teacher", "base": "Base"} | {name: name.upper() for name in RUNS}
# Limits of what can be plotted: beyond them sums overflow and updates are not exact in float64.
LARGEST, LAST_UPDATE = 1e100, 2**53
# Samples are embedded in the page.
MAX_SAMPLES_BYTES = 1 << 29


class Clip(NamedTuple):
    """A sample: `video` is uint8 [F, H, W, 3]."""

    prompt: str
    seed: Any
    video: np.ndarray


@dataclass(frozen=True)
class Part:
    """A column of the report. `evaluations` and `updates` are sorted by update, one per update."""

    name: str
    folder: Path | None = None
    finished: bool = False
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    updates: list[dict[str, Any]] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)
    doctor: dict[str, Any] = field(default_factory=dict)
    clips: list[Clip] = field(default_factory=list)
    source: FolderTeacher | None = None
    warnings: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    @property
    def label(self) -> str:
        return LABELS[self.name]

    @property
    def is_run(self) -> bool:
        return self.name in RUNS

    @property
    def prompts(self) -> list[str]:
        """Prompts that have a video."""
        if self.clips:
            return [clip.prompt for clip in self.clips]
        return [request.prompt for request in self.source.requests] if self.source else []

    @property
    def metrics(self) -> dict[str, float]:
        """Finite values of the last evaluation."""
        return numbers(self.evaluations[-1].get("metrics")) if self.evaluations else {}

    @property
    def progress(self) -> str:
        """Last known update: "update 150 of 400"."""
        update = max([0, *(line["update"] for line in self.evaluations + self.updates)])
        updates = self.config.get("updates")
        return f"update {update}" + (f" of {updates}" if updates else "")

    @property
    def when(self) -> datetime | None:
        """Modification time of the newest file."""
        names = ("DONE", "evaluation.jsonl", "metrics.jsonl")
        for path in [self.folder / name for name in names] if self.folder else []:
            try:
                return datetime.fromtimestamp(path.stat().st_mtime)
            except (OSError, ValueError, OverflowError):  # absent, or an invalid timestamp
                continue
        return None


def holds_run(run_dir: Path) -> bool:
    """Whether a folder holds files of a run, itself or in one of a quickstart's folders."""
    places = (run_dir, *(run_dir / name for name in COLUMNS if name != "teacher"))
    names = ("config.yaml", "metrics.jsonl", "evaluation.jsonl")
    return any(os.path.lexists(place / name) for place in places for name in names)


def read_parts(run_dir: Path) -> dict[str, Part]:
    """The report columns of a quickstart folder or a single run folder."""
    if (run_dir / "config.yaml").is_file() or (run_dir / "metrics.jsonl").is_file():
        run = _read_part("afd", run_dir)
        methods = [run.config.get("method"), *(line.get("method") for line in run.evaluations)]
        name = next((str(method) for method in methods if method), "afd")
        parts = {column: Part(column) for column in COLUMNS}
        parts["teacher"] = _read_part("teacher", run_dir / "teacher")
        if name in RUNS:
            parts[name] = replace(run, name=name)
    else:
        parts = {name: _read_part(name, run_dir / name) for name in COLUMNS}
    if parts["teacher"].folder is None:
        for run in runs(parts):
            teacher = run.config.get("teacher")
            if isinstance(teacher, dict) and isinstance(path := teacher.get("path"), str) and path:
                parts["teacher"] = _read_part("teacher", Path(path), teacher.get("manifest"))
    parts = _by_method(parts)
    if not parts["base"].evaluations:
        # Before its first update a run is the base student.
        first = [line for run in runs(parts) for line in run.evaluations[:1] if line["update"] == 0]
        parts["base"] = replace(parts["base"], evaluations=first[:1])
    return parts


def runs(parts: dict[str, Part]) -> list[Part]:
    """Columns of trained students, including those without a folder."""
    return [part for part in parts.values() if part.is_run]


def _read_part(name: str, folder: Path, manifest: Any = None) -> Part:
    try:
        if not folder.is_dir():
            return Part(name)
    except OSError as error:  # the name is too long
        return Part(name, problems=[f"cannot be read ({error})"])
    problems: list[str] = []
    source = None
    if name == "teacher":
        try:
            source = FolderTeacher(folder, manifest if isinstance(manifest, str) else None)
        except (TeacherError, OSError, ValueError) as error:
            problems.append(str(error))
    return Part(
        name,
        folder,
        finished=(folder / "DONE").is_file(),
        evaluations=_read_lines(folder / "evaluation.jsonl", problems),
        updates=by_update(_read_lines(folder / "metrics.jsonl", problems)),
        config=_read_mapping(folder / "config.yaml", problems),
        doctor=_read_mapping(folder / "doctor.json", problems),
        clips=_read_clips(folder / "samples.safetensors", problems),
        source=source,
        warnings=_read_warnings(folder / "train.log"),
        problems=problems,
    )


def _by_method(parts: dict[str, Part]) -> dict[str, Part]:
    """Move evaluations to the column of their method, since base/ may also hold the teacher's."""
    lines: dict[str, list[dict[str, Any]]] = {name: [] for name in parts}
    for name, part in parts.items():
        for line in part.evaluations:
            method = str(line.get("method"))
            lines[method if method in parts and not part.is_run else name].append(line)
    return {name: replace(part, evaluations=by_update(lines[name])) for name, part in parts.items()}


def by_update(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Sort lines by update; the last line of each update and method wins."""
    kept: dict[tuple[int, str], dict[str, Any]] = {}
    for line in lines:
        update = line.get("update")
        if type(update) is int and 0 <= update < LAST_UPDATE:
            kept[update, str(line.get("method", ""))] = {**line, "update": update}
    return sorted(kept.values(), key=lambda line: line["update"])


def numbers(data: Any) -> dict[str, float]:
    """The plottable numbers of a mapping; empty if `data` is not a mapping."""
    if not isinstance(data, dict):
        return {}
    return {
        str(key): float(value)
        for key, value in data.items()
        # NaN fails the comparison.
        if type(value) in (int, float) and -LARGEST <= value <= LARGEST
    }


def read_jsonl(path: Path, problems: list[str]) -> list[dict[str, Any]]:
    """The objects of a JSON-lines file; damaged (truncated) lines are skipped and noted."""
    try:
        lines = read_json_lines(path) if path.is_file() else []
    except OSError as error:
        problems.append(f"{path.name}: cannot be read ({error.strerror})")
        return []
    damaged = sum(line.value is None for line in lines)
    if damaged:
        problems.append(f"{path.name}: {counted(damaged, 'unreadable line')} skipped")
    return [line.value for line in lines if line.value is not None]


def _read_lines(path: Path, problems: list[str]) -> list[dict[str, Any]]:
    """The lines of a run's metrics; those without a count of updates are skipped and noted."""
    lines = read_jsonl(path, problems)
    kept = [line for line in lines if "update" in line]
    if len(kept) < len(lines):
        skipped = counted(len(lines) - len(kept), "line")
        problems.append(f"{path.name}: {skipped} without update skipped")
    return kept


def _read_mapping(path: Path, problems: list[str]) -> dict[str, Any]:
    """The mapping in a YAML or JSON file (JSON is YAML)."""
    try:
        return read_yaml(path) if path.is_file() else {}
    except ConfigError as error:
        problems.append(str(error))
        return {}


def _read_clips(path: Path, problems: list[str]) -> list[Clip]:
    if not path.is_file():
        return []
    try:
        with safe_open(str(path), framework="np") as file:
            layout = file.get_slice("videos")
            dtype, shape = layout.get_dtype(), layout.get_shape()
            # Check before reading the tensor: NumPy may lack the dtype, and it may be huge.
            if dtype != "U8" or len(shape) != 5 or shape[-1] != 3 or 0 in shape:
                raise ValueError(f"it holds {dtype} {list(shape)}, not uint8 [N, F, H, W, 3]")
            if math.prod(shape) > MAX_SAMPLES_BYTES:
                raise ValueError(f"more than {MAX_SAMPLES_BYTES} bytes of videos")
            videos, metadata = file.get_tensor("videos"), file.metadata() or {}
        prompts, seeds = (parse_json(metadata.get(key, "[]")) for key in ("prompts", "seeds"))
        if not isinstance(prompts, list):
            raise ValueError(f"its prompts are {type(prompts).__name__}, not a list")
        if len(prompts) != len(videos):
            raise ValueError(f"{len(videos)} videos but {len(prompts)} prompts")
    except (SafetensorError, OSError, ValueError, TypeError) as error:
        problems.append(f"{path.name}: cannot be read ({error})")
        return []
    if not isinstance(seeds, list) or len(seeds) != len(videos):
        seeds = [None] * len(videos)
    return [
        Clip(str(p), seed, video) for p, seed, video in zip(prompts, seeds, videos, strict=True)
    ]


def _read_warnings(path: Path) -> list[str]:
    """Distinct warnings of a log, each with its first update and count."""
    first: dict[str, str] = {}
    count: Counter[str] = Counter()
    try:
        text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    except OSError:  # removed in the meantime
        return []
    for update, warning in re.findall(r"\bWARNING:? (?:update (\d+): )?(.*)", text):
        first.setdefault(warning, f"from update {update}" if update else "")
        count[warning] += 1
    warnings = []
    for text, times in count.items():
        notes = ", ".join(filter(None, (first[text], f"{times} times" if times > 1 else "")))
        warnings.append(f"{text} ({notes})" if notes else text)
    return warnings
