"""AFD and SFT: the weights they give, the contexts they use, what they save."""

from __future__ import annotations

import copy
import io
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Generator, Tensor, nn

from afd import ops
from afd.config.run import make_config
from afd.lab.config import ToyDiscriminatorConfig
from afd.lab.discriminator import MotionBackbone, ToyDiscriminator
from afd.lab.simulator import PROMPTS, attribute_table, sample_videos
from afd.lab.student import ToyStudent
from afd.methods.afd import Afd
from afd.methods.base import Batch, draw_times
from afd.methods.config import AfdConfig, SftConfig
from afd.methods.sft import VERSIONS, Sft
from afd.models.policies import make_policies
from afd.rollout import STEPS
from afd.trainer.build import build_method

THREE = list(PROMPTS)[::13][:3]


@pytest.fixture
def student() -> ToyStudent:
    torch.manual_seed(0)
    student = ToyStudent()
    nn.init.normal_(student.net.head.head.weight, std=0.05)
    return student


def batch(step: int = 0) -> Batch:
    generator = Generator().manual_seed(step)
    return Batch(step, THREE, sample_videos(attribute_table(THREE), "target", "nuis", generator)[0])


def afd(student: ToyStudent, seed: int = 0, **settings: Any) -> Afd:
    discriminator = ToyDiscriminator(
        ToyDiscriminatorConfig(backbone="scratch", warmup_updates=1, steps_per_update=1), seed=seed
    )
    config = AfdConfig(**settings)
    policies = make_policies(copy.deepcopy(student), config.versions)
    return Afd(policies, discriminator, config, denoising_steps=STEPS, seed=seed)


def sft(student: ToyStudent, seed: int = 0) -> Sft:
    policies = make_policies(copy.deepcopy(student), VERSIONS)
    return Sft(policies, SftConfig(learning_rate=1e-3), denoising_steps=STEPS, seed=seed)


def weights(method: Any, name: str) -> dict[str, Tensor]:
    """A version's weights, by name; those of the frozen start are "ref"."""
    with method.policies.using(name) as student:
        return {key: value.clone() for key, value in student.state_dict().items()}


def step(method: Any, number: int) -> dict[str, float]:
    given = batch(number)
    method.rollout(given)
    return method.discriminator_step(given) | method.student_step(given)


def saved(method: Any) -> dict[str, Any]:
    """The state as it comes back from a file that may hold tensors and numbers only."""
    file = io.BytesIO()
    torch.save(method.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


# --- parts of a step ---


def test_times_come_from_the_students_list_or_a_law() -> None:
    generator = Generator().manual_seed(0)
    listed = draw_times("student", 500, 4, STEPS, generator)
    assert listed.dtype == torch.float32
    assert set(listed.flatten().tolist()) == set(torch.tensor(STEPS).tolist())
    assert float(draw_times("uniform", 500, 4, (), generator).min()) > 0
    assert float(draw_times("uniform", 500, 4, (), generator).mean()) == pytest.approx(
        0.5, abs=0.03
    )
    assert float(draw_times("shifted", 500, 4, (), generator).median()) > 0.8


# --- AFD ---


def test_the_warm_up_trains_the_discriminator_alone(student: ToyStudent) -> None:
    method = afd(student, adv_clip=100.0)
    metrics = step(method, 0)
    assert "student/loss" not in metrics
    assert {"discriminator/accuracy", "discriminator/margin", "student/r_mean"} <= metrics.keys()
    for name, value in student.state_dict().items():
        assert torch.equal(value, weights(method, "theta")[name])
    metrics = step(method, 1)
    assert metrics["student/r_mean"] == pytest.approx(0.5)
    theta, ref = weights(method, "theta"), weights(method, "ref")
    changed = [n for n, v in student.state_dict().items() if (v != theta[n]).any()]
    assert len(changed) > 60
    for name, value in student.state_dict().items():
        assert torch.equal(value, ref[name])


def test_updates_of_the_discriminator_alone_have_their_own_number_of_steps(
    student: ToyStudent,
) -> None:
    method, counts = afd(student), []
    config = method.discriminator.config
    method.discriminator.config = config.model_copy(
        update={"warmup_updates": 2, "warmup_steps_per_update": 3, "steps_per_update": 2}
    )
    before = weights(method, "theta")
    for number in range(3):
        seen = _adam_steps(method)
        metrics = step(method, number)
        counts.append(_adam_steps(method) - seen)
        assert ("student/loss" in metrics) == (number == 2)
        if number < 2:
            for version in ("theta", "old", "ref"):
                assert_equal(weights(method, version), before)
    assert counts == [3, 3, 2]
    assert method.optimizer.updates == 1
    assert any(not torch.equal(v, before[name]) for name, v in weights(method, "theta").items())


def _adam_steps(method: Afd) -> int:
    state = method.discriminator.state_dict()["optimizer"]["state"]
    return max((int(moments["step"]) for moments in state.values()), default=0)


def assert_equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    assert all(torch.equal(a[key], b[key]) for key in a)


def test_a_run_that_stops_among_those_updates_continues_with_the_same_bits(
    student: ToyStudent,
) -> None:
    pace = {"warmup_updates": 3, "warmup_steps_per_update": 2}
    straight, first, second = afd(student), afd(student), afd(student, seed=5)
    for method in (straight, first, second):
        method.discriminator.config = method.discriminator.config.model_copy(update=pace)
    for number in range(5):
        expected = step(straight, number)
    step(first, 0)
    step(first, 1)
    second.load_state_dict(saved(first))
    for number in range(2, 5):
        found = step(second, number)
    assert found == expected
    for version in ("theta", "old"):
        assert_equal(weights(second, version), weights(straight, version))
    ours, theirs = (m.discriminator.state_dict()["net"] for m in (second, straight))
    assert_equal(ours, theirs)


def test_all_contexts_agree_while_the_three_policies_are_one(student: ToyStudent) -> None:
    losses = {}
    for context in ("recompute", "own_context", "shared_context"):
        method = afd(student, context=context)
        step(method, 0)
        losses[context] = step(method, 1)["student/loss"]
    assert losses["own_context"] == pytest.approx(losses["recompute"], rel=1e-5)
    assert losses["shared_context"] == pytest.approx(losses["recompute"], rel=1e-4)


def test_a_resumed_run_continues_with_the_same_bits(student: ToyStudent) -> None:
    whole = afd(student, baseline="ema", context="shared_context")
    for number in range(2):
        step(whole, number)
    resumed = afd(student, seed=99, baseline="ema", context="shared_context")
    resumed.load_state_dict(saved(whole))
    first, second = step(whole, 2), step(resumed, 2)
    assert first == second
    for name, value in weights(whole, "old").items():
        assert torch.equal(value, weights(resumed, "old")[name])


@pytest.mark.parametrize(
    "settings",
    [
        {"advantage": "random"},
        {"old": "current"},
        {"diversity_weight": 0.5},
        {"best": 1, "worst": 2, "chunks_per_update": 2},
        {"timesteps": "uniform", "timestep_per": "video", "weighting": "velocity"},
        {"baseline": "teacher", "normalize": "group", "prior_by_r": True},
        {"context": "noisy", "timesteps": "list", "timestep_list": [1, 0.5], "keep_context": True},
        {"samples_per_prompt": 1, "baseline": "batch", "prior_weight": 0.0, "draws": 1},
    ],
)
def test_every_option_makes_a_step(student: ToyStudent, settings: dict[str, Any]) -> None:
    method = afd(student, **settings)
    for number in range(2):
        metrics = step(method, number)
    assert metrics["student/loss"] >= 0
    assert metrics["student/grad_norm"] > 0


def test_the_student_learns_from_the_best_and_the_worst(
    student: ToyStudent, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two of five videos of a prompt, once per draw; the discriminator learns from all."""
    method = afd(student, samples_per_prompt=5, best=1, worst=1, draws=3)
    step(method, 0)
    calls: list[dict[str, Any]] = []

    def recorded(**given: Any) -> ops.NftLoss:
        calls.append(given)
        return nft_loss(**given)

    nft_loss = ops.nft_loss
    monkeypatch.setattr(ops, "nft_loss", recorded)
    given = batch(1)
    method.rollout(given)
    x0_BFCHW = method._current().x0_BFCHW
    seen = method._current().input_BFCHW
    method.discriminator_step(given)
    scored = copy.deepcopy(method.discriminator)
    method.student_step(given)
    [call] = calls
    score_PG = scored.score(seen, [p for p in THREE for _ in range(5)]).view(3, 5)
    ends = torch.stack([score_PG.argmax(1), score_PG.argmin(1)], 1).sort(1).values
    index_V = (ends + 5 * torch.arange(3)[:, None]).flatten()
    assert torch.equal(call["x0"], x0_BFCHW[index_V].repeat(3, 1, 1, 1, 1))
    assert call["r"].view(3, 3, 2).amin(2).max() < 0.5 < call["r"].view(3, 3, 2).amax(2).min()


def test_choosing_all_changes_nothing(student: ToyStudent) -> None:
    one, other = afd(student), afd(student, best=3, worst=1)
    for number in range(2):
        step(one, number)
        step(other, number)
    kept, found = weights(one, "theta"), weights(other, "theta")
    assert all(torch.equal(value, found[key]) for key, value in kept.items())


@pytest.mark.parametrize("chosen", [{"best": 5}, {"best": 3, "worst": 2}, {"best": 0}])
def test_more_than_there_are_or_none_is_refused(chosen: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=r"together from 1 to afd.samples_per_prompt=4"):
        AfdConfig(**chosen)
    with pytest.raises(ValueError, match=r"afd.prior_share: got 0.5; needed: 1 with afd.best"):
        AfdConfig(best=1, worst=1, prior_share=0.5)


def test_old_follows_theta_on_its_schedule(student: ToyStudent) -> None:
    method = afd(student, old_decay=0.5, old_decay_slope=0.1, old_decay_start=2)
    assert [method._decay(s) for s in (0, 2, 4, 100)] == pytest.approx([0, 0, 0.2, 0.5])


def test_a_step_without_a_rollout_is_refused(student: ToyStudent) -> None:
    with pytest.raises(RuntimeError, match="no rollouts: call rollout"):
        afd(student).discriminator_step(batch())


# --- SFT and the factory ---


def test_sft_lowers_its_loss_and_resumes_with_the_same_bits(student: ToyStudent) -> None:
    method = sft(student)
    losses = [step(method, 0)["student/loss"] for _ in range(8)]
    assert losses[-1] < 0.8 * losses[0]
    resumed = sft(student, seed=7)
    resumed.load_state_dict(saved(method))
    assert step(method, 9) == step(resumed, 9)


def test_the_configuration_builds_both_methods(student: ToyStudent, tmp_path: Path) -> None:
    student.save(tmp_path / "base.safetensors")
    MotionBackbone().save(tmp_path / "motion.safetensors")
    for name in ("afd", "sft"):
        config = make_config(
            {
                "method": name,
                "student": {"checkpoint": str(tmp_path / "base.safetensors")},
                "discriminator": {"checkpoint": str(tmp_path / "motion.safetensors")},
            }
        )
        method = build_method(config)
        assert method.name == name
        with method.evaluation_policy() as policy:
            assert isinstance(policy, ToyStudent)
