"""What the report knows: every file of a run folder, read so that a missing or broken one is a
sentence in the report and never an exception.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from afd.config.run import read_yaml
from afd.errors import ConfigError, TeacherError, VideoError
from afd.files import parse_json, read_json_lines
from afd.teachers.base import Request
from afd.teachers.folder import FolderTeacher
from afd.video import read_video, to_uint8

COLUMNS = ("teacher", "base", "afd", "sft")
RUNS = ("afd", "sft", "gan", "dmd")
# What a report can draw: beyond are mistakes, and sums that are no numbers any more.
LARGEST, LAST_STEP = 1e100, 2**53
# Samples are pictures in the page.
MAX_SAMPLES_BYTES = 1 << 29
MAX_JSON_BYTES = 1 << 24
LABELS = {"teacher": "Teacher", "base": "Base"} | {name: name.upper() for name in RUNS}


@dataclass(frozen=True)
class Clips:
    """uint8 videos [N, F, H, W, 3] with the prompt and the seed of each."""

    videos: np.ndarray
    prompts: list[str]
    seeds: list[Any]


@dataclass(frozen=True)
class Part:
    """One column of the report. `evaluations` and `updates` are sorted by step, one of a step."""

    name: str
    folder: Path | None = None
    finished: bool = False
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    updates: list[dict[str, Any]] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)
    doctor: dict[str, Any] = field(default_factory=dict)
    clips: Clips | None = None
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
        """The prompts that have a video here."""
        if self.clips is not None:
            return self.clips.prompts
        return [request.prompt for request in self.source.requests] if self.source else []

    @property
    def metrics(self) -> dict[str, float]:
        """The finite numbers of the last evaluation."""
        return numbers(self.evaluations[-1].get("metrics")) if self.evaluations else {}

    @property
    def step(self) -> int:
        """The last update known of."""
        return max([0, *(int(line["step"]) for line in (self.evaluations + self.updates))])

    @property
    def when(self) -> datetime | None:
        """When the part's last file was written."""
        if self.folder is None:
            return None
        names = ("DONE", "evaluation.jsonl", "metrics.jsonl")
        paths = [self.folder / name for name in names]
        try:
            times = [path.stat().st_mtime for path in paths if path.is_file()]
            return datetime.fromtimestamp(times[0]) if times else None
        except (OSError, ValueError, OverflowError):  # removed meanwhile, or of no year
            return None


def read_parts(run_dir: Path) -> dict[str, Part]:
    """The four columns of a quickstart folder, or of one run's folder."""
    single = (run_dir / "config.yaml").is_file() or (run_dir / "metrics.jsonl").is_file()
    if single:
        run = _part("afd", run_dir)
        name = str(run.config.get("method") or _method_of(run) or "afd")
        parts = {n: Part(n) for n in COLUMNS} | {"teacher": _part("teacher", run_dir / "teacher")}
        if name in RUNS:
            parts[name] = replace(run, name=name)
    else:
        parts = {name: _part(name, run_dir / name) for name in COLUMNS}
    if parts["teacher"].folder is None:
        for run in runs(parts):
            named = run.config.get("teacher")
            path = named.get("path") if isinstance(named, dict) else None
            if path and isinstance(path, str) and isinstance(named, dict):
                parts["teacher"] = _part("teacher", Path(path), named.get("manifest"))
    parts = _route(parts)
    if not parts["base"].evaluations:
        # Before its first update a run is the base student.
        lines = [line for run in runs(parts) for line in run.evaluations[:1]]
        starts = [line for line in lines if line["step"] == 0]
        parts["base"] = replace(parts["base"], evaluations=starts[:1])
    return parts


def runs(parts: dict[str, Part]) -> list[Part]:
    """The columns that are trained students, those that have no folder included."""
    return [part for part in parts.values() if part.is_run]


def _part(name: str, folder: Path, manifest: Any = None) -> Part:
    try:
        if not folder.is_dir():
            return Part(name)
    except OSError as error:  # a name that is too long
        return Part(name, problems=[f"cannot be looked at ({error})"])
    problems: list[str] = []
    return Part(
        name,
        folder,
        finished=(folder / "DONE").is_file(),
        evaluations=read_jsonl(folder / "evaluation.jsonl", problems),
        updates=by_step(read_jsonl(folder / "metrics.jsonl", problems)),
        config=_read_mapping(folder / "config.yaml", problems),
        doctor=_read_mapping(folder / "doctor.json", problems),
        clips=_read_clips(folder / "samples.safetensors", problems),
        source=_open_teacher(folder, manifest, problems) if name == "teacher" else None,
        warnings=_read_warnings(folder / "train.log"),
        problems=problems,
    )


def _open_teacher(folder: Path, manifest: Any, problems: list[str]) -> FolderTeacher | None:
    try:
        return FolderTeacher(folder, manifest if isinstance(manifest, str) else None)
    except (TeacherError, OSError, ValueError) as error:
        problems.append(str(error))
        return None


def _method_of(run: Part) -> str | None:
    return next((str(line["method"]) for line in run.evaluations if "method" in line), None)


def _route(parts: dict[str, Part]) -> dict[str, Part]:
    """Evaluations go to the column that their method names: base/ may hold the teacher's too."""
    lines: dict[str, list[dict[str, Any]]] = {name: [] for name in parts}
    for name, part in parts.items():
        for line in part.evaluations:
            method = str(line.get("method"))
            lines[method if method in parts and not part.is_run else name].append(line)
    return {name: replace(part, evaluations=by_step(lines[name])) for name, part in parts.items()}


def read_jsonl(path: Path, problems: list[str]) -> list[dict[str, Any]]:
    """The objects of a JSON-lines file; lines that are none (a cut-off last one) are skipped."""
    try:
        lines = read_json_lines(path) if path.is_file() else []
    except OSError as error:
        problems.append(f"{path.name}: cannot be read ({error.strerror})")
        return []
    broken = sum(line.value is None for line in lines)
    if broken:
        problems.append(f"{path.name}: {broken} unreadable line(s) skipped")
    return [line.value for line in lines if line.value is not None]


def by_step(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Sorted by step; of two lines of one step and method the later counts."""
    kept: dict[tuple[int, str], dict[str, Any]] = {}
    for line in lines:
        step = line.get("step", 0)
        if type(step) is int and 0 <= step < LAST_STEP:
            kept[step, str(line.get("method", ""))] = {**line, "step": step}
    return sorted(kept.values(), key=lambda line: line["step"])


def numbers(data: Any) -> dict[str, float]:
    """The finite numbers of a mapping that can be drawn, whatever else it holds."""
    if not isinstance(data, dict):
        return {}
    return {
        str(key): float(value)
        for key, value in data.items()
        # A comparison with NaN is false.
        if type(value) in (int, float) and -LARGEST <= value <= LARGEST
    }


def _read_mapping(path: Path, problems: list[str]) -> dict[str, Any]:
    """A YAML or JSON file that holds a mapping, else an empty one."""
    if not path.is_file():
        return {}
    try:
        if path.suffix != ".json":
            return read_yaml(path)
        with path.open("rb") as file:
            data = parse_json(file.read(MAX_JSON_BYTES).decode("utf-8"))
        if not isinstance(data, dict):
            raise ValueError(f"{type(data).__name__}, not an object")
    except ConfigError as error:
        problems.append(str(error))
    except (OSError, ValueError) as error:
        problems.append(f"{path.name}: cannot be read ({error})")
    else:
        return data
    return {}


def _read_clips(path: Path, problems: list[str]) -> Clips | None:
    if not path.is_file():
        return None
    try:
        with safe_open(str(path), framework="np") as file:
            # What is no picture has no dtype of numpy's, perhaps.
            kind, shape = file.get_slice("videos").get_dtype(), file.get_slice("videos").get_shape()
            if kind == "U8" and math.prod(shape) > MAX_SAMPLES_BYTES:
                raise ValueError(f"more than {MAX_SAMPLES_BYTES} bytes of videos")
            videos = file.get_tensor("videos") if kind == "U8" else np.zeros(0, np.float32)
            extra = file.metadata() or {}
        prompts = parse_json(extra.get("prompts", "[]"))
        seeds = parse_json(extra.get("seeds", "[]"))
    except (SafetensorError, OSError, ValueError, TypeError) as error:
        problems.append(f"{path.name}: cannot be read ({error})")
        return None
    if videos.ndim != 5 or videos.shape[-1] != 3 or videos.dtype != np.uint8 or not videos.size:
        problems.append(f"{path.name}: holds {kind} {list(shape)}, not uint8 [N, F, H, W, 3]")
        return None
    if not isinstance(prompts, list):
        problems.append(f"{path.name}: its prompts are {type(prompts).__name__}, not a list")
        return None
    if len(prompts) != len(videos):
        problems.append(f"{path.name}: {len(videos)} videos but {len(prompts)} prompts")
        return None
    known = isinstance(seeds, list) and len(seeds) == len(videos)
    return Clips(videos, [str(p) for p in prompts], seeds if known else [None] * len(videos))


def _log_lines(path: Path) -> Iterator[str]:
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            yield from file
    except OSError:
        return


def _read_warnings(path: Path) -> list[str]:
    """Distinct warnings of a log, each with the step where it came first and how often it came."""
    if not path.is_file():
        return []
    first: dict[str, str] = {}
    count: Counter[str] = Counter()
    for line in _log_lines(path):
        found = re.search(r"\bWARNING:? (?:(?:step|update) (\d+): )?(.*)", line)
        if found:
            first.setdefault(found[2], found[1] or "")
            count[found[2]] += 1
    notes = {
        text: (f"from update {first[text]}" if first[text] else "")
        + (f", {times} times" if times > 1 else "")
        for text, times in count.items()
    }
    return [f"{text} ({note.strip(', ')})" if note else text for text, note in notes.items()]


# --- videos ---


def choose_prompts(parts: dict[str, Part], count: int) -> list[str]:
    """Up to `count` prompts that most columns can show, as unlike each other as can be."""
    shown = Counter(prompt for part in parts.values() for prompt in set(part.prompts))
    if not shown:
        return []
    most = max(shown.values())
    order = dict.fromkeys(prompt for part in parts.values() for prompt in part.prompts)
    left = [prompt for prompt in order if shown[prompt] == most]
    chosen = [left.pop(0)]
    while left and len(chosen) < count:
        unlike = {p: [_unlike(p, other) for other in chosen] for p in left}
        farthest = max(unlike, key=lambda p: (min(unlike[p]), sum(unlike[p])))
        left.remove(farthest)
        chosen.append(farthest)
    return sorted(chosen, key=list(order).index)


def _unlike(a: str, b: str) -> int:
    return len(set(a.split()) ^ set(b.split()))


def same_noise(parts: dict[str, Part]) -> bool:
    """Whether the students' samples were drawn from the same known seeds, prompt by prompt."""
    clips = [part.clips for part in parts.values() if part.clips is not None]
    pairs = [list(zip(c.prompts, c.seeds, strict=True)) for c in clips]
    return len(clips) > 1 and None not in clips[0].seeds and all(p == pairs[0] for p in pairs)


def pick_videos(parts: dict[str, Part], prompt: str) -> Iterator[tuple[str, np.ndarray | str]]:
    """Per column the video [F, H, W, 3] of a prompt, from one seed where they share one; or why
    there is none."""
    seeds = {
        name: [s for s, p in zip(part.clips.seeds, part.clips.prompts, strict=True) if p == prompt]
        for name, part in parts.items()
        if part.clips is not None and prompt in part.clips.prompts
    }
    lists = list(seeds.values())
    common = [s for s in lists[0] if all(s in other for other in lists)] if lists else []
    for name, part in parts.items():
        if name in seeds and part.clips is not None:
            seed = common[0] if common else seeds[name][0]
            pairs = list(zip(part.clips.prompts, part.clips.seeds, strict=True))
            yield name, part.clips.videos[pairs.index((prompt, seed))]
        elif part.source is not None:
            yield name, _decode(part.source, _shape(parts), prompt)
        else:
            yield name, "no samples yet" if part.folder is not None else "did not run"


def _shape(parts: dict[str, Part]) -> dict[str, Any]:
    """The size in which the trainer saw the teacher's videos (the toy's where no config tells)."""
    configs = (run.config.get("video") for run in runs(parts))
    video = next((config for config in configs if isinstance(config, dict)), {})
    shape: dict[str, Any] = {"frames": 12, "height": 16, "width": 16}
    shape |= {k: v for k in shape if type(v := video.get(k)) is int and 0 < v < 1 << 14}
    fps = numbers(video).get("fps", 0.0)
    shape |= {"fps": fps} if fps > 0 else {}
    return shape | ({"hdr": video["hdr"]} if video.get("hdr") in ("tonemap", "refuse") else {})


def _decode(source: FolderTeacher, shape: dict[str, Any], prompt: str) -> np.ndarray | str:
    try:
        path = source.answer(Request(prompt))
        return to_uint8(read_video(path, short="repeat", **shape)).numpy()
    except (TeacherError, VideoError, OSError, ValueError) as error:
        return str(error)
