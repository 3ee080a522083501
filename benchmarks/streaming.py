"""Rollouts of an update: groups that share a prefix, and clips of long streams.

    python benchmarks/streaming.py               # the laptop student

Timed is `roll_out` of one update, providers interleaved. Groups: "off" generates every video of a
prompt on its own; the others share the chunks before the named one. Streams: the clip of an update
at the end of a stream 1, 10 or 50 times as long as a training video, of a student with a window of
12 frames and a sink of 3. Counted are the passes over a chunk (a denoising step or a context pass
of one video).
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor

# Allows running from a checkout without installation.
sys.path.append(str(Path(__file__).resolve().parents[1]))
sys.path.append(str(Path(__file__).resolve().parents[1] / "python"))

from afd.lab.simulator import PROMPTS
from afd.lab.student import ToyConfig, ToyStudent
from afd.methods.base import Batch
from afd.methods.copies import Place, draw_fork
from afd.methods.generation import Streaming
from afd.methods.rollouts import roll_out
from afd.models.student import Student
from afd.rollout import STEPS
from benchmarks import harness, report

PROVIDERS = ("off", "1", "2", "last", "1x", "10x", "50x")
HOW = (
    "ms: median of the rollouts of one update; passes: chunk passes, context passes included; "
    "share: of the denoising passes of whole videos; us a pass: ms over passes; peak: memory "
    "allocated during the rollouts"
)


@dataclass(frozen=True)
class Row:
    """One way to roll out a group; times in milliseconds per update."""

    case: str
    provider: str
    prompts: int
    group: int
    median_ms: float
    p20: float
    p80: float
    host_ms: float | None
    reps: int
    passes: int
    share: float
    speedup: float | None  # against "off"
    us_per_pass: float
    peak_mib: float


@contextmanager
def counted_passes() -> Iterator[list[int]]:
    """Rows of every pass in the block: of denoising steps, and negative of context passes."""
    rows: list[int] = []
    passed: Any = Student._pass

    def note(self: Student, x: Tensor, *args: Any, **how: Any) -> Tensor | None:
        rows.append(-len(x) if how["context"] else len(x))
        made: Tensor | None = passed(self, x, *args, **how)
        return made

    Student._pass = note  # type: ignore[method-assign]
    try:
        yield rows
    finally:
        Student._pass = passed  # type: ignore[method-assign]


def place_of(provider: str, chunks: int) -> Place:
    """Where the update is in its rollouts, of videos of `chunks` chunks."""
    if provider.endswith("x"):
        return Place(clip=(int(provider[:-1]) - 1) * chunks)
    shared: Any = None if provider == "off" else provider
    return Place(fork=draw_fork(shared, chunks, Generator()) or None)


def measure(
    case: str, prompts: int, group: int, student: ToyStudent, args: Any
) -> tuple[list[Row], dict[str, str]]:
    """Rows of every provider for groups of this size; streams of a student with a window."""
    chunks, windowed = student.frames // student.chunk, student.net.config.window is not None
    batch = Batch(0, list(PROMPTS)[:prompts], torch.empty(prompts, 0))

    def roll(provider: str, _: int) -> object:
        generator, at = Generator().manual_seed(0), place_of(provider, chunks)
        return roll_out(student, batch, group, generator, Streaming(STEPS), place=at)

    names = [name for name in args.providers if name.endswith("x") == windowed]
    runs = {name: partial(roll, name) for name in names}
    if not runs:
        return [], {}
    timings = harness.timed(runs, "cpu", 1, args.reps, args.budget)
    rows = []
    for name, run in runs.items():
        with counted_passes() as passes:
            run(0)
        denoising, ms = sum(count for count in passes if count > 0), timings[name].median_ms
        total = sum(map(abs, passes))
        rows.append(
            Row(
                case=case,
                provider=name,
                prompts=prompts,
                group=group,
                **asdict(timings[name]),
                passes=total,
                share=denoising / (len(STEPS) * prompts * group * chunks),
                speedup=timings["off"].median_ms / ms if "off" in timings else None,
                us_per_pass=1e3 * ms / total,
                peak_mib=harness.peak_mib(run, "cpu"),
            )
        )
    return rows, {}


def show(rows: list[Row]) -> None:
    """The table of one case."""
    report.table(
        rows[0].case,
        ("from chunk, or length",),
        ("ms", "p20", "p80", "passes", "share", "us a pass", "x off", "peak MiB"),
        [
            (
                *(r.provider, r.median_ms, r.p20, r.p80, float(r.passes), r.share),
                *(r.us_per_pass, r.speedup, r.peak_mib),
            )
            for r in rows
        ],
    )


def main(argv: list[str] | None = None) -> None:
    parser = report.arguments(__doc__.splitlines()[0], PROVIDERS)
    parser.add_argument("--group", type=int, nargs="+", default=[4, 12])
    args = report.parse(parser, argv)
    torch.set_num_threads(1)
    prompts = 2 if args.quick else 8
    torch.manual_seed(0)
    whole = ToyStudent(ToyConfig()).requires_grad_(False)
    windowed = ToyStudent(ToyConfig(replace(ToyConfig().wan, window=12, sink=3)))
    windowed.load_state_dict(whole.state_dict())
    cases = [(f"groups of {group}", group, whole) for group in args.group]
    cases.append(("streams", 1, windowed.requires_grad_(False)))
    named = (
        (case, partial(measure, f"toy, {prompts} prompts, {case}", prompts, group, student, args))
        for case, group, student in cases
    )
    report.run("streaming", HOW, named, show, args)


if __name__ == "__main__":
    main()
