"""The report's charts, drawn from metrics.jsonl and evaluation.jsonl."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from afd.lab.report.inline_svg import COLORS, HEIGHT, WIDTH, inline_svg
from afd.lab.report.metrics import Metric, number
from afd.lab.report.run_files import Part, numbers, runs

# Margins of the axes in pixels; REFERENCES is extra room on the right for reference labels.
LEFT, RIGHT, TOP, BOTTOM, REFERENCES = 56, 16, 14, 36, 52
# Candidate tick spacings, times a power of ten.
STEPS = (1, 2, 5, 10)
# Lines with at least this many updates are drawn thin under a running mean.
NOISY = 25


class Chart(NamedTuple):
    """A figure with its caption; `legend` holds (label, colour name)."""

    title: str
    note: str
    legend: list[tuple[str, str]]
    svg: Markup


class Line(NamedTuple):
    """A curve of (x, y) points; `color` is a name in COLORS. With `dots` every point is marked;
    otherwise a long line is smoothed."""

    label: str
    color: str
    points: Sequence[tuple[float, float]]
    dots: bool = False

    @property
    def noisy(self) -> bool:
        return not self.dots and len(self.points) >= NOISY

    @property
    def range(self) -> list[float]:
        """The y values to show; for a long noisy line, without the most extreme 1 %."""
        cut = 0.005 if self.noisy and len(self.points) >= 100 else 0.0
        return list(map(float, np.quantile([y for _, y in self.points], [cut, 1 - cut])))


class Group(NamedTuple):
    """Logged values that share a chart: (key, label, colour) each; if empty, the run's are used."""

    title: str
    note: str
    zero: bool
    lines: tuple[tuple[str, str, str], ...]


# fmt: off
GROUPS = (
    Group("r, the weight of the positive branch",
          "mean, and the share of samples at 0 and at 1", True,
          (("student/r_mean", "mean", ""), ("student/r_at_0", "at 0", "base"),
           ("student/r_at_1", "at 1", "teacher"))),
    Group("Discriminator accuracy",
          "share of prompt-matched pairs in which the teacher’s video scores higher", False,
          (("discriminator/accuracy", "accuracy", ""),)),
    Group("Discriminator margin",
          "score of the teacher’s video minus the student’s; above 5 it may rank a shortcut", True,
          (("discriminator/margin", "margin", ""),)),
    Group("Does the score agree with the metrics?",
          "correlation of the score with minus each error, within the samples of one prompt", True,
          (("agreement/phys", "physics error", ""), ("agreement/rend", "look error", "sft"),
           ("agreement/fit_res", "roughness", "base"))),
    Group("Student loss", "", False, (("student/loss", "student", ""),)),
    Group("Discriminator loss", "", False, (("discriminator/loss", "discriminator", "teacher"),)),
    Group("Distance of the student", "mean squared difference of velocities", True,
          (("student/ref_deviation", "from the base", "base"),
           ("student/old_deviation", "from the old policy", ""))),
)
# fmt: on

Reference = tuple[str, str, float]


def line_chart(
    title: str,
    note: str,
    lines: Sequence[Line],
    references: Sequence[Reference] = (),
    zero: bool = False,
) -> Chart | None:
    """A line chart over the updates; None if there are no points.

    `references` are horizontal lines (label, colour, y); `zero` includes 0 in the y axis.
    """
    lines = [line for line in lines if line.points]
    if not lines:
        return None

    def draw(axes: Axes) -> None:
        _set_axes(axes, "update", REFERENCES if references else 0)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, steps=STEPS))
        axes.set_xlim(_limits([x for line in lines for x, _ in line.points], margin=0))
        shown = [y for line in lines for y in line.range] + [y for *_, y in references]
        axes.set_ylim(_limits(shown, zero))
        _draw_references(axes, references)
        for line in lines:
            color, (x, y) = COLORS[line.color], np.array(line.points, dtype=np.float64).T
            if line.noisy:
                axes.plot(x, y.clip(*axes.get_ylim()), color=color, linewidth=1, alpha=0.25)
                y = running_mean(y, window(len(y)))
            # A single point is visible only as a dot.
            marker = "o" if line.dots or len(y) == 1 else ""
            axes.plot(x, y.clip(*axes.get_ylim()), color=color, marker=marker)

    words = [
        f"{line.label}: {number(line.points[0][1])} at update {line.points[0][0]:.0f}, "
        f"{number(line.points[-1][1])} at update {line.points[-1][0]:.0f}."
        for line in lines
    ]
    words += [f"{label}: {number(y)}." for label, _, y in references]
    legend = [(line.label, line.color) for line in lines]
    return Chart(title, note, legend, inline_svg(draw, title, " ".join(words)))


def _set_axes(axes: Axes, x_label: str, room: int = 0) -> None:
    """Set the margins around the axes, with `room` extra pixels on the right."""
    size = (WIDTH - LEFT - RIGHT - room) / WIDTH, (HEIGHT - TOP - BOTTOM) / HEIGHT
    axes.set_position((LEFT / WIDTH, BOTTOM / HEIGHT, *size))
    axes.set_xlabel(x_label, loc="right")
    axes.yaxis.set_major_locator(MaxNLocator(6, steps=STEPS))


def _draw_references(axes: Axes, references: Sequence[Reference]) -> None:
    """Draw dotted reference lines labelled on the right, moving overlapping labels apart."""
    ordered = sorted(references, key=lambda reference: -reference[2])
    low, high = axes.get_ylim()
    for index, (label, color, y) in enumerate(ordered):
        axes.axhline(y, color=COLORS[color], linewidth=1.3, linestyle=(0, (1.5, 3)))
        close = len(ordered) == 2 and ordered[0][2] - ordered[1][2] < (high - low) / 14
        shift = (9, -9)[index] if close else 0
        place: Any = {"xycoords": axes.get_yaxis_transform(), "textcoords": "offset points"}
        style: Any = {"color": COLORS[color], "weight": "bold", "va": "center"}
        axes.annotate(label, (1, y), (8, shift), **place, **style)


def _limits(
    values: Sequence[float], zero: bool = False, margin: float = 0.06
) -> tuple[float, float]:
    """Axis limits with a margin; `zero` includes 0, without a margin on that side."""
    low, high = min(values), max(values)
    if zero:
        low, high = min(low, 0.0), max(high, 0.0)
    margin *= high - low
    low, high = MaxNLocator().nonsingular(low - (0 if zero and low == 0 else margin), high + margin)
    return float(low), float(high)


def window(count: int) -> int:
    """Window of the running mean for a line of `count` updates."""
    return max(1, count // 25)


def running_mean(values: Sequence[float] | np.ndarray, width: int) -> np.ndarray:
    """Centred running mean over `width` values, truncated at both ends."""
    total = np.concatenate([[0.0], np.cumsum(np.asarray(values, dtype=np.float64))])
    index = np.arange(len(values))
    first = np.maximum(index - width // 2, 0)
    last = np.minimum(index + (width + 1) // 2, len(values))
    return (total[last] - total[first]) / (last - first)


# --- charts of a run folder ---


def evaluation_chart(parts: dict[str, Part], metric: Metric) -> Chart | None:
    """A metric at every evaluation of every run, with teacher and base student as references."""
    lines = []
    for run in runs(parts):
        found = [(line["update"], numbers(line.get("metrics"))) for line in run.evaluations]
        points = [(update, values[metric.key]) for update, values in found if metric.key in values]
        lines.append(Line(run.label, run.name, points, dots=True))
    references = [
        (parts[name].label, name, parts[name].metrics[metric.key])
        for name in ("teacher", "base")
        if metric.key in parts[name].metrics
    ]
    return line_chart(metric.name, metric.meaning, lines, references, zero=True)


def update_charts(parts: dict[str, Part], groups: Sequence[Group]) -> Iterator[Chart | None]:
    """One chart per group and run, where the run logged any of the group's values."""
    for group in groups:
        logging = [run for run in runs(parts) if {k for k, _, _ in group.lines} & set(keys(run))]
        for run in logging:
            title = group.title if len(logging) == 1 else f"{group.title}, {run.label}"
            lines = [
                Line(label or run.label, color or run.name, logged(run, k))
                for k, label, color in group.lines
            ]
            yield line_chart(title, group.note, lines, zero=group.zero)


def other_groups(parts: dict[str, Part]) -> list[Group]:
    """A separate group for each logged value that is not in GROUPS."""
    grouped = {key for group in GROUPS for key, _, _ in group.lines}
    found = dict.fromkeys(key for run in runs(parts) for key in keys(run))
    return [Group(key, "", False, ((key, "", ""),)) for key in found if key not in grouped]


def keys(run: Part) -> list[str]:
    """Names of all logged values, in order of first appearance."""
    found = dict.fromkeys(key for update in run.updates for key in numbers(update))
    return [key for key in found if key not in ("update", "time_s")]


def logged(run: Part, key: str) -> list[tuple[int, float]]:
    """(update, value) for every update that logged the key."""
    found = ((line["update"], numbers(line)) for line in run.updates)
    return [(update, values[key]) for update, values in found if key in values]


def trade_off(parts: dict[str, Part]) -> Chart | None:
    """Physics error against look error, each run as a path from the base student."""
    paths: dict[str, list[tuple[float, float]]] = {}
    for part in parts.values():
        lines = part.evaluations if part.is_run else part.evaluations[-1:]
        values = [numbers(line.get("metrics")) for line in lines]
        paths[part.name] = [(v["rend"], v["phys"]) for v in values if {"rend", "phys"} <= v.keys()]
    if not any(paths[run.name] for run in runs(parts)):
        return None
    paths = {name: path for name, path in paths.items() if path}
    xs, ys = zip(*[point for path in paths.values() for point in path], strict=True)

    def draw(axes: Axes) -> None:
        _set_axes(axes, "look error")
        axes.xaxis.set_major_locator(MaxNLocator(6, steps=STEPS))
        axes.set_xlim(_limits(xs, zero=True))
        axes.set_ylim(_limits(ys, zero=True))
        for name, path in paths.items():
            color = COLORS[name]
            axes.plot(*zip(*path, strict=True), color=color, marker="o")
            axes.plot(*path[-1], color=color, marker="o", markersize=12, markerfacecolor=color)
            offset, align = (-12, "top") if parts[name].is_run else (12, "bottom")
            place: Any = {"textcoords": "offset points", "ha": "center", "va": align}
            axes.annotate(
                parts[name].label, path[-1], (0, offset), color=color, weight="bold", **place
            )

    title = "Physics error against look error"
    note = "Vertical: physics error, px. Each run starts at the base; lower left is better."
    words = [
        f"{parts[name].label}: look error {number(path[-1][0])}, physics error "
        f"{number(path[-1][1])}."
        for name, path in paths.items()
    ]
    return Chart(title, note, [], inline_svg(draw, title, " ".join(words)))
