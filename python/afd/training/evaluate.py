"""Evaluation as the loop sees it: a policy in; metrics and videos of held-out seeds out."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from afd.config import RunConfig
from afd.evaluation import physics
from afd.models.student import Student
from afd.rollout import rollout
from afd.teachers.simulator import ATTRIBUTES
from afd.video import to_uint8


@dataclass(frozen=True)
class Evaluation:
    """What one evaluation found. `videos_BFCHW` in [-1, 1]; one prompt and seed per video."""

    metrics: dict[str, float]
    videos_BFCHW: Tensor
    prompts: list[str]
    seeds: list[int]

    @property
    def count(self) -> int:
        return len(self.prompts)


Evaluator = Callable[[Student, int], Evaluation]


def make_evaluator(config: RunConfig, teacher_videos: Callable[[], Tensor]) -> Evaluator | None:
    """What `evaluation.kind` asks for: policy and number of videos in, Evaluation out.

    Held-out video i has the simulator's prompt i modulo 36 and seed evaluation.seed + i, whatever
    the method, so every run shows the same noise. `teacher_videos` gives [N, F, C, H, W], for the
    distance to the nearest training video.
    """
    if config.evaluation.kind == "none":
        return None
    training_tracks: list[Tensor] = []

    def evaluate(policy: Student, count: int) -> Evaluation:
        if not training_tracks:
            training_tracks.append(physics.track_ball(teacher_videos())[0])
        prompts = [ATTRIBUTES[i % len(ATTRIBUTES)].prompt for i in range(count)]
        seeds = [config.evaluation.seed + i for i in range(count)]
        videos_BFCHW = rollout(policy, prompts, seeds, steps=config.student.steps)
        metrics = physics.measure(videos_BFCHW, prompts, training_tracks[0])
        return Evaluation(finite(metrics), videos_BFCHW, prompts, seeds)

    return evaluate


def finite(metrics: dict[str, float]) -> dict[str, float]:
    """Only the metrics that this many videos allow (a spread needs two of one prompt)."""
    return {key: value for key, value in metrics.items() if math.isfinite(value)}


def write_samples(path: Path, result: Evaluation, count: int) -> None:
    """The first `count` videos as uint8 [N, F, H, W, 3] under "videos", whole or not at all."""
    if count == 0:
        return
    partial = path.with_name(path.name + ".partial")
    save_file(
        {"videos": to_uint8(result.videos_BFCHW[:count])},
        str(partial),
        metadata={
            "prompts": json.dumps(result.prompts[:count]),
            "seeds": json.dumps(result.seeds[:count]),
        },
    )
    partial.replace(path)
