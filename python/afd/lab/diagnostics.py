"""Does the discriminator rank by physics? Signs to watch while the student learns."""

from __future__ import annotations

import torch
from torch import Tensor

from afd.distributed import ALONE, Ranks
from afd.lab.physics import measure_each
from afd.lab.simulator import PROMPTS


def within_group_correlation(a_B: Tensor, b_B: Tensor, group_size: int) -> float:
    """Pearson correlation after removing every group's mean; 0 when either is constant."""
    a, b = (x.view(-1, group_size).double() for x in (a_B, b_B))
    a, b = a - a.mean(1, keepdim=True), b - b.mean(1, keepdim=True)
    scale = float((a.square().sum() * b.square().sum()).sqrt())
    return float((a * b).sum()) / scale if scale > 0 else 0.0


@torch.no_grad()
def rank_agreement(
    score_B: Tensor,
    video_BFCHW: Tensor,
    prompts: list[str],
    group_size: int,
    ranks: Ranks = ALONE,
) -> dict[str, float]:
    """Correlation of the score with each metric of the task, within a prompt's rollouts.

    Over the videos of all processes. Only for bouncing-ball prompts and groups of two or more;
    empty otherwise.
    """
    if group_size < 2 or ranks.any(any(prompt not in PROMPTS for prompt in prompts)):
        return {}
    each = measure_each(video_BFCHW.cpu())
    score_B = ranks.gather(score_B)
    known = {"phys": -each.phys, "fit_res": -each.fit_res, "rend": -each.rend}
    return {
        f"agreement/{name}": within_group_correlation(score_B, ranks.gather(value_B), group_size)
        for name, value_B in known.items()
    }
