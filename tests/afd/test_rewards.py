"""Frozen rewards beside the discriminator, or alone: what they change, and what they do not."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from afd import ops
from afd.config.run import differences, make_config, to_yaml
from afd.data.inputs import inputs_of, refuse_other_inputs
from afd.errors import ConfigError, TeacherError, TrainingError
from afd.lab.physics import measure_each
from afd.lab.simulator import attribute_table
from afd.methods.afd import Afd
from afd.methods.base import Batch
from afd.methods.config import AfdConfig
from afd.methods.rewards import (
    Scores,
    combine,
    metrics_of,
    novelty,
    prior_weights,
    terms_of,
    with_novelty,
)
from afd.rewards.base import Reward, Term
from afd.trainer.build import build_method
from afd.trainer.loop import load_run, train
from tests.afd.tiny_methods import (
    Brightness,
    gradients,
    make_afd,
    step,
    toy_batch,
    toy_student,
    wan_batch,
    wan_student,
    weights,
)

MEASURED = Term("bright", 0.0, Brightness())
ALONE = {"discriminator": None}


def alone(rewards: list[Term], **settings: Any) -> Afd:
    return make_afd(toy_student(), how={"rewards": rewards, **ALONE}, **settings)


# --- what a reward changes ---


def test_a_reward_that_is_only_measured_changes_no_bit() -> None:
    plain, measured = (make_afd(toy_student(), how={"rewards": r}) for r in ([], [MEASURED]))
    for number in range(2):
        without, with_it = (step(method, toy_batch(number)) for method in (plain, measured))
        added = with_it.keys() - without.keys()
        assert added == {
            "reward/discriminator/mean",
            "reward/discriminator/std",
            "reward/bright/mean",
            "reward/bright/std",
            "reward/bright/agreement",
            "student/disagreement",
        }
        assert {key: with_it[key] for key in without} == without
    for name, value in weights(plain, "theta").items():
        assert torch.equal(value, weights(measured, "theta")[name])


def test_a_reward_alone_trains_without_a_discriminator_and_without_teacher_videos() -> None:
    method = alone([Term("bright", 1.0, Brightness())], learning_rate=3e-3, samples_per_prompt=4)
    assert (method.needs_teacher, method.needs_discriminator) == (False, False)
    prompts = toy_batch().prompts
    found = []
    for number in range(12):
        batch = Batch(number, prompts, torch.empty(len(prompts), 0))
        method.rollout(batch)
        assert method.discriminator_step(batch) == {}
        found.append(method.student_step(batch))
    assert not any(key.startswith("discriminator/") for key in found[0])
    assert found[0]["reward/bright/mean"] == pytest.approx(found[0]["student/score_mean"])
    # The optimised quantity rises: the method ascends the reward, not its negation.
    late = sum(line["reward/bright/mean"] for line in found[-3:]) / 3
    assert late > found[0]["reward/bright/mean"] + 0.02
    assert method.shown is not None
    assert method.shown.score is not None


def test_a_state_without_a_discriminator_continues_with_the_same_bits() -> None:
    rewards = [Term("bright", 1.0, Brightness()), Term("dark", 0.5, Brightness(sign=-1))]
    settings: dict[str, Any] = {"baseline": "ema", "normalize": "none", "prior_share": 0.5}
    whole = alone(rewards, **settings)
    step(whole, toy_batch())
    state = copy.deepcopy(whole.state_dict())
    assert state["discriminator"] is None
    resumed = alone(rewards, **settings)
    resumed.load_state_dict(state)
    assert step(whole, toy_batch(1)) == step(resumed, toy_batch(1))
    for a, b in zip(gradients(whole), gradients(resumed), strict=True):
        assert torch.equal(a, b)


def test_scorers_of_latents_and_of_pixels_see_their_own_space() -> None:
    class Twice:
        """Pixels are latents times two."""

        identity = None

        def decode(self, x0_BFCHW: Tensor) -> Tensor:
            return 2 * x0_BFCHW

    rewards = [
        Term("latents", 1.0, Brightness("latents")),
        Term("pixels", 1.0, Brightness()),
        Term("same", 1.0, Brightness()),
    ]
    method = make_afd(wan_student(), how={"rewards": rewards, "codec": Twice()})
    method.rollout(wan_batch())
    rollouts = method._current()
    # The discriminator's own, and one of each space, which rewards share.
    assert len(rollouts.inputs) == 3
    assert rollouts.input_BFCHW is rollouts.inputs[0]
    metrics = method.discriminator_step(wan_batch()) | method.student_step(wan_batch())
    assert metrics["reward/pixels/mean"] == pytest.approx(2 * metrics["reward/latents/mean"])
    assert metrics["reward/same/mean"] == metrics["reward/pixels/mean"]


# --- how rewards are combined ---


def scores(**rows: list[float]) -> Scores:
    """Rows whose names begin with w0 are measured only."""
    terms = tuple(Term(name, 0.0 if name.startswith("w0") else 2.0, Brightness()) for name in rows)
    return Scores(terms, torch.tensor(list(rows.values())))


def test_the_weights_are_those_of_the_public_op() -> None:
    given = scores(a=[1.0, 2, 3, 9, 5, 5, 6, 4], b=[0.5, 0, 0, 0, 40, 30, 20, 10])
    for how in ("rewards", "advantages"):
        config = AfdConfig(combine=how, normalize="group", adv_clip=3.0)
        expected = ops.optimality(
            {"a": given.each_RB[0], "b": given.each_RB[1]},
            samples_per_prompt=4,
            reward_weights={"a": 2.0, "b": 2.0},
            combine=how,
            normalize="group",
            adv_clip=3.0,
        )
        assert torch.equal(combine(given, config).r, expected.r)
    by_sum, by_each = (
        combine(given, AfdConfig(combine=how, normalize="group")).r
        for how in ("rewards", "advantages")
    )
    # In the second group b's units decide the sum, and not the sum of advantages.
    assert by_sum[4:].argsort().tolist() == [3, 2, 1, 0]
    assert by_each[4:].tolist() != by_sum[4:].tolist()


@pytest.mark.parametrize("how", ["rewards", "advantages"])
def test_novelty_is_weighed_in_units_of_the_scores(how: str) -> None:
    torch.manual_seed(0)
    video_BFCHW = torch.randn(8, 2, 1, 2, 2).cumsum(0)
    novelty_B = novelty(video_BFCHW, 4)
    expected = [
        (video - prompt.mean(0)).square().mean()
        for prompt in video_BFCHW.split(4)
        for video in prompt
    ]
    assert torch.allclose(novelty_B, torch.stack(expected))
    score_B, config = torch.randn(8), AfdConfig(combine=how)
    plain = Scores((Term("a"),), score_B[None])
    r_of = {}
    for unit in (1e3, 1e6):
        for weight in (0.0, 0.5, 1e6):
            scaled = Scores((Term("a"),), unit * score_B[None])
            given = with_novelty(scaled, novelty_B, weight, 4)
            r_of[unit, weight] = combine(given, config).r
    for weight in (0.0, 0.5, 1e6):
        assert torch.allclose(r_of[1e3, weight], r_of[1e6, weight], atol=1e-5)
    assert torch.allclose(r_of[1e3, 0.0], combine(plain, config).r, atol=1e-3)
    for order in (slice(0, 4), slice(4, 8)):
        by_novelty = r_of[1e3, 1e6][order][novelty_B[order].argsort()]
        assert (by_novelty.diff() >= 0).all()
        assert by_novelty[0] < by_novelty[-1]
    # Equal videos have no novelty, whatever the scores are.
    same = with_novelty(plain, novelty(torch.ones(8, 2, 1, 2, 2), 4), 0.5, 4)
    assert torch.allclose(combine(same, config).r, combine(plain, config).r, atol=1e-6)


def test_rewards_that_count_come_first_and_a_discriminator_joins_them() -> None:
    frozen = [Term("a", 0.0, Brightness()), Term("b", 1.0, Brightness())]
    online = make_afd(toy_student()).discriminator
    assert [t.name for t in terms_of(None, frozen)] == ["b", "a"]
    assert [t.name for t in terms_of(online, frozen)] == ["discriminator", "b", "a"]
    weighed = [*frozen, Term("adversary", 0.0)]
    assert [t.name for t in terms_of(online, weighed)] == ["b", "a", "adversary"]


def test_the_prior_is_the_mean_over_the_videos_that_disagree_most() -> None:
    disagreement = torch.tensor([0.9, -0.9, 0.2, 0.8, 0.0, -0.1, 0.1, -1.0])
    config = AfdConfig(prior_weight=0.5, prior_share=0.25)
    found = prior_weights(disagreement, config)
    assert isinstance(found, Tensor)
    assert found.tolist() == [2.0, 0, 0, 2.0, 0, 0, 0, 0]
    assert float(found.mean()) == pytest.approx(0.5)
    # Videos that the first reward does not prefer have none, however many the share allows.
    assert (
        prior_weights(disagreement, config.model_copy(update={"prior_share": 0.9})).count_nonzero()
        == 4
    )  # type: ignore[union-attr]
    assert not prior_weights(-disagreement.abs(), config).any()  # type: ignore[union-attr]
    assert prior_weights(disagreement, AfdConfig(prior_weight=0.5)) == 0.5


def test_a_selective_prior_acts_on_the_selected_videos_alone() -> None:
    rewards = [Term("bright", 1.0, Brightness()), Term("dark", 0.0, Brightness(sign=-1))]
    found = {}
    for share in (0.25, 1.0):
        method = alone(
            rewards,
            prior_share=share,
            prior_weight=100.0,
            learning_rate=1e-3,
            samples_per_prompt=4,
            old_decay=0.0,
            adv_clip=1e9,  # r = 1/2: the branches cancel where theta is old, and the prior remains
        )
        given: list[Any] = []
        loss = method._loss

        def recorded(*args: Any, kept: Any = given, of: Any = loss) -> Any:
            kept.append((args[2], args[3]))
            return of(*args)

        method._loss = recorded  # type: ignore[method-assign]
        for number in range(2):
            found[share] = step(method, toy_batch(number))
        copies, prior = given[-1]
        if share < 1:
            # The rewards are each other's negation: the brightest of each group is selected.
            assert (prior > 0).view(2, 4).sum(1).tolist() == [1, 1]
            assert float(prior.mean()) == pytest.approx(100.0)
            assert len(copies) == 2 * len(prior)
        else:
            assert prior == 100.0
    assert found[0.25]["student/prior_share"] == 0.25
    assert "student/prior_share" not in found[1.0]
    assert found[0.25]["student/disagreement"] == pytest.approx(2 / 3)


def test_the_agreement_is_the_correlation_within_groups() -> None:
    online, same, other = [1.0, 2, 3, 100, 102, 101], [5.0, 6, 7, -1, 1, 0], [3.0, 2, 1, 9, 7, 8]
    given = Scores(
        (Term("d"), Term("same", 1, Brightness()), Term("other", 1, Brightness())),
        torch.tensor([online, same, other]),
    )
    found = metrics_of(given, 3)
    assert found["reward/same/agreement"] == pytest.approx(1.0)
    assert found["reward/other/agreement"] == pytest.approx(-1.0)
    assert found["reward/d/std"] == pytest.approx((2 / 3) ** 0.5)
    assert "reward/d/agreement" not in found
    assert metrics_of(Scores((Term("d"),), given.each_RB[:1]), 3) == {}


def test_a_score_that_is_not_finite_ends_the_run_with_a_sentence() -> None:
    class Broken(Brightness):
        def score(self, input_BFCHW: Tensor, prompts: Any) -> Tensor:
            found = super().score(input_BFCHW, prompts)
            found[1] = torch.inf
            return found

    method = make_afd(toy_student(), how={"rewards": [Term("odd", 0.0, Broken())]})
    with pytest.raises(TrainingError, match=r"update 1: reward odd is inf for 1 of 4 videos"):
        step(method, toy_batch())


# --- configuration ---

BRIGHT = "{kind: physics, measure: rend}"


@pytest.mark.parametrize(
    ("overrides", "needed"),
    [
        (
            [f"rewards.a={BRIGHT}", "method=sft"],
            "rewards: got a with method=sft; needed: method=afd",
        ),
        (["discriminator=null", "method=gan"], "discriminator: got null; needed: a section"),
        (["discriminator=null"], "rewards: got none with a positive weight"),
        (
            ["discriminator=null", "rewards.a={kind: physics, weight: 0}"],
            "rewards: got none with a positive weight",
        ),
        (["rewards.a={kind: discriminator, weight: 0}"], "rewards: got none with a positive"),
        (
            ["rewards.a={kind: discriminator}", "rewards.b={kind: discriminator}"],
            "rewards: got kind=discriminator in a and b; needed: once",
        ),
        (
            ["discriminator=null", "rewards.a={kind: discriminator}"],
            "rewards.a: got kind=discriminator with discriminator=null; needed",
        ),
        ([f"rewards.discriminator={BRIGHT}"], "rewards.discriminator: got kind=physics beside"),
        ([f"rewards.a={BRIGHT}", "afd.baseline=teacher"], "afd.baseline: got teacher with rewards"),
        (["afd.prior_share=0.5"], "afd.prior_share: got 0.5 with a single reward; needed"),
        (["afd.combine=advantages", "afd.baseline=ema"], "afd.baseline: got ema; needed: group"),
        (
            ["afd.diversity_weight=1", f"rewards.a={BRIGHT}", "afd.prior_share=0.5"],
            "afd.diversity_weight: got 1.0; needed",
        ),
        (["rewards.a={weight: 1}"], "rewards.a.kind: not given; needed: one of the rewards disc"),
        (["rewards.a={kind: nice}"], "rewards.a.kind: got 'nice'; needed: one of the rewards"),
        (["rewards.a.kind=nice"], "override 'rewards.a.kind=nice': rewards.a.kind: got 'nice'"),
        (["rewards.a.weight=2"], "override 'rewards.a.weight=2': rewards.a.kind: not given"),
        (["rewards.a=3"], "rewards.a is 3; needed: a section"),
        (
            [f"rewards.a={BRIGHT}", "rewards.a.wieght=1"],
            "override 'rewards.a.wieght=1': unknown key 'rewards.a.wieght'; did you mean "
            "rewards.a.weight?",
        ),
        (["rewards.a={kind: discriminator, grey: true}"], "belongs to another rewards.a.kind"),
        ([f"rewards.a={BRIGHT}", "rewards.a.weight=-1"], "rewards.a.weight is -1"),
        (["rewards={a b: {kind: physics}}"], "rewards.a b.[key] is 'a b'"),
    ],
)
def test_rewards_that_make_no_sense_are_refused(overrides: list[str], needed: str) -> None:
    with pytest.raises(ConfigError) as refused:
        make_config({}, overrides)
    assert needed in str(refused.value)


def test_a_physics_reward_needs_the_toy() -> None:
    data = {
        "student": {"kind": "wan"},
        "video": {"frames": 81, "height": 480, "width": 832},
        "discriminator": {"kind": "latent"},
        "evaluation": {"kind": "video"},
        "rewards": {"fall": {"kind": "physics"}},
    }
    with pytest.raises(ConfigError, match=r"rewards\.fall\.kind: got physics, which only measures"):
        make_config(data)


def test_overrides_reach_into_a_reward_and_take_one_out() -> None:
    data = {"rewards": {"a": {"kind": "physics"}, "b": {"kind": "physics", "measure": "adh"}}}
    config = make_config(data, ["rewards.a.weight=0.25", "rewards.b=null"])
    assert list(config.rewards) == ["a"]
    assert config.rewards["a"].weight == 0.25
    alone = make_config(data, ["discriminator=null"])
    assert alone.discriminator is None


# --- runs ---


def run(out: Path, *overrides: str) -> None:
    common = ["device=cpu", "prompts_per_update=2", "evaluation.kind=none", "teacher.count=4"]
    common += ["afd.samples_per_prompt=2", "afd.draws=1", "checkpoint.every=1", f"out={out}"]
    train(make_config({}, [*common, *overrides]))


def test_a_run_on_rewards_alone_resumes_with_the_same_bits(tmp_path: Path) -> None:
    rewards = [
        "discriminator=null",
        "rewards.fall={kind: physics}",
        "rewards.look={kind: physics, measure: rend, weight: 0.5}",
        "rewards.words={kind: physics, measure: adh, weight: 0}",
        "afd.prior_share=0.5",
        "logging.videos_every=2",
    ]
    run(tmp_path / "whole", "updates=2", *rewards)
    run(tmp_path / "parts", "updates=1", *rewards)
    (tmp_path / "parts" / "DONE").unlink()
    run(tmp_path / "parts", "updates=2", *rewards)
    ours, theirs = (
        (tmp_path / name / "metrics.jsonl").read_text().splitlines() for name in ("whole", "parts")
    )
    assert [_numbers(line) for line in ours] == [_numbers(line) for line in theirs]
    assert "reward/fall/mean" in ours[1]
    assert (tmp_path / "whole" / "videos" / "update_000002.mp4").is_file()
    config = load_run(tmp_path / "whole")
    assert config.discriminator is None
    assert make_config({}, [f"out={tmp_path / 'whole'}"]) != config
    assert "discriminator: null" in to_yaml(config)
    with pytest.raises(ConfigError, match=r"rewards\.fall\.weight"):
        run(tmp_path / "parts", "updates=3", *rewards, "rewards.fall.weight=2")


def test_a_run_on_rewards_alone_needs_prompts_and_no_videos(tmp_path: Path) -> None:
    listed = tmp_path / "prompts.txt"
    first, second = toy_batch().prompts
    listed.write_text(f"{first}\n\n{second}\n{first}\n", encoding="utf-8")
    data = {
        "device": "cpu",
        "teacher": {"kind": "prompts", "path": str(listed)},
        "discriminator": None,
        "rewards": {"fall": {"kind": "physics"}},
        "evaluation": {"kind": "none"},
        "logging": {"videos_every": 1},
    }
    small = [
        "updates=2",
        "prompts_per_update=2",
        "afd.samples_per_prompt=2",
        f"out={tmp_path / 'r'}",
    ]
    config = make_config(data, small)
    assert [r.draw for r in config.open_teacher().requests] == [0, 0, 1]
    train(config)
    assert (tmp_path / "r" / "videos" / "update_000002.mp4").is_file()
    assert not (tmp_path / "r" / "teacher").exists()
    listed.write_text("\n")
    with pytest.raises(TeacherError, match="holds no prompt; needed: one a line"):
        config.open_teacher()
    assert list(config.teacher.missing(tmp_path)) == [
        f"teacher.path: got {tmp_path}, a directory; needed: a text file"
    ]
    for override, needed in {
        "discriminator={kind: toy}": "teacher.kind: got prompts, which has no videos; needed",
        "evaluation.kind=physics": "evaluation.kind other than physics",
        "teacher.path=null": "teacher.kind=prompts needs teacher.path",
    }.items():
        with pytest.raises(ConfigError) as refused:
            make_config(data, [override])
        assert needed in str(refused.value)


def _numbers(line: str) -> dict[str, Any]:
    held = json.loads(line)
    return {key: value for key, value in held.items() if key not in ("time_s", "phase_s")}


def test_a_reward_whose_files_changed_is_refused_on_resume() -> None:
    class Read(Brightness):
        identity = "one"

    method = alone([Term("read", 1.0, Read()), Term("plain", 1.0, Brightness())])
    inputs = inputs_of(method, [])
    assert inputs == {"rewards.read": "one"}
    with pytest.raises(ConfigError, match=r"rewards\.read: has changed since the run began"):
        refuse_other_inputs(inputs, {**inputs, "rewards.read": "two"})


def test_the_toys_rewards_are_its_measurements() -> None:
    config = make_config(
        {"discriminator": None, "rewards": {m: {"kind": "physics", "measure": m} for m in MEASURES}}
    )
    method = build_method(config)
    batch = toy_batch()
    each = measure_each(batch.teacher_BFCHW)
    assert isinstance(method, Afd)
    for term in method.terms:
        assert isinstance(term.reward, Reward)
        found = term.reward.score(batch.teacher_BFCHW, batch.prompts)
        if term.name == "adh":
            wanted = attribute_table(batch.prompts)
            assert torch.equal(found, (each.attributes == wanted).float().mean(1))
        else:
            assert torch.equal(found, -getattr(each, term.name))


MEASURES = ("phys", "fit_res", "rend", "adh")


def test_another_order_of_rewards_is_another_run() -> None:
    one = {"rewards": {"fall": {"weight": 1}, "look": {"weight": 1}}}
    other = {"rewards": {"look": {"weight": 1}, "fall": {"weight": 1}}}
    assert differences(one, one) == []
    assert differences(one, other) == ["rewards: in the order fall, look there, look, fall now"]


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        (["rewards={}", "discriminator=null", "afd.advantage=random"], "rewards: got none"),
        (["afd.prior_share=0.5", "afd.advantage=random"], "afd.prior_share: got 0.5"),
        (["rewards={p: {kind: physics, weight: 1e39}}"], "rewards.p.weight is '1e39'"),
    ],
)
def test_rewards_that_cannot_count_are_refused(changes: list[str], named: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(named)):
        make_config({}, ["rewards={p: {kind: physics}}", *changes])
