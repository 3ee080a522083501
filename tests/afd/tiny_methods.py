"""Methods on students of a few thousand weights: the toy's, and Wan's in the released layout."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Generator, Tensor, nn

from afd.discriminators.config import LatentConfig
from afd.discriminators.latent import LatentDiscriminator
from afd.lab.config import ToyDiscriminatorConfig
from afd.lab.discriminator import ToyDiscriminator
from afd.lab.simulator import PROMPTS, attribute_table, sample_videos
from afd.lab.student import ToyConfig, ToyStudent
from afd.methods.afd import Afd
from afd.methods.base import Batch
from afd.methods.config import AfdConfig, SftConfig
from afd.methods.sft import VERSIONS, Sft
from afd.models.config import LoraConfig
from afd.models.policies import make_policies
from afd.models.student import Student
from afd.models.wan.student import WanStudent
from afd.models.wan.types import WanConfig
from afd.rewards.base import Reward
from afd.rollout import STEPS
from tests.afd.tiny_wan import HEIGHT, WIDTH, tiny

PAIR = list(PROMPTS)[::13][:2]
WAN_STEPS = (1000, 750, 500, 250)
FRAMES, CHANNELS, TEXT, LENGTH = 12, 4, 8, 5


class Brightness(Reward):
    """The mean of a video, times a sign."""

    def __init__(self, space: Any = "pixels", sign: float = 1.0) -> None:
        self.input_space, self.sign = space, sign

    def score(self, input_BFCHW: Tensor, prompts: Sequence[str]) -> Tensor:
        assert len(prompts) == len(input_BFCHW)
        return self.sign * input_BFCHW.float().flatten(1).mean(1)


def toy_student(seed: int = 0) -> ToyStudent:
    """The toy's layout with one narrow layer; random, its head included."""
    torch.manual_seed(seed)
    sizes = asdict(ToyConfig().wan) | {"dim": 32, "num_heads": 2, "ffn_dim": 48, "num_layers": 2}
    student = ToyStudent(ToyConfig(WanConfig(**sizes)))
    nn.init.normal_(student.net.head.head.weight, std=0.05)
    return student


def words(prompts: list[str]) -> Tensor:
    """Embeddings [B, LENGTH, TEXT] that depend on the prompt alone, two rows of padding."""
    rows = [torch.randn(LENGTH, TEXT, generator=Generator().manual_seed(len(p))) for p in prompts]
    text_BLE = torch.stack(rows)
    text_BLE[:, 3:] = 0
    return text_BLE


def wan_student(dtype: torch.dtype = torch.float32, **changes: Any) -> WanStudent:
    """12 latent frames in chunks of 3."""
    net = tiny(**changes).to(dtype)
    return WanStudent(net, height=HEIGHT, width=WIDTH, frames=FRAMES, encoder=words)


def toy_batch(step: int = 0, prompts: list[str] = PAIR) -> Batch:
    table, generator = attribute_table(prompts), Generator().manual_seed(step)
    return Batch(step, prompts, sample_videos(table, "target", "nuis", generator)[0])


def wan_batch(step: int = 0, count: int = 2) -> Batch:
    """Teacher latents that brighten from frame to frame."""
    generator = Generator().manual_seed(1000 + step)
    x = 0.3 * torch.randn(count, FRAMES, CHANNELS, HEIGHT, WIDTH, generator=generator)
    ramp = torch.linspace(-1, 1, FRAMES).view(1, -1, 1, 1, 1)
    return Batch(step, ["up" + "!" * i for i in range(count)], x + ramp)


def make_afd(
    student: Student,
    *,
    lora: LoraConfig | None = None,
    seed: int = 0,
    discriminator: dict[str, Any] | None = None,
    how: dict[str, Any] | None = None,
    **settings: Any,
) -> Afd:
    """`discriminator`: its settings; `how`: the constructor's arguments, which may replace it; the
    rest: AfdConfig's."""
    # A few updates are too short for the default warm-up and prior.
    short = {"samples_per_prompt": 2, "warmup_updates": 0, "prior_weight": 1e-4}
    config = AfdConfig(**{**short, **settings})
    policies = make_policies(student, config.versions, lora=lora)
    pace: dict[str, Any] = {"steps_per_update": 1, **(discriminator or {})}
    if isinstance(student, ToyStudent):
        toy = ToyDiscriminatorConfig(**{"backbone": "scratch", "warmup_updates": 0, **pace})
        given: Any = {"discriminator": ToyDiscriminator(toy, seed=seed), "denoising_steps": STEPS}
    else:
        latent = LatentDiscriminator(
            lambda prompts: words(list(prompts)),
            LatentConfig(**{"width": 8, "learning_rate": 1e-3, **pace}),
            channels=CHANNELS,
            text_dim=TEXT,
            device=student.device,
            seed=seed,
        )
        given = {"discriminator": latent, "denoising_steps": WAN_STEPS}
    return Afd(policies, config=config, seed=seed, **{**given, **(how or {})})


def make_sft(
    student: Student,
    *,
    lora: LoraConfig | None = None,
    how: dict[str, Any] | None = None,
    **settings: Any,
) -> Sft:
    policies = make_policies(student, VERSIONS, lora=lora)
    steps = STEPS if isinstance(student, ToyStudent) else WAN_STEPS
    return Sft(policies, SftConfig(**settings), denoising_steps=steps, **(how or {}))


def step(method: Any, batch: Batch) -> dict[str, float]:
    """The three parts of an update."""
    method.rollout(batch)
    return method.discriminator_step(batch) | method.student_step(batch)


def gradients(method: Any) -> list[Tensor]:
    """The clipped gradients of the last update."""
    return [master.grad for master in method.policies.weights("theta").masters]


def weights(method: Any, name: str) -> dict[str, Tensor]:
    """A version's weights, by name; those of the frozen start are "ref"."""
    with method.policies.using(name) as student:
        return {key: value.clone() for key, value in student.state_dict().items()}
