"""The report's curves and times, from metrics.jsonl and evaluation.jsonl."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from afd.lab.report import words as words
from afd.lab.report.charts import Chart, Series, draw, window
from afd.lab.report.read import LABELS, Part, numbers, runs

CURVES = ("phys", "rend", "g_mae", "traj_fd")
DEVIATIONS = (
    ("student/ref_deviation", "the base", "base"),
    ("student/old_deviation", "its own average", "afd"),
)
# Phases in the trainer's order; what lies between them is "other".
PHASES = ("teacher", "rollout", "discriminator", "student", "evaluate", "other")


def plane(parts: dict[str, Part]) -> Chart | None:
    """Look error against physics error: every run starts at the base and wants to the corner."""
    series = []
    for part in runs(parts):
        both = [numbers(line.get("metrics")) for line in part.evaluations]
        both = [values for values in both if {"rend", "phys"} <= values.keys()]
        if both:
            x, y = [v["rend"] for v in both], [v["phys"] for v in both]
            series.append(Series(part.label, part.name, x, y, dots=True, end=part.label))
    if not series:
        return None
    for name in ("base", "teacher"):
        values = parts[name].metrics
        if {"rend", "phys"} <= values.keys():
            label = parts[name].label
            series.insert(0, Series(label, name, [values["rend"]], [values["phys"]], end=label))
    return draw(
        "Physics error over look error",
        "Up: physics error, px. Every run starts at the base; bottom left has both right.",
        series,
        x_label="look error",
        zero=True,
    )


def charts(parts: dict[str, Part]) -> Iterator[Chart | None]:
    # Of the run with a discriminator, if there is one.
    run = next((part.name for part in runs(parts) if part.updates and part.name != "sft"), "afd")
    for key in CURVES:
        metric = next(metric for metric in words.METRICS if metric.key == key)
        yield evaluation_chart(parts, key, metric.name, metric.meaning)
    yield update_chart(
        parts,
        "r, the weight of the positive branch",
        "mean, and the share of samples at 0 and at 1",
        (
            ("student/r_mean", "mean", "afd"),
            ("student/r_at_0", "at 0", "base"),
            ("student/r_at_1", "at 1", "teacher"),
        ),
        zero=True,
        run=run,
    )
    yield update_chart(
        parts,
        "Discriminator accuracy",
        "share of prompt-matched pairs in which the teacher’s video scores higher",
        (("discriminator/accuracy", "accuracy", "afd"),),
        run=run,
    )
    yield update_chart(
        parts,
        "Discriminator margin",
        "mean score of the teacher’s video above the student’s; above 5 hints at a shortcut",
        (("discriminator/margin", "margin", "afd"),),
        zero=True,
        run=run,
    )
    yield update_chart(
        parts,
        "Does the score rank physics?",
        "correlation of the score with minus each error, within the samples of one prompt",
        _agreements(parts),
        zero=True,
    )
    lines = (("student/loss", "student", run),)
    yield update_chart(parts, f"{LABELS[run]} loss", "", lines, run=run)
    lines = (("discriminator/loss", "discriminator", "teacher"),)
    yield update_chart(parts, "Discriminator loss", "", lines, run=run)
    yield update_chart(
        parts,
        "How far the student is from",
        "mean squared difference of velocities",
        DEVIATIONS,
        zero=True,
        run=run,
    )
    sft = (("student/loss", "student", "sft"),)
    yield update_chart(parts, "SFT loss", "", sft, run="sft")


def _agreements(parts: dict[str, Part]) -> tuple[tuple[str, str, str], ...]:
    """Lines for what the discriminator's score agrees with, physics first."""
    names = {f"agreement/{metric.key}": metric.name.lower() for metric in words.METRICS}
    found = sorted((k for k in names if k in keys(parts["afd"])), key=list(names).index)
    colors = ("afd", "sft", "teacher", "base")
    return tuple((k, names[k], color) for k, color in zip(found, colors, strict=False))


def keys(part: Part) -> list[str]:
    """Names of everything the run logged, in the order of their first appearance."""
    reserved = ("step", "time_s")
    return [
        k for k in dict.fromkeys(k for u in part.updates for k in numbers(u)) if k not in reserved
    ]


def evaluation_chart(parts: dict[str, Part], key: str, title: str, note: str) -> Chart | None:
    series = []
    for part in runs(parts):
        found = [(line["step"], numbers(line.get("metrics"))) for line in part.evaluations]
        points = [(step, values[key]) for step, values in found if key in values]
        x, y = [x for x, _ in points], [y for _, y in points]
        series.append(Series(part.label, part.name, x, y, dots=True))
    references = [
        (parts[name].label, name, parts[name].metrics[key])
        for name in ("teacher", "base")
        if key in parts[name].metrics
    ]
    return draw(title, note, series, references, zero=True)


def update_chart(
    parts: dict[str, Part],
    title: str,
    note: str,
    lines: Sequence[tuple[str, str, str]],
    zero: bool = False,
    run: str = "afd",
) -> Chart | None:
    """Lines of metrics.jsonl: (key, label, colour) each."""
    series = []
    for key, label, color in lines:
        points = [
            (u["step"], values[key]) for u in parts[run].updates if key in (values := numbers(u))
        ]
        x, y = [x for x, _ in points], [y for _, y in points]
        series.append(Series(label, color, x, y, rough=len(points) >= 25))
    return draw(title, note, series, zero=zero)


def more_charts(parts: dict[str, Part]) -> Iterator[Chart | None]:
    """Every logged key that has no chart of its own."""
    shown = {"student/loss", "student/r_mean", "student/r_at_0", "student/r_at_1"}
    shown |= {key for key, _, _ in DEVIATIONS} | {
        "discriminator/accuracy",
        "discriminator/margin",
        "discriminator/loss",
    }
    shown |= {key for key, _, _ in _agreements(parts)}
    for part in runs(parts):
        for key in keys(part):
            if key not in shown:
                lines = ((key, part.label, part.name),)
                yield update_chart(parts, key, "", lines, run=part.name)
    measured = dict.fromkeys(k for part in runs(parts) for k in part.metrics if k not in CURVES)
    names = {metric.key: metric for metric in words.METRICS}
    for key in measured:
        metric = names.get(key)
        yield evaluation_chart(
            parts, key, metric.name if metric else key, metric.meaning if metric else ""
        )


def charts_note(parts: dict[str, Part]) -> str:
    width = window(max(len(part.updates) for part in runs(parts)))
    text = "Dots are evaluations of the averaged student on held-out seeds."
    if width > 1:
        text += f" Thin lines are single updates, thick ones means over {width}."
    lines = [line for part in runs(parts) for line in part.evaluations]
    counts = {int(line["videos"]) for line in lines if isinstance(line.get("videos"), int)}
    if len(counts) > 1:
        text += f" Dots on the way use {min(counts)} videos, the last one {max(counts)}."
    return text


# --- timing ---


def timing(parts: dict[str, Part]) -> dict[str, Any] | None:
    """Seconds per phase, summed over the updates of each run."""
    totals: dict[str, dict[str, float]] = {}
    for part in runs(parts):
        seconds: dict[str, float] = {}
        for update in part.updates:
            for phase, value in numbers(update.get("phase_s")).items():
                seconds[phase] = seconds.get(phase, 0.0) + max(value, 0.0)
        elapsed = max([0.0, *(numbers(u).get("time_s", 0.0) for u in part.updates)])
        if seconds or elapsed:
            seconds["other"] = max(0.0, elapsed - sum(seconds.values()))
            totals[part.name] = seconds
    if not totals:
        return None
    named = dict.fromkeys([*PHASES, *(p for seconds in totals.values() for p in seconds)])
    phases = [p for p in named if any(s.get(p, 0.0) > 0 for s in totals.values())]
    index = {p: PHASES.index(p) if p in PHASES else len(PHASES) - 1 for p in phases}
    longest = max(sum(seconds.values()) for seconds in totals.values())
    bars = [
        {
            "name": name,
            "label": LABELS[name],
            "total": _seconds(sum(seconds.values())),
            "share": round(100 * sum(seconds.values()) / longest, 2) if longest else 0,
            "parts": [
                {
                    "phase": p,
                    "index": index[p],
                    "share": round(100 * v / sum(seconds.values()), 3),
                    "text": _seconds(v),
                }
                for p in phases
                if (v := seconds.get(p, 0.0)) > 0
            ],
        }
        for name, seconds in totals.items()
    ]
    rows = [
        {
            "phase": phase,
            "index": index[phase],
            "cells": [
                text
                for name, seconds in totals.items()
                for text in _time_cells(seconds.get(phase, 0.0), len(parts[name].updates))
            ],
        }
        for phase in phases
    ]
    whole = _seconds(sum(sum(seconds.values()) for seconds in totals.values()))
    return {
        "runs": bars,
        "rows": rows,
        "note": f"Training took {whole} in all, without the final evaluation.",
    }


def _time_cells(seconds: float, updates: int) -> tuple[str, str]:
    return (_seconds(seconds), _seconds(seconds / max(updates, 1))) if seconds else ("–", "–")


def _seconds(value: float) -> str:
    if value >= 100:
        return f"{int(value) // 60} min {int(value) % 60:02d} s"
    if value >= 1:
        return f"{value:.1f} s"
    return f"{1000 * value:.0f} ms" if value >= 0.01 else f"{1000 * value:.1f} ms"
