"""Checks of a teacher's clips by a discriminator that has learnt.

The scale of a discriminator's scores means nothing, and one that ignores the prompt or cannot tell
teacher from student knows nothing about a clip. Each check therefore compares a clip with the set:
its number is how far the clip is from the median of all, in robust standard deviations. Without
wrong clips it is distributed alike whatever the discriminator has learnt; up to half of the clips
may be wrong. Shape letters: N clips, M prompts, A attempts, F frames, C channels, H x W pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

# Scores [N] of inputs [N, F, C, H, W] for their prompts.
Score = Callable[[Tensor, Sequence[str]], Tensor]
# The least deviation that counts, in that of the compared scores: equal clips have outliers, too.
LEAST = 0.25
# The weight of the usual variance of a clip's scores in its own, in prompts.
PRIOR = 4


def prompt_mismatch(
    score: Score, input_NFCHW: Tensor, prompts: Sequence[str], others: int = 16
) -> list[float]:
    """How unlike the other clips each clip fits its own prompt [N], in robust deviations.

    A clip's margin is the score for its prompt above the mean of those for other prompts, in the
    deviations of the clip's scores, each relative to the prompt's mean over clips of others. The
    number is the margin's distance from the median, on either side: a discriminator that learnt
    from clips of other prompts knows them as the teacher's by their misfit, and scores them high.
    0 for all with a single prompt.

    `others`: at most this many other prompts per clip, evenly spaced in the set's order.
    """
    known = list(dict.fromkeys(prompts))
    if len(known) < 2:
        return [0.0] * len(prompts)
    number = {prompt: place for place, prompt in enumerate(known)}
    own_N = torch.tensor([number[prompt] for prompt in prompts])
    count = min(others, len(known) - 1)
    steps = [1 + place * (len(known) - 1) // count for place in range(count)]
    asked_NM = torch.stack([(own_N + step) % len(known) for step in steps], 1)
    rows = [
        score(input_NFCHW, [known[i] for i in asked]).double().cpu()
        for asked in (own_N.tolist(), *asked_NM.T.tolist())
    ]
    own_score_N, other_NM = rows[0], torch.stack(rows[1:], 1)
    # Some prompts score higher than others whatever the video.
    flat, sums = asked_NM.flatten(), torch.zeros(len(known), dtype=torch.float64)
    usual = sums.index_add(0, flat, other_NM.flatten())
    usual = usual / torch.bincount(flat, minlength=len(known)).clamp_min(1)
    other_NM = other_NM - usual[asked_NM]
    margin_N = own_score_N - usual[own_N] - other_NM.mean(1)
    # Clips differ in how much a prompt changes their scores; few prompts tell little of it.
    square_N = other_NM.var(1, correction=0) + margin_N.square() / (count + 1)
    square_N = (count * square_N + PRIOR * square_N.median()) / (count + PRIOR)
    margin_N = margin_N / square_N.sqrt().clamp_min(1e-12)
    return _below(margin_N, 1.0).abs().tolist()


def worse_than_student(
    score: Score,
    input_NFCHW: Tensor,
    prompts: Sequence[str],
    student: Callable[[Sequence[str]], list[Tensor]],
) -> list[float]:
    """How much worse each clip compares with the student's rollouts of its prompt than the other
    clips do with theirs, [N], in robust deviations; at most 0 for a clip above their mean.

    `student`: inputs [N, F, C, H, W] of rollouts of these prompts, once per attempt.
    """
    made = [score(one, list(prompts)).double().cpu() for one in student(prompts)]
    if not made:
        return [0.0] * len(prompts)
    made_NA = torch.stack(made, 1)
    margin_N = score(input_NFCHW, list(prompts)).double().cpu() - made_NA.mean(1)
    away_N = _below(margin_N, float(made_NA.std(correction=0)))
    return torch.where(margin_N < 0, away_N, away_N.clamp_max(0)).tolist()


def _below(margin_N: Tensor, scale: float) -> Tensor:
    """Distances below the median in robust standard deviations."""
    away_N = margin_N.median() - margin_N
    deviation = max(1.4826 * float(away_N.abs().median()), LEAST * scale, 1e-12)
    return away_N / deviation
