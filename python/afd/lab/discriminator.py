"""Discriminators of the toy task, and the frozen motion backbone they can build on.

Shape letters: B videos, F frames, C colour channels, H x W pixels, M motion features, E text.
"""

from __future__ import annotations

import copy
import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Generator, Tensor, nn

from afd.discriminators.base import LOSSES, gradient_penalty, head_numbers, pair_metrics
from afd.discriminators.windows import windows
from afd.distributed import ALONE, Ranks
from afd.files import replacing
from afd.lab.augmentation import random_look
from afd.lab.config import ToyDiscriminatorConfig
from afd.lab.shipped import checkpoint_path
from afd.lab.student import encode_prompts
from afd.models.student import Student
from afd.video.config import VideoConfig

TEXT_LEN, TEXT_DIM = 6, 32


class MotionBackbone(nn.Module):
    """Twelve look-invariant features per frame that encode the ball's position and motion.

    The stand-in for a pretrained video scorer. Input: each frame, and its difference from the
    clip's mean, which removes everything that does not move.
    """

    features = 12

    def __init__(self, channels: int = 3) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(2 * channels, 16, 5, stride=2, padding=2)
        self.conv2 = nn.Conv2d(16, 40, 3, stride=2, padding=1)
        self.frame = nn.Linear(40 * 16, 64)
        self.time1 = nn.Conv1d(64, 64, 5, padding=2)
        self.time2 = nn.Conv1d(64, self.features, 3, padding=1)
        self.register_buffer("mean", torch.zeros(self.features))
        self.register_buffer("std", torch.ones(self.features))
        self.mean: Tensor
        self.std: Tensor

    def raw(self, video_BFCHW: Tensor) -> Tensor:
        """Features before standardisation, [B, F, M]."""
        moving = video_BFCHW - video_BFCHW.mean(1, keepdim=True)
        x = torch.cat([video_BFCHW, moving], 2).flatten(0, 1)
        x = F.gelu(self.conv2(F.gelu(self.conv1(x))))
        x = F.gelu(self.frame(x.flatten(1))).view(*video_BFCHW.shape[:2], -1).transpose(1, 2)
        return self.time2(F.gelu(self.time1(x))).transpose(1, 2)

    def forward(self, video_BFCHW: Tensor) -> Tensor:
        """Features [B, F, M], standardised over the pretraining clips."""
        return (self.raw(video_BFCHW) - self.mean) / self.std

    def save(self, path: Path) -> None:
        weights = {k: v.detach().half().contiguous() for k, v in self.state_dict().items()}
        with replacing(path) as partial:
            save_file(weights, partial, metadata={"what": json.dumps("motion backbone")})

    @classmethod
    def load(cls, name: str = "motion") -> MotionBackbone:
        backbone = cls()
        weights = load_file(checkpoint_path(name))
        backbone.load_state_dict({k: v.float() for k, v in weights.items()})
        return backbone


class WindowedHead(nn.Module, ABC):
    """Base class of the scorers: a head on windows of per-frame features and the prompt.

    Attributes:
        window: frames that the head takes at a time.
        text: embeds the prompt.
        head: one score per window.
    """

    window: int
    text: nn.Linear
    head: nn.Sequential

    @abstractmethod
    def per_frame(self, inputs: Tensor) -> Tensor:
        """The features of every frame that the head reads, [B, F, D]."""

    def forward(self, inputs: Tensor, text_BE: Tensor) -> Tensor:
        """Scores [B]."""
        return self.summed(self.per_frame(inputs), text_BE)

    def summed(self, features_BFD: Tensor, text_BE: Tensor) -> Tensor:
        """Sum of the scores of all windows, [B]."""
        window_BND = windows(features_BFD, self.window).flatten(2)
        text_BNE = self.text(text_BE)[:, None].expand(-1, window_BND.shape[1], -1)
        return self.head(torch.cat([window_BND, text_BNE], 2)).sum((1, 2))


class FrozenFeatureScorer(WindowedHead):
    """A small online head on frozen features and the prompt embedding: an MLP 128-64-1.

    `window`: frames of a window of the score; of the clip, if there is only one.
    """

    def __init__(self, backbone: MotionBackbone, window: int) -> None:
        super().__init__()
        self.window = window
        self.backbone = backbone.requires_grad_(False)
        self.text = nn.Linear(TEXT_LEN * TEXT_DIM, 32)
        self.head = nn.Sequential(
            nn.Linear(window * backbone.features + 32, 128),
            nn.GELU(),
            nn.Linear(128, 64),
            nn.GELU(),
            nn.Linear(64, 1),
        )

    def inputs(self, video_BFCHW: Tensor) -> Tensor:
        """The tensor to which noise and the gradient penalty apply."""
        return self.backbone(video_BFCHW)

    def per_frame(self, features_BFM: Tensor) -> Tensor:
        return features_BFM


class ScratchScorer(WindowedHead):
    """A pixel scorer trained from scratch online: per-frame and temporal convolutions, MLP."""

    def __init__(self, window: int, channels: int = 3) -> None:
        super().__init__()
        self.window = window
        self.conv = nn.Sequential(
            nn.Conv2d(channels, 16, 5, stride=2, padding=2),
            nn.LeakyReLU(0.2),
            nn.Conv2d(16, 32, 3, stride=2, padding=1),
            nn.LeakyReLU(0.2),
            nn.Flatten(),
            nn.Linear(32 * 16, 64),
        )
        self.time = nn.Conv1d(64, 64, 3, padding=1)
        self.text = nn.Linear(TEXT_LEN * TEXT_DIM, 32)
        self.head = nn.Sequential(
            nn.Linear(window * 64 + 32, 96), nn.LeakyReLU(0.2), nn.Linear(96, 1)
        )

    def inputs(self, video_BFCHW: Tensor) -> Tensor:
        return video_BFCHW

    def per_frame(self, video_BFCHW: Tensor) -> Tensor:
        frames = self.conv(video_BFCHW.flatten(0, 1)).view(*video_BFCHW.shape[:2], -1)
        return F.leaky_relu(self.time(frames.transpose(1, 2)), 0.2).transpose(1, 2)


class TeacherScorers(nn.Module):
    """One scorer for each teacher, equal at first, on the same frozen features."""

    def __init__(self, scorer: FrozenFeatureScorer | ScratchScorer, count: int) -> None:
        super().__init__()
        self.scorers = nn.ModuleList(copy.deepcopy(scorer) for _ in range(count))
        if isinstance(scorer, FrozenFeatureScorer):
            # The features are computed once, by the first.
            for other in list(self.scorers)[1:]:
                cast("FrozenFeatureScorer", other).backbone = nn.Identity()  # type: ignore[assignment]

    def inputs(self, video_BFCHW: Tensor) -> Tensor:
        """The tensor to which noise and the gradient penalty apply."""
        found: Tensor = self.scorers[0].inputs(video_BFCHW)  # type: ignore[operator]
        return found

    def forward(self, inputs: Tensor, text_BE: Tensor, head_B: Tensor | None = None) -> Tensor:
        """Scores [B] by the given scorers; None: the mean over all."""
        if head_B is None:
            return torch.stack([scorer(inputs, text_BE) for scorer in self.scorers]).mean(0)
        # A scorer without a video gets no gradient, so that its weights do not decay either.
        asked = head_B.unique().tolist()
        order = [(head_B == number).nonzero().flatten() for number in asked]
        parts = [
            self.scorers[number](inputs[index], text_BE[index])
            for number, index in zip(asked, order, strict=True)
        ]
        return torch.cat(parts)[torch.cat(order).argsort()]


class ToyDiscriminator:
    """A scorer with its optimizer and random generator (see `Discriminator`).

    It is small: with several processes, each computes the update of the whole batch redundantly.

    Args:
        video: the length and rate of its videos; by default those of the toy task.
    """

    input_space: Literal["pixels", "latents"] = "pixels"
    teachers: tuple[str, ...] = ()
    # Differences of scores of the latest step's pairs, of this process.
    margins_B: Tensor | None = None

    def __init__(
        self,
        config: ToyDiscriminatorConfig,
        video: VideoConfig | None = None,
        seed: int = 0,
        ranks: Ranks = ALONE,
    ) -> None:
        video = video or VideoConfig()
        window = config.window_frames(video, video.frames) or video.frames
        self.config, self.ranks = config, ranks
        self.generator = Generator().manual_seed(seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.net: FrozenFeatureScorer | ScratchScorer | TeacherScorers
            if config.backbone == "scratch":
                self.net = ScratchScorer(window)
            elif config.backbone == "random":
                self.net = FrozenFeatureScorer(_standardised(MotionBackbone()), window)
            else:
                self.net = FrozenFeatureScorer(MotionBackbone.load(config.checkpoint), window)
        self._start_optimizer()

    def _start_optimizer(self) -> None:
        config = self.config
        self._weights = [p for p in self.net.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            self._weights,
            lr=config.learning_rate,
            betas=config.betas,
            weight_decay=config.weight_decay,
        )

    def with_teachers(self, names: Sequence[str]) -> None:
        """Give every teacher a scorer of its own; before anything is learnt."""
        assert not isinstance(self.net, TeacherScorers)
        self.teachers = tuple(names)
        self.net = TeacherScorers(self.net, len(names))
        self._start_optimizer()

    def prepare(self, video_BFCHW: Tensor) -> Tensor:
        """The videos, unchanged."""
        return video_BFCHW

    def weights(self) -> Iterable[Tensor]:
        """The trained weights."""
        return self._weights

    def _restyled(self, video_BFCHW: Tensor, generator: Generator, shared: bool = False) -> Tensor:
        if not self.config.random_looks:
            return video_BFCHW
        return random_look(video_BFCHW, generator, shared=shared)

    def _text(self, prompts: Sequence[str]) -> Tensor:
        return encode_prompts(list(prompts), TEXT_LEN, TEXT_DIM).flatten(1)

    def _beginning(self, inputs: Tensor, quarters_B: Tensor) -> Tensor:
        """Keep the given number of quarters of each clip and blank the rest."""
        frames = inputs.shape[1]
        seen_BF = torch.arange(frames) * 4 < quarters_B[:, None] * frames
        return inputs * seen_BF.view(*seen_BF.shape, *[1] * (inputs.ndim - 2))

    @torch.no_grad()
    def score(
        self, input_BFCHW: Tensor, prompts: Sequence[str], teachers: Sequence[str] = ()
    ) -> Tensor:
        return self._score(input_BFCHW, prompts, self.generator, teachers)

    def differentiable_score(
        self, input_BFCHW: Tensor, prompts: Sequence[str], teachers: Sequence[str] = ()
    ) -> Tensor:
        """Scores [B] with gradients to the videos.

        The looks stay fixed until the next `step`, so that a batch may be scored in parts.
        """
        looks = Generator().set_state(self.generator.get_state())
        # The discriminator is on the CPU, whatever the student's device.
        return self._score(input_BFCHW.cpu(), prompts, looks, teachers).to(input_BFCHW.device)

    def _score(
        self,
        input_BFCHW: Tensor,
        prompts: Sequence[str],
        generator: Generator,
        teachers: Sequence[str] = (),
    ) -> Tensor:
        text_BE = self._text(prompts)
        head_B = head_numbers(teachers, self.teachers)
        looks = self.config.score_looks if self.config.random_looks else 1
        quarters = (4, 3, 2, 1) if self.config.beginnings else (4,)
        scores = []
        # All videos share the looks: a look's contribution to the score cancels in the advantage.
        for _ in range(looks):
            inputs = self.net.inputs(self._restyled(input_BFCHW, generator, shared=True))
            for count in quarters:
                seen = self._beginning(inputs, torch.full((len(inputs),), count))
                scores.append(self._of(seen, text_BE, head_B))
        return torch.stack(scores).mean(0)

    def _of(self, inputs: Tensor, text_BE: Tensor, head_B: Tensor | None) -> Tensor:
        """The net's scores, by its heads if it has several."""
        if isinstance(self.net, TeacherScorers):
            return cast("Tensor", self.net(inputs, text_BE, head_B))
        return cast("Tensor", self.net(inputs, text_BE))

    def step(
        self,
        teacher_BFCHW: Tensor,
        student_BFCHW: Tensor,
        prompts: Sequence[str],
        teachers: Sequence[str] = (),
        weights_B: Tensor | None = None,
    ) -> dict[str, float]:
        own = len(prompts)
        head_B = head_numbers(teachers, self.teachers)
        head_B = None if head_B is None else self.ranks.gather(head_B)
        if weights_B is not None:
            weights_B = self.ranks.gather(weights_B)
            weights_B = weights_B / weights_B.sum().clamp_min(1e-6)
        whole = [teacher_BFCHW, student_BFCHW, self._text(prompts)]
        teacher_BFCHW, student_BFCHW, text_BE = map(self.ranks.gather, whole)
        teacher = self._noisy(self.net.inputs(self._restyled(teacher_BFCHW, self.generator)))
        student = self._noisy(self.net.inputs(self._restyled(student_BFCHW, self.generator)))
        teacher.requires_grad_(self.config.r1 > 0)
        quarters_B = torch.full((len(teacher),), 4)
        if self.config.beginnings:
            quarters_B = torch.randint(1, 5, (len(teacher),), generator=self.generator)
        teacher_B = self._of(self._beginning(teacher, quarters_B), text_BE, head_B)
        student_B = self._of(self._beginning(student, quarters_B), text_BE, head_B)
        loss = LOSSES[self.config.loss](teacher_B, student_B, weights_B)
        total = loss
        if self.config.r1 > 0:
            total = loss + self.config.r1 * gradient_penalty(teacher_B, teacher)
        self.optimizer.zero_grad()
        total.backward()
        self.optimizer.step()
        counts = self.ranks.gather(torch.tensor([own])).tolist()
        self.margins_B = (teacher_B - student_B).detach().split(counts)[self.ranks.rank]
        metrics = pair_metrics(teacher_B, student_B, head_B, self.teachers)
        return {"loss": float(loss.detach()), **metrics}

    def _noisy(self, inputs: Tensor) -> Tensor:
        noise = torch.randn(inputs.shape, generator=self.generator)
        return inputs.detach() + self.config.noise * noise

    def state_dict(self) -> dict[str, Any]:
        return {
            "net": self.net.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "generator": self.generator.get_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.net.load_state_dict(state["net"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.generator.set_state(state["generator"])


def _standardised(backbone: MotionBackbone) -> MotionBackbone:
    """Standardise a randomly initialised backbone's features over random images."""
    noise = torch.rand(64, 12, 3, 16, 16) * 2 - 1
    with torch.no_grad():
        raw = backbone.raw(random_look(noise, Generator().manual_seed(0))).flatten(0, 1)
        backbone.mean.copy_(raw.mean(0))
        backbone.std.copy_(raw.std(0))
    return backbone


def build(
    config: ToyDiscriminatorConfig,
    student: Student,
    video: VideoConfig,
    prompts: Sequence[str] = (),
    *,
    seed: int = 0,
    ranks: Ranks = ALONE,
) -> ToyDiscriminator:
    """Build the discriminator from its configuration (`DiscriminatorConfig.build`)."""
    return ToyDiscriminator(config, video, seed=seed, ranks=ranks)
