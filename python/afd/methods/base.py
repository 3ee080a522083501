"""The interface between the trainer and the training methods.

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
from afd.methods.robust import Robust
from afd.models.codec import Codec
from afd.models.student import Student


@dataclass
class Batch:
    """Inputs of one update: this process's part of the prompts.

    Attributes:
        update: number of the update, from 0.
        prompts: this process's prompts.
        teacher_BFCHW: one finished teacher video per prompt in the method's `input_space`: pixels
            processed by its `prepare`, or latents; empty where only prompts are used.
        first: index of prompts[0] among the prompts of all processes.
        total: number of prompts of all processes; None: as many as `prompts`.
        teachers: the teacher of each video, where there are several (`teacher_BFCHW` then has the
            same number of videos for each prompt, one after another); empty with a single one.
        clips: the number of each video among all of the teacher's.
        robust: what the run does about videos that are wrong, if anything.
        replay: prompts of earlier domains in the same update, without the teacher's videos.
        cached: number of those, of all processes, that are among `prompts`, too.
        earlier: for each of `prompts`, another one of the update, under which streams that switch
            their prompt begin (`earlier_prompts`); empty: none can.
    """

    update: int
    prompts: list[str]
    teacher_BFCHW: Tensor
    first: int = 0
    total: int | None = None
    teachers: Sequence[str] = ()
    clips: Sequence[int] = ()
    robust: Robust | None = None
    replay: Batch | None = None
    cached: int = 0
    earlier: Sequence[str] = ()

    @property
    def share(self) -> float:
        """The weight of these prompts beside the replayed ones: their share of all."""
        return self.count / self._all

    @property
    def replay_share(self) -> float:
        """The weight of the replayed prompts: their share of all."""
        return 1 - (self.count - self.cached) / self._all

    @property
    def _all(self) -> int:
        replayed = 0 if self.replay is None else self.replay.count
        return self.count + replayed - self.cached

    @property
    def count(self) -> int:
        """Number of prompts of all processes."""
        return len(self.prompts) if self.total is None else self.total

    def own(self, copies: int = 1) -> slice:
        """This process's slice of a list with `copies` entries for each prompt of the update."""
        return slice(self.first * copies, (self.first + len(self.prompts)) * copies)


def earlier_prompts(prompts: Sequence[str]) -> list[str]:
    """For each prompt of an update the nearest one before it that differs, the last ones coming
    before the first; its own where all are the same."""
    found = []
    for i, prompt in enumerate(prompts):
        before = (prompts[i - back] for back in range(1, len(prompts)))
        found.append(next((other for other in before if other != prompt), prompt))
    return found


@dataclass(frozen=True)
class Shown:
    """One of an update's videos, for visual inspection.

    Attributes:
        x0_FCHW: in the student's space, on the CPU.
        score, r: the discriminator's score and the method's weight, if computed.
        teacher_score: the discriminator's score of the teacher's video.
    """

    prompt: str
    x0_FCHW: Tensor
    score: float | None = None
    r: float | None = None
    teacher_score: float | None = None


class Method(Protocol):
    """A way to train the student; the trainer calls the three parts of an update in this order."""

    name: str
    needs_rollout: bool
    needs_discriminator: bool
    input_space: Literal["pixels", "latents"]
    codec: Codec
    shown: Shown | None  # the first video of the last update, if the method generates any

    def prepare(self, video_BFCHW: Tensor) -> Tensor:
        """Reduce a teacher's video [-1, 1] to what is stored when `input_space` is "pixels"."""
        ...

    def rollout(self, batch: Batch) -> None: ...

    def discriminator_step(self, batch: Batch) -> dict[str, float]: ...

    def student_step(self, batch: Batch) -> dict[str, float]: ...

    def evaluation_policy(self) -> AbstractContextManager[Student]:
        """Context with the student version that is evaluated."""
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
    """Draw times, float32 [videos, chunks], from the list `steps` or a distribution on (0, 1].

    "shifted" is 5u / (1 + 4u) of a uniform u: mostly high noise, as in the training of Wan
    students. "logit_normal" is the sigmoid of a normal variable (arXiv 2403.03206).
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
