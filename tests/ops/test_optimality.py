"""Advantages and r from rewards: the formulas, other trainers' numbers, and what is refused."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from afd import ops

SCORE = torch.tensor([1.0, 3, 5, 11])


def test_a_group_baseline_keeps_the_mean_of_r_at_one_half() -> None:
    rewards = torch.tensor([1.0, 2, 3, 4, 10, 20, 30, 40])
    r = ops.optimality(rewards, samples_per_prompt=4, normalize="none", adv_clip=100.0).r
    assert r.view(2, 4).mean(1).tolist() == pytest.approx([0.5, 0.5])
    assert torch.equal(r.argsort(), torch.tensor([4, 5, 0, 1, 2, 3, 6, 7]))


@pytest.mark.parametrize(
    ("baseline", "expected"),
    [
        ("group", [-1, 1, -3, 3]),
        ("batch", [-4, -2, 0, 6]),
        (torch.tensor([4.0, 4, 6, 6]), [-3, -1, -1, 5]),
        (2.0, [-1, 1, 3, 9]),
    ],
    ids=["group", "batch", "tensor", "number"],
)
def test_each_baseline_is_subtracted(baseline: Any, expected: list[float]) -> None:
    made = ops.optimality(
        SCORE, samples_per_prompt=2, baseline=baseline, normalize="none", adv_clip=2.0
    )
    assert made.advantage.tolist() == expected
    assert made.r.tolist() == [min(1, max(0, a / 4 + 0.5)) for a in expected]


@pytest.mark.parametrize(
    ("normalize", "expected"),
    [
        ("batch", torch.tensor([-1.0, 1, -3, 3]) / (5**0.5 + 1e-4)),
        ("global", torch.tensor([-1.0, 1, -3, 3]) / (14**0.5 + 1e-4)),
        ("group", torch.tensor([-1 / 1.0001, 1 / 1.0001, -3 / 3.0001, 3 / 3.0001])),
        ("rank", torch.tensor([-1.0, 1, -1, 1])),
    ],
)
def test_each_normalisation_is_its_formula(normalize: Any, expected: Tensor) -> None:
    made = ops.optimality(SCORE, samples_per_prompt=2, normalize=normalize)
    torch.testing.assert_close(made.advantage, expected)


@pytest.mark.parametrize("normalize", ["batch", "group", "global", "rank", "none"])
def test_equal_rewards_give_one_half(normalize: Any) -> None:
    made = ops.optimality(torch.full((8,), 3.0), samples_per_prompt=4, normalize=normalize)
    assert made.r.tolist() == [0.5] * 8


@pytest.mark.parametrize("normalize", ["batch", "group", "global", "rank", "none"])
def test_groups_in_any_order_and_number(normalize: Any) -> None:
    """Of unequal sizes: each group alone, where the normalisation is the group's own."""
    g = torch.Generator().manual_seed(1)
    groups = torch.tensor([7, -2, 7, 7, 0, -2, 0, 7, 0, 5, 5])
    rewards = torch.randn(11, generator=g, dtype=torch.float64)
    made = ops.optimality(rewards, groups=groups, normalize=normalize)
    for group in groups.unique():
        own = groups == group
        if normalize in ("group", "rank"):
            alone = ops.optimality(
                rewards[own], samples_per_prompt=int(own.sum()), normalize=normalize
            )
            torch.testing.assert_close(made.advantage[own], alone.advantage)
        assert abs(made.advantage[own].sum().item()) < 1e-12
    sizes = torch.arange(12) // 3
    by_size = ops.optimality(SCORE.repeat(3), samples_per_prompt=3, normalize=normalize)
    by_group = ops.optimality(SCORE.repeat(3), groups=sizes, normalize=normalize)
    assert torch.equal(by_size.r, by_group.r)


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("all", [0.0, 0.25, 0.5, 1.0]),
        ("positive_only", [0.5, 0.5, 0.5, 1.0]),
        ("negative_only", [0.0, 0.25, 0.5, 0.5]),
        ("one_only", [0.5, 0.5, 0.5, 0.75]),
        ("binary", [0.25, 0.25, 0.5, 0.75]),
    ],
)
def test_the_mode_decides_which_side_counts(mode: Any, expected: list[float]) -> None:
    rewards = torch.tensor([-9.0, -1.0, 0.0, 9.0])
    made = ops.optimality(
        rewards, samples_per_prompt=4, baseline=0.0, normalize="none", adv_clip=2.0, adv_mode=mode
    )
    assert made.r.tolist() == pytest.approx(expected)
    assert torch.equal(made.advantage, rewards)


def test_a_clip_with_two_bounds() -> None:
    """Clipped to [low, high], then divided by 2 high, as in Flow-Factory."""
    rewards = torch.tensor([-9.0, -1.0, 3.0, 9.0])
    how: dict[str, Any] = {"samples_per_prompt": 4, "baseline": 0, "normalize": "none"}
    r = ops.optimality(rewards, adv_clip=(-2.0, 4.0), **how).r
    assert r.tolist() == [-2 / 8 + 0.5, -1 / 8 + 0.5, 3 / 8 + 0.5, 1.0]


def test_several_rewards_are_summed_or_standardised_first() -> None:
    g = torch.Generator().manual_seed(2)
    large, small = 1e3 * torch.randn(8, generator=g), torch.randn(8, generator=g)
    how: dict[str, Any] = {"samples_per_prompt": 4}
    weights = {"small": 3.0, "large": 0.5}
    both = {"large": large, "small": small}
    summed = ops.optimality(both, reward_weights=weights, **how)
    alone = ops.optimality(0.5 * large + 3 * small, **how)
    torch.testing.assert_close(summed.advantage, alone.advantage)
    first = ops.optimality(both, reward_weights=weights, combine="advantages", **how)
    want = 0.5 * ops.optimality(large, **how).advantage
    want = want + 3 * ops.optimality(small, **how).advantage
    torch.testing.assert_close(first.advantage, want)
    same = ops.optimality({"a": small, "b": small * 7}, **how)
    assert same.disagreement.tolist() == [0.0] * 8


def test_the_disagreement_is_a_difference_of_ranks_within_the_prompt() -> None:
    main = torch.tensor([1.0, 2, 3, 10, 20, 30])
    other = torch.tensor([3.0, 2, 1, 5, 5, 5])
    made = ops.optimality({"main": main, "other": other, "third": main}, samples_per_prompt=3)
    # Ranks 0, 1/2, 1; of others the mean; ties share 1/2.
    assert made.disagreement.tolist() == [-0.5, 0.0, 0.5, -0.25, 0.0, 0.25]
    assert ops.optimality(main, samples_per_prompt=3).disagreement.tolist() == [0.0] * 6


def test_the_best_and_the_worst_of_each_prompt_are_selected() -> None:
    rewards = torch.tensor([5.0, 1, 4, 2, 3, 0, 10, 30, 20, 50, 40, 60])
    made = ops.optimality(rewards, samples_per_prompt=6, best=1, worst=2)
    assert made.selected.nonzero().flatten().tolist() == [0, 1, 5, 6, 8, 11]
    assert ops.optimality(rewards, samples_per_prompt=6).selected.all()
    assert ops.optimality(rewards, samples_per_prompt=6, best=6, worst=6).selected.all()
    equal = ops.optimality(torch.zeros(12), samples_per_prompt=6, best=2)
    assert equal.selected.sum() == 4


def test_the_tracker_of_other_trainers(shared: Any) -> None:
    """group_std and global_std of DiffusionNFT's and Astrolabe's stat_tracking.py."""
    from safetensors.torch import load_file

    folder = shared / "golden" / "nft_variants"
    if not (file := folder / "advantages_group6.safetensors").is_file():
        pytest.skip(f"{file} is absent")
    golden = load_file(file)
    for normalize, name in (("group", "group_std"), ("global", "global_std")):
        for dtype in (torch.float32, torch.float64):
            rewards = golden["reward"].to(dtype)
            got = ops.optimality(rewards, samples_per_prompt=6, normalize=normalize).advantage  # type: ignore[arg-type]
            error = (got.double() - golden[name]).norm() / golden[name].norm()
            assert error <= 1e-6, (normalize, dtype)


def bad(needle: str, rewards: Any = SCORE, **change: Any) -> Any:
    return pytest.param(rewards, change, needle, id=needle[:40])


BAD = [
    bad("rewards: got float32 [4, 1]", SCORE[:, None]),
    bad("rewards: got 1.0; needed: float32 or float64 [B]", 1.0),
    bad("rewards: got int64 [4]", SCORE.long()),
    bad("rewards: got bfloat16 [4]", SCORE.bfloat16()),
    bad("rewards: got float32 [0]", SCORE[:0]),
    bad("not finite at [1]", torch.tensor([1.0, float("nan"), 2.0, 3.0])),
    bad("rewards['b']: got float32 [4, 1]", {"a": SCORE, "b": SCORE[:, None]}),
    bad("rewards['b']: got float32 [2] on cpu; needed: shape", {"a": SCORE, "b": SCORE[:2]}),
    bad("rewards: got {}; needed: at least one", {}),
    bad("reward_weights: got ['b']", {"a": SCORE}, reward_weights={"b": 1.0}),
    bad("reward_weights['a']: got nan", {"a": SCORE}, reward_weights={"a": float("nan")}),
    bad("samples_per_prompt: got 3; needed: a divisor of the 4", samples_per_prompt=3),
    bad("samples_per_prompt: got 0", samples_per_prompt=0),
    bad("samples_per_prompt, groups: got both", groups=torch.zeros(4, dtype=torch.int64)),
    bad("samples_per_prompt, groups: got neither", samples_per_prompt=None),
    bad("groups: got float32 [4]", samples_per_prompt=None, groups=SCORE),
    bad("samples of a prompt: got 1", samples_per_prompt=1),
    bad("normalize: got 'std'", normalize="std"),
    bad("adv_mode: got 'both'", adv_mode="both"),
    bad("combine: got 'gdpo'", combine="gdpo"),
    bad("baseline: got 'mean'", baseline="mean"),
    bad("baseline: got float32 [4, 1]", baseline=SCORE[:, None]),
    bad("baseline: got nan; needed: 'group', 'batch', a finite number", baseline=float("nan")),
    bad("baseline: got 'values that are not finite'", baseline=SCORE / 0),
    bad("adv_clip: got 0.0", adv_clip=0.0),
    bad("adv_clip: got (1.0, 2.0)", adv_clip=(1.0, 2.0)),
    bad("best: got 3; needed: from 0 to 2", best=3),
    bad("worst: got -1", worst=-1),
]


@pytest.mark.parametrize(("rewards", "change", "needle"), BAD)
def test_bad_input_names_the_argument(rewards: Any, change: dict[str, Any], needle: str) -> None:
    with pytest.raises(ValueError, match=re.escape(needle)):
        ops.optimality(rewards, **{"samples_per_prompt": 2, **change})


@pytest.mark.parametrize("value", [0.1, 0.7, 7.7, 1000.1, 1e6 + 0.1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("baseline", ["group", "batch"])
@pytest.mark.parametrize("normalize", ["group", "batch", "global", "none"])
def test_equal_rewards_have_no_advantage(
    value: float, dtype: torch.dtype, baseline: Any, normalize: Any
) -> None:
    rewards = torch.full((12,), value, dtype=dtype)
    for mode in ("all", "binary"):
        result = ops.optimality(
            rewards, samples_per_prompt=6, baseline=baseline, normalize=normalize, adv_mode=mode
        )
        assert torch.equal(result.advantage, torch.zeros_like(rewards))
        assert torch.equal(result.r, torch.full_like(rewards, 0.5))


def test_a_reward_of_negative_weight_disagrees_by_its_negation() -> None:
    x = torch.tensor([0.0, 1.0, 2.0])
    result = ops.optimality(
        {"a": x, "b": -x}, samples_per_prompt=3, reward_weights={"a": 1.0, "b": -1.0}
    )
    assert torch.equal(result.disagreement, torch.zeros(3))


@pytest.mark.parametrize("kind", [np.int32, np.uint16, np.int64, torch.tensor])
def test_seeds_of_any_integer_are_those_of_pythons(kind: Any) -> None:
    ours = ops.draw_seeds(
        3, base=1, step=kind(1000), rank=kind(40_000 if kind is not np.int32 else 7)
    )
    theirs = ops.draw_seeds(3, base=1, step=1000, rank=40_000 if kind is not np.int32 else 7)
    assert torch.equal(ours, theirs)
    with pytest.raises(ValueError, match=r"step: got 1\.5; needed: an integer or None"):
        ops.draw_seeds(3, base=1, step=1.5, rank=kind(0))  # type: ignore[arg-type]
