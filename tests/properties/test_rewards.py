"""Any scores of any number of rewards: what is only measured changes no weight, and the prior stays
the mean over the videos that have one."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from afd.methods.config import AfdConfig
from afd.methods.rewards import Scores, combine, metrics_of, prior_weights
from afd.rewards.base import Reward, Term


class Given(Reward):
    """Stands for any frozen reward; these properties need no videos."""

    def score(self, input_BFCHW: Tensor, prompts: object) -> Tensor:
        raise NotImplementedError


FROZEN = Given()


@st.composite
def scored(draw: st.DrawFn) -> tuple[Scores, AfdConfig]:
    """A discriminator's and up to three rewards' scores, in any units, with ties."""
    group, prompts = draw(st.integers(2, 6)), draw(st.integers(1, 4))
    weights = draw(st.lists(st.sampled_from([0.25, 1.0, 3.0]), max_size=3))
    value = st.one_of(
        st.sampled_from([-1.0, 0.0, 1.0]), st.floats(-1e4, 1e4, width=32, allow_subnormal=False)
    )
    rows = [
        draw(st.lists(value, min_size=group * prompts, max_size=group * prompts))
        for _ in range(1 + len(weights))
    ]
    terms = (Term("d"), *(Term(f"r{i}", w, FROZEN) for i, w in enumerate(weights)))
    config = AfdConfig(
        samples_per_prompt=group,
        combine=draw(st.sampled_from(["rewards", "advantages"])),
        normalize=draw(st.sampled_from(["batch", "group", "global", "rank", "none"])),
        prior_weight=draw(st.one_of(st.just(0.0), st.floats(1e-6, 100))),
        prior_share=draw(st.floats(0.01, 1)),
    )
    return Scores(terms, torch.tensor(rows)), config


@given(scored(), st.integers(0, 2**31))
def test_what_is_only_measured_changes_no_weight(case: tuple[Scores, AfdConfig], seed: int) -> None:
    scores, config = case
    extra = torch.randn(1, scores.each_RB.shape[1], generator=torch.Generator().manual_seed(seed))
    more = Scores(
        (*scores.terms, Term("extra", 0.0, FROZEN)), torch.cat([scores.each_RB, 100 * extra])
    )
    assert torch.equal(combine(more, config).r, combine(scores, config).r)
    assert torch.equal(more.total_B, scores.total_B)
    found = metrics_of(more, config.samples_per_prompt)
    agreements = [value for key, value in found.items() if key.endswith("agreement")]
    assert len(agreements) == len(more.terms) - 1
    assert all(-1.0001 <= value <= 1.0001 for value in agreements)


@given(scored())
def test_a_prompts_weights_come_from_its_videos_in_any_order(
    case: tuple[Scores, AfdConfig],
) -> None:
    scores, config = case
    config = config.model_copy(update={"normalize": "rank"})
    result = combine(scores, config)
    back = torch.arange(scores.each_RB.shape[1]).flip(0)
    turned = combine(Scores(scores.terms, scores.each_RB[:, back]), config)
    torch.testing.assert_close(turned.r[back], result.r)
    torch.testing.assert_close(turned.disagreement[back], result.disagreement)


@given(scored())
def test_the_prior_is_a_mean_over_those_that_have_one(case: tuple[Scores, AfdConfig]) -> None:
    scores, config = case
    disagreement = combine(scores, config).disagreement
    prior = prior_weights(disagreement, config)
    if not isinstance(prior, Tensor):
        assert (prior, config.prior_share) == (config.prior_weight, 1)
        return
    chosen = prior > 0
    if config.prior_weight > 0 and bool((disagreement > 0).any()):
        torch.testing.assert_close(float(prior.mean()), config.prior_weight, rtol=1e-5, atol=1e-6)
        # Every chosen video disagrees at least as much as every other one.
        assert float(disagreement[chosen].min()) >= float(
            disagreement[~chosen].max() if bool((~chosen).any()) else -2
        )
    else:
        assert not bool(chosen.any())
