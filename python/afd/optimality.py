"""Advantages from rewards, and the weights r of the two NFT branches.

Letters: B samples, P prompts, G samples of a prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from afd.arguments import typed
from afd_kernels.contracts import require

# Added to every standard deviation that divides.
_SPREAD_MIN = 1e-4
_NORMALIZE = ("group", "global", "batch", "rank", "none")
_MODES = ("all", "positive_only", "negative_only", "one_only", "binary")


@dataclass(frozen=True)
class Optimality:
    """Weights of samples in the NFT loss, [B] each, in the rewards' order, dtype and device.

    Attributes:
        r: clamp(A / (2 adv_clip) + 1/2, 0, 1) after `adv_mode`: the `r` of afd.ops.nft_loss.
        advantage: A, neither clipped nor changed by `adv_mode`.
        selected: bool, the `best` and the `worst` of each prompt; True everywhere without them.
        disagreement: the rank of the first reward among the samples of its prompt, minus the mean
            rank of the others: in [-1, 1], above 0 where only the first one likes the sample; 0
            with a single reward.
    """

    r: Tensor
    advantage: Tensor
    selected: Tensor
    disagreement: Tensor


@typed
def optimality(
    rewards: Tensor | Mapping[str, Tensor],
    *,
    samples_per_prompt: int | None = None,
    groups: Tensor | None = None,
    reward_weights: Mapping[str, float] | None = None,
    combine: Literal["rewards", "advantages"] = "rewards",
    baseline: Literal["group", "batch"] | float | Tensor = "group",
    normalize: Literal["group", "global", "batch", "rank", "none"] = "group",
    adv_clip: float | tuple[float, float] = 5.0,
    adv_mode: Literal["all", "positive_only", "negative_only", "one_only", "binary"] = "all",
    best: int | None = None,
    worst: int | None = None,
) -> Optimality:
    """Advantages of samples and their weights r in the NFT loss, from one reward or several.

    In a distributed run, pass the rewards of all processes: `global` and `batch` need them.

    Args:
        rewards: float32 or float64 [B], finite; or several by name, each [B]. The order of names
            matters to the disagreement only. [B, 1] is refused: it broadcasts against [B].
        samples_per_prompt: G, where the samples of a prompt are consecutive; or
        groups: int64 [B], the prompt of each sample, in any order and number.
        reward_weights: a finite weight of each reward; None: 1.
        combine: "rewards" takes the advantage of their weighted sum; "advantages" the weighted sum
            of each reward's own advantage (GDPO): no reward dominates by its units.
        baseline: what is subtracted: the mean of the prompt's samples ("group") or of all
            ("batch"), a finite number, or a finite tensor [B].
        normalize: what divides the difference, + 1e-4: the standard deviation of the prompt's
            ("group") or of all rewards ("global"), or that of all differences ("batch"); "none": 1.
            "rank" instead takes ranks among the samples of a prompt, evenly from -1 to 1 (ties
            share their mean), and no baseline. Deviations are those of the population.
        adv_clip: the advantage at which r reaches 0 and 1, > 0; or (low, high) with low < 0 < high:
            advantages are clipped to it, and r = clamp(A / (2 high) + 1/2, 0, 1).
        adv_mode: "all"; "positive_only" and "negative_only" set advantages of the opposite sign to
            0; "one_only" sets positive ones to 1 and the rest to 0; "binary" keeps only the sign.
        best: selects this many samples of each prompt by advantage; None: with `worst` None all.
        worst: likewise from the other end. A sample is selected once.

    Returns:
        Optimality. Of a prompt whose samples have equal rewards every advantage is 0.

    Raises:
        ValueError: naming the argument, the value given and what is needed.
    """
    named = dict(rewards) if isinstance(rewards, Mapping) else {"rewards": rewards}
    weights = _checked(named, reward_weights)
    first = next(iter(named.values()))
    samples = _Groups.of(first, samples_per_prompt, groups)
    _check_options(samples, baseline, normalize, adv_mode, combine)
    low, high = _bounds(adv_clip)

    def advantage(reward_B: Tensor) -> Tensor:
        return _advantage(reward_B, samples, baseline, normalize)

    if combine == "advantages":
        total = _sum([advantage(reward) * weights[name] for name, reward in named.items()])
    else:
        total = advantage(_sum([reward * weights[name] for name, reward in named.items()]))
    used = _moded(total.clamp(low, high), adv_mode)
    return Optimality(
        (used / (2 * high) + 0.5).clamp(0, 1),
        total,
        _selected(total, samples, best, worst),
        _disagreement([-x if weights[name] < 0 else x for name, x in named.items()], samples),
    )


@dataclass(frozen=True)
class _Groups:
    """The samples of prompts, as matrices of indices [P, G], one for each G that occurs."""

    indices: list[Tensor]

    @staticmethod
    def of(like: Tensor, samples_per_prompt: int | None, groups: Tensor | None) -> _Groups:
        batch = like.shape[0]
        if (samples_per_prompt is None) == (groups is None):
            got = "neither" if groups is None else "both"
            raise ValueError(f"samples_per_prompt, groups: got {got}; needed: exactly one of them")
        if groups is None:
            size = samples_per_prompt if isinstance(samples_per_prompt, int) else 0
            needed = f"a divisor of the {batch} rewards"
            require(
                size > 0 and batch % size == 0, "samples_per_prompt", samples_per_prompt, needed
            )
            return _Groups([torch.arange(batch, device=like.device).view(-1, size)])
        ok = isinstance(groups, Tensor) and groups.dtype == torch.int64
        require(ok and groups.shape == (batch,), "groups", groups, f"int64 [{batch}]")
        _, prompt, counts = groups.to(like.device).unique(return_inverse=True, return_counts=True)
        order, size_of = prompt.argsort(stable=True), counts[prompt]
        sizes = counts.unique().tolist()
        return _Groups([order[size_of[order] == size].view(-1, size) for size in sizes])

    def largest(self) -> int:
        return max(index.shape[1] for index in self.indices)

    def map(self, x_B: Tensor, of_prompts: Callable[[Tensor], Tensor]) -> Tensor:
        """of_prompts: [P, G] to [P, G] or [P, 1]."""
        outs = [of_prompts(x_B[index]).expand(index.shape) for index in self.indices]
        result = outs[0].new_empty(x_B.shape)
        for index, out in zip(self.indices, outs, strict=True):
            result[index] = out
        return result


def _checked(named: dict[str, Tensor], given: Mapping[str, float] | None) -> dict[str, float]:
    """Checks the rewards and returns their weights."""
    require(bool(named), "rewards", named, "at least one")
    first = next(iter(named.values()))
    for name, reward in named.items():
        where = name if name == "rewards" else f"rewards[{name!r}]"
        ok = isinstance(reward, Tensor) and reward.dtype in (torch.float32, torch.float64)
        require(
            ok and reward.ndim == 1 and len(reward) > 0, where, reward, "float32 or float64 [B]"
        )
        same = (reward.shape, reward.dtype, reward.device) == (
            first.shape,
            first.dtype,
            first.device,
        )
        require(same, where, reward, "shape, dtype and device of the first reward")
        finite = reward.isfinite()
        if not finite.all():
            at = finite.logical_not().nonzero().flatten().tolist()
            require(False, where, f"values that are not finite at {at[:8]}", "finite rewards")
    mapped = given is None or isinstance(given, Mapping)
    require(mapped, "reward_weights", given, "a number for each name, or None")
    weights = {name: 1.0 for name in named} if given is None else dict(given)
    require(weights.keys() == named.keys(), "reward_weights", sorted(weights), f"{sorted(named)}")
    for name, weight in weights.items():
        ok = isinstance(weight, int | float) and abs(weight) < float("inf")
        require(ok, f"reward_weights[{name!r}]", weight, "a finite number")
    return weights


def _check_options(
    samples: _Groups, baseline: object, normalize: str, adv_mode: str, combine: str
) -> None:
    for name, value, allowed in (
        ("normalize", normalize, _NORMALIZE),
        ("adv_mode", adv_mode, _MODES),
        ("combine", combine, ("rewards", "advantages")),
    ):
        require(value in allowed, name, value, "one of " + ", ".join(map(repr, allowed)))
    if baseline == "group" or normalize in ("group", "rank"):
        needed = "2 or more somewhere, or another baseline and normalize: one sample has no equals"
        require(samples.largest() > 1, "samples of a prompt", samples.largest(), needed)


def _bounds(adv_clip: float | tuple[float, float]) -> tuple[float, float]:
    if isinstance(adv_clip, tuple):
        ok = len(adv_clip) == 2 and -float("inf") < adv_clip[0] < 0 < adv_clip[1] < float("inf")
        require(ok, "adv_clip", adv_clip, "a finite number > 0, or (low, high) with low < 0 < high")
        return adv_clip
    require(
        0 < adv_clip < float("inf"), "adv_clip", adv_clip, "a finite number > 0, or (low, high)"
    )
    return -adv_clip, adv_clip


def _sum(parts: list[Tensor]) -> Tensor:
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total


def _advantage(
    reward_B: Tensor, samples: _Groups, baseline: str | float | Tensor, normalize: str
) -> Tensor:
    if normalize == "rank":
        return samples.map(reward_B, lambda x: 2 * _ranks(x) - 1)
    if isinstance(baseline, Tensor):
        same = baseline.shape == reward_B.shape and baseline.dtype == reward_B.dtype
        require(same, "baseline", baseline, f"{reward_B.dtype} {list(reward_B.shape)}")
        finite = bool(baseline.isfinite().all())
        require(finite, "baseline", "values that are not finite", "finite values")
        level = baseline
    elif baseline == "group":
        level = samples.map(reward_B, _mean)
    elif baseline == "batch":
        level = _mean(reward_B[None])[0]
    else:
        require(
            isinstance(baseline, int | float) and abs(baseline) < float("inf"),
            "baseline",
            baseline,
            "'group', 'batch', a finite number or a tensor [B]",
        )
        level = torch.tensor(baseline, dtype=reward_B.dtype)
    difference = reward_B - level
    if normalize == "group":
        spread = samples.map(difference, lambda x: x.std(1, keepdim=True, correction=0))
        return difference / (spread + _SPREAD_MIN)
    if normalize == "batch":
        return difference / (difference.std(correction=0) + _SPREAD_MIN)
    if normalize == "global":
        return difference / (reward_B.std(correction=0) + _SPREAD_MIN)
    return difference


def _mean(x_PG: Tensor) -> Tensor:
    """Mean along the last dimension, kept as 1. Of equal values exactly that value: the rounding of
    a sum would become an advantage where the spread is 0."""
    first = x_PG[:, :1]
    return torch.where((x_PG == first).all(1, keepdim=True), first, x_PG.mean(1, keepdim=True))


def _ranks(x_PG: Tensor) -> Tensor:
    """Ranks along the last dimension, evenly from 0 to 1; equal values share their mean rank."""
    below = (x_PG[:, None, :] < x_PG[:, :, None]).sum(-1)
    equal = (x_PG[:, None, :] == x_PG[:, :, None]).sum(-1)
    ranks = (below + (equal - 1) / 2).to(x_PG.dtype)
    count = x_PG.shape[-1] - 1
    return ranks / count if count else ranks + 0.5


def _moded(advantage_B: Tensor, mode: str) -> Tensor:
    """Apply `adv_mode`, as in DiffusionNFT's code (arXiv 2509.16117)."""
    if mode == "positive_only":
        return advantage_B.clamp(min=0)
    if mode == "negative_only":
        return advantage_B.clamp(max=0)
    if mode == "one_only":
        return (advantage_B > 0).to(advantage_B)
    if mode == "binary":
        return advantage_B.sign()
    return advantage_B


def _selected(advantage_B: Tensor, samples: _Groups, best: int | None, worst: int | None) -> Tensor:
    for name, count in (("best", best), ("worst", worst)):
        ok = count is None or (isinstance(count, int) and 0 <= count <= samples.largest())
        require(ok, name, count, f"from 0 to {samples.largest()}, the samples of a prompt")
    if best is None and worst is None:
        return torch.ones_like(advantage_B, dtype=torch.bool)

    def ends(x_PG: Tensor) -> Tensor:
        place = x_PG.argsort(dim=1, descending=True, stable=True).argsort(1)
        return (place < (best or 0)) | (place >= x_PG.shape[1] - (worst or 0))

    return samples.map(advantage_B, ends)


def _disagreement(rewards: list[Tensor], samples: _Groups) -> Tensor:
    first, *others = [samples.map(x, _ranks) for x in rewards]
    return first - torch.stack(others).mean(0) if others else torch.zeros_like(first)
