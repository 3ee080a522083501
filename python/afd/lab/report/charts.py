"""Charts and sprites of the report: plain geometry for the template, colours left to its CSS."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
from matplotlib.image import imsave

WIDTH, HEIGHT = 540, 264
LEFT, RIGHT, TOP, BOTTOM = 56, 524, 14, 228
# Room to the right of the lines for the names of the reference lines.
NAMES = 52


@dataclass(frozen=True)
class Series:
    """One line. `color` is a CSS custom property; `rough` draws every value thin under a running
    mean; `dots` marks every point; `end` labels the last one."""

    label: str
    color: str
    x: Sequence[float]
    y: Sequence[float]
    rough: bool = False
    dots: bool = False
    dashed: bool = False
    end: str = ""


@dataclass(frozen=True)
class Chart:
    """A drawing that is ready for the template: positions in a WIDTH x HEIGHT box."""

    title: str
    note: str
    x_label: str
    lines: list[dict[str, Any]]
    references: list[dict[str, Any]]
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    width: int = WIDTH
    height: int = HEIGHT
    left: int = LEFT
    right: int = RIGHT
    top: int = TOP
    bottom: int = BOTTOM
    legend: list[tuple[str, str]] = field(default_factory=list)


def draw(
    title: str,
    note: str,
    series: Sequence[Series],
    references: Sequence[tuple[str, str, float]] = (),
    x_label: str = "update",
    zero: bool = False,
    limits: tuple[float, float] | None = None,
) -> Chart | None:
    """Lay out lines over a shared x axis; `references` are (label, color, y). None without data.

    `zero` puts 0 on the y axis, `limits` fixes that axis.
    """
    series = [finite(s) for s in series]
    series = [s for s in series if len(s.x)]
    if not series:
        return None
    ys = [y for s in series for y in _spread(s)] + [y for _, _, y in references]
    low, high = limits or (min(ys), max(ys))
    if zero:
        low, high = min(low, 0.0), max(high, 0.0)
    if limits is None and high > low:
        margin = 0.06 * (high - low)
        low, high = low - (margin if low < 0 or not zero else 0.0), high + margin
    xs = [x for s in series for x in s.x]
    plane = any(s.end for s in series)
    left, room = (min(0.0, *xs), 0.07 * max(xs)) if plane else (min(xs), 0.0)
    right = RIGHT - (NAMES if references else 0)
    across = _Axis(left, max(xs) + room, LEFT, right)
    up = _Axis(low, high, BOTTOM, TOP)
    return Chart(
        title,
        note,
        x_label,
        lines=[_line(s, across, up) for s in series],
        references=_apart(
            [{"label": a, "color": c, "y": up(y), "text": up(y) + 4} for a, c, y in references]
        ),
        x_ticks=across.ticks(least=0.0 if plane else 1.0),
        y_ticks=up.ticks(),
        right=right,
        legend=[(s.label, s.color) for s in series if not s.end],
    )


def finite(series: Series) -> Series:
    """Without the points that are not numbers."""
    pairs = zip(series.x, series.y, strict=True)
    kept = [(x, y) for x, y in pairs if math.isfinite(x) and math.isfinite(y)]
    return Series(**{**series.__dict__, "x": [x for x, _ in kept], "y": [y for _, y in kept]})


def window(count: int) -> int:
    """Updates in the running mean of a line of `count` updates."""
    return max(1, count // 25)


def _spread(series: Series) -> list[float]:
    """The values that set the scale: of a rough line all but its wildest hundredth."""
    if not series.rough or len(series.y) < 100:
        return list(series.y)
    low, high = np.quantile(series.y, [0.005, 0.995])
    return [float(low), float(high)]


def _line(series: Series, across: _Axis, up: _Axis) -> dict[str, Any]:
    smooth = running_mean(series.y, window(len(series.y))) if series.rough else series.y
    points = [(across(x), up(y)) for x, y in zip(series.x, smooth, strict=True)]
    raw = [(across(x), up(y)) for x, y in zip(series.x, series.y, strict=True)]
    return {
        "color": series.color,
        "label": series.label,
        "dashed": series.dashed,
        "path": _path(points),
        "raw": _path(raw) if series.rough else "",
        "dots": points if series.dots or (len(points) == 1 and not series.end) else [],
        "end": (series.end, *points[-1]) if series.end else None,
    }


def running_mean(values: Sequence[float], width: int) -> list[float]:
    """Centred mean over `width` values, over fewer at both ends."""
    total = np.concatenate([[0.0], np.cumsum(np.asarray(values, dtype=np.float64))])
    index = np.arange(len(values))
    first = np.maximum(index - width // 2, 0)
    last = np.minimum(index + (width + 1) // 2, len(values))
    return ((total[last] - total[first]) / (last - first)).tolist()


def _path(points: Sequence[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{x:.1f} {min(max(y, TOP - 6), BOTTOM + 6):.1f}" for x, y in points)


def _apart(labels: list[dict[str, Any]], gap: float = 15.0) -> list[dict[str, Any]]:
    """Moves the names of close reference lines apart."""
    labels = sorted(labels, key=lambda label: label["y"])
    for upper, lower in pairwise(labels):
        if lower["text"] - upper["text"] < gap:
            lower["text"] = upper["text"] + gap
    return labels


class _Axis:
    """Values between low and high to positions between start and end."""

    def __init__(self, low: float, high: float, start: float, end: float) -> None:
        if high - low <= max(1e-12 * max(abs(low), abs(high)), 1e-100):
            pad = abs(low) * 0.1 or 1.0
            low, high = low - pad, high + pad
        self.low, self.high, self.start, self.end = low, high, start, end

    def __call__(self, value: float) -> float:
        part = (value - self.low) / (self.high - self.low)
        return round(self.start + part * (self.end - self.start), 1)

    def ticks(self, count: int = 5, least: float = 0.0) -> list[tuple[float, str]]:
        """Round values (1, 2 or 5 times a power of ten, at least `least`, apart) and positions."""
        rough = max((self.high - self.low) / count, least)
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(f * power for f in (1, 2, 5, 10) if f * power >= rough * 0.999)
        first = math.ceil(self.low / step - 1e-9)
        last = math.floor(self.high / step + 1e-9)
        digits = max(0, -math.floor(math.log10(step) + 1e-9))
        return [(self(k * step), f"{k * step + 0.0:.{digits}f}") for k in range(first, last + 1)]


# --- sprites ---


def sprite(video_FHWC: np.ndarray, frames: int) -> str:
    """All frames side by side (the last one repeated up to `frames`) as a PNG data URI."""
    missing = max(0, frames - len(video_FHWC))
    strip = [*video_FHWC[:frames], *[video_FHWC[-1]] * missing]
    return _png(np.concatenate(strip, axis=1))


def exposure(video_FHWC: np.ndarray, shots: int = 5) -> str:
    """One picture of the whole clip, like a stroboscope's: per pixel the moment that stands out
    most from its frame's median colour, earlier flashes dimmer. A PNG data URI."""
    video = video_FHWC.astype(np.float64)
    count = len(video)
    stands_out = np.linalg.norm(video - np.median(video, axis=(1, 2), keepdims=True), axis=-1)
    ground = np.take_along_axis(video, stands_out.argmin(0)[None, ..., None], 0)[0]
    flashes = np.unique(np.linspace(0, count - 1, min(shots, count)).round().astype(int))
    strength = np.linspace(0.45, 1.0, len(flashes))[:, None, None]
    # Where two flashes overlap the later one wins.
    best = ((0.9 + 0.1 * strength) * stands_out[flashes]).argmax(0)[None]
    chosen = np.take_along_axis(video[flashes], best[..., None], 0)[0]
    weight = np.take_along_axis(np.broadcast_to(strength, (len(flashes), *best.shape[1:])), best, 0)
    picture = ground + weight[0][..., None] * (chosen - ground)
    return _png(picture.round().clip(0, 255).astype(np.uint8))


def _png(picture_HWC: np.ndarray) -> str:
    file = io.BytesIO()
    imsave(file, np.ascontiguousarray(picture_HWC), format="png")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode("ascii")
