"""Learning from pairs in micro-batches, for discriminators that are too large for one pass.

Shape letters: B videos (input frames in pixels, or latents), F frames, C channels, H x W.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from afd.discriminators.base import LOSSES, head_numbers, pair_metrics
from afd.discriminators.config import PairConfig
from afd.distributed import ALONE, Ranks
from afd_kernels.contracts import require


def matched_pieces(videos: Tensor, prompts: Sequence[str], size: int | None) -> Iterator[slice]:
    """Slices of at most `size` that cover the videos; None: one slice.

    Raises ValueError unless there is one prompt per video.
    """
    count = len(videos)
    matched = not isinstance(prompts, str) and len(prompts) == count > 0
    require(matched, "prompts", prompts, f"a list of {count}, one per video")
    width = size or count
    return (slice(start, start + width) for start in range(0, count, width))


class DiscriminatorOptimizer:
    """AdamW with gradient clipping and a linear warmup to a constant rate."""

    def __init__(self, parameters: Iterable[Tensor], config: PairConfig) -> None:
        self.config, self.parameters, self.updates = config, list(parameters), 0
        self.adam = torch.optim.AdamW(
            self.parameters,
            lr=config.learning_rate,
            betas=config.betas,
            weight_decay=config.weight_decay,
        )

    def clear(self) -> None:
        self.adam.zero_grad()

    def step(self, ranks: Ranks = ALONE) -> float:
        """Update from the gradients summed over processes; returns their norm before clipping."""
        ranks.sum_([p.grad for p in self.parameters if p.grad is not None])
        rise = min(1.0, (self.updates + 1) / max(1, self.config.learning_rate_warmup))
        self.adam.param_groups[0]["lr"] = self.config.learning_rate * rise
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.config.grad_clip)
        self.adam.step()
        self.updates += 1
        return float(norm)

    def state_dict(self) -> dict[str, Any]:
        return {"adam": self.adam.state_dict(), "updates": self.updates}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.adam.load_state_dict(state["adam"])
        self.updates = state["updates"]


class PairDiscriminator(ABC):
    """Scores and updates in micro-batches through `differentiable_score` (see `Discriminator`).

    Neither the micro-batch nor the number of processes changes the update: losses are means over
    all pairs of all processes. Its state consists of `net` and the optimizer.
    """

    config: PairConfig
    optimizer: DiscriminatorOptimizer
    input_space: Literal["pixels", "latents"] = "pixels"
    ranks: Ranks = ALONE
    teachers: tuple[str, ...] = ()
    # Differences of scores of the latest step's pairs, of this process.
    margins_B: Tensor | None = None

    def __init__(self, net: nn.Module, config: PairConfig, ranks: Ranks = ALONE) -> None:
        self.net, self.config, self.ranks = net, config, ranks
        self.optimizer = DiscriminatorOptimizer(
            [p for p in net.parameters() if p.requires_grad], config
        )

    def prepare(self, video_BFCHW: Tensor) -> Tensor:
        """The part of the videos that it uses as input; only this needs to be stored."""
        return video_BFCHW

    def excerpts(self, teacher_BFCHW: Tensor, student_BFCHW: Tensor) -> tuple[Tensor, Tensor]:
        """The part of each pair that one update ranks, the same of both videos."""
        return teacher_BFCHW, student_BFCHW

    @abstractmethod
    def differentiable_score(self, input_BFCHW: Tensor, prompts: Sequence[str]) -> Tensor:
        """Scores [B] with gradients to the input and to the weights."""

    def _scores(
        self, input_BFCHW: Tensor, prompts: Sequence[str], teachers: Sequence[str]
    ) -> Tensor:
        """As `differentiable_score`; without heads of their own, all teachers have one score."""
        return self.differentiable_score(input_BFCHW, prompts)

    def weights(self) -> Iterable[Tensor]:
        """The trained weights."""
        return self.optimizer.parameters

    @torch.no_grad()
    def score(
        self, input_BFCHW: Tensor, prompts: Sequence[str], teachers: Sequence[str] = ()
    ) -> Tensor:
        """Scores [B]; no gradient and no side effects."""
        size = self.config.micro_batch
        return torch.cat(
            [
                self._scores(input_BFCHW[part], prompts[part], teachers[part])
                for part in matched_pieces(input_BFCHW, prompts, size)
            ]
        )

    def step(
        self,
        teacher_BFCHW: Tensor,
        student_BFCHW: Tensor,
        prompts: Sequence[str],
        teachers: Sequence[str] = (),
        weights_B: Tensor | None = None,
    ) -> dict[str, float]:
        """One update on prompt-matched pairs; returns loss, accuracy, margin and gradient norm.

        `teachers`: of each pair, whose head learns. `weights_B`: of the pairs; None: equal.
        """
        alike = teacher_BFCHW.shape == student_BFCHW.shape
        require(alike, "student_BFCHW", student_BFCHW, f"shape {tuple(teacher_BFCHW.shape)}")
        teacher_BFCHW, student_BFCHW = self.excerpts(teacher_BFCHW, student_BFCHW)
        self.optimizer.clear()
        count = int(self.ranks.gather(torch.tensor([len(prompts)])).sum())
        if weights_B is not None:
            whole = float(self.ranks.gather(weights_B.double()).sum())
            weights_B = weights_B / max(whole, 1e-6)
        total, seen = 0.0, []
        for part in matched_pieces(teacher_BFCHW, prompts, self.config.micro_batch):
            # Both in one pass, so that padding and rounding are the same.
            both = torch.cat([teacher_BFCHW[part], student_BFCHW[part].to(teacher_BFCHW)]).detach()
            scores = self._scores(both, [*prompts[part]] * 2, [*teachers[part]] * 2)
            teacher_B, student_B = scores.chunk(2)
            if weights_B is None:
                loss = LOSSES[self.config.loss](teacher_B, student_B) * len(teacher_B) / count
            else:
                loss = LOSSES[self.config.loss](teacher_B, student_B, weights_B[part])
            loss.backward()
            total += float(loss.detach())
            seen.append(torch.stack([teacher_B, student_B], 1).detach())
        norm = self.optimizer.step(self.ranks)
        total = float(self.ranks.gather(torch.tensor([total], dtype=torch.float64)).sum())
        own_B2 = torch.cat(seen)
        self.margins_B = (own_B2[:, 0] - own_B2[:, 1]).float().cpu()
        head_B = head_numbers(teachers, self.teachers)
        head_B = None if head_B is None else self.ranks.gather(head_B.to(own_B2.device))
        teacher_B, student_B = self.ranks.gather(own_B2).unbind(1)
        metrics = pair_metrics(teacher_B, student_B, head_B, self.teachers)
        return {"loss": total, "grad_norm": norm, **metrics}

    def state_dict(self) -> dict[str, Any]:
        return {"net": self.net.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.net.load_state_dict(state["net"])
        self.optimizer.load_state_dict(state["optimizer"])


class TeacherHeads(PairDiscriminator):
    """A discriminator that can have a head for each of several teachers."""

    def with_teachers(self, names: Sequence[str]) -> None:
        """Give every teacher a head of its own; before anything is learnt."""
        self.teachers = tuple(names)
        self.add_heads(len(names))

    @abstractmethod
    def add_heads(self, count: int) -> None:
        """Make this many heads, equal at first, and an optimizer of them."""

    @abstractmethod
    def differentiable_score(
        self, input_BFCHW: Tensor, prompts: Sequence[str], teachers: Sequence[str] = ()
    ) -> Tensor:
        """Scores [B] with gradients to the input and to the weights, each by the head of its
        teacher; without `teachers` the mean over the heads."""

    def _scores(
        self, input_BFCHW: Tensor, prompts: Sequence[str], teachers: Sequence[str]
    ) -> Tensor:
        return self.differentiable_score(input_BFCHW, prompts, teachers)
