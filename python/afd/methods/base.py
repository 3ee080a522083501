"""What the trainer asks of every method.

Shape letters: B videos, F frames, C channels, H x W pixels or latents, K chunks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Generator, Tensor, nn

from afd.methods.config import StudentOptimizerConfig, Timesteps
from afd.models.student import Student


@dataclass
class Batch:
    """What one optimizer step is given: this process's part of the prompts.

    Attributes:
        step: optimizer step, from 0.
        prompts: this process's.
        teacher_BFCHW: one finished teacher video per prompt, as the method `sees` it: looked at by
            its `look`, or encoded into the student's own space.
        first: number of prompts[0] among the prompts of all processes.
        total: number of prompts of all processes; None: these are all.
    """

    step: int
    prompts: list[str]
    teacher_BFCHW: Tensor
    first: int = 0
    total: int | None = None

    @property
    def count(self) -> int:
        """Prompts of all processes."""
        return len(self.prompts) if self.total is None else self.total

    def own(self, copies: int = 1) -> slice:
        """This process's part of a list that has `copies` entries for each prompt of the step."""
        return slice(self.first * copies, (self.first + len(self.prompts)) * copies)


class Method(Protocol):
    """A way to train the student; the trainer calls the three parts of a step in this order."""

    name: str
    needs_rollout: bool
    needs_critic: bool
    sees: Literal["video", "latent"]

    def look(self, video_BFCHW: Tensor) -> Tensor:
        """What is kept of a teacher's video [-1, 1] where `sees` is "video"."""
        ...

    def rollout(self, batch: Batch) -> None: ...

    def critic_step(self, batch: Batch) -> dict[str, float]: ...

    def student_step(self, batch: Batch) -> dict[str, float]: ...

    def evaluation_policy(self) -> AbstractContextManager[Student]:
        """The student whose weights are measured, for the block."""
        ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


def cosine_rate(step: int, steps: int | None, floor: float = 0.05) -> float:
    """Learning-rate factor: a cosine from 1 to `floor` over `steps`, then flat; None: always 1."""
    if steps is None:
        return 1.0
    done = min(1.0, step / steps)
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * done))


@torch.no_grad()
def ema_update(average: nn.Module, current: nn.Module, decay: float) -> None:
    """average <- decay · average + (1 - decay) · current, in place."""
    torch._foreach_lerp_(list(average.parameters()), list(current.parameters()), 1 - decay)


def draw_times(
    kind: Timesteps,
    videos: int,
    chunks: int,
    steps: Sequence[float],
    generator: Generator,
    *,
    logit_mean: float = 0.0,
    logit_std: float = 1.0,
) -> Tensor:
    """Times float32 [videos, chunks]: of the list `steps`, or by a law in (0, 1].

    "shifted" is 5u / (1 + 4u) of a uniform u: mostly high noise, as Wan students are trained.
    "logit_normal" is the sigmoid of a normal number (arXiv 2403.03206).
    """
    shape = (videos, chunks)
    if kind == "student":
        index = torch.randint(len(steps), shape, generator=generator)
        return torch.tensor(steps, dtype=torch.float32)[index]
    if kind == "logit_normal":
        normal_BK = torch.randn(shape, generator=generator)
        return torch.sigmoid(logit_mean + logit_std * normal_BK)
    u_BK = 1 - torch.rand(shape, generator=generator)
    return u_BK if kind == "uniform" else 5 * u_BK / (1 + 4 * u_BK)


class StudentOptimizer:
    """AdamW with a cosine rate and clipped gradients over a student's weights."""

    def __init__(self, student: nn.Module, config: StudentOptimizerConfig) -> None:
        self.config = config
        self.parameters = list(student.parameters())
        self.updates = 0
        self.adam = torch.optim.AdamW(
            self.parameters,
            lr=config.learning_rate,
            betas=config.betas,
            weight_decay=config.weight_decay,
        )

    def step(self, loss: Tensor) -> dict[str, float]:
        """Backward and one update; returns loss, gradient norm and rate."""
        rate = self.config.learning_rate * cosine_rate(self.updates, self.config.cosine_steps)
        self.adam.param_groups[0]["lr"] = rate
        self.adam.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.config.grad_clip)
        self.adam.step()
        self.updates += 1
        return {
            "student/loss": float(loss.detach()),
            "student/grad_norm": float(norm),
            "student/learning_rate": rate,
        }

    def state_dict(self) -> dict[str, Any]:
        return {"adam": self.adam.state_dict(), "updates": self.updates}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.adam.load_state_dict(state["adam"])
        self.updates = state["updates"]
