"""Checks of a teacher's clips by a discriminator that has learnt.

Shape letters: N clips, M prompts, F frames, C channels, H x W pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

# Scores [N] of inputs [N, F, C, H, W] for their prompts.
Score = Callable[[Tensor, Sequence[str]], Tensor]


def prompt_mismatch(
    score: Score, input_NFCHW: Tensor, prompts: Sequence[str], others: int = 8
) -> list[float]:
    """Minus the clip's margin [N]: its score for its own prompt over the best of other prompts of
    the set, in standard deviations of such differences over the set.

    `others`: at most this many other prompts per clip, evenly spaced in the set's order. Above 0:
    the clip fits another prompt better. 0 for all with a single prompt.
    """
    known = list(dict.fromkeys(prompts))
    if len(known) < 2:
        return [0.0] * len(prompts)
    own_N = score(input_NFCHW, list(prompts)).float().cpu()
    count = min(others, len(known) - 1)
    rows = []
    for place in range(count):
        step = 1 + place * (len(known) - 1) // count
        asked = [known[(known.index(prompt) + step) % len(known)] for prompt in prompts]
        rows.append(score(input_NFCHW, asked).float().cpu())
    away_NM = own_N[:, None] - torch.stack(rows, 1)
    spread = float(away_NM.std(correction=0)) or 1.0
    return (-away_NM.amin(1) / spread).tolist()


def worse_than_student(
    score: Score,
    input_NFCHW: Tensor,
    prompts: Sequence[str],
    student: Callable[[Sequence[str]], list[Tensor]],
) -> list[float]:
    """Share of the student's rollouts of the clip's prompt that score above it, [N].

    `student`: inputs [N, F, C, H, W] of rollouts of these prompts, once per attempt.
    """
    own_N = score(input_NFCHW, list(prompts)).float().cpu()
    above = [score(made, list(prompts)).float().cpu() > own_N for made in student(prompts)]
    return torch.stack(above).float().mean(0).tolist() if above else [0.0] * len(prompts)
