"""Every option of AFD takes effect: each test fails if its option is not read."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Generator, Tensor

from afd.config.run import EvaluationConfig
from afd.distributed import ALONE
from afd.lab.metrics import PhysicsMetrics
from afd.methods.afd import Afd
from afd.methods.base import draw_times
from afd.methods.config import AfdConfig
from afd.methods.copies import draw_copies
from afd.methods.inputs import InputPipeline
from afd.models.codec import Pixels
from afd.video import through_codec
from afd.video.config import VideoConfig
from tests.afd.tiny_methods import gradients, make_afd, step, toy_batch, toy_student, weights
from tests.tolerances import NETWORK_REORDERED as SAME

DIFFUSION_NFT = {
    "type 0": ({"old_decay": 0.0}, {1: 0, 400: 0}),
    "type 1": ({"old_decay": 0.5, "old_decay_slope": 0.001}, {1: 0.001, 100: 0.1, 900: 0.5}),
    "type 2": (
        {"old_decay": 0.999, "old_decay_slope": 0.0075, "old_decay_start": 75},
        {1: 0, 75: 0, 95: 0.15, 300: 0.999},
    ),
    "constant": ({"old_decay": 0.99, "old_decay_slope": 1.0}, {1: 0.99, 500: 0.99}),
}


def first(**settings: Any) -> tuple[Afd, dict[str, float]]:
    """A method after its first update, in which theta, old and ref are one, and its metrics."""
    method = make_afd(toy_student(), **settings)
    return method, step(method, toy_batch())


def two(**settings: Any) -> tuple[Afd, dict[str, float]]:
    method, _ = first(learning_rate=1e-3, **settings)
    return method, step(method, toy_batch(1))


# --- r ---


def test_scores_weights_and_losses_are_one_number_a_video() -> None:
    method = make_afd(toy_student(), draws=2, micro_batch=3)
    seen: list[Any] = []
    loss = method._loss

    def recorded(rollouts: Any, r_B: Tensor, copies: Any, prior: float) -> Any:
        result = loss(rollouts, r_B, copies, prior)
        seen.append((r_B, copies, result))
        return result

    method._loss = recorded  # type: ignore[method-assign]
    step(method, toy_batch())
    assert [len(copies) for _, copies, _ in seen] == [3, 3, 2]
    for r_B, copies, result in seen:
        assert r_B.shape == (4,)
        assert result.loss_pos.shape == result.loss_neg.shape == (len(copies),)
        assert result.prior.shape == result.w_pos.shape == (len(copies),)
        assert result.loss.shape == ()


def test_the_mode_reaches_the_update() -> None:
    r = {mode: first(adv_mode=mode)[1]["student/r_mean"] for mode in ("all", "positive_only")}
    # Standardised scores sum to zero but for the rounding of scores far from zero, divided by their
    # spread; another order of the network's sums (another CPU) rounds otherwise.
    assert r["positive_only"] > 0.55 > r["all"] == pytest.approx(0.5, abs=1e-5)


def test_an_average_of_past_scores_is_kept_for_the_baseline() -> None:
    method, metrics = first(baseline="ema", normalize="none")
    before = metrics["student/score_mean"]
    assert method.score_average == pytest.approx(before)
    metrics = step(method, toy_batch(1))
    assert metrics["student/r_mean"] != pytest.approx(0.5, abs=1e-4)
    expected = 0.9 * before + 0.1 * metrics["student/score_mean"]
    assert method.score_average == pytest.approx(expected, rel=1e-5)


def test_random_advantages_ignore_the_score() -> None:
    found = []
    for seed in (1, 2):
        method = make_afd(toy_student(), advantage="random")
        method.discriminator.net.head[0].weight.data.normal_(
            generator=Generator().manual_seed(seed)
        )
        found.append(step(method, toy_batch()))
    assert found[0]["student/score_mean"] != found[1]["student/score_mean"]
    assert found[0]["student/r_std"] == found[1]["student/r_std"] > 0


# --- the loss ---


def test_the_first_loss_is_the_formula_while_all_versions_are_one() -> None:
    _, plain = first()
    # L+ = L- = L: the loss is adv_clip L / nft_beta, and there is no prior.
    assert plain["student/loss_pos"] == plain["student/loss_neg"]
    assert plain["student/prior"] == plain["student/old_deviation"] == 0
    loss = plain["student/loss_pos"]
    assert plain["student/loss"] == pytest.approx(2 * loss, rel=1e-5)
    assert first(nft_beta=0.1)[1]["student/loss"] == pytest.approx(20 * loss, rel=1e-5)
    assert first(adv_clip=5.0)[1]["student/loss"] == pytest.approx(5 * loss, rel=1e-5)
    velocity = first(weighting="velocity")[1]
    assert velocity["student/loss"] == pytest.approx(velocity["student/loss_pos"], rel=1e-5)
    assert velocity["student/loss_pos"] != pytest.approx(loss, rel=0.1)


def test_the_prior_is_weighed_by_r_where_asked() -> None:
    plain, by_r = (two(prior_weight=0.1, prior_by_r=flag)[1] for flag in (False, True))
    assert plain["student/prior"] == pytest.approx(plain["student/ref_deviation"])
    assert 0.2 < by_r["student/prior"] / plain["student/prior"] < 0.8
    assert by_r["student/ref_deviation"] == pytest.approx(plain["student/ref_deviation"])


def test_without_a_prior_no_reference_is_kept() -> None:
    assert AfdConfig().versions == ("theta", "old", "ref")
    assert AfdConfig(prior_weight=0.0, old="current").versions == ("theta",)
    assert AfdConfig(ema_decay=0.9).versions == ("theta", "old", "ema", "ref")
    method, metrics = first(prior_weight=0.0)
    assert metrics["student/prior"] == metrics["student/ref_deviation"] == 0
    with pytest.raises(ValueError, match="name: got 'ref'"):
        method.policies.using("ref").__enter__()


# --- times, chunks, context ---


def test_logit_normal_times_have_their_mean_and_spread() -> None:
    given: dict[str, Any] = {"timesteps": "logit_normal", "logit_mean": 1.0, "logit_std": 0.5}
    copies = draw_copies(AfdConfig(draws=500, **given), 4, 4, (), Generator().manual_seed(0))
    normal = copies.t_NK.logit()
    assert float(normal.mean()) == pytest.approx(1.0, abs=0.02)
    assert float(normal.std()) == pytest.approx(0.5, abs=0.02)
    plain = draw_times("logit_normal", 2000, 4, (), Generator().manual_seed(0))
    assert float(plain.median()) == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize("context", ["recompute", "own_context", "shared_context"])
def test_only_drawn_chunks_are_computed_and_counted(context: str) -> None:
    found = {}
    for count in (None, 4, 1):
        method = make_afd(toy_student(), context=context, chunks_per_update=count)
        net, frames = method.policies.student.net, []
        forward = net.forward

        def counted(x: Tensor, *args: Any, **how: Any) -> Tensor:
            frames.append(x.shape[1])  # noqa: B023
            return forward(x, *args, **how)  # noqa: B023

        net.forward = counted  # type: ignore[method-assign]
        found[count] = step(method, toy_batch()), [g.clone() for g in gradients(method)]
        assert set(frames) == {12 if count is None else 3 * count}
    # All chunks drawn is no drawing.
    assert found[4][0]["student/loss"] == pytest.approx(found[None][0]["student/loss"], rel=1e-6)
    for drawn, whole in zip(found[4][1], found[None][1], strict=True):
        torch.testing.assert_close(drawn, whole, **SAME)
    assert found[1][0]["student/loss"] != pytest.approx(found[None][0]["student/loss"], rel=1e-3)


def test_the_mean_over_drawings_is_the_loss_of_all_chunks() -> None:
    whole, drawn = (
        first(weighting="velocity", draws=32, chunks_per_update=count)[1] for count in (None, 1)
    )
    assert drawn["student/loss"] == pytest.approx(whole["student/loss"], rel=0.1)


def test_a_kept_context_and_one_that_old_makes_again_are_the_same() -> None:
    found = {}
    for keep in (True, False):
        method = make_afd(toy_student(), keep_context=keep, learning_rate=1e-3)
        for number in range(2):
            given = toy_batch(number)
            method.rollout(given)
            assert method._rollouts is not None
            assert bool(method._rollouts.contexts) == keep
            method.discriminator_step(given)
            metrics = method.student_step(given)
        found[keep] = metrics, gradients(method)
    assert found[True][0]["student/loss"] == pytest.approx(found[False][0]["student/loss"], 1e-4)
    for kept, again in zip(found[True][1], found[False][1], strict=True):
        assert float((kept - again).norm()) <= 1e-3 * float(again.norm()) + 1e-7


def test_only_recompute_sends_gradients_through_the_context() -> None:
    """The text keys of the last layer's cross-attention serve noisy queries alone; the first
    layer's serve the context as well."""
    found = {
        context: gradients(first(context=context, prior_weight=0.0)[0])
        for context in ("recompute", "own_context", "shared_context")
    }
    own, shared = found["own_context"], found["shared_context"]
    for a, b in zip(own, shared, strict=True):
        assert float((a - b).norm()) <= 1e-3 * float(b.norm()) + 1e-7
    apart = [float((a - b).norm()) for a, b in zip(found["recompute"], own, strict=True)]
    assert max(apart) > 0.01


# --- versions ---


@pytest.mark.parametrize("name", list(DIFFUSION_NFT))
def test_the_old_policy_follows_every_known_schedule(name: str) -> None:
    settings, expected = DIFFUSION_NFT[name]
    method = make_afd(toy_student(), **settings)
    assert {s: method._decay(s) for s in expected} == pytest.approx(expected)


def test_old_is_the_average_that_its_schedule_says() -> None:
    method = make_afd(toy_student(), old_decay=0.75, old_decay_slope=1.0, learning_rate=1e-3)
    before = weights(method, "old")
    metrics = step(method, toy_batch())
    assert metrics["student/old_decay"] == 0.75
    theta = weights(method, "theta")
    for name, old in weights(method, "old").items():
        torch.testing.assert_close(old, 0.75 * before[name] + 0.25 * theta[name])


def test_the_current_student_anchors_itself_and_is_evaluated() -> None:
    method, metrics = two(old="current")
    assert metrics["student/old_deviation"] == 0
    assert metrics["student/ref_deviation"] > 0
    assert "student/old_decay" not in metrics
    with method.evaluation_policy() as policy:
        assert policy is method.policies.student


def test_an_average_of_its_own_is_evaluated_where_asked() -> None:
    method = make_afd(toy_student(), ema_decay=0.01, learning_rate=1e-3)
    before = weights(method, "ema")
    step(method, toy_batch())
    theta, ema = weights(method, "theta"), weights(method, "ema")
    for name in ema:
        torch.testing.assert_close(ema[name], 0.01 * before[name] + 0.99 * theta[name])
    with method.evaluation_policy() as policy:
        for name, value in policy.state_dict().items():
            assert torch.equal(value, ema[name])
    with make_afd(toy_student()).evaluation_policy() as policy:
        assert policy is not None


# --- rollouts and the discriminator's input ---


def test_rollouts_in_pieces_are_the_rollouts() -> None:
    found = []
    for size in (None, 1, 3):
        method = make_afd(toy_student(), how={"rollout_batch": size})
        method.rollout(toy_batch())
        assert method._rollouts is not None
        found.append(method._rollouts)
    for pieces in found[1:]:
        torch.testing.assert_close(pieces.x0_BFCHW, found[0].x0_BFCHW, **SAME)
        torch.testing.assert_close(pieces.input_BFCHW, found[0].input_BFCHW, **SAME)
        assert pieces.prompts == found[0].prompts
        assert len(pieces.contexts) == 4


def test_the_group_is_as_large_as_asked_and_the_first_video_is_shown() -> None:
    method = make_afd(toy_student(), samples_per_prompt=3)
    given = toy_batch()
    method.rollout(given)
    assert method._rollouts is not None
    assert method._rollouts.prompts == [p for p in given.prompts for _ in range(3)]
    x_FCHW = method._rollouts.x0_BFCHW[0]
    method.student_step(given)
    assert method.shown is not None
    assert torch.equal(method.shown.x0_FCHW, x_FCHW)
    assert method.shown.prompt == given.prompts[0]
    assert method.shown.score is not None
    assert 0 <= (method.shown.r or 0) <= 1


def test_the_discriminator_is_shown_what_the_codec_leaves() -> None:
    method = make_afd(toy_student())
    x = torch.rand(2, 12, 3, 16, 16) * 2 - 1
    plain = InputPipeline(method.discriminator, Pixels(), VideoConfig())
    matched = InputPipeline(method.discriminator, Pixels(), VideoConfig(codec_match=True, crf=30))
    assert torch.equal(plain(x), x)
    assert torch.equal(matched(x), through_codec(x, crf=30))
    assert not torch.equal(matched(x), x)


def test_agreement_with_physics_is_logged_on_its_steps() -> None:
    watch = PhysicsMetrics.watch(EvaluationConfig(), ALONE)
    method = make_afd(toy_student())
    method.watch = watch
    logged = ["agreement/phys" in step(method, toy_batch(number)) for number in (0, 1, 10)]
    assert logged == [True, False, True]
