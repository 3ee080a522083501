"""Evaluation of long streams of the toy task: its metrics by position.

Shape letters: B streams, F frames of a clip, C colour channels, H x W pixels.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from statistics import fmean

import torch
from torch import Tensor

from afd.lab import physics
from afd.lab.metrics import PhysicsMetrics
from afd.lab.simulator import GRAVITY, Domain, attribute_table
from afd.models.student import Student
from afd.rollout import stream, stream_layout
from afd.trainer.evaluate import Evaluation, finite, own_part
from afd.video import to_uint8


def clip_metrics(
    video_BFCHW: Tensor, prompts: list[str], domain: Domain = GRAVITY
) -> dict[str, float]:
    """Metrics of clips at one position of their streams (`physics.DEFINITIONS`), and `colour`: the
    share of clips that show the colour of their prompt, its only attribute that lasts; in an
    endless domain a ball that moves sideways also goes on, and `adh` is the share with both."""
    each = physics.measure_each(video_BFCHW, domain, moving=True)
    wanted_B4 = attribute_table(prompts)
    found = {
        "phys": float(each.phys.mean()),
        "fit_res": float(each.fit_res.mean()),
        "motion": float(each.motion.mean()),
        "rend": float(each.rend.mean()),
        "colour": float((each.colour == wanted_B4[:, 0]).float().mean()),
    }
    if domain.endless:
        adheres_B = physics.adheres(each.attributes, wanted_B4, domain)
        found["adh"] = float(adheres_B.float().mean())
    return finite(found)


class StreamPhysicsMetrics(PhysicsMetrics):
    """The task's metrics by position in held-out streams of `evaluation.clips` training lengths.

    `phys@k` is that of the k-th clip; without a position a metric is the mean over all. Prompts and
    seeds are those of `PhysicsMetrics`. Memory does not grow with the stream of a student with a
    window.
    """

    def __call__(self, policy: Student, count: int) -> Evaluation:
        ranks = self.run.ranks
        domain, prompts, seeds = self.held_out(count)
        own = own_part(count, ranks)
        first = torch.empty(0)
        rows: list[dict[str, float]] = []
        clips = self._clips(policy, [prompts[i] for i in own], [seeds[i] for i in own])
        for made_BFCHW in clips:
            videos_BFCHW = ranks.gather(made_BFCHW)[:count].cpu()
            if not rows:
                first = to_uint8(videos_BFCHW)
            # As everywhere, one process measures for all.
            measured = clip_metrics(videos_BFCHW, prompts, domain) if ranks.main else None
            rows.append(ranks.same(measured))
        metrics = {name: fmean(row[name] for row in rows) for name in rows[0]}
        for place, row in enumerate(rows, 1):
            metrics |= {f"{name}@{place}": value for name, value in row.items()}
        return Evaluation(metrics, first, prompts, seeds)

    def _clips(self, policy: Student, prompts: list[str], seeds: list[int]) -> Iterator[Tensor]:
        """The consecutive clips of the streams, [B, F, C, H, W]."""
        student, count = self.run.config.student, self.run.config.evaluation.clips
        draws = max(len(student.denoising_steps), len(student.first_chunk_steps or ()))
        chunks = stream(
            policy,
            policy.encode(prompts),
            policy.noise_source(seeds, stream_layout(policy, None), draws),
            frames=count * policy.frames,
            denoising_steps=student.denoising_steps,
            first_chunk_steps=student.first_chunk_steps,
            context_noise=student.context_noise,
        )
        for _ in range(count):
            yield torch.cat(list(islice(chunks, policy.frames // policy.chunk)), 1)
