"""The two sides of benchmarks/train_step.py: the trainer's method, and the naive implementation.

Both are built for a `Case` (student and batch) and expose their phases as `Provider`s.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from afd.discriminators.base import Discriminator
from afd.discriminators.config import LatentConfig
from afd.discriminators.latent import LatentDiscriminator
from afd.lab.config import ToyDiscriminatorConfig, ToyStudentConfig
from afd.lab.discriminator import ToyDiscriminator
from afd.lab.student import ToyConfig, ToyStudent
from afd.methods.afd import Afd
from afd.methods.base import Batch
from afd.methods.config import AfdConfig
from afd.models.config import LoraConfig
from afd.models.policies import make_policies
from afd.models.student import Student
from afd.models.wan.student import WanStudent
from afd.models.wan.types import WanConfig
from afd.planning.cost_model import Net
from afd.rollout import stream_layout
from benchmarks.eager_train import EagerTrained, EagerUpdate, Lora, rolled_out
from benchmarks.eager_wan import random_network

# Which network computes the clean context; "kept" is the rollout's own cache.
MODES: dict[str, dict[str, Any]] = {
    "recompute": {"context": "recompute"},
    "own_context": {"context": "own_context"},
    "shared_context": {"context": "shared_context", "keep_context": False},
    "shared_context, kept": {"context": "shared_context", "keep_context": True},
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
PROMPTS = ("a red ball falls from high onto the floor", "a blue ball is thrown up")


@dataclass(frozen=True)
class Case:
    """A student and batch. `wan` None: the quickstart's toy, with all weights trained."""

    name: str
    prompts: int
    group: int
    draws: int = 1
    wan: WanConfig | None = None
    height: int = 16
    width: int = 16
    frames: int = 12
    rank: int | None = None
    dtype: str = "fp32"
    checkpoint_blocks: bool = False
    micro_batch: int | None = None

    @property
    def videos(self) -> int:
        return self.prompts * self.group

    @property
    def network(self) -> WanConfig:
        return self.wan or ToyConfig().wan

    @property
    def afd(self) -> AfdConfig:
        """The quickstart's settings for the toy, else the published ones."""
        sizes: dict[str, Any] = {"samples_per_prompt": self.group, "draws": self.draws}
        if self.group == 1:  # a group of one has no statistics
            sizes |= {"baseline": "batch", "normalize": "batch"}
        if self.wan is None:
            return AfdConfig(**sizes)
        more: dict[str, Any] = {"nft_beta": 0.1, "adv_clip": 5.0, "learning_rate": 1e-5}
        return AfdConfig(**sizes, **more, micro_batch=self.micro_batch)

    @property
    def costs(self) -> Net:
        """The case in the cost model's format."""
        wan = self.network
        rows, cols = wan.grid(self.height, self.width)
        sizes = (wan.dim, wan.ffn_dim, wan.num_layers, wan.text_len)
        return Net(*sizes, 0, self.frames, wan.chunk, rows * cols, self.rank)


@dataclass
class Provider:
    """A provider's phases, run in this order, and their measurements."""

    phases: dict[str, Callable[[], object]]
    ms: dict[str, list[float]] = field(default_factory=dict)
    peak_mib: dict[str, float] = field(default_factory=dict)


class Scored:
    """A discriminator with precomputed scores, so that the update is timed alone."""

    def __init__(self, discriminator: Discriminator, score_B: Tensor) -> None:
        self._discriminator, self._score_B = discriminator, score_B

    def __getattr__(self, name: str) -> Any:
        return getattr(self._discriminator, name)

    def score(self, input_BFCHW: Tensor, prompts: Sequence[str]) -> Tensor:
        return self._score_B


class Ours:
    """The trainer's method, with the context mode set before every phase."""

    def __init__(self, case: Case, device: str) -> None:
        self.case, self.device = case, torch.device(device)
        student, self.discriminator, self.steps = _student(case, self.device)
        lora = None if case.rank is None else LoraConfig(rank=case.rank, alpha=case.rank)
        policies = make_policies(student, case.afd.versions, lora=lora)
        self.student, generator = student, torch.Generator().manual_seed(0)
        self.method = Afd(
            policies,
            self.discriminator,
            case.afd,
            denoising_steps=self.steps,
            rollout_batch=case.micro_batch,
        )
        prompts = [PROMPTS[i % len(PROMPTS)] for i in range(case.prompts)]
        shape = (case.prompts, student.frames, *student.frame_shape)
        teacher = torch.rand(shape, generator=generator) * 2 - 1
        self.batch = Batch(1, prompts, self.discriminator.prepare(teacher.to(self.device)).cpu())
        self.score_B = torch.randn(case.videos, generator=generator)

    def provider(self, mode: str) -> Provider:
        config = self.case.afd.model_copy(update=MODES[mode])
        scored: Any = Scored(self.discriminator, self.score_B)

        def phase(
            run: Callable[[], object], discriminator: Any = self.discriminator
        ) -> Callable[[], object]:
            def configured() -> object:
                self.method.config, self.method.discriminator = config, discriminator
                return run()

            return configured

        phases = {"rollout": phase(lambda: self.method.rollout(self.batch))}
        if mode == "recompute":  # the discriminator's work does not depend on the mode
            prompts = [p for p in self.batch.prompts for _ in range(self.case.group)]
            seen = self.batch.teacher_BFCHW.repeat_interleave(self.case.group, 0)
            phases["discriminator"] = phase(lambda: self.method.discriminator_step(self.batch))
            phases["score"] = phase(lambda: self.discriminator.score(seen, prompts))
        phases["update"] = phase(lambda: self.method.student_step(self.batch), scored)
        return Provider(phases)


class Eager:
    """The same iteration of the same student by eager_train.py, with separate weights."""

    def __init__(self, ours: Ours) -> None:
        self.case, self.student, self.steps = ours.case, ours.student, ours.steps
        case, settings = ours.case, ours.case.afd
        frozen = {k: v.detach() for k, v in _weights(ours.student).items()}
        toy = ours.student if isinstance(ours.student, ToyStudent) else None

        def network(trained: bool, reference: bool = False) -> EagerTrained:
            weights, lora = frozen, {}
            if case.rank is None:
                weights = {k: v.clone().requires_grad_(trained) for k, v in frozen.items()}
            elif not reference:
                lora = adapters(case.network, frozen, case.rank, trained)
            return EagerTrained(
                case.network, weights, lora, checkpoint_blocks=case.checkpoint_blocks
            )

        def velocity(out: Tensor, x_t: Tensor, t_BF111: Tensor) -> Tensor:
            if toy is None:
                return out.float()
            return (x_t - out) / t_BF111.clamp_min(toy.config.smallest_t)

        self.update = EagerUpdate(
            theta=network(True),
            old=network(False),
            ref=network(False, reference=True),
            velocity=velocity,
            learning_rate=settings.learning_rate,
            nft_beta=settings.nft_beta,
            prior_weight=settings.prior_weight,
            adv_clip=settings.adv_clip,
        )
        self.text_BLE = ours.student.encode(
            [prompt for prompt in ours.batch.prompts for _ in range(case.group)]
        )
        self.r_B = (ours.score_B / 10 + 0.5).clamp(0, 1).to(ours.device)
        self.x0_BFCHW = torch.zeros(0)

    def rollout(self) -> None:
        student, case = self.student, self.case
        layout = stream_layout(student, case.frames)
        videos = []
        for text_BLE in self.text_BLE.split(case.micro_batch or case.videos):
            draw = student.noise_source(list(range(len(text_BLE))), layout, len(self.steps))
            videos.append(
                rolled_out(
                    self.update.old,
                    text_BLE,
                    draw,
                    student.levels(self.steps),
                    student.x0_from_output,
                    len(layout),
                )
            )
        self.x0_BFCHW = torch.cat(videos).float()

    def step(self) -> None:
        case, x0_BFCHW = self.case, self.x0_BFCHW
        copies = case.draws
        x0, text, r = (
            x.repeat(copies, *(1,) * (x.ndim - 1)) for x in (x0_BFCHW, self.text_BLE, self.r_B)
        )
        times = torch.tensor(self.student.times(self.steps), device=x0.device)
        t_NK = times[torch.randint(len(times), (len(x0), case.frames // case.network.chunk))]
        width = case.micro_batch or len(x0)
        for at in range(0, len(x0), width):
            rows = slice(at, at + width)
            loss = self.update.loss(x0[rows], t_NK[rows], text[rows], r[rows])
            self.update.add(loss * (width / len(x0)))
        self.update.step()

    def provider(self) -> Provider:
        return Provider({"rollout": self.rollout, "update": self.step})


def adapters(
    wan: WanConfig, weights: dict[str, Tensor], rank: int, trained: bool
) -> dict[str, Lora]:
    """LoRA on every linear layer of the blocks, as in the trainer; up is 0."""
    parts = [f"{a}_attn.{p}" for a in ("self", "cross") for p in "qkvo"] + ["ffn.0", "ffn.2"]
    names = [f"blocks.{i}.{part}" for i in range(wan.num_layers) for part in parts]
    made = {}
    for name in names:
        weight = weights[f"{name}.weight"]
        down = torch.randn_like(weight[:1].expand(rank, -1)) / rank
        up = torch.zeros_like(weight[:, :1].expand(-1, rank).contiguous())
        made[name] = Lora(down.requires_grad_(trained), up.requires_grad_(trained), 1.0)
    return made


def _weights(student: Student) -> dict[str, Tensor]:
    """The network's weights by their names without adapters."""
    return {
        name.replace(".base_layer", ""): value
        for name, value in student.net.state_dict().items()
        if "lora" not in name
    }


def _student(case: Case, device: torch.device) -> tuple[Student, Discriminator, list[float]]:
    """The student with random or shipped weights, its discriminator and denoising steps."""
    if case.wan is None:
        toy = ToyStudent.load().to(device)
        discriminator: Discriminator = ToyDiscriminator(
            ToyDiscriminatorConfig(warmup_updates=0), toy.config.frames
        )
        return toy, discriminator, ToyStudentConfig().denoising_steps
    net = random_network(case.wan, device, DTYPES[case.dtype])
    net.checkpoint_blocks = case.checkpoint_blocks
    text_LE = torch.randn(case.wan.text_len, case.wan.text_dim, device=device)

    def encode(prompts: Sequence[str]) -> Tensor:
        return text_LE.expand(len(prompts), -1, -1)

    student = WanStudent(
        net, height=case.height, width=case.width, frames=case.frames, encoder=encode
    )
    discriminator = LatentDiscriminator(
        encode,
        LatentConfig(micro_batch=case.micro_batch),
        channels=case.wan.in_dim,
        text_dim=case.wan.text_dim,
        device=device,
    )
    return student, discriminator, [1000.0, 750.0, 500.0, 250.0]


@torch.no_grad()
def disagreement(ours: Ours, eager: Eager) -> float:
    """Relative error of our teacher-forced pass against eager's on one random video."""
    student, device = ours.student, ours.device
    draw = torch.Generator().manual_seed(1)
    clean, x_t = (
        torch.randn(1, student.frames, *student.frame_shape, generator=draw).to(device)
        for _ in range(2)
    )
    t_BK = torch.rand(1, student.frames // student.chunk, generator=draw).to(device)
    t_BF = t_BK.repeat_interleave(student.chunk, 1)
    text = student.encode([PROMPTS[0]])
    found = student.velocity(x_t.to(student.dtype), t_BK, text, x0_BFCHW=clean)
    out = eager.update.theta.teacher_forced(x_t.to(student.dtype), 1000 * t_BF, text, clean)
    expected = eager.update.velocity(out, x_t.to(student.dtype), t_BF[..., None, None, None])
    return float((found.float() - expected).norm() / expected.norm())
