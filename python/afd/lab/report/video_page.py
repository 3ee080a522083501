"""Report sections specific to runs evaluated as video: the videos, and a reward-hacking check."""

from __future__ import annotations

import base64
import re
from pathlib import Path
from typing import Any

from afd.config.run import read_yaml
from afd.errors import ConfigError
from afd.lab.report.charts import Chart, Line, line_chart, logged
from afd.lab.report.metrics import number
from afd.lab.report.run_files import Part, numbers, read_jsonl

# Embedded videos from training and from the final evaluation, and the largest allowed, in bytes.
TRAINING, SAMPLES, MAX_BYTES = 6, 4, 12 * 2**20


def is_video_run(run_dir: Path) -> bool:
    """Whether a folder holds a single run that is evaluated as video."""
    try:
        return bool(read_yaml(run_dir / "config.yaml")["evaluation"]["kind"] == "video")
    except (ConfigError, KeyError, TypeError):
        return False


def video_page(run_dir: Path, run: Part, base: dict[str, float]) -> dict[str, Any]:
    """The template variables specific to video.html; `base`: the base student's metrics."""
    changes = []
    for key, what in (("MQ", "motion quality by the frozen VideoAlign"), ("motion", "motion")):
        if key in run.metrics:
            before = f"went from {number(base[key])} (base) to" if key in base else "is"
            changes.append(f"{what} {before} {number(run.metrics[key])}")
    count = len(run.warnings)
    changes.append(f"{count or 'no'} alarm{'' if count == 1 else 's'} so far")
    text = "; ".join(changes) + "."
    return {
        "title": f"{run.label}, {run.progress}" + ("" if run.finished else ", unfinished"),
        "paragraph": text[0].upper() + text[1:],
        "last": run.evaluations[-1] if run.evaluations else None,
        "alarms": run.warnings,
        "training_videos": _training_videos(run_dir),
        "samples": [
            _film(run_dir / "samples" / Path(line["file"]).name, str(line.get("prompt", "")))
            for line in read_jsonl(run_dir / "samples.jsonl", [])
            if isinstance(line.get("file"), str)
        ][:SAMPLES],
    }


def reward_hacking(run: Part) -> Chart | None:
    """Chart of the frozen rating and the online score, which should rise together."""
    rated = [(line["update"], numbers(line.get("metrics"))) for line in run.evaluations]
    quality = [(update, values["MQ"]) for update, values in rated if "MQ" in values]
    score = [(update, -margin) for update, margin in logged(run, "discriminator/margin")]
    lines = [
        Line("MQ by the frozen VideoAlign", run.name, quality, dots=True),
        Line("online score minus the teacher’s", "teacher", score),
    ]
    note = "when the score rises while MQ falls, the student fools the discriminator"
    return line_chart("Frozen rating and online score", note, lines if quality else [])


def _training_videos(run_dir: Path) -> list[dict[str, str]]:
    """Teacher and student side by side at evenly spaced updates, including the first and last."""
    paths = sorted((run_dir / "videos").glob("*.mp4"))
    paths = [path for path in paths if re.fullmatch(r"update_[0-9]{1,15}", path.stem)]
    if len(paths) > TRAINING:
        paths = [paths[round(i * (len(paths) - 1) / (TRAINING - 1))] for i in range(TRAINING)]
    return [_film(path, f"after update {int(path.stem[7:])}") for path in paths]


def _film(path: Path, caption: str) -> dict[str, str]:
    """A video as a data URI, or the reason why it is missing."""
    film = {"caption": caption, "missing": "", "data": ""}
    try:
        if not path.is_file():
            return film | {"missing": f"{path.name} is missing"}
        if path.stat().st_size > MAX_BYTES:
            return film | {"missing": f"{path.name} is too large to embed; see the run’s folder"}
        data = base64.b64encode(path.read_bytes()).decode("ascii")
        return film | {"data": f"data:video/mp4;base64,{data}"}
    except OSError as error:
        return film | {"missing": f"{path.name[:80]} cannot be read ({error.strerror})"}
