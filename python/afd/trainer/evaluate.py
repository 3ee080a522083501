"""Evaluation: takes a policy, returns metrics and videos of held-out seeds.

Shape letters: B videos, F frames, C channels, H x W pixels, N metrics.
"""

from __future__ import annotations

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors.torch import save
from torch import Tensor

from afd.config.run import EvaluationConfig, RunConfig
from afd.data.prompts import prompts_of
from afd.distributed import ALONE, Ranks
from afd.errors import ConfigError
from afd.files import write_bytes, write_text
from afd.methods.afd import Watch
from afd.models.codec import Codec, Pixels
from afd.models.config import StudentConfig
from afd.models.student import Student
from afd.registry import find
from afd.rewards.base import Term
from afd.rollout import rollout
from afd.teachers.base import Request
from afd.trainer.motion import DYNAMIC, motion
from afd.video import from_uint8, through_codec, to_uint8, write_video


@dataclass(frozen=True)
class Evaluation:
    """The result of one evaluation.

    Attributes:
        metrics: means over all its videos.
        pictures_BFHWC: uint8, of all videos or only the first `evaluation.samples`.
        prompts, seeds: one per video, including those whose pictures were freed.
        fps: frame rate of the pictures; None for the toy.
    """

    metrics: dict[str, float]
    pictures_BFHWC: Tensor
    prompts: list[str]
    seeds: list[int]
    fps: float | None = None

    @property
    def count(self) -> int:
        return len(self.prompts)


Evaluator = Callable[[Student, int], Evaluation]


class Metrics(ABC):
    """Base class of the entries of the registry's group "metrics" (docs/EXTENDING.md).

    Attributes:
        needs_prompts: whether it takes its prompts from the run (`evaluation_prompts`).
    """

    needs_prompts: ClassVar[bool] = True

    def __init__(self, run: Evaluated) -> None:
        self.run = run

    @staticmethod  # noqa: B027 - the default accepts any student
    def check(student: StudentConfig) -> None:
        """Raise ValueError if this student's videos cannot be measured."""

    @staticmethod
    def check_domain(key: str, domain: str | None) -> None:
        """Raise ValueError, naming the section, for a domain that it does not have. Default: it has
        none."""
        if domain is not None:
            raise ValueError(f"{key}.domain: got {domain}; needed: null, with this kind")

    @staticmethod
    def watch(config: EvaluationConfig, ranks: Ranks) -> Watch | None:
        """A hook that computes metrics of an update's rollouts and scores. Default: None."""
        return None

    @abstractmethod
    def __call__(self, policy: Student, count: int) -> Evaluation:
        """Measure `count` held-out videos. Every process of the run must call this."""


@dataclass(frozen=True)
class Evaluated:
    """The parts of a run that metrics may use.

    Attributes:
        teacher_videos: returns some of the teacher's training videos, [N, F, C, H, W] in [-1, 1].
        codec, discriminator: of the run's method.
        prompts: of held-out videos, see `evaluation_prompts`.
        ranks: the processes that share an evaluation's videos.
        rewards: of the run's method.
    """

    config: RunConfig
    teacher_videos: Callable[[], Tensor]
    codec: Codec
    discriminator: Any
    prompts: Sequence[str]
    ranks: Ranks
    rewards: Sequence[Term] = ()


def make_evaluator(
    config: RunConfig,
    teacher_videos: Callable[[], Tensor],
    *,
    codec: Codec | None = None,
    discriminator: Any = None,
    prompts: Sequence[str] = (),
    ranks: Ranks = ALONE,
    rewards: Sequence[Term] = (),
) -> Evaluator | None:
    """Build the metrics of `evaluation.kind` (arguments: see `Evaluated`); None for "none"."""
    if config.evaluation.kind == "none":
        return None
    codec = codec or Pixels()
    run = Evaluated(config, teacher_videos, codec, discriminator, prompts, ranks, rewards)
    evaluator: Evaluator = find("metrics", config.evaluation.kind)(run)
    return evaluator


def evaluation_prompts(config: RunConfig, requests: Sequence[Request]) -> list[str]:
    """The prompts of held-out videos: `evaluation.prompts`, or the teacher's; empty for metrics
    that define their own.

    Raises ConfigError if they cannot be read.
    """
    evaluation = config.evaluation
    if evaluation.kind == "none" or not find("metrics", evaluation.kind).needs_prompts:
        return []
    if evaluation.prompts is None:
        found = list(dict.fromkeys(request.prompt for request in requests))
    else:
        found = prompts_of("evaluation.prompts", evaluation.prompts)
    return found[: max(evaluation.videos, evaluation.curve_videos)]


def every_prompt(config: RunConfig, requests: Sequence[Request]) -> list[str]:
    """The prompts of all held-out sets, in order, with those of a set once."""
    each = [evaluation_prompts(one, requests) for one in each_set(config).values()]
    return list(dict.fromkeys(prompt for prompts in each for prompt in prompts))


def each_set(config: RunConfig) -> dict[str, RunConfig]:
    """The configuration with each held-out set's settings by name (`EvaluationConfig.each`)."""
    sets = config.evaluation.each()
    return {name: config.model_copy(update={"evaluation": one}) for name, one in sets.items()}


class Sets:
    """Measures several held-out sets one after another; their metrics are named "set/metric"."""

    def __init__(self, evaluators: dict[str, Evaluator]) -> None:
        self._evaluators = evaluators

    def __call__(self, policy: Student, count: int) -> Evaluation:
        """Measure `count` videos of each set."""
        found = {name: measure(policy, count) for name, measure in self._evaluators.items()}
        return Evaluation(
            {f"{name}/{key}": x for name, one in found.items() for key, x in one.metrics.items()},
            torch.cat([one.pictures_BFHWC for one in found.values()]),
            [prompt for one in found.values() for prompt in one.prompts],
            [seed for one in found.values() for seed in one.seeds],
            next(iter(found.values())).fps,
        )


def own_part(count: int, ranks: Ranks) -> list[int]:
    """Indices of the `count` videos that this process makes, in order. The last index is repeated
    if they do not divide evenly, because every forward pass of a sharded network needs all
    processes. Raises ConfigError for fewer than one."""
    if count < 1:
        raise ConfigError(f"videos: got {count}; needed: at least one to evaluate")
    each = -(-count // ranks.world)
    return [min(i, count - 1) for i in range(ranks.rank * each, (ranks.rank + 1) * each)]


class EachVideo(Metrics):
    """Metrics averaged over videos; a subclass measures a single video.

    Held-out video i has prompt i modulo the number of prompts and seed evaluation.seed + i, so
    prompts and noise are the same in every evaluation of every run. The processes share the videos.
    """

    @abstractmethod
    def measure(self, video_1FCHW: Tensor, prompt: str) -> dict[str, float]:
        """The metrics of one video in [-1, 1], under the same names for every video."""

    def __call__(self, policy: Student, count: int) -> Evaluation:
        config, prompts, ranks = self.run.config, self.run.prompts, self.run.ranks
        asked = [prompts[i % len(prompts)] for i in range(count)]
        seeds = [config.evaluation.seed + i for i in range(count)]
        own = own_part(count, ranks)
        rows: list[list[float]] = []
        pictures: list[Tensor] = []
        names: list[str] = []
        for index, x0_1FCHW in zip(own, rolled(policy, config, asked, seeds, own), strict=True):
            with torch.no_grad():
                video_1FCHW = self.run.codec.decode(x0_1FCHW)
            row = self.measure(video_1FCHW, asked[index])
            names = list(row)
            rows.append([row[name] for name in names])
            if ranks.main and index < config.evaluation.samples and index == len(pictures):
                pictures.append(to_uint8(video_1FCHW[0]))
        found_BN = ranks.gather(torch.tensor(rows, dtype=torch.float64))[:count]
        metrics = dict(zip(names, found_BN.mean(0).tolist(), strict=True))
        kept = torch.stack(pictures) if pictures else torch.empty(0, 0, 0, 0, 3, dtype=torch.uint8)
        return Evaluation(metrics, kept, asked, seeds, config.video.rate)


class VideoMetrics(EachVideo):
    """Motion; motion quality as rated by the frozen VideoAlign if the run's discriminator is one;
    and the run's frozen rewards of pixels."""

    def measure(self, video_1FCHW: Tensor, prompt: str) -> dict[str, float]:
        video, judge = self.run.config.video, self.run.discriminator
        moved = motion(video_1FCHW[0], video.rate)
        row = {"motion": moved, "dynamic": float(moved > DYNAMIC)}
        frozen = [(t.name, t.reward) for t in self.run.rewards if t.reward is not None]
        rated = [(name, reward) for name, reward in frozen if reward.input_space == "pixels"]
        if video.codec_match and (rated or hasattr(judge, "released_ratings")):
            # The same input as in training.
            video_1FCHW = through_codec(video_1FCHW, fps=video.fps, crf=video.crf)
        # As in training, rewards of one preparation share an input, and with it their passes.
        inputs: dict[object, Tensor] = {}
        for name, reward in rated:
            of = reward.prepared_by
            if of not in inputs:
                inputs[of] = reward.prepare(video_1FCHW.cpu())
            row[f"reward/{name}"] = float(reward.score(inputs[of], [prompt]))
        if hasattr(judge, "released_ratings"):
            seen = judge.prepare(video_1FCHW)
            ratings = judge.released_ratings(seen, [prompt])
            row |= {name: float(value) for name, value in ratings.items()}
            row["score"] = float(judge.score(seen, [prompt]))
        return row


def rolled(
    policy: Student,
    config: RunConfig,
    prompts: list[str],
    seeds: list[int],
    chosen: list[int],
) -> Iterator[Tensor]:
    """Yield the selected videos [1, F, C, H, W] in the student's space, generated in small batches
    as in training."""
    student = config.student
    width = student.rollout_batch or len(chosen)
    for part in (chosen[at : at + width] for at in range(0, len(chosen), width)):
        x0_BFCHW = rollout(
            policy,
            [prompts[i] for i in part],
            [seeds[i] for i in part],
            denoising_steps=student.denoising_steps,
            first_chunk_steps=student.first_chunk_steps,
            context_noise=student.context_noise,
        )
        yield from x0_BFCHW.split(1)


def finite(metrics: dict[str, float]) -> dict[str, float]:
    """The metrics that are defined for this many videos (a spread needs two of one prompt)."""
    return {key: value for key, value in metrics.items() if math.isfinite(value)}


def write_samples(out: Path, result: Evaluation, count: int) -> None:
    """Write the first `count` videos into a run's folder, atomically.

    Toy videos as samples.safetensors, uint8 [N, F, H, W, 3] under "videos"; others as
    samples/000.mp4 and so on, with samples.jsonl beside that folder.
    """
    if result.fps is None:
        _write_tensors(out / "samples.safetensors", result, count)
        return
    folder = out / "samples"
    folder.mkdir(exist_ok=True)
    lines = []
    for i, picture_FHWC in enumerate(result.pictures_BFHWC[:count]):
        write_video(folder / f"{i:03d}.mp4", from_uint8(picture_FHWC), fps=result.fps)
        line = {"file": f"samples/{i:03d}.mp4", "prompt": result.prompts[i]}
        lines.append(json.dumps(line | {"seed": result.seeds[i]}, ensure_ascii=False) + "\n")
    write_text(out / "samples.jsonl", "".join(lines))


def _write_tensors(path: Path, result: Evaluation, count: int) -> None:
    if count == 0:
        return
    data = save(
        {"videos": result.pictures_BFHWC[:count].contiguous()},
        {"prompts": json.dumps(result.prompts[:count]), "seeds": json.dumps(result.seeds[:count])},
    )
    write_bytes(path, data)
