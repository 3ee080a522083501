"""What runs at the same time in an update, against one after another: the laptop student.

    python benchmarks/overlap.py

Rollouts: 32 videos in batches of 8, encoded as h264 for `codec_match` and scored by a frozen
reward, after each other ("serial") or beside the next batch ("overlap"). Update: the quickstart's,
rollout, discriminator and student, with `afd.async` 0 and 1. Times are of the wall clock, each
thread has one core, and both sides take turns.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor

# Allows running from a checkout without installation.
sys.path.append(str(Path(__file__).resolve().parents[1]))
sys.path.append(str(Path(__file__).resolve().parents[1] / "python"))

from afd.lab.config import ToyDiscriminatorConfig
from afd.lab.discriminator import ToyDiscriminator
from afd.lab.simulator import PROMPTS
from afd.lab.student import ToyConfig, ToyStudent
from afd.methods.afd import Afd
from afd.methods.base import Batch
from afd.methods.config import AfdConfig
from afd.methods.generation import Streaming
from afd.methods.inputs import InputPipeline
from afd.methods.rollouts import roll_out
from afd.models.codec import Pixels
from afd.models.policies import make_policies
from afd.rewards.base import Reward
from afd.rollout import STEPS
from afd.video.config import VideoConfig
from benchmarks import harness, report

CASES = {"rollouts": ("serial", "overlap"), "update": ("async 0", "async 1")}
HOW = "ms: median of one update's rollouts, or of a whole update; ratio: to the case's first row"


@dataclass(frozen=True)
class Row:
    """One way to do the work of a case; times in milliseconds."""

    case: str
    provider: str
    median_ms: float
    p20: float
    p80: float
    host_ms: float | None
    reps: int
    ratio: float | None


class Frozen(Reward):
    """The laptop task's scorer, as a frozen reward."""

    def __init__(self, discriminator: ToyDiscriminator) -> None:
        self.discriminator = discriminator

    def score(self, input_BFCHW: Tensor, prompts: Sequence[str]) -> Tensor:
        return self.discriminator.score(input_BFCHW, list(prompts))


def scorer() -> ToyDiscriminator:
    return ToyDiscriminator(ToyDiscriminatorConfig(backbone="random", warmup_updates=0))


def student() -> ToyStudent:
    torch.manual_seed(0)
    return ToyStudent(ToyConfig())


def rollouts(prompts: list[str]) -> dict[str, Callable[[int], object]]:
    made = student().requires_grad_(False)
    pipeline = InputPipeline(None, Pixels(), VideoConfig(codec_match=True), [Frozen(scorer())])
    batch = Batch(0, prompts, torch.empty(len(prompts), 0))

    def roll(overlap: bool, _: int) -> object:
        how = Streaming(STEPS, batch=len(prompts), overlap=overlap)
        return roll_out(made, batch, 4, Generator().manual_seed(0), how, to_input=pipeline)

    return {name: partial(roll, name == "overlap") for name in CASES["rollouts"]}


def updates(prompts: list[str], methods: list[Afd]) -> dict[str, Callable[[int], object]]:
    """`methods`: filled with those that are to be closed."""
    found: dict[str, Callable[[int], object]] = {}
    for delay, name in enumerate(CASES["update"]):
        config = AfdConfig(**{"async": delay})
        policies = make_policies(student(), config.versions)
        methods.append(Afd(policies, scorer(), config, denoising_steps=STEPS))
        found[name] = partial(_update, methods[-1], prompts)
    return found


def _update(method: Afd, prompts: list[str], _: int) -> object:
    shape = (len(prompts), ToyConfig().frames, *method.policies.student.frame_shape)
    batch = Batch(1, prompts, torch.zeros(shape))
    method.rollout(batch)
    if method.ahead is not None:
        method.roll_ahead(batch)
    return method.discriminator_step(batch), method.student_step(batch)


def measure(case: str, args: Any) -> tuple[list[Row], dict[str, str]]:
    prompts, methods = list(PROMPTS)[:: 36 // (2 if args.quick else 8)], list[Afd]()
    prompts = prompts[: 2 if args.quick else 8]
    runs = rollouts(prompts) if case == "rollouts" else updates(prompts, methods)
    runs = {name: run for name, run in runs.items() if name in args.providers}
    if not runs:
        return [], {}
    timings = harness.timed(runs, "cpu", 1, args.reps, args.budget)
    for method in methods:
        method.close()
    first = timings.get(CASES[case][0])
    return [
        Row(
            case=case,
            provider=name,
            **asdict(timing),
            ratio=timing.median_ms / first.median_ms if first is not None else None,
        )
        for name, timing in timings.items()
    ], {}


def show(rows: list[Row]) -> None:
    """The table of one case."""
    report.table(
        f"{rows[0].case}, laptop student",
        ("provider",),
        ("ms", "p20", "p80", "reps", "ratio"),
        [(r.provider, r.median_ms, r.p20, r.p80, float(r.reps), r.ratio) for r in rows],
    )


def main(argv: list[str] | None = None) -> None:
    every = [name for names in CASES.values() for name in names]
    parser = report.arguments(__doc__.splitlines()[0], every)
    args = report.parse(parser, argv)
    torch.set_num_threads(1)
    if (sentence := report.busy()) is not None:
        print(sentence)
    named = ((case, partial(measure, case, args)) for case in CASES)
    report.run("overlap", HOW, named, show, args)


if __name__ == "__main__":
    main()
