"""Rewards of an update's videos: scored on each process, combined over all of them.

Shape letters: R rewards, B videos (group by group; of all processes unless noted), P prompts, G
videos per prompt (B = P G).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from afd import ops
from afd.discriminators.base import Discriminator
from afd.errors import TrainingError
from afd.methods.config import AfdConfig
from afd.methods.inputs import InputPipeline
from afd.methods.rollouts import Rollouts
from afd.rewards.base import ONLINE, Reward, Term


def terms_of(discriminator: Discriminator | None, rewards: Sequence[Term]) -> tuple[Term, ...]:
    """All rewards of a run: those that count first, else in the given order, where a discriminator
    that is not among them comes first with weight 1."""
    listed = list(rewards)
    if discriminator is not None and all(term.reward is not None for term in listed):
        listed.insert(0, Term(ONLINE))
    return tuple(sorted(listed, key=lambda term: term.weight == 0))


@dataclass(frozen=True)
class Scores:
    """Scores of videos by every reward.

    Attributes:
        terms: the rewards, those that count first.
        each_RB: float32 on the CPU.
    """

    terms: tuple[Term, ...]
    each_RB: Tensor

    @property
    def total_B(self) -> Tensor:
        """The weighted sum."""
        first, *others = self.terms
        total_B = self.each_RB[0] * first.weight
        for term, score_B in zip(others, self.each_RB[1:], strict=True):
            total_B = total_B + score_B * term.weight
        return total_B

    def shown(self, video: int) -> float:
        """The discriminator's score of a video; without a discriminator the weighted sum."""
        for term, score_B in zip(self.terms, self.each_RB, strict=True):
            if term.reward is None:
                return float(score_B[video])
        return float(self.total_B[video])

    def refuse_non_finite(self, update: int) -> None:
        """Raise TrainingError if a score is not finite; `update`: its number, from 0."""
        for term, score_B in zip(self.terms, self.each_RB, strict=True):
            bad = score_B[~score_B.isfinite()]
            if len(bad):
                raise TrainingError(
                    f"update {update + 1}: reward {term.name} is {float(bad[0])} for {len(bad)} of "
                    f"{len(score_B)} videos; needed: finite scores"
                )


def score(
    terms: tuple[Term, ...],
    discriminator: Discriminator | None,
    to_input: InputPipeline,
    rollouts: Rollouts,
) -> Scores:
    """Score this process's videos by every reward; frozen ones may have rated them already."""
    found = []
    for term in terms:
        scorer: Discriminator | Reward | None = discriminator
        seen = rollouts.input_BFCHW
        if term.reward is not None and rollouts.ratings:
            found.append(rollouts.ratings[to_input.rewards.index(term.reward)])
            continue
        if term.reward is not None:
            scorer, seen = term.reward, rollouts.inputs[to_input.place(term.reward)]
        assert scorer is not None
        assert seen is not None
        if term.teacher:
            online: Any = scorer
            heads = [term.teacher] * len(rollouts.prompts)
            found.append(online.score(seen, rollouts.prompts, heads).float().cpu())
        else:
            found.append(scorer.score(seen, rollouts.prompts).float().cpu())
    return Scores(terms, torch.stack(found))


def combine(
    scores: Scores, config: AfdConfig, baseline: float | Tensor | None = None
) -> ops.Optimality:
    """Weights r, selection and disagreement of all videos from their scores (`afd.ops.optimality`).

    `baseline`: value of the baselines "teacher" [B] and "ema"; None: the batch's mean.
    """
    level: Literal["group", "batch"] | float | Tensor = "batch" if baseline is None else baseline
    if config.baseline in ("group", "batch"):
        level = config.baseline
    named = {term.name: score_B for term, score_B in zip(scores.terms, scores.each_RB, strict=True)}
    return ops.optimality(
        named,
        samples_per_prompt=config.samples_per_prompt,
        reward_weights={term.name: term.weight for term in scores.terms},
        # Of several teachers none may win by the scale of its head's scores.
        combine="advantages" if any(term.teacher for term in scores.terms) else config.combine,
        baseline=level,
        normalize=config.normalize,
        adv_clip=config.adv_clip,
        adv_mode=config.adv_mode,
        best=config.best,
        worst=config.worst,
    )


def novelty(x0_BFCHW: Tensor, group: int) -> Tensor:
    """Mean squared distance [B] of each video to the mean video of its group, on the CPU."""
    x0_PG = x0_BFCHW.unflatten(0, (-1, group))
    return (x0_PG - x0_PG.mean(1, keepdim=True)).square().flatten(2).mean(2).flatten().float().cpu()


def with_novelty(scores: Scores, novelty_B: Tensor, weight: float, group: int) -> Scores:
    """The scores with the novelty as one more reward, which has the standard deviation within
    groups of the scores' sum."""
    novelty_PG, sum_PG = (x_B.view(-1, group) for x_B in (novelty_B, scores.total_B))
    novelty_PG = novelty_PG - novelty_PG.mean(1, keepdim=True)
    spread = (sum_PG - sum_PG.mean(1, keepdim=True)).std(correction=0)
    unit = novelty_PG.std(correction=0).clamp_min(torch.finfo(torch.float32).tiny)
    each_RB = torch.cat([scores.each_RB, (novelty_PG * (spread / unit)).view(1, -1)])
    return Scores((*scores.terms, Term("afd.diversity_weight", weight)), each_RB)


def prior_weights(disagreement_B: Tensor, config: AfdConfig) -> float | Tensor:
    """The prior's weight: `prior_weight`, or float32 [B] with prior_share < 1, where only the
    videos on which the rewards disagree most have one (ties included), such that the prior is the
    mean over them.
    """
    if config.prior_share == 1:
        return config.prior_weight
    count = max(1, round(config.prior_share * len(disagreement_B)))
    least = disagreement_B.topk(count).values[-1]
    chosen_B = (disagreement_B > 0) & (disagreement_B >= least)
    weight = config.prior_weight * len(chosen_B) / max(1, int(chosen_B.sum()))
    return weight * chosen_B.float()


def metrics_of(scores: Scores, group_size: int) -> dict[str, float]:
    """Per reward the mean and the standard deviation within groups; of frozen ones the correlation
    with the discriminator within groups. Empty for the discriminator alone."""
    if all(term.reward is None for term in scores.terms):
        return {}
    pairs = list(zip(scores.terms, scores.each_RB, strict=True))
    online_B = next((score_B for term, score_B in pairs if term.reward is None), None)
    found = {}
    for term, score_B in pairs:
        key = f"reward/{term.name}"
        found[f"{key}/mean"] = float(score_B.mean())
        found[f"{key}/std"] = float(score_B.view(-1, group_size).std(1, correction=0).mean())
        if term.reward is not None and online_B is not None and group_size > 1:
            found[f"{key}/agreement"] = within_group_correlation(score_B, online_B, group_size)
    return found


def within_group_correlation(a_B: Tensor, b_B: Tensor, group_size: int) -> float:
    """Pearson correlation after subtracting each group's mean; 0 when either is constant."""
    a, b = (x.view(-1, group_size).double() for x in (a_B, b_B))
    a, b = a - a.mean(1, keepdim=True), b - b.mean(1, keepdim=True)
    scale = float((a.square().sum() * b.square().sum()).sqrt())
    return float((a * b).sum()) / scale if scale > 0 else 0.0
