"""GAN and DMD: what rollouts keep, where gradients go, and that a resume changes nothing.

The students are the toy, a tiny Wan student and its adapters.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from afd import ops
from afd.config.run import make_config
from afd.discriminators.config import LatentConfig, VideoAlignConfig
from afd.discriminators.latent import LatentDiscriminator
from afd.lab.config import ToyDiscriminatorConfig
from afd.lab.discriminator import ToyDiscriminator
from afd.lab.physics import measure
from afd.lab.simulator import PROMPTS, attribute_table, sample_videos
from afd.lab.student import ToyStudent, encode_prompts
from afd.methods.base import Batch
from afd.methods.config import DmdConfig, GanConfig
from afd.methods.dmd import Dmd
from afd.methods.gan import Gan
from afd.models.config import LoraConfig
from afd.models.policies import Policies, make_policies
from afd.models.wan.student import WanStudent
from afd.rollout import STEPS, rollout
from afd.trainer.build import build_method
from afd.video.config import VideoConfig
from tests.afd.tiny_wan import HEIGHT, WIDTH, tiny
from tests.tolerances import NETWORK_REORDERED

Method = Gan | Dmd
WAN_STEPS = [1000, 750, 500]
WORDS = ["a red ball", "two cats", "rain", "a kite"]
STUDENTS = pytest.mark.parametrize("kind", ["toy", "wan", "lora"])
METHODS = pytest.mark.parametrize("name", ["gan", "dmd"])
CASES = pytest.mark.parametrize(
    ("name", "kind"), [("gan", "toy"), ("gan", "lora"), ("dmd", "wan"), ("dmd", "lora")]
)


def wan(frames: int = 6, **changes: Any) -> WanStudent:
    net = tiny(**changes)
    size = net.config
    return WanStudent(
        net,
        height=HEIGHT,
        width=WIDTH,
        frames=frames,
        encoder=lambda prompts: encode_prompts(prompts, size.text_len, size.text_dim),
    )


def versions(kind: str, config: GanConfig | DmdConfig) -> Policies:
    student = ToyStudent.load() if kind == "toy" else wan()
    lora = LoraConfig(rank=4, alpha=8) if kind in ("lora", "bf16") else None
    if kind == "bf16":
        student.to(torch.bfloat16)
    return make_policies(student, config.versions, trained=config.trained, lora=lora)


def make(name: str, kind: str, **settings: Any) -> Method:
    steps = STEPS if kind == "toy" else WAN_STEPS
    if name == "dmd":
        fields = DmdConfig(**{"score_warmup_updates": 1, "score_updates": 1, **settings})
        return Dmd(versions(kind, fields), fields, denoising_steps=steps, seed=3)
    config = GanConfig(**{"prior_weight": 0.0, **settings})
    policies = versions(kind, config)
    discriminator: Any
    if kind == "toy":
        discriminator = ToyDiscriminator(
            ToyDiscriminatorConfig(loss="gan", window=None, warmup_updates=0)
        )
    else:
        discriminator = LatentDiscriminator(
            policies.student.encode, LatentConfig(loss="gan", width=4), channels=4, text_dim=8
        )
    return Gan(policies, discriminator, config, denoising_steps=steps, seed=3)


def batch(kind: str, step: int = 0) -> Batch:
    if kind == "toy":
        prompts = list(PROMPTS)[:2]
        videos, _ = sample_videos(attribute_table(prompts), "target", "clean", Generator())
        return Batch(step, prompts, videos)
    generator = Generator().manual_seed(5)
    return Batch(step, WORDS[:2], torch.randn(2, 6, 4, HEIGHT, WIDTH, generator=generator))


def update(method: Method, of: Batch) -> dict[str, float]:
    method.rollout(of)
    return method.discriminator_step(of) | method.student_step(of)


def masters(method: Method, name: str = "theta") -> Tensor:
    return torch.cat([m.detach().flatten() for m in method.policies.weights(name).masters])


def everything(method: Method) -> list[Tensor]:
    found: list[Tensor] = []

    def walk(value: Any) -> None:
        for part in value.values() if isinstance(value, dict) else value:
            if isinstance(part, Tensor):
                found.append(part)
            elif isinstance(part, dict | list | tuple):
                walk(part)

    walk(method.state_dict())
    return found


# --- the last step ---


@STUDENTS
def test_the_pass_with_gradients_makes_the_very_videos_of_the_rollout(kind: str) -> None:
    for context in ("own_context", "recompute"):
        method = make("gan", kind, samples_per_prompt=2, context=context)
        method.rollout(batch(kind))
        rollouts = method._current()
        x_BFCHW, _ = method.predict(rollouts, slice(1, 4))
        assert x_BFCHW.requires_grad
        torch.testing.assert_close(x_BFCHW, rollouts.x0_BFCHW[1:4], **NETWORK_REORDERED)


@pytest.mark.parametrize("first_steps", [None, [1000, 500], [1000]])
def test_a_first_chunk_with_steps_of_its_own_and_a_noisy_context_are_followed(
    first_steps: list[float] | None,
) -> None:
    config = GanConfig(samples_per_prompt=3)
    method = Gan(
        versions("wan", config),
        make("gan", "wan").discriminator,
        config,
        denoising_steps=WAN_STEPS,
        first_chunk_steps=first_steps,
        context_noise=50,
        rollout_batch=4,
    )
    method.rollout(batch("wan"))
    rollouts = method._current()
    x_BFCHW, _ = method.predict(rollouts, slice(0, 6))
    torch.testing.assert_close(x_BFCHW, rollouts.x0_BFCHW, **NETWORK_REORDERED)


def test_the_fields_of_dmd_see_the_first_chunk_at_its_own_steps() -> None:
    config, given = DmdConfig(timesteps="student"), batch("wan")
    method = Dmd(
        versions("wan", config), config, denoising_steps=WAN_STEPS, first_chunk_steps=[1000]
    )
    t_BK = torch.cat([method._noised(given.teacher_BFCHW, given, 1)[1] for _ in range(32)])
    assert set(t_BK[:, 0].tolist()) == {1.0}
    assert set(t_BK[:, 1:].flatten().tolist()) == set(torch.tensor(method.times).tolist())


def test_only_recompute_sends_gradients_through_the_past() -> None:
    reached = {}
    for context in ("own_context", "recompute"):
        method = make("gan", "wan", context=context)
        method.rollout(batch("wan"))
        x_BFCHW, _ = method.predict(method._current(), slice(0, 2))
        # The second chunk sees the first through keys and values only; theirs alone can differ.
        x_BFCHW[:, 3:].sum().backward()
        reached[context] = method.policies.student.net.blocks[0].self_attn.k.weight.grad
    assert not torch.allclose(reached["own_context"], reached["recompute"], rtol=1e-2)


@CASES
def test_each_process_rolls_out_its_part_of_the_whole_batch(name: str, kind: str) -> None:
    method, whole = make(name, kind, samples_per_prompt=2), batch(kind)
    method.rollout(whole)
    together = method._current().x0_BFCHW
    apart = []
    for i in range(2):
        method = make(name, kind, samples_per_prompt=2)
        part = slice(i, i + 1)
        method.rollout(Batch(0, whole.prompts[part], whole.teacher_BFCHW[part], first=i, total=2))
        apart.append(method._current().x0_BFCHW)
    torch.testing.assert_close(torch.cat(apart), together, **NETWORK_REORDERED)


# --- an update ---


@CASES
def test_an_update_in_parts_is_the_update_at_once(name: str, kind: str) -> None:
    gradients = []
    for micro_batch in (None, 1, 3):
        method = make(
            name, kind, samples_per_prompt=2, micro_batch=micro_batch, prior_weight=0.1,
            grad_clip=1e9,
        )  # fmt: skip
        metrics = update(method, batch(kind))
        gradients.append(
            torch.cat(
                [
                    m.grad.flatten()
                    for m in method.policies.weights("theta").masters
                    if m.grad is not None
                ]
            )
        )
        assert metrics["student/prior"] >= 0
    scale = float(gradients[0].abs().max())
    for other in gradients[1:]:
        torch.testing.assert_close(other, gradients[0], rtol=1e-3, atol=1e-4 * scale)


@CASES
def test_a_resumed_method_goes_on_to_the_same_bits(name: str, kind: str) -> None:
    first = make(name, kind, samples_per_prompt=2)
    for step in range(2):
        update(first, batch(kind, step))
    state = copy.deepcopy(first.state_dict())
    second = make(name, kind, samples_per_prompt=2)
    second.load_state_dict(state)
    metrics = [update(method, batch(kind, 2)) for method in (first, second)]
    assert metrics[0] == metrics[1]
    pairs = zip(everything(first), everything(second), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


@CASES
def test_evaluation_is_by_the_average_that_follows_the_student(name: str, kind: str) -> None:
    method = make(name, kind, ema_decay=0.5)
    before = masters(method)
    theta, average = [], before
    for step in range(3):
        update(method, batch(kind, step))
        theta.append(masters(method))
        decay = min(0.5, 0.02 * (step + 1))
        average = decay * average + (1 - decay) * theta[-1]
    assert not torch.equal(theta[-1], before)
    torch.testing.assert_close(masters(method, "ema"), average)
    text = method.policies.student.encode(batch(kind).prompts)
    x_t, t_B1 = batch(kind).teacher_BFCHW, torch.full((2, 1), 0.5)
    with torch.no_grad():
        with method.evaluation_policy() as student:
            evaluated = student.velocity(x_t, t_B1, text)
        with method.policies.using("theta") as student:
            assert not torch.equal(student.velocity(x_t, t_B1, text), evaluated)


@METHODS
def test_a_student_in_bf16_has_fp32_videos_and_masters(name: str) -> None:
    method = make(name, "bf16", prior_weight=0.1, learning_rate=1e-6)
    before = masters(method)
    method.rollout(batch("wan"))
    rollouts = method._current()
    x_BFCHW, _ = method.predict(rollouts, slice(0, 2))
    assert rollouts.x0_BFCHW.dtype == x_BFCHW.dtype == before.dtype == torch.float32
    method.discriminator_step(batch("wan"))
    assert method.student_step(batch("wan"))["student/grad_norm"] > 0
    moved = (masters(method) - before).abs()
    # Steps that a bf16 weight would round away are kept.
    assert 0 < moved.max() < 1e-5


@METHODS
def test_a_student_that_has_not_moved_has_no_prior_and_one_that_has_is_held(name: str) -> None:
    method = make(name, "wan", prior_weight=1.0)
    assert update(method, batch("wan"))["student/prior"] == 0
    assert update(method, batch("wan", 1))["student/prior"] > 0


@METHODS
def test_a_step_without_rollouts_is_refused(name: str) -> None:
    with pytest.raises(RuntimeError, match="no rollouts"):
        make(name, "wan").student_step(batch("wan"))


# --- GAN ---


@STUDENTS
def test_the_gan_moves_the_student_to_where_the_discriminator_scores_higher(kind: str) -> None:
    method = make("gan", kind, samples_per_prompt=4, learning_rate=1e-4, weight_decay=0.0)
    of = batch(kind)
    method.rollout(of)
    method.discriminator_step(of)
    rollouts, every = method._current(), slice(0, 8)

    def loss() -> float:
        with torch.no_grad():
            x_BFCHW, _ = method.predict(rollouts, every)
            score_B = method.discriminator.differentiable_score(x_BFCHW, rollouts.prompts)
        return float(F.softplus(-score_B).mean())

    before, discriminator = loss(), copy.deepcopy(method.discriminator.state_dict()["net"])
    metrics = method.student_step(of)
    assert metrics["student/loss"] == pytest.approx(before, rel=1e-4)
    assert loss() < before
    after = method.discriminator.state_dict()["net"]
    assert all(torch.equal(discriminator[key], after[key]) for key in discriminator)


def test_the_gan_waits_for_its_discriminator() -> None:
    method = make("gan", "toy")
    method.discriminator.config = method.discriminator.config.model_copy(
        update={"warmup_updates": 1}
    )
    before = masters(method)
    assert "student/loss" not in update(method, batch("toy"))
    assert torch.equal(masters(method), before)
    assert "student/loss" in update(method, batch("toy", 1))
    assert not torch.equal(masters(method), before)


@pytest.mark.parametrize("kind", ["toy", "wan"])
def test_the_gans_loss_goes_through_the_discriminator_and_not_into_it(kind: str) -> None:
    method = make("gan", kind)
    method.rollout(batch(kind))
    before = masters(method)
    method.student_step(batch(kind))
    assert not torch.equal(masters(method), before)
    assert all(weight.grad is None for weight in method.discriminator.weights())
    # And it learns on.
    assert all(weight.requires_grad for weight in method.discriminator.weights())


def test_scores_with_gradients_are_the_same_for_a_batch_and_its_parts() -> None:
    discriminator, of = ToyDiscriminator(ToyDiscriminatorConfig()), batch("toy")
    video = of.teacher_BFCHW.clone().requires_grad_()
    whole_B = discriminator.differentiable_score(video, of.prompts)
    parts = [
        discriminator.differentiable_score(video[i : i + 1], of.prompts[i : i + 1]) for i in (0, 1)
    ]
    torch.testing.assert_close(torch.cat(parts), whole_B)
    (gradient,) = torch.autograd.grad(whole_B.sum(), video)
    assert gradient.flatten(1).abs().amax(1).min() > 0
    # The next one of AFD's scores has the looks that these had.
    torch.testing.assert_close(discriminator.score(video.detach(), of.prompts), whole_B.detach())


def test_the_gan_reaches_a_latent_student_through_the_codec_and_a_reward_model(
    tmp_path: Any,
) -> None:
    from afd.discriminators.videoalign.discriminator import VideoAlignDiscriminator
    from afd.discriminators.videoalign.model import VideoAlign
    from afd.models.wan.vae import VideoVAE
    from tests.afd.test_vae import model
    from tests.afd.tiny_videoalign import write_released

    folder = write_released(tmp_path / "released")
    scorer = VideoAlign.load(folder / "root", base=folder / "base", dtype=torch.float32)
    settings = VideoAlignConfig(loss="gan", lora_rank=2, lora_alpha=4, learning_rate=1e-3)
    discriminator = VideoAlignDiscriminator(scorer, settings, video=VideoConfig())
    codec = VideoVAE(model())
    student = wan(frames=3, in_dim=16, out_dim=16)
    policies = make_policies(student, ("theta", "ema"), lora=LoraConfig(rank=4, alpha=8))
    video = VideoConfig(frames=9, height=48, width=32, fps=16, codec_match=True)
    method = Gan(
        policies,
        discriminator,
        GanConfig(micro_batch=1, learning_rate=1e-3, prior_weight=0.0),
        denoising_steps=WAN_STEPS,
        codec=codec,
        video=video,
    )
    teacher = torch.rand(2, 9, 3, 48, 32, generator=Generator().manual_seed(1)) * 2 - 1
    before = masters(method)
    metrics = update(method, Batch(0, WORDS[:2], method.prepare(teacher)))
    assert metrics["student/grad_norm"] > 0
    assert not torch.equal(masters(method), before)


# --- DMD ---


def test_the_two_fields_learn_their_own_videos_and_nothing_else_moves() -> None:
    method, of = make("dmd", "toy", score_updates=1, score_warmup_updates=99), batch("toy")
    method.rollout(of)
    before = {name: masters(method, name) for name in DmdConfig().versions}
    losses = [method.discriminator_step(of) for _ in range(12)]
    for name in ("real", "fake"):
        assert not torch.equal(masters(method, name), before[name])
        first, last = (
            sum(found[f"{name}/loss"] for found in some) for some in (losses[:4], losses[-4:])
        )
        assert name == "fake" or last < 0.9 * first
    for name in ("theta", "ema"):
        assert torch.equal(masters(method, name), before[name])
    assert method.student_step(of) == {}


@STUDENTS
def test_equal_fields_give_no_direction(kind: str) -> None:
    method = make("dmd", kind, weight_decay=0.0, score_learning_rate=0.0)
    before = masters(method)
    metrics = update(method, batch(kind))
    assert metrics["student/direction"] == 0
    assert metrics["student/grad_norm"] == 0
    assert torch.equal(masters(method), before)


@STUDENTS
def test_the_direction_is_the_difference_of_what_the_fields_see_over_the_distance_to_real(
    kind: str,
) -> None:
    method, of = make("dmd", kind, score_learning_rate=1e-2), batch(kind)
    method.rollout(of)
    method.discriminator_step(of)
    rollouts = method._current()
    x0, text = rollouts.x0_BFCHW, rollouts.text_BLE
    chunks = x0.shape[1] // method.policies.student.chunk
    t_BK = torch.tensor([[0.3, 0.9, 0.5, 0.7], [0.6, 0.2, 0.8, 0.4]])[:, :chunks]
    seed = torch.tensor([4, 5])
    x_t = ops.forward_noise(x0, t_BK, seed=seed, layout="BFCHW")
    sees = {}
    for name in ("real", "fake"):
        with torch.no_grad(), method.policies.using(name) as student:
            v = student.velocity(x_t, t_BK, text, x0_BFCHW=x0)
        times = t_BK.repeat_interleave(student.chunk, 1)[..., None, None, None]
        sees[name] = x_t - times * v
    wanted = [
        (sees["fake"][i] - sees["real"][i]) / (x0[i] - sees["real"][i]).abs().mean()
        for i in range(2)
    ]
    got = method._direction(x0, x_t, t_BK, text)
    torch.testing.assert_close(got, torch.stack(wanted), rtol=1e-3, atol=1e-4)
    assert got.abs().max() > 1e-2


def test_the_gradient_at_the_video_is_the_direction_itself() -> None:
    """Of |x - stopgrad(x - g)|²/2, averaged over elements, for a last step that is the identity."""
    method, of = make("dmd", "wan", score_learning_rate=1e-2), batch("wan")
    method.rollout(of)
    method.discriminator_step(of)
    rollouts, draws = method._current(), method.generator.get_state()
    x_BFCHW, _ = method.predict(rollouts, slice(0, 2))
    x_t, t_BK = method._noised(rollouts.x0_BFCHW, of, 1, clamp=method.config.t_range)
    assert t_BK.min() >= 0.02
    assert t_BK.max() <= 0.98
    g_BFCHW = method._direction(rollouts.x0_BFCHW, x_t, t_BK, rollouts.text_BLE)
    wanted = torch.autograd.grad(
        x_BFCHW, method.policies.weights("theta").masters, g_BFCHW / g_BFCHW.numel(),
        allow_unused=True,
    )  # fmt: skip
    method.generator.set_state(draws)
    method.config = method.config.model_copy(update={"grad_clip": 1e9})
    method.optimizer.config = method.config
    method.student_step(of)
    for master, gradient in zip(method.policies.weights("theta").masters, wanted, strict=True):
        if gradient is not None:
            torch.testing.assert_close(master.grad, gradient, rtol=1e-3, atol=1e-6)


# --- what it is for ---


@pytest.mark.slow
def test_the_gan_learns_the_fall() -> None:
    prompts = (list(PROMPTS) * 6)[:200]
    teacher, _ = sample_videos(attribute_table(prompts), "target", "nuis", Generator())
    held_out, seeds = list(PROMPTS) * 4, range(10**6, 10**6 + 144)
    # A fast rate, as 45 updates are few.
    config = {"method": "gan", "discriminator": {"loss": "gan"}, "gan": {"learning_rate": 3e-5}}
    method: Any = build_method(make_config(config))

    def measured() -> dict[str, float]:
        with method.evaluation_policy() as policy:
            return measure(rollout(policy, held_out, seeds), held_out)

    before, generator = measured(), Generator().manual_seed(1)
    for step in range(45):
        pick = torch.randint(len(prompts), (8,), generator=generator)
        update(method, Batch(step, [prompts[i] for i in pick], teacher[pick]))
    after = measured()
    assert after["phys"] < 0.8 * before["phys"]
    assert after["rend"] < before["rend"] + 0.02
