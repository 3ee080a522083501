"""Evaluation of the toy task: held-out physics metrics and their rank agreement with the score."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from afd.config.run import EvaluationConfig
from afd.distributed import ALONE, Ranks
from afd.lab import physics
from afd.lab.physics import measure_each
from afd.lab.simulator import DOMAINS, GRAVITY, PROMPTS, Domain
from afd.methods.afd import Watch
from afd.methods.rewards import within_group_correlation
from afd.models.config import StudentConfig
from afd.models.student import Student
from afd.rollout import rollout
from afd.trainer.evaluate import Evaluated, Evaluation, Metrics, finite, own_part
from afd.video import to_uint8

# Updates between two logs of the score's agreement with the task's metrics.
WATCH_EVERY = 10


def measured_domain(section: EvaluationConfig) -> Domain:
    """The domain by which videos are measured."""
    return GRAVITY if section.domain is None else DOMAINS[section.domain]


class PhysicsMetrics(Metrics):
    """The task's exact metrics (`physics.DEFINITIONS`).

    Held-out video i has the domain's prompt i modulo 36 and seed evaluation.seed + i: every run
    starts from the same noise, whatever its method.
    """

    needs_prompts: ClassVar[bool] = False

    def __init__(self, run: Evaluated) -> None:
        super().__init__(run)
        self.training_tracks: list[Tensor] = []

    @staticmethod
    def check(student: StudentConfig) -> None:
        """Reject any student but the toy."""
        if student.kind != "toy":
            raise ValueError(
                "evaluation.kind: got physics, which measures the toy task; needed: video or none "
                f"for student.kind={student.kind}"
            )

    @staticmethod
    def check_domain(key: str, domain: str | None) -> None:
        """Reject names that are not in the simulator's DOMAINS."""
        if domain is not None and domain not in DOMAINS:
            raise ValueError(f"{key}.domain: got {domain}; needed: one of {', '.join(DOMAINS)}")

    @staticmethod
    def watch(config: EvaluationConfig, ranks: Ranks) -> Watch:
        """Log, every WATCH_EVERY updates, the score's agreement with the task's metrics."""

        def watch(
            update: int, score_B: Tensor, video_BFCHW: Tensor, prompts: list[str], group: int
        ) -> dict[str, float]:
            if update % WATCH_EVERY:
                return {}
            domain = measured_domain(config)
            return rank_agreement(score_B, video_BFCHW, prompts, group, ranks, domain)

        return watch

    def held_out(self, count: int) -> tuple[Domain, list[str], list[int]]:
        """The measured domain, its prompts and the seeds."""
        section = self.run.config.evaluation
        domain = measured_domain(section)
        return domain, domain.in_turn(count), [section.seed + i for i in range(count)]

    def __call__(self, policy: Student, count: int) -> Evaluation:
        config, ranks = self.run.config, self.run.ranks
        named = config.evaluation.domain
        domain, prompts, seeds = self.held_out(count)
        own = own_part(count, ranks)
        mine = [prompts[i] for i in own], [seeds[i] for i in own]
        made_BFCHW = rollout(policy, *mine, denoising_steps=config.student.denoising_steps)
        videos_BFCHW = ranks.gather(made_BFCHW)[:count].cpu()
        metrics = None
        if ranks.main:
            # Another domain's teacher may be at work.
            if named is None and not self.training_tracks:
                self.training_tracks.append(physics.track_ball(self.run.teacher_videos())[0])
            tracks = self.training_tracks[0] if named is None else None
            metrics = finite(physics.measure(videos_BFCHW, prompts, tracks, domain))
        return Evaluation(ranks.same(metrics), to_uint8(videos_BFCHW), prompts, seeds)


@torch.no_grad()
def rank_agreement(
    score_B: Tensor,
    video_BFCHW: Tensor,
    prompts: list[str],
    group_size: int,
    ranks: Ranks = ALONE,
    domain: Domain = GRAVITY,
) -> dict[str, float]:
    """Correlation of the score with each task metric among the rollouts of a prompt, and the
    rollouts' `seam_jerk`.

    Computed over the videos of all processes. Empty unless the prompts are bouncing-ball prompts
    and groups have two or more videos.
    """
    if group_size < 2 or ranks.any(any(prompt not in PROMPTS for prompt in prompts)):
        return {}
    each = measure_each(video_BFCHW.cpu(), domain)
    score_B = ranks.gather(score_B)
    known = {"phys": -each.phys, "fit_res": -each.fit_res, "rend": -each.rend}
    found = {
        f"agreement/{name}": within_group_correlation(score_B, ranks.gather(value_B), group_size)
        for name, value_B in known.items()
    }
    return finite(found | {"student/seam_jerk": physics.seam_jerk(ranks.gather(each.kink))})
