"""The discriminator interface and the two losses.

Shape letters: B videos or pairs of a teacher and a student video, F frames, C channels, H x W.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from afd.config.base import Natural, Section, Share
from afd.distributed import ALONE, Ranks
from afd.extras import need
from afd.models.config import StudentConfig
from afd.registry import load

if TYPE_CHECKING:
    from afd.models.student import Student
    from afd.video.config import VideoConfig


class DiscriminatorConfig(Section):
    """Base class of every discriminator's section: loss, optimizer and update schedule.

    A subclass implements `build` (docs/EXTENDING.md); a built-in one sets `builder` to the
    function, as "module:name".
    """

    builder: ClassVar[str]
    # Optional packages required to build it.
    packages: ClassVar[tuple[str, ...]] = ()

    kind: str = Field(description="name of the discriminator in the registry")
    loss: Literal["bt", "gan"] = Field(
        default="bt", description="Bradley-Terry on prompt-matched pairs, or the vanilla GAN loss"
    )
    learning_rate: float = Field(default=5e-6, ge=0, description="AdamW learning rate")
    betas: tuple[Share, Share] = Field(default=(0.9, 0.999), description="AdamW betas")
    weight_decay: float = Field(default=1e-4, ge=0, description="AdamW weight decay")
    warmup_updates: Natural = Field(
        default=0, description="updates of the run in which only the discriminator learns"
    )
    warmup_steps_per_update: Natural | None = Field(
        default=None,
        description="its steps in each of those updates, on the same rollouts; null: "
        "steps_per_update",
    )
    steps_per_update: Natural = Field(
        default=1, description="its optimizer steps in one update of the run"
    )
    init: Path | None = Field(
        default=None,
        description="run folder whose discriminator, of the same settings, is carried on; null: a "
        "fresh one",
    )

    # Defaults that differ for a method, by its name.
    of_methods: ClassVar[Mapping[str, Mapping[str, Any]]] = {}

    def for_method(self, method: str) -> DiscriminatorConfig:
        """The settings with the method's own defaults for keys that were not given."""
        own = self.of_methods.get(method, {})
        return self.model_copy(
            update={key: own[key] for key in own if key not in self.model_fields_set}
        )

    def learns_alone(self, update: int) -> bool:
        """Whether only the discriminator learns in this update (from 0)."""
        return update < self.warmup_updates

    def steps_in(self, update: int) -> int:
        """Number of its steps in this update (from 0)."""
        if self.learns_alone(update) and self.warmup_steps_per_update is not None:
            return self.warmup_steps_per_update
        return self.steps_per_update

    def build(
        self,
        student: Student,
        video: VideoConfig,
        prompts: Sequence[str] = (),
        *,
        seed: int = 0,
        ranks: Ranks = ALONE,
    ) -> DifferentiableDiscriminator:
        """Build the discriminator for this student's videos and these prompts.

        Raises ValueError, FileNotFoundError or ConfigError if a part cannot be loaded.
        """
        need(f"discriminator.kind={self.kind}", *self.packages)
        return load(self.builder)(self, student, video, prompts, seed=seed, ranks=ranks)

    def check_student(self, student: StudentConfig) -> None:
        """Raise ValueError if it cannot score this student's videos."""

    def check_video(self, video: VideoConfig) -> None:
        """Raise ValueError if it cannot score videos of this length."""

    def missing(self) -> Iterator[str]:
        """Yield a sentence for each file that a run would not find or would have to download."""
        yield from ()


class Discriminator(Protocol):
    """A scorer of finished videos that learns to distinguish the teacher's from the student's.

    Inputs are already prepared (`prepare`). With several processes each passes its own part of the
    batch; an update and its metrics are those of the whole batch.

    Attributes:
        input_space: pixels in [-1, 1], or the student's latents.
    """

    input_space: Literal["pixels", "latents"]

    @property
    def config(self) -> DiscriminatorConfig:
        """Its settings, including the update schedule."""
        ...

    def prepare(self, video_BFCHW: Tensor) -> Tensor:
        """The part of the videos that it uses as input; only this needs to be stored."""
        ...

    def score(self, input_BFCHW: Tensor, prompts: Sequence[str]) -> Tensor:
        """Scores [B], higher for videos more like the teacher's for the prompt; no gradient."""
        ...

    def step(
        self, teacher_BFCHW: Tensor, student_BFCHW: Tensor, prompts: Sequence[str]
    ) -> dict[str, float]:
        """One optimizer step on prompt-matched pairs; returns loss, accuracy and margin."""
        ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class DifferentiableDiscriminator(Discriminator, Protocol):
    """A discriminator through which a generator's loss can reach the videos (the GAN baseline)."""

    def differentiable_score(self, input_BFCHW: Tensor, prompts: Sequence[str]) -> Tensor:
        """Scores [B] with gradients to the input, and to the weights unless `held`."""
        ...

    def weights(self) -> Iterable[Tensor]:
        """The trained weights."""
        ...


@contextmanager
def held(discriminator: DifferentiableDiscriminator) -> Iterator[None]:
    """Freeze the discriminator's weights in the block: a loss and its backward pass gradients
    through it but not to its weights."""
    weights = list(discriminator.weights())
    for weight in weights:
        weight.requires_grad_(False)
    try:
        yield
    finally:
        for weight in weights:
            weight.requires_grad_(True)


def bradley_terry_loss(
    teacher_B: Tensor, student_B: Tensor, weights_B: Tensor | None = None
) -> Tensor:
    """Mean -log sigmoid(D(teacher) - D(student)) over prompt-matched pairs (arXiv 2605.26105).

    `weights_B`: of the pairs, in the sum; None: the mean.
    """
    return _summed(F.softplus(student_B - teacher_B), weights_B)


def gan_loss(teacher_B: Tensor, student_B: Tensor, weights_B: Tensor | None = None) -> Tensor:
    """The vanilla GAN loss: each score is a logit of "made by the teacher"."""
    return _summed(F.softplus(-teacher_B), weights_B) + _summed(F.softplus(student_B), weights_B)


def _summed(loss_B: Tensor, weights_B: Tensor | None) -> Tensor:
    return loss_B.mean() if weights_B is None else (loss_B * weights_B.to(loss_B)).sum()


LOSSES = {"bt": bradley_terry_loss, "gan": gan_loss}


def pair_metrics(
    teacher_B: Tensor,
    student_B: Tensor,
    head_B: Tensor | None = None,
    teachers: Sequence[str] = (),
) -> dict[str, float]:
    """Fraction of pairs ranked correctly, and the mean score difference; also of each teacher's
    pairs, with `head_B` the number of the teacher of each pair."""
    margin_B = (teacher_B - student_B).detach()
    found = {"accuracy": float((margin_B > 0).float().mean()), "margin": float(margin_B.mean())}
    for number, name in enumerate(teachers if head_B is not None else ()):
        own = margin_B[head_B == number]
        if len(own):
            found[f"accuracy/{name}"] = float((own > 0).float().mean())
            found[f"margin/{name}"] = float(own.mean())
    return found


def head_numbers(teachers: Sequence[str], known: Sequence[str]) -> Tensor | None:
    """The number of the head of each video, int64 [B]; None where no teachers are given.

    Raises ValueError for a teacher without a head.
    """
    if not teachers:
        return None
    unknown = [name for name in teachers if name not in known]
    if unknown:
        raise ValueError(f"teachers: got {unknown[0]!r}; needed: of {', '.join(known) or 'none'}")
    return torch.tensor([list(known).index(name) for name in teachers])


def gradient_penalty(score_B: Tensor, inputs: Tensor) -> Tensor:
    """R1: mean squared norm of d score / d inputs; keeps the scorer smooth around the teacher."""
    (gradient,) = torch.autograd.grad(score_B.sum(), inputs, create_graph=True)
    return gradient.flatten(1).square().sum(1).mean()
