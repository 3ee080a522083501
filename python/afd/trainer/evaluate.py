"""Evaluation as the loop sees it: a policy in; metrics and videos of held-out seeds out.

Shape letters: B videos, F frames, C channels, H x W pixels, N metrics.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from afd.config.run import RunConfig
from afd.distributed import ALONE, Ranks
from afd.errors import ConfigError
from afd.files import write_bytes, write_text
from afd.lab import physics
from afd.lab.simulator import ATTRIBUTES
from afd.models.codec import Codec, Pixels
from afd.models.student import Student
from afd.rollout import rollout
from afd.teachers.base import Request
from afd.trainer.motion import DYNAMIC, motion
from afd.video import from_uint8, through_codec, to_uint8, write_video

# Frames per second of clips that are taken as they come.
RATE = 16.0


@dataclass(frozen=True)
class Evaluation:
    """What one evaluation found.

    Attributes:
        metrics: means over all its videos.
        pictures_BFHWC: uint8, of all videos or (kind "video") the first `evaluation.samples`.
        prompts, seeds: one for each video, also those whose pictures were let go.
        fps: rate at which the pictures are shown; None for the toy's.
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


def make_evaluator(
    config: RunConfig,
    teacher_videos: Callable[[], Tensor],
    *,
    codec: Codec | None = None,
    critic: Any = None,
    prompts: Sequence[str] = (),
    ranks: Ranks = ALONE,
) -> Evaluator | None:
    """What `evaluation.kind` asks for: policy and number of videos in, Evaluation out.

    Args:
        teacher_videos: [N, F, C, H, W], for the toy's distance to the nearest training video.
        codec, critic: of the run's method (kind "video").
        prompts: what held-out videos are made of (kind "video"), see `evaluation_prompts`.
        ranks: the processes that share an evaluation's videos; each calls the evaluator.
    """
    kind = config.evaluation.kind
    if kind == "none":
        return None
    if kind == "physics":
        return _physics(config, teacher_videos, ranks)
    judge = critic if hasattr(critic, "released_ratings") else None
    return _video(config, codec or Pixels(), judge, list(prompts), ranks)


def evaluation_prompts(config: RunConfig, requests: Sequence[Request]) -> list[str]:
    """The prompts of held-out videos of kind "video": `evaluation.prompts`, or the teacher's.

    Raises ConfigError where they cannot be read.
    """
    evaluation = config.evaluation
    if evaluation.kind != "video":
        return []
    if evaluation.prompts is None:
        found = list(dict.fromkeys(request.prompt for request in requests))
    else:
        try:
            text = evaluation.prompts.read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(
                f"evaluation.prompts {evaluation.prompts}: cannot be read ({error})"
            ) from None
        found = [line.strip() for line in text.split("\n") if line.strip()]
    if not found:
        raise ConfigError("evaluation.prompts: holds no prompt; needed: one a line")
    return found[: max(evaluation.videos, evaluation.curve_videos)]


def _physics(config: RunConfig, teacher_videos: Callable[[], Tensor], ranks: Ranks) -> Evaluator:
    """Held-out video i has the simulator's prompt i modulo 36 and seed evaluation.seed + i: every
    run shows the same noise, whatever its method."""
    training_tracks: list[Tensor] = []

    def evaluate(policy: Student, count: int) -> Evaluation:
        prompts = [ATTRIBUTES[i % len(ATTRIBUTES)].prompt for i in range(count)]
        seeds = [config.evaluation.seed + i for i in range(count)]
        own = _own(count, ranks)
        mine = [prompts[i] for i in own], [seeds[i] for i in own]
        made_BFCHW = rollout(policy, *mine, steps=config.student.steps)
        videos_BFCHW = ranks.gather(made_BFCHW)[:count].cpu()
        metrics = None
        if ranks.main:
            if not training_tracks:
                training_tracks.append(physics.track_ball(teacher_videos())[0])
            metrics = finite(physics.measure(videos_BFCHW, prompts, training_tracks[0]))
        return Evaluation(ranks.same(metrics), to_uint8(videos_BFCHW), prompts, seeds)

    return evaluate


def _own(count: int, ranks: Ranks) -> list[int]:
    """Which of `count` videos this process makes, in order; the last one again where they do not
    divide: a sharded network needs all processes in each pass. ConfigError for fewer than one."""
    if count < 1:
        raise ConfigError(f"videos: got {count}; needed: at least one to evaluate")
    each = -(-count // ranks.world)
    return [min(i, count - 1) for i in range(ranks.rank * each, (ranks.rank + 1) * each)]


def _video(
    config: RunConfig, codec: Codec, judge: Any, prompts: list[str], ranks: Ranks
) -> Evaluator:
    """Held-out video i has prompt i modulo their number and seed evaluation.seed + i: prompts and
    noise are the same in every evaluation of every run."""
    fps = config.video.fps or RATE

    def evaluate(policy: Student, count: int) -> Evaluation:
        asked = [prompts[i % len(prompts)] for i in range(count)]
        seeds = [config.evaluation.seed + i for i in range(count)]
        own = _own(count, ranks)
        rows: list[list[float]] = []
        pictures: list[Tensor] = []
        names: list[str] = []
        for index, x_1FCHW in zip(own, rolled(policy, config, asked, seeds, own), strict=True):
            with torch.no_grad():
                video_1FCHW = codec.decode(x_1FCHW)
            moved = motion(video_1FCHW[0], fps)
            row = {"motion": moved, "dynamic": float(moved > DYNAMIC)}
            if judge is not None:
                # As the discriminator sees them in training.
                judged = video_1FCHW
                if config.video.codec_match:
                    judged = through_codec(judged, fps=config.video.fps, crf=config.video.crf)
                seen = judge.look(judged)
                ratings = judge.released_ratings(seen, [asked[index]])
                row |= {name: float(value) for name, value in ratings.items()}
                row["score"] = float(judge.score(seen, [asked[index]]))
            names = list(row)
            rows.append([row[name] for name in names])
            if ranks.main and index < config.evaluation.samples and index == len(pictures):
                pictures.append(to_uint8(video_1FCHW[0]))
        found_BN = ranks.gather(torch.tensor(rows, dtype=torch.float64))[:count]
        metrics = dict(zip(names, found_BN.mean(0).tolist(), strict=True))
        kept = torch.stack(pictures) if pictures else torch.empty(0, 0, 0, 0, 3, dtype=torch.uint8)
        return Evaluation(metrics, kept, asked, seeds, fps)

    return evaluate


def rolled(
    policy: Student,
    config: RunConfig,
    prompts: list[str],
    seeds: list[int],
    chosen: list[int],
) -> Iterator[Tensor]:
    """The chosen videos one by one [1, F, C, H, W], in the student's space, streamed a few together
    as in training."""
    student = config.student
    more: dict[str, Any] = {}
    if student.kind == "wan":
        more = {"first_steps": student.first_chunk_steps, "context_noise": student.context_noise}
    width = student.rollout_batch or len(chosen)
    for part in (chosen[at : at + width] for at in range(0, len(chosen), width)):
        x_BFCHW = rollout(
            policy,
            [prompts[i] for i in part],
            [seeds[i] for i in part],
            steps=student.steps,
            **more,
        )
        yield from x_BFCHW.split(1)


def finite(metrics: dict[str, float]) -> dict[str, float]:
    """Only the metrics that this many videos allow (a spread needs two of one prompt)."""
    return {key: value for key, value in metrics.items() if math.isfinite(value)}


def write_samples(out: Path, result: Evaluation, count: int) -> None:
    """The first `count` videos, into a run's folder, whole or not at all.

    The toy's as samples.safetensors, uint8 [N, F, H, W, 3] under "videos"; others as
    samples/000.mp4 and on, with samples.jsonl beside that folder.
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
