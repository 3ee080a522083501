"""The report's charts: what is drawn, from metrics.jsonl and evaluation.jsonl."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from afd.lab.report.inline_svg import COLORS, HEIGHT, WIDTH, inline_svg
from afd.lab.report.metrics import Metric, number
from afd.lab.report.run_files import Part, numbers, runs

# The axes within the drawing, in pixels; REFERENCES is the room for the names of reference lines.
LEFT, RIGHT, TOP, BOTTOM, REFERENCES = 56, 16, 14, 36, 52
# Of the distance between ticks, times a power of ten.
STEPS = (1, 2, 5, 10)
# Lines of at least so many updates are drawn thin under a running mean.
NOISY = 25


class Chart(NamedTuple):
    """A drawing with its caption; `legend` holds (label, colour name)."""

    title: str
    note: str
    legend: list[tuple[str, str]]
    svg: Markup


class Line(NamedTuple):
    """Points of one curve; `color` is a name in COLORS. `dots` marks every point, otherwise a long
    line is smoothed."""

    label: str
    color: str
    x: Sequence[float]
    y: Sequence[float]
    dots: bool = False

    @classmethod
    def of(
        cls, label: str, color: str, points: Sequence[tuple[int, float]], dots: bool = False
    ) -> Line:
        return cls(label, color, [x for x, _ in points], [y for _, y in points], dots)

    @property
    def noisy(self) -> bool:
        return not self.dots and len(self.y) >= NOISY

    @property
    def range(self) -> tuple[float, float]:
        """The y values to show: of a long noisy line all but the wildest hundredth."""
        cut = 0.005 if self.noisy and len(self.y) >= 100 else 0.0
        low, high = np.quantile(self.y, [cut, 1 - cut])
        return float(low), float(high)


class Group(NamedTuple):
    """Logged values that share a chart: (key, label, colour) each; no colour means the run's."""

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
          (("critic/accuracy", "accuracy", ""),)),
    Group("Discriminator margin",
          "score of the teacher’s video minus the student’s; above 5 it may rank a shortcut", True,
          (("critic/margin", "margin", ""),)),
    Group("Does the score agree with the metrics?",
          "correlation of the score with minus each error, within the samples of one prompt", True,
          (("agreement/phys", "physics error", ""), ("agreement/rend", "look error", "sft"),
           ("agreement/fit_res", "roughness", "base"))),
    Group("Student loss", "", False, (("student/loss", "student", ""),)),
    Group("Discriminator loss", "", False, (("critic/loss", "discriminator", "teacher"),)),
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
    """Lines over the updates; None without a finite point.

    `references` are horizontal lines (label, colour, y); `zero` includes 0 in the y axis.
    """
    lines = [line for line in map(finite, lines) if line.y]
    if not lines:
        return None
    bounds = [bound for line in lines for bound in line.range] + [y for *_, y in references]
    low, high = y_limits(bounds, zero)
    xs = [x for line in lines for x in line.x]

    def draw(axes: Axes) -> None:
        _set_axes(axes, "update", REFERENCES if references else 0)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, steps=STEPS))
        axes.set_xlim(*_apart(min(xs), max(xs)))
        axes.set_ylim(low, high)
        _draw_references(axes, references)
        for line in lines:
            color, y = COLORS[line.color], np.asarray(line.y)
            if line.noisy:
                axes.plot(line.x, y.clip(low, high), color=color, linewidth=1, alpha=0.25)
                y = running_mean(y, window(len(y)))
            # A single point is no line: only a dot shows it.
            marker = "o" if line.dots or len(y) == 1 else ""
            axes.plot(line.x, y.clip(low, high), color=color, marker=marker)

    legend = [(line.label, line.color) for line in lines]
    words = [
        f"{line.label}: {number(line.y[0])} at update {line.x[0]:g}, "
        f"{number(line.y[-1])} at update {line.x[-1]:g}."
        for line in lines
    ]
    words += [f"{label}: {number(y)}." for label, _, y in references]
    return Chart(title, note, legend, inline_svg(draw, title, " ".join(words)))


def _set_axes(axes: Axes, x_label: str, room: int = 0) -> None:
    """Leave room around the axes for labels, and `room` more on the right; pixels."""
    size = (WIDTH - LEFT - RIGHT - room) / WIDTH, (HEIGHT - TOP - BOTTOM) / HEIGHT
    axes.set_position((LEFT / WIDTH, BOTTOM / HEIGHT, *size))
    axes.set_xlabel(x_label, loc="right")
    axes.yaxis.set_major_locator(MaxNLocator(5, steps=STEPS))


def _draw_references(axes: Axes, references: Sequence[Reference]) -> None:
    """Dotted lines with their names on the right; names of close lines move apart."""
    ordered = sorted(references, key=lambda reference: -reference[2])
    low, high = axes.get_ylim()
    for index, (label, color, y) in enumerate(ordered):
        axes.axhline(y, color=COLORS[color], linewidth=1.3, linestyle=(0, (1.5, 3)))
        close = ordered[0][2] - ordered[-1][2] < (high - low) / 14
        align = ("bottom", "top")[index] if close and len(ordered) == 2 else "center"
        right = axes.get_yaxis_transform()
        axes.text(1.02, y, label, color=COLORS[color], weight="bold", va=align, transform=right)


def y_limits(values: Sequence[float], zero: bool) -> tuple[float, float]:
    """Limits that show all values with a margin; `zero` includes 0, without a margin there."""
    low, high = min(values), max(values)
    if zero:
        low, high = min(low, 0.0), max(high, 0.0)
    margin = 0.06 * (high - low)
    return _apart(low - (0 if zero and low == 0 else margin), high + margin)


def _apart(low: float, high: float) -> tuple[float, float]:
    """Limits of an axis, moved apart where they are equal."""
    low, high = MaxNLocator().nonsingular(low, high)
    return float(low), float(high)


def finite(line: Line) -> Line:
    """Without the points that are not finite numbers."""
    pairs = zip(line.x, line.y, strict=True)
    kept = [(x, y) for x, y in pairs if math.isfinite(x) and math.isfinite(y)]
    return line._replace(x=[x for x, _ in kept], y=[y for _, y in kept])


def window(count: int) -> int:
    """Updates in the running mean of a line of `count` updates."""
    return max(1, count // 25)


def running_mean(values: Sequence[float] | np.ndarray, width: int) -> np.ndarray:
    """Centred mean over `width` values, over fewer at both ends."""
    total = np.concatenate([[0.0], np.cumsum(np.asarray(values, dtype=np.float64))])
    index = np.arange(len(values))
    first = np.maximum(index - width // 2, 0)
    last = np.minimum(index + (width + 1) // 2, len(values))
    return (total[last] - total[first]) / (last - first)


# --- charts of a run folder ---


def evaluation_chart(parts: dict[str, Part], metric: Metric) -> Chart | None:
    """A metric at every evaluation of every run, beside the teacher's and the base student's."""
    lines = []
    for run in runs(parts):
        found = [(line["step"], numbers(line.get("metrics"))) for line in run.evaluations]
        points = [(step, values[metric.key]) for step, values in found if metric.key in values]
        lines.append(Line.of(run.label, run.name, points, dots=True))
    references = [
        (parts[name].label, name, parts[name].metrics[metric.key])
        for name in ("teacher", "base")
        if metric.key in parts[name].metrics
    ]
    return line_chart(metric.name, metric.meaning, lines, references, zero=True)


def update_charts(parts: dict[str, Part]) -> Iterator[Chart | None]:
    """The GROUPS that each run has logged."""
    for group in GROUPS:
        logging = [run for run in runs(parts) if {k for k, _, _ in group.lines} & set(keys(run))]
        for run in logging:
            title = group.title if len(logging) == 1 else f"{group.title} of {run.label}"
            lines = [
                Line.of(label, color or run.name, logged(run, key))
                for key, label, color in group.lines
            ]
            yield line_chart(title, group.note, lines, zero=group.zero)


def other_charts(
    parts: dict[str, Part], metrics: Sequence[Metric], shown: Sequence[str]
) -> Iterator[Chart | None]:
    """Every other logged value, and every metric that is not among the `shown` keys."""
    grouped = {key for group in GROUPS for key, _, _ in group.lines}
    for run in runs(parts):
        for key in keys(run):
            if key not in grouped:
                yield line_chart(key, "", [Line.of(run.label, run.name, logged(run, key))])
    known = {metric.key: metric for metric in metrics}
    for key in dict.fromkeys(key for run in runs(parts) for key in run.metrics):
        if key not in shown:
            yield evaluation_chart(parts, known.get(key, Metric(key, key)))


def keys(run: Part) -> list[str]:
    """The names of all logged values, in the order of their first appearance."""
    found = dict.fromkeys(key for update in run.updates for key in numbers(update))
    return [key for key in found if key not in ("step", "time_s")]


def logged(run: Part, key: str) -> list[tuple[int, float]]:
    """(update, value) wherever a value was logged."""
    found = ((update["step"], numbers(update)) for update in run.updates)
    return [(step, values[key]) for step, values in found if key in values]


def trade_off(parts: dict[str, Part]) -> Chart | None:
    """Physics error against look error: each run is a path from the base student."""
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
        axes.xaxis.set_major_locator(MaxNLocator(5, steps=STEPS))
        axes.set_xlim(*y_limits(xs, zero=True))
        axes.set_ylim(*y_limits(ys, zero=True))
        for name, path in paths.items():
            color, below = COLORS[name], parts[name].is_run
            axes.plot(*zip(*path, strict=True), color=color, marker="o")
            axes.plot(*path[-1], color=color, marker="o", markersize=12, markerfacecolor=color)
            axes.annotate(
                parts[name].label,
                path[-1],
                (0, -12 if below else 10),
                textcoords="offset points",
                ha="center",
                va="top" if below else "bottom",
                color=color,
                weight="bold",
            )

    title = "Physics error against look error"
    note = "Vertical: physics error, px. Each run starts at the base; lower left is better."
    words = [
        f"{parts[name].label}: look error {number(path[-1][0])}, physics error "
        f"{number(path[-1][1])}."
        for name, path in paths.items()
    ]
    return Chart(title, note, [], inline_svg(draw, title, " ".join(words)))
