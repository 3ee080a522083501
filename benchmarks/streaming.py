"""Rollouts of an update: groups that share a prefix.

    python benchmarks/streaming.py               # the laptop student

Timed is `roll_out` of one update, providers interleaved. "off" generates every video of a prompt on
its own; the others share the chunks before the named one. Counted are the passes over a chunk (a
denoising step or a context pass of one video).
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
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

PROVIDERS = ("off", "1", "2", "last")
HOW = (
    "ms: median of the rollouts of one update; passes: chunk passes, context passes included; "
    "share: of the denoising passes without sharing; peak: memory allocated during the rollouts"
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


def measure(
    prompts: int, group: int, student: ToyStudent, args: Any
) -> tuple[list[Row], dict[str, str]]:
    """Rows of every provider for groups of this size."""
    batch = Batch(0, list(PROMPTS)[:prompts], torch.empty(prompts, 0))
    chunks = student.frames // student.chunk

    def roll(provider: str, _: int) -> object:
        shared: Any = {"off": None, "last": "last"}.get(provider, provider)
        fork = draw_fork(shared, chunks, Generator())
        generator = Generator().manual_seed(0)
        return roll_out(
            student, batch, group, generator, Streaming(STEPS), place=Place(fork=fork or None)
        )

    runs = {name: partial(roll, name) for name in args.providers}
    timings = harness.timed(runs, "cpu", 1, args.reps, args.budget)
    rows = []
    for name, run in runs.items():
        with counted_passes() as passes:
            run(0)
        denoising = sum(count for count in passes if count > 0)
        rows.append(
            Row(
                case=f"toy, {prompts} prompts of {group}",
                provider=name,
                prompts=prompts,
                group=group,
                **asdict(timings[name]),
                passes=sum(map(abs, passes)),
                share=denoising / (len(STEPS) * prompts * group * chunks),
                speedup=timings["off"].median_ms / timings[name].median_ms
                if "off" in timings
                else None,
                peak_mib=harness.peak_mib(run, "cpu"),
            )
        )
    return rows, {}


def show(rows: list[Row]) -> None:
    """The table of one case."""
    report.table(
        rows[0].case,
        ("from chunk",),
        ("ms", "p20", "p80", "passes", "share", "x off", "peak MiB"),
        [
            (r.provider, r.median_ms, r.p20, r.p80, float(r.passes), r.share, r.speedup, r.peak_mib)
            for r in rows
        ],
    )


def main(argv: list[str] | None = None) -> None:
    parser = report.arguments(__doc__.splitlines()[0], PROVIDERS)
    parser.add_argument("--group", type=int, nargs="+", default=[4, 12])
    args = report.parse(parser, argv)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    student = ToyStudent(ToyConfig()).requires_grad_(False)
    prompts = 2 if args.quick else 8
    named = (
        (f"group {group}", partial(measure, prompts, group, student, args)) for group in args.group
    )
    report.run("streaming", HOW, named, show, args)


if __name__ == "__main__":
    main()
