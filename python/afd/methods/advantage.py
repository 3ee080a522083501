"""Advantages from scores, and the weights r of the two NFT branches, one per video.

Shape letters: B videos of all processes, group by group; P prompts, G videos per prompt (B = P G).
"""

from __future__ import annotations

import torch
from torch import Tensor

from afd.methods.config import AfdConfig
from afd_kernels.contracts import require


def optimality(
    score_B: Tensor,
    group_size: int,
    config: AfdConfig,
    teacher_B: Tensor | None = None,
    ema: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Advantage A and weight r = clamp(A / (2·adv_clip) + 1/2, 0, 1), each [B].

    `teacher_B` and `ema` are the values of those baselines (`ema` None: the batch mean). A constant
    group has advantage 0. A is normalised but not clipped; `adv_mode` only affects r.
    """
    require(score_B.ndim == 1, "score_B", score_B, "[B]")
    score_PG = score_B.view(-1, group_size)
    if config.baseline == "group":
        baseline = score_PG.mean(1, keepdim=True)
    elif config.baseline == "batch":
        baseline = score_PG.mean()
    elif config.baseline == "teacher":
        if teacher_B is None:
            raise ValueError("teacher_B: None came, baseline='teacher' needs the teacher's scores")
        baseline = teacher_B.view(-1, group_size)
    else:
        baseline = score_PG.mean() if ema is None else torch.tensor(ema)
    advantage_PG = score_PG - baseline
    if config.normalize == "batch":
        advantage_PG = advantage_PG / (advantage_PG.std(correction=0) + 1e-4)
    elif config.normalize == "group":
        spread = advantage_PG.std(1, keepdim=True, correction=0)
        advantage_PG = advantage_PG / (spread + 1e-4)
    advantage_B = advantage_PG.flatten()
    used_B = chosen(advantage_B, config)
    return advantage_B, (used_B / (2 * config.adv_clip) + 0.5).clamp(0, 1)


def chosen(advantage_B: Tensor, config: AfdConfig) -> Tensor:
    """Apply `adv_mode` to the advantages, as in DiffusionNFT's code (arXiv 2509.16117).

    "positive_only" and "negative_only" set advantages of the opposite sign to 0; "one_only" sets
    positive ones to 1 and the rest to 0; "binary" keeps only the sign.
    """
    if config.adv_mode == "positive_only":
        return advantage_B.clamp(min=0)
    if config.adv_mode == "negative_only":
        return advantage_B.clamp(max=0)
    if config.adv_mode == "one_only":
        return (advantage_B > 0).to(advantage_B)
    if config.adv_mode == "binary":
        return advantage_B.sign()
    return advantage_B
