"""What the trainer asks of every method.

Shape letters: B videos, F frames, C channels, H x W pixels or latents, K chunks.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Generator, Tensor

from afd.methods.config import Timesteps
from afd.models.codec import Codec
from afd.models.student import Student


@dataclass
class Batch:
    """What one optimizer step is given: this process's part of the prompts.

    Attributes:
        step: optimizer step, from 0.
        prompts: this process's.
        teacher_BFCHW: one finished teacher video per prompt in the method's `input_space`: pixels
            that its `prepare` has gone over, or latents.
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


@dataclass(frozen=True)
class Shown:
    """One of a step's videos, to be looked at by people.

    Attributes:
        x0_FCHW: in the student's space, on the CPU.
        score, r: what the discriminator and the method made of it, where they did.
        teacher_score: the discriminator's score of the teacher's video.
    """

    prompt: str
    x0_FCHW: Tensor
    score: float | None = None
    r: float | None = None
    teacher_score: float | None = None


class Method(Protocol):
    """A way to train the student; the trainer calls the three parts of a step in this order."""

    name: str
    needs_rollout: bool
    needs_discriminator: bool
    input_space: Literal["pixels", "latents"]
    codec: Codec
    shown: Shown | None  # the first video of the last step, where the student makes any

    def prepare(self, video_BFCHW: Tensor) -> Tensor:
        """What is kept of a teacher's video [-1, 1] where `input_space` is "pixels"."""
        ...

    def rollout(self, batch: Batch) -> None: ...

    def discriminator_step(self, batch: Batch) -> dict[str, float]: ...

    def student_step(self, batch: Batch) -> dict[str, float]: ...

    def evaluation_policy(self) -> AbstractContextManager[Student]:
        """The student whose weights are measured, for the block."""
        ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


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
