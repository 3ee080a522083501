"""Metrics of the rollouts that need no knowledge of the task: size and diversity.

Shape letters: B videos of this process, group by group; P prompts, G videos per prompt (B = P G), F
frames, C channels, H x W pixels or latents.
"""

from __future__ import annotations

import torch
from torch import Tensor

from afd.distributed import ALONE, Ranks


@torch.no_grad()
def rollout_metrics(x0_BFCHW: Tensor, group: int, ranks: Ranks = ALONE) -> dict[str, float]:
    """RMS of the videos, and `student/diversity`: the RMS difference between two videos of a
    prompt, absent for groups of one."""
    square_B = x0_BFCHW.square().flatten(1).mean(1)
    found = {"student/x0_rms": _rms(square_B, ranks)}
    if group > 1:
        x0_PG = x0_BFCHW.unflatten(0, (-1, group))
        # The mean squared difference of two different videos of a group: twice the variance. On the
        # CPU `var` over this dimension takes many times as long.
        deviation_PG = x0_PG - x0_PG.mean(1, keepdim=True)
        spread_P = 2 * deviation_PG.square().flatten(1).mean(1) * (group / (group - 1))
        found["student/diversity"] = _rms(spread_P, ranks)
    return found


def _rms(square_B: Tensor, ranks: Ranks) -> float:
    """Square root of the mean over the videos or groups of all processes."""
    return float(ranks.gather(square_B.float().cpu()).mean().sqrt())
