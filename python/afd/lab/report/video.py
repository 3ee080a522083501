"""The report of one run at video size: alarms, teacher and student side by side, curves."""

from __future__ import annotations

import base64
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from afd.config.run import read_yaml
from afd.errors import ConfigError
from afd.lab.report import curves as curves
from afd.lab.report.charts import Chart, Series, draw
from afd.lab.report.read import Part, numbers, read_jsonl, read_parts, runs
from afd.lab.report.settings import config_table, facts, progress
from afd.lab.report.words import Headline, number
from afd.trainer.motion import DEFINITION, DYNAMIC

# Videos of the way that are shown, and of the final evaluation; larger files are only named.
WAY, SAMPLES, LARGEST = 6, 4, 12 * 2**20
RATING = "as the untouched VideoAlign rates it, in standard deviations of its authors' videos"
MEANINGS = {
    "MQ": ("Motion quality", RATING),
    "VQ": ("Visual quality", RATING),
    "TA": ("Text alignment", RATING),
    "Overall": ("VQ + MQ + TA", RATING),
    "motion": ("Motion", DEFINITION),
    "dynamic": ("Dynamic", f"share of videos whose motion is above {DYNAMIC:g} pixels"),
    "score": ("Online score", "of the discriminator as it is now; only differences mean anything"),
}
SHOWN = (
    "student/r_mean",
    "student/r_at_0",
    "student/r_at_1",
    "discriminator/accuracy",
    "discriminator/margin",
    "discriminator/loss",
    "student/loss",
    "student/old_deviation",
    "student/ref_deviation",
)


_UPDATE = re.compile(r"update_[0-9]{1,15}\Z")


def is_video_run(run_dir: Path) -> bool:
    """Whether a folder holds one run that is evaluated as video."""
    try:
        config = read_yaml(run_dir / "config.yaml")
        return bool(config["evaluation"]["kind"] == "video")
    except (ConfigError, KeyError, TypeError):
        return False


def video_page(run_dir: Path) -> dict[str, Any]:
    """Everything that base.html and video.html show."""
    parts = read_parts(run_dir)
    run = next((part for part in runs(parts) if part.folder is not None), parts["afd"])
    base = parts["base"].metrics
    return {
        "name": run_dir.resolve().name,
        "date": run.when.strftime("%d %B %Y, %H:%M").lstrip("0") if run.when else "",
        "headline": _headline(run, base),
        "basis": _basis(run),
        "plane": None,
        "notices": list(_notices(run)),
        "alarms": run.warnings,
        "films": [group for group in _films(run_dir) if group["films"]],
        "parts": [{"name": part.name, "label": part.label} for part in (parts["base"], run)],
        "table": list(_table(run, base)),
        "table_note": "Means over the held-out videos of the last evaluation, and of the first.",
        "charts": [chart for chart in _charts(parts, run) if chart is not None],
        "charts_title": "How it learned",
        "charts_note": curves.charts_note(parts),
        "more_charts": [chart for chart in _more(parts, run) if chart is not None],
        "timing": curves.timing(parts),
        "facts": list(facts(parts)),
        "warnings": [],  # they are the alarms
        "config": config_table(parts),
    }


def _headline(run: Part, base: dict[str, float]) -> Headline:
    title = f"{run.label}, {progress(run)}" + ("" if run.finished else ", unfinished")
    told = []
    for key, what in (("MQ", "the untouched VideoAlign’s rating of motion"), ("motion", "motion")):
        if key in run.metrics:
            now = number(run.metrics[key])
            if key in base:
                told.append(f"{what} went from {number(base[key])} (base) to {now}")
            else:
                told.append(f"{what} is {now}")
    count = len(run.warnings)
    told.append(f"{count or 'no'} alarm{'' if count == 1 else 's'} so far")
    text = "; ".join(told) + "."
    return Headline(title, text[0].upper() + text[1:])


def _basis(run: Part) -> str:
    if not run.evaluations:
        return ""
    last = run.evaluations[-1]
    videos = last.get("videos")
    text = f"Measured on {videos} held-out videos after update {last['step']}. "
    return text + "VideoAlign began the discriminator too: judge the motion by eye as well."


def _notices(run: Part) -> Iterator[str]:
    if not run.evaluations:
        yield "No evaluation yet."
    yield from run.problems


def _table(run: Part, base: dict[str, float]) -> Iterator[dict[str, Any]]:
    now = run.metrics
    for key in dict.fromkeys([k for k in MEANINGS if k in now] + sorted(now)):
        name, meaning = MEANINGS.get(key, (key, ""))
        before = number(base[key]) if key in base else "–"
        yield {
            "name": name,
            "key": key if key != name else "",
            "meaning": meaning,
            "direction": "",
            "cells": [
                {"name": "base", "text": before, "best": False},
                {"name": run.name, "text": number(now[key]), "best": False},
            ],
        }


# --- videos ---


def _films(run_dir: Path) -> Iterator[dict[str, Any]]:
    way = sorted(path for path in (run_dir / "videos").glob("*.mp4") if _UPDATE.match(path.stem))
    if len(way) > WAY:  # the first, the last, and some evenly between
        way = [way[round(i * (len(way) - 1) / (WAY - 1))] for i in range(WAY)]
    yield {
        "id": "side-by-side",
        "title": "Teacher | student",
        "note": "One prompt of the update, with the discriminator’s score and the weight r.",
        "films": [_film(path, f"after update {int(path.stem[7:])}") for path in way],
    }
    problems: list[str] = []
    named = read_jsonl(run_dir / "samples.jsonl", problems)
    chosen = [line for line in named if isinstance(line.get("file"), str)][:SAMPLES]
    yield {
        "id": "samples",
        "title": "Samples",
        "note": "Of the final evaluation, held-out prompts and seeds.",
        "films": [
            _film(run_dir / "samples" / Path(line["file"]).name, str(line.get("prompt", "")))
            for line in chosen
        ],
    }


def _film(path: Path, caption: str) -> dict[str, str]:
    """A video as a data URI, or why it is not shown."""
    try:
        if not path.is_file():
            return {"caption": caption, "missing": f"{path.name} is not there"}
        if path.stat().st_size > LARGEST:
            missing = f"{path.name} is large; it lies in the run's folder"
            return {"caption": caption, "missing": missing}
        data = base64.b64encode(path.read_bytes()).decode("ascii")
    except OSError as error:
        return {
            "caption": caption,
            "missing": f"{path.name[:80]} cannot be read ({error.strerror})",
        }
    return {"caption": caption, "missing": "", "data": f"data:video/mp4;base64,{data}"}


# --- curves ---


def _charts(parts: dict[str, Part], run: Part) -> Iterator[Chart | None]:
    name = run.name
    yield _hacking(run)
    yield curves.evaluation_chart(parts, "motion", "Motion", DEFINITION)
    for title, note, *lines in (
        (
            "r, the weight of the positive branch",
            "mean, and the share of samples at 0 and at 1",
            ("student/r_mean", "mean", name),
            ("student/r_at_0", "at 0", "base"),
            ("student/r_at_1", "at 1", "teacher"),
        ),
        (
            "Discriminator accuracy",
            "share of prompt-matched pairs in which the teacher’s video scores higher",
            ("discriminator/accuracy", "accuracy", name),
        ),
        (
            "Discriminator margin",
            "mean score of the teacher’s video above the student’s",
            ("discriminator/margin", "margin", name),
        ),
        (
            "How far the student is from",
            "mean squared difference of velocities",
            ("student/ref_deviation", "the base", "base"),
            ("student/old_deviation", "the old policy", name),
        ),
        (
            "Losses",
            "",
            ("student/loss", "student", name),
            ("discriminator/loss", "discriminator", "teacher"),
        ),
    ):
        yield curves.update_chart(parts, title, note, lines, zero=title[0] != "L", run=name)


def _hacking(run: Part) -> Chart | None:
    """The frozen rating over the online score, which should rise together."""
    rated = [(line["step"], numbers(line.get("metrics"))) for line in run.evaluations]
    rated = [(step, values) for step, values in rated if "MQ" in values]
    margins = [
        (u["step"], values) for u in run.updates if "discriminator/margin" in (values := numbers(u))
    ]
    series = [
        Series("MQ of the untouched VideoAlign", run.name, *_xy(rated, "MQ", 1.0), dots=True),
        Series(
            "online score above the teacher’s",
            "teacher",
            *_xy(margins, "discriminator/margin", -1.0),
            rough=len(margins) >= 25,
        ),
    ]
    note = "when the score rises while MQ falls, the student is fooling the discriminator"
    return draw("Untouched rating and online score", note, series if rated else [])


def _xy(
    lines: list[tuple[int, dict[str, float]]], key: str, sign: float
) -> tuple[list[int], list[float]]:
    return [step for step, _ in lines], [sign * values[key] for _, values in lines]


def _more(parts: dict[str, Part], run: Part) -> Iterator[Chart | None]:
    """Everything else that was logged or measured."""
    for key in curves.keys(run):
        if key not in SHOWN:
            lines = ((key, run.label, run.name),)
            yield curves.update_chart(parts, key, "", lines, run=run.name)
    for key in run.metrics:
        if key != "motion":
            name, meaning = MEANINGS.get(key, (key, ""))
            yield curves.evaluation_chart(parts, key, name, meaning)
