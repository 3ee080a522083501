"""One self-contained report.html from a quickstart folder, or from the folder of one run.

Every number comes from the run's own files; what is missing is named, never guessed.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from afd.files import write_bytes
from afd.lab.report import curves as curves
from afd.lab.report import words as words
from afd.lab.report.charts import exposure, sprite
from afd.lab.report.read import (
    LABELS,
    Part,
    choose_prompts,
    pick_videos,
    read_parts,
    runs,
    same_noise,
)
from afd.lab.report.settings import config_table, facts, progress
from afd.lab.report.video import is_video_run, video_page

PROMPTS = 6
ROLES = {
    "teacher": "black box, files only",
    "base": "the student before",
    "afd": "adversarial distillation",
    "sft": "fits the teacher’s videos",
    "gan": "learns through its last step",
    "dmd": "matches distributions",
}


def write_report(run_dir: Path) -> Path:
    """Write `run_dir`/report.html (whole or not at all) and return its path.

    Raises FileNotFoundError where `run_dir` is no folder. Parts that are missing, unfinished or
    unreadable are named in the report.
    """
    run_dir = Path(run_dir)
    if not run_dir.is_dir():
        raise FileNotFoundError(f"run_dir {run_dir}: no such folder; a run's folder is needed")
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    if is_video_run(run_dir):
        template, page = "video.html", video_page(run_dir)
    else:
        template, page = "page.html", _page(run_dir)
    html = environment.get_template(template).render(page)
    path = run_dir / "report.html"
    # A name may hold bytes that are no characters.
    write_bytes(path, html.encode("utf-8", "backslashreplace"))
    return path


def _page(run_dir: Path) -> dict[str, Any]:
    """Everything that base.html and page.html show."""
    parts = read_parts(run_dir)
    measured = {name: part.metrics for name, part in parts.items() if part.metrics}
    unfinished = {
        part.name: progress(part)
        for part in parts.values()
        if part.is_run and part.folder is not None and not part.finished
    }
    shown = [name for name in parts if parts[name].folder is not None or parts[name].metrics]
    rows, frames = _video_rows(parts, shown)
    dates = [part.when for part in parts.values() if part.when is not None]
    return {
        "name": run_dir.resolve().name,
        "date": max(dates).strftime("%d %B %Y, %H:%M").lstrip("0") if dates else "",
        "headline": words.headline(measured, unfinished),
        "basis": _basis(parts),
        "plane": curves.plane(parts),
        "notices": list(_notices(parts, unfinished)),
        "parts": [{"name": n, "label": LABELS[n], "role": ROLES[n]} for n in shown],
        "ways": ("", "one way", "two ways", "three ways", "four ways", "five ways")[len(shown)],
        "rows": rows,
        "frames": frames,
        "same_noise": same_noise(parts),
        "table": _table(measured, shown),
        "table_note": _table_note(parts),
        "charts": [chart for chart in curves.charts(parts) if chart is not None],
        "charts_title": "How they learned",
        "charts_note": curves.charts_note(parts),
        "more_charts": [chart for chart in curves.more_charts(parts) if chart is not None],
        "timing": curves.timing(parts),
        "facts": list(facts(parts)),
        "warnings": [(part.label, text) for part in parts.values() for text in part.warnings],
        "config": config_table(parts),
    }


def _basis(parts: dict[str, Part]) -> str:
    """On how many videos and seeds the numbers stand, and what the words leave out."""
    ran = [part for part in runs(parts) if part.metrics]
    if not ran:
        return ""
    seeds = {str(part.evaluations[-1].get("seed")) for part in ran} - {"None"}
    videos = {str(part.evaluations[-1].get("videos")) for part in ran} - {"None"}
    text = f"Measured on {' and '.join(sorted(videos))} held-out videos. " if videos else ""
    if len(seeds) == 1:
        text += f"One training seed ({seeds.pop()}) each: another seed gives other numbers. "
    return (
        text + f"Physics errors within {words.EQUAL:.0%} of each other and look errors within "
        f"{words.LOOK_KEPT:g} count as equal."
    )


def _notices(parts: dict[str, Part], unfinished: dict[str, str]) -> Iterator[str]:
    """What is missing here, one sentence each."""
    for name, part in parts.items():
        if part.folder is None and not part.evaluations:
            yield f"{part.label}: did not run here."
        elif not part.metrics:
            yield f"{part.label}: no evaluation yet."
        elif name in unfinished:
            yield f"{part.label}: unfinished, {unfinished[name]}."
        for problem in part.problems:
            yield f"{part.label}: {problem}"


# --- videos ---


def _video_rows(parts: dict[str, Part], shown: list[str]) -> tuple[list[dict[str, Any]], int]:
    """Rows of cells for the template, and the frames of the longest clip."""
    found = {p: dict(pick_videos(parts, p)) for p in choose_prompts(parts, PROMPTS)}
    videos = [v for row in found.values() for v in row.values() if not isinstance(v, str)]
    frames = max([0, *(len(video) for video in videos)])
    rows = []
    for prompt, row in found.items():
        cells = [_cell(name, row[name], frames) for name in shown]
        rows.append({"prompt": prompt, "cells": cells})
    return (rows if videos else []), frames


def _cell(name: str, video: Any, frames: int) -> dict[str, Any]:
    if isinstance(video, str):
        return {"name": name, "label": LABELS[name], "missing": video}
    height, width = video.shape[1:3]
    side = max(height, width)
    return {
        "name": name,
        "label": LABELS[name],
        "missing": "",
        "width": width,
        "height": height,
        # Whole multiples keep the pixels square; a large clip is made smaller instead.
        "big": 112 // side if side <= 112 else round(112 / side, 4),
        "small": 80 // side if side <= 80 else round(80 / side, 4),
        "strip": sprite(video, frames),
        "flash": exposure(video),
    }


# --- numbers ---


def _table(measured: dict[str, dict[str, float]], shown: list[str]) -> list[dict[str, Any]]:
    """Known metrics first, then whatever else was measured."""
    known = [metric.key for metric in words.METRICS]
    others = sorted({key for values in measured.values() for key in values} - set(known))
    metrics = [*words.METRICS, *(words.Metric(key, key, "") for key in others)]
    rows = []
    for metric in metrics:
        values = {n: m[metric.key] for n, m in measured.items() if metric.key in m}
        if not values:
            continue
        winners = words.best(metric, values) if metric.better else set()
        cells = [
            {
                "name": name,
                "text": words.number(values[name]) if name in values else "–",
                "best": name in winners,
            }
            for name in shown
        ]
        rows.append(
            {
                "name": metric.name,
                "key": metric.key if metric.name != metric.key else "",
                "meaning": metric.meaning,
                "direction": words.DIRECTION.get(metric.better, ""),
                "cells": cells,
            }
        )
    return rows


def _table_note(parts: dict[str, Part]) -> str:
    """Seeds, updates and videos behind each column."""
    notes = []
    for part in parts.values():
        if not part.metrics:
            continue
        last = part.evaluations[-1]
        facts = [f"seed {last['seed']}"] if "seed" in last else []
        facts += [f"{last['step']} updates"] if part.is_run else []
        facts += [f"{last['videos']} videos"] if "videos" in last else []
        notes.append(part.label + (f" ({', '.join(facts)})" if facts else ""))
    return "● best value of a student. " + ", ".join(notes) + "."
