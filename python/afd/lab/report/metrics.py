"""Metrics of an evaluation: names, meanings, and which value is best."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from afd.lab.physics import DEFINITIONS
from afd.lab.report.run_files import Part
from afd.trainer.motion import DEFINITION, DYNAMIC


class Metric(NamedTuple):
    """A metric's name and meaning. `better`: "lower", "higher", "teacher" (closest to the teacher's
    value), "far" (only values near 0 are bad, so none is best), or "" (not compared)."""

    key: str
    name: str
    better: str = ""
    meaning: str = ""


_TOY = (
    Metric("phys", "Physics error", "lower"),
    Metric("g_mae", "Gravity error", "lower"),
    Metric("rend", "Look error", "lower"),
    Metric("traj_fd", "Trajectory distance", "lower"),
    Metric("fit_res", "Roughness", "lower"),
    Metric("seam_jerk", "Kinks between chunks", "teacher"),
    Metric("motion", "Motion", "teacher"),
    Metric("adh", "Prompt adherence", "higher"),
    Metric("div", "Diversity", "teacher"),
    Metric("nn", "Nearest in training", "far"),
)
TOY_METRICS = tuple(metric._replace(meaning=DEFINITIONS[metric.key]) for metric in _TOY)
_RATING = "by the frozen VideoAlign, in standard deviations of its authors’ videos"
VIDEO_METRICS = (
    Metric("MQ", "Motion quality", "", _RATING),
    Metric("VQ", "Visual quality", "", _RATING),
    Metric("TA", "Text alignment", "", _RATING),
    Metric("Overall", "VQ + MQ + TA", "", _RATING),
    Metric("motion", "Motion", "", DEFINITION),
    Metric("dynamic", "Dynamic", "", f"share of videos whose motion is above {DYNAMIC:g} pixels"),
    Metric("score", "Online score", "", "of the current discriminator; only differences count"),
)
DIRECTIONS = {
    "lower": "lower is better",
    "higher": "higher is better",
    "teacher": "closer to the teacher is better",
    "far": "near 0 is memorised",
    "": "",
}


def number(value: float) -> str:
    """Format a value for the report: 0.043, 1.32, 12.6."""
    size = abs(value)
    digits = 3 if size < 1 else 2 if size < 10 else 1
    return f"{value:.{digits}f}" if size < 1e7 else f"{value:.3g}"


def metric_rows(
    parts: Mapping[str, Part], columns: Sequence[str], metrics: Sequence[Metric]
) -> Iterator[dict[str, Any]]:
    """Table rows of the known `metrics` in order, then of all other measured values."""
    measured = {key for name in columns for key in parts[name].metrics}
    others = sorted(measured - {metric.key for metric in metrics})
    for metric in [*metrics, *(Metric(key, key) for key in others)]:
        values = {n: m[metric.key] for n in columns if metric.key in (m := parts[n].metrics)}
        if values:
            yield {"metric": metric, "values": values, "best": best(metric, values)}


def best(metric: Metric, values: Mapping[str, float]) -> set[str]:
    """Columns with the best printed value, except the teacher's; empty if only one has a value."""
    badness = {
        "lower": lambda value: value,
        "higher": lambda value: -value,
        "teacher": lambda value: abs(value - values["teacher"]),
    }.get(metric.better)
    students = {name: float(number(v)) for name, v in values.items() if name != "teacher"}
    unknown = metric.better == "teacher" and "teacher" not in values
    if badness is None or unknown or len(students) < 2:
        return set()
    least = min(map(badness, students.values()))
    return {name for name, value in students.items() if badness(value) <= least + 1e-9}
