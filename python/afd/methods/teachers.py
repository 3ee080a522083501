"""Several teachers in one update: pairs, advantages and metrics of each.

Shape letters: P prompts, T videos of a prompt by its teachers, G rollouts per prompt; pairs are
ordered by prompt, teacher, rollout.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from afd.distributed import Ranks
from afd.methods.base import Batch
from afd.methods.rewards import Scores, within_group_correlation
from afd.rewards.base import Term

# Maps an update to the teachers' weights, with sum 1.
Weights = Callable[[int], Mapping[str, float]]
_log = logging.getLogger("afd")


@dataclass(frozen=True)
class Pairs:
    """Pairs of a teacher's video and a rollout, as arguments of a discriminator's step."""

    teacher_BFCHW: Tensor
    student_BFCHW: Tensor
    prompts: list[str]
    more: dict[str, Any]
    clips_B: Tensor


def pairs(batch: Batch, student_BFCHW: Tensor, group: int, heads: bool) -> Pairs:
    """Pair every teacher's video with every rollout of its prompt. `heads`: whether the
    discriminator has a head for each teacher."""
    each = len(batch.teacher_BFCHW) // max(1, len(batch.prompts))
    prompt_N = torch.arange(len(batch.prompts)).repeat_interleave(each)
    rollout_B = (prompt_N[:, None] * group + torch.arange(group)).flatten()
    prompts = [batch.prompts[i] for i in prompt_N.repeat_interleave(group).tolist()]
    more: dict[str, Any] = {}
    if heads:
        more["teachers"] = [name for name in batch.teachers for _ in range(group)]
    if batch.robust is not None:
        more["weights_B"] = batch.robust.weights(batch.clips).repeat_interleave(group)
    student = student_BFCHW if each == 1 else student_BFCHW[rollout_B]
    clips = torch.tensor(list(batch.clips), dtype=torch.int64).repeat_interleave(group)
    teacher = batch.teacher_BFCHW.repeat_interleave(group, 0)
    return Pairs(teacher, student, prompts, more, clips)


def note_losses(batch: Batch, made: Pairs, margins_B: Tensor, ranks: Ranks) -> dict[str, float]:
    """Tell `batch.robust` the losses of a step; returns its metrics."""
    robust = batch.robust
    assert robust is not None
    clips_B, loss_B = ranks.gather(made.clips_B), ranks.gather(F.softplus(-margins_B))
    for clip, out in robust.update(clips_B, loss_B):
        _log.info(
            "update %d: teacher clip %d %s (smoothed loss %.3f)",
            batch.update + 1,
            clip,
            "is left out of the discriminator's loss" if out else "counts again",
            float(robust.loss_N[clip]),
        )
    return {"robust/left_out": float(robust.trimmed_N.sum())}


def by_teacher(terms: tuple[Term, ...], weights: Mapping[str, float]) -> tuple[Term, ...]:
    """The rewards with the discriminator's replaced by one for each teacher's head."""
    found = []
    for term in terms:
        if term.reward is not None:
            found.append(term)
            continue
        found += [
            Term(f"{term.name}/{name}", term.weight * weight, None, name)
            for name, weight in weights.items()
        ]
    return tuple(found)


def teacher_metrics(scores: Scores, group: int) -> dict[str, float]:
    """Per teacher its weight and the spread of its scores within groups; of every two the
    correlation of their scores within groups."""
    held = {
        term.teacher: (term.weight, score_B)
        for term, score_B in zip(scores.terms, scores.each_RB, strict=True)
        if term.teacher
    }
    found = {}
    for name, (weight, score_B) in held.items():
        found[f"teacher/{name}/weight"] = float(weight)
        spread = score_B.view(-1, group).std(1, correction=0)
        found[f"teacher/{name}/score_std"] = float(spread.mean())
    for (a, (_, a_B)), (b, (_, b_B)) in combinations(held.items(), 2):
        found[f"teachers/{a}~{b}/correlation"] = within_group_correlation(a_B, b_B, group)
    return found
