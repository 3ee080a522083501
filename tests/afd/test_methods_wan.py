"""AFD and SFT on a tiny Wan student: LoRA and all weights, fp32 and bf16, whole and in pieces."""

from __future__ import annotations

import copy
import io
from collections.abc import Sequence
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from afd.discriminators.base import DiscriminatorConfig
from afd.methods.afd import Afd
from afd.methods.base import Batch
from afd.methods.copies import draw_copies
from afd.models.config import LoraConfig
from tests.afd.tiny_methods import (
    gradients,
    make_afd,
    make_sft,
    step,
    toy_batch,
    toy_student,
    wan_batch,
    wan_student,
    weights,
)
from tests.tolerances import ACCUMULATED, NETWORK_REORDERED

LORA = LoraConfig(rank=4, alpha=8)
CONTEXTS = ("recompute", "own_context", "shared_context")


class Brightness:
    """A fixed discriminator: how bright the latents are."""

    input_space: Literal["pixels", "latents"] = "latents"
    config = DiscriminatorConfig(kind="tiny")

    def prepare(self, video_BFCHW: Tensor) -> Tensor:
        return video_BFCHW

    def score(self, input_BFCHW: Tensor, prompts: Sequence[str]) -> Tensor:
        return input_BFCHW.mean((1, 2, 3, 4))

    def step(self, *videos: Any) -> dict[str, float]:
        return {}

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing: it has no state."""


def apart(a: list[Tensor], b: list[Tensor]) -> float:
    """Relative L2 distance of two lists of gradients."""
    size = sum(float(y.double().square().sum()) for y in b) ** 0.5
    difference = sum(
        float((x.double() - y.double()).square().sum()) for x, y in zip(a, b, strict=True)
    )
    return difference**0.5 / size


# --- learning ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
def test_flow_matching_learns_the_teachers_latents(
    dtype: torch.dtype, lora: LoraConfig | None
) -> None:
    settings: dict[str, Any] = {"loss": "velocity", "timesteps": "uniform", "draws": 2}
    method = make_sft(wan_student(dtype), lora=lora, learning_rate=5e-3, **settings)
    losses = [step(method, wan_batch(i))["student/loss"] for i in range(16)]
    assert sum(losses[-3:]) < 0.7 * sum(losses[:3])
    parameter = method.policies.student.net.patch_embedding.weight
    assert parameter.dtype == dtype
    assert method.policies.weights("theta").masters[0].dtype == torch.float32


@pytest.mark.parametrize(
    ("dtype", "lora", "context"),
    [
        (torch.float32, None, "shared_context"),
        (torch.float32, LORA, "recompute"),
        (torch.bfloat16, LORA, "shared_context"),
        (torch.bfloat16, None, "own_context"),
    ],
    ids=str,
)
def test_distillation_raises_what_the_discriminator_scores(
    dtype: torch.dtype, lora: LoraConfig | None, context: str
) -> None:
    method = make_afd(
        wan_student(dtype),
        lora=lora,
        samples_per_prompt=4,
        learning_rate=3e-3 if lora is None else 1e-2,
        context=context,
        old_decay=0.0,
    )
    method.discriminator = Brightness()
    scores = [step(method, wan_batch(i))["student/score_mean"] for i in range(8)]
    assert scores[-1] > scores[0] + 0.25


# --- contexts ---


def velocities(method: Afd, batch: Batch) -> dict[tuple[str, str], Tensor]:
    """v of every version in every context mode, on the same copies of the same rollouts."""
    method.rollout(batch)
    rollouts = method._current()
    copies = draw_copies(
        method.config, len(rollouts.prompts), method.chunks, method.times, torch.Generator()
    )
    x0, found, config = rollouts.x0_BFCHW[copies.video_N], {}, method.config
    x_t = copies.noise(x0)
    for context in CONTEXTS:
        method.config = config.model_copy(update={"context": context})
        shared = method._shared_context(rollouts, copies)
        for name in ("theta", "old", "ref"):
            with torch.no_grad():
                found[context, name] = method._velocity(name, x0, x_t, rollouts, copies, shared)
    method.config = config
    return found


@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
def test_before_the_first_update_all_versions_and_contexts_give_one_velocity(
    lora: LoraConfig | None,
) -> None:
    how = {"context_noise": 20.0}
    found = velocities(make_afd(wan_student(), lora=lora, draws=2, how=how), wan_batch())
    first = found["recompute", "theta"]
    for value in found.values():
        torch.testing.assert_close(value, first, **NETWORK_REORDERED)
    other = velocities(make_afd(wan_student(), lora=lora, draws=2), wan_batch())
    assert not torch.allclose(other["recompute", "theta"], first, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
def test_v_old_is_exact_in_every_context_and_theta_sees_olds_where_it_is_shared(
    lora: LoraConfig | None,
) -> None:
    method = make_afd(wan_student(), lora=lora, draws=2, learning_rate=1e-2)
    for number in range(3):
        step(method, wan_batch(number))
    found = velocities(method, wan_batch(3))
    for name in ("theta", "old", "ref"):
        exact, own = found["recompute", name], found["own_context", name]
        torch.testing.assert_close(own, exact, **NETWORK_REORDERED)
        shared = torch.allclose(found["shared_context", name], exact, **NETWORK_REORDERED)
        assert shared == (name == "old")
    assert not torch.allclose(found["recompute", "theta"], found["recompute", "old"], rtol=1e-3)


def test_the_times_are_the_students_own_warped_list() -> None:
    method = make_afd(wan_student())
    sigmas = method.policies.student.schedule.sigmas  # type: ignore[attr-defined]
    assert method.times == [float(sigmas[1000 - s]) for s in (1000, 750, 500, 250)]


# --- pieces ---


@pytest.mark.parametrize(
    ("context", "lora"),
    [
        ("recompute", None),
        ("own_context", LORA),
        ("shared_context", LORA),
        ("shared_context", None),
    ],
)
def test_eight_videos_at_once_are_four_times_two_and_eight_times_one(
    context: str, lora: LoraConfig | None
) -> None:
    found = []
    for size in (None, 2, 1):
        settings: dict[str, Any] = {"context": context, "draws": 1, "chunks_per_update": 3}
        method = make_afd(
            wan_student(), lora=lora, samples_per_prompt=2, micro_batch=size, **settings
        )
        metrics = step(method, wan_batch(count=4))
        found.append((metrics, gradients(method)))
    whole, expected = found[0]
    for metrics, ours in found[1:]:
        assert metrics == pytest.approx(whole, rel=ACCUMULATED, abs=1e-7)
        assert apart(ours, expected) < ACCUMULATED


@pytest.mark.parametrize("context", ["own_context", "shared_context"])
def test_a_piece_that_begins_within_one_draw_and_ends_in_the_next_has_its_videos_contexts(
    context: str,
) -> None:
    found = []
    for size in (None, 3, 1):
        method = make_afd(
            wan_student(),
            samples_per_prompt=2,
            micro_batch=size,
            draws=2,
            context=context,
            keep_context=False,
        )
        found.append((step(method, wan_batch()), gradients(method)))
    for metrics, ours in found[1:]:
        assert metrics == pytest.approx(found[0][0], rel=ACCUMULATED, abs=1e-7)
        assert apart(ours, found[0][1]) < ACCUMULATED


def test_pieces_of_the_toys_copies_add_up_too() -> None:
    found = []
    for size in (None, 3, 1):
        method = make_afd(toy_student(), micro_batch=size, samples_per_prompt=4)
        found.append((step(method, toy_batch()), gradients(method)))
    for metrics, ours in found[1:]:
        assert metrics == pytest.approx(found[0][0], rel=ACCUMULATED, abs=1e-7)
        assert apart(ours, found[0][1]) < ACCUMULATED


@pytest.mark.parametrize("loss", ["x0", "velocity"])
def test_pieces_of_the_teachers_copies_add_up(loss: str) -> None:
    found = []
    for size in (None, 3, 1):
        method = make_sft(wan_student(), loss=loss, micro_batch=size, chunks_per_update=2)
        found.append((step(method, wan_batch()), gradients(method)))
    for metrics, ours in found[1:]:
        assert metrics == pytest.approx(found[0][0], rel=ACCUMULATED)
        assert apart(ours, found[0][1]) < ACCUMULATED


@pytest.mark.parametrize(
    ("context", "lora"), [("recompute", LORA), ("own_context", None), ("shared_context", LORA)]
)
def test_checkpointed_blocks_give_the_same_gradients(context: str, lora: LoraConfig | None) -> None:
    found = []
    for again in (False, True):
        method = make_afd(wan_student(), lora=lora, context=context, learning_rate=1e-3)
        step(method, wan_batch())
        for name in ("theta", "old", "ref"):
            with method.policies.using(name) as student:
                student.net.checkpoint_blocks = again
        step(method, wan_batch(1))
        found.append(gradients(method))
    for ours, expected in zip(*found, strict=True):
        assert torch.equal(ours, expected)


# --- the loss of the flow, states ---


def test_the_velocity_loss_is_flow_matching_and_x0_weighs_it() -> None:
    """With one time, |v - v*|² t² is |x0 - predicted x0|², which "x0" divides by t."""
    found = {}
    for loss in ("x0", "velocity"):
        method = make_sft(wan_student(), loss=loss, timesteps="student", draws=1)
        method.times = [0.5]
        found[loss] = step(method, wan_batch())["student/loss"]
    assert found["x0"] == pytest.approx(0.5 * found["velocity"], rel=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
def test_a_resumed_wan_run_continues_with_the_same_bits(
    dtype: torch.dtype, lora: LoraConfig | None
) -> None:
    settings: dict[str, Any] = {"ema_decay": 0.9, "baseline": "ema", "learning_rate": 1e-3}
    start = wan_student(dtype)
    whole, resumed = (
        make_afd(copy.deepcopy(start), lora=lora, seed=seed, **settings) for seed in (0, 9)
    )
    for number in range(2):
        step(whole, wan_batch(number))
    file = io.BytesIO()
    torch.save(whole.state_dict(), file)
    file.seek(0)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    assert step(whole, wan_batch(2)) == step(resumed, wan_batch(2))
    for name in ("theta", "old", "ema", "ref"):
        ours, theirs = weights(resumed, name), weights(whole, name)
        assert all(torch.equal(value, theirs[key]) for key, value in ours.items())


def test_a_student_with_a_first_list_of_its_own_streams_and_learns_by_it() -> None:
    method = make_afd(wan_student(), how={"first_chunk_steps": (1000, 500)})
    plain = make_afd(wan_student())
    for one in (method, plain):
        one.rollout(wan_batch())
    ours, theirs = method._current().x0_BFCHW, plain._current().x0_BFCHW
    assert not torch.allclose(ours[:, :3], theirs[:, :3])
    assert method.first_times == [method.times[0], method.times[2]]
    method.discriminator_step(wan_batch())
    assert "student/loss" in method.student_step(wan_batch())
