"""Time per phase of each run, as totals and as a chart."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from markupsafe import Markup
from matplotlib.axes import Axes

from afd.lab.report.inline_svg import COLORS, WIDTH, inline_svg
from afd.lab.report.run_files import LABELS, Part, numbers

# In the trainer's order; time outside them is "other".
PHASES = ("teacher", "rollout", "discriminator", "student", "evaluate", "other")


def seconds_per_phase(run: Part) -> dict[str, float]:
    """Total seconds per phase over all updates, in the order of PHASES, without empty phases."""
    seconds = dict.fromkeys(PHASES, 0.0)
    for update in run.updates:
        for phase, value in numbers(update.get("phase_s")).items():
            seconds[phase] = seconds.get(phase, 0.0) + max(value, 0.0)
    elapsed = max([0.0, *(numbers(update).get("time_s", 0.0) for update in run.updates)])
    seconds["other"] += max(0.0, elapsed - sum(seconds.values()))
    return {phase: value for phase, value in seconds.items() if value > 0}


def phase_color(phase: str) -> str:
    """Name of a phase's colour in COLORS."""
    return f"phase{PHASES.index(phase if phase in PHASES else 'other')}"


def phase_chart(times: Mapping[str, Mapping[str, float]]) -> Markup:
    """A stacked horizontal bar per run with its seconds per phase."""

    def draw(axes: Axes) -> None:
        axes.set_position((48 / WIDTH, 0, (WIDTH - 48 - 80) / WIDTH, 1))
        axes.set_axis_off()
        beside: dict[str, Any] = {"textcoords": "offset points", "va": "center"}
        axes.set_xlim(0, max(sum(seconds.values()) for seconds in times.values()))
        axes.set_ylim(len(times) - 0.5, -0.5)
        for row, (name, seconds) in enumerate(times.items()):
            end = 0.0
            for phase, value in seconds.items():
                axes.barh(row, value, 0.6, left=end, color=COLORS[phase_color(phase)])
                end += value
            name_style: Any = {"ha": "right", "weight": "bold", "color": COLORS[name]}
            axes.annotate(LABELS[name], (0, row), (-8, 0), **beside, **name_style)
            axes.annotate(duration(end), (end, row), (8, 0), **beside, color=COLORS["soft"])

    words = [
        f"{LABELS[name]}: " + ", ".join(f"{p} {duration(v)}" for p, v in seconds.items()) + "."
        for name, seconds in times.items()
    ]
    return inline_svg(draw, "Time per phase", " ".join(words), 24 + 44 * len(times))


def duration(seconds: float) -> str:
    """Format a duration for the report: 2.5 ms, 310 ms, 12.0 s, 3 min 05 s."""
    if seconds >= 100:
        return f"{int(seconds) // 60} min {int(seconds) % 60:02d} s"
    if seconds >= 1:
        return f"{seconds:.1f} s"
    return f"{1000 * seconds:.{0 if seconds >= 0.01 else 1}f} ms"
