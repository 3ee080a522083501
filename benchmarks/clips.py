"""A teacher's clips: what the check of one costs, beside reading it.

    python -m benchmarks.clips

The clips are written here (waves under noise, h264); those up to 81 frames of 480x832 are checked
by decoding, larger ones by their packets and one frame. CPU only.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

# Allows running from a checkout without installation.
sys.path.append(str(Path(__file__).resolve().parents[1]))
sys.path.append(str(Path(__file__).resolve().parents[1] / "python"))

from afd.video import check_video, read_video, write_video
from benchmarks import report

WORK = ("check", "read")
HOW = (
    "ms: median over repetitions, for one clip on one thread of Python (the decoder takes more for "
    "large frames); read: to 480x832 at 16 a second; MB: the file's size."
)


@dataclass(frozen=True)
class Row:
    """One kind of work on one clip."""

    case: str
    work: str
    MB: float
    median_ms: float
    reps: int


@dataclass(frozen=True)
class Case:
    """A clip of `frames` at `fps`."""

    frames: int
    height: int
    width: int
    fps: int

    def __str__(self) -> str:
        return f"{self.frames} frames of {self.height}x{self.width}"


def waves(case: Case) -> Tensor:
    """A moving, textured video [F, 3, H, W] in [-1, 1]."""
    rows = torch.linspace(0, 20, case.height)[:, None]
    columns = torch.linspace(0, 30, case.width)
    time_F = torch.arange(case.frames).view(-1, 1, 1, 1) * 0.1
    colour = torch.arange(1, 4).view(1, 3, 1, 1)
    noise_CHW = torch.randn(3, case.height, case.width, generator=torch.Generator().manual_seed(0))
    return (torch.sin(columns + colour + time_F) * torch.cos(rows) + 0.1 * noise_CHW).clamp(-1, 1)


def measure(case: Case, args: argparse.Namespace) -> tuple[list[Row], dict[str, str]]:
    """A row for every requested kind of work."""
    wanted = int(case.frames * 16 / case.fps)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "clip.mp4"
        write_video(path, waves(case), fps=case.fps)
        works: dict[str, Callable[[], object]] = {
            "check": lambda: check_video(path, frames=wanted, fps=16),
            "read": lambda: read_video(path, frames=wanted, height=480, width=832, fps=16),
        }
        for work in args.providers:
            seconds = _times(works[work], args.reps, args.budget)
            median_ms = 1e3 * statistics.median(seconds)
            rows.append(Row(str(case), work, path.stat().st_size / 1e6, median_ms, len(seconds)))
    return rows, {}


def _times(work: Callable[[], object], reps: int, budget_s: float) -> list[float]:
    """Seconds of each repetition, after a warm-up."""
    work()
    seconds: list[float] = []
    while not seconds or (len(seconds) < reps and sum(seconds) < budget_s):
        started = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - started)
    return seconds


def cases(args: argparse.Namespace) -> Iterator[Case]:
    """Clips from the toy's size to a video service's."""
    yield Case(12, 16, 16, 8)
    if not args.quick:
        yield Case(81, 480, 832, 16)
        yield Case(120, 720, 1280, 24)


def show(rows: list[Row]) -> None:
    """The table of one clip."""
    report.table(
        rows[0].case,
        ("work",),
        ("ms", "MB", "reps"),
        [(row.work, row.median_ms, row.MB, row.reps) for row in rows],
    )


def main(argv: list[str] | None = None) -> None:
    args = report.parse(report.arguments(__doc__.splitlines()[0], WORK), argv)
    named = ((str(case), partial(measure, case, args)) for case in cases(args))
    report.run("clips", HOW, named, show, args)


if __name__ == "__main__":
    main()
