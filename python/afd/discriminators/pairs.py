"""Learning from pairs in pieces, for discriminators that are too large for one pass.

Shape letters: B videos (pixels or latents), F frames, C channels, H x W.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from afd.discriminators.base import LOSSES, pair_metrics
from afd.discriminators.config import PairConfig
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


class CriticOptimizer:
    """AdamW with clipped gradients and a rate that rises linearly and then stays."""

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

    def step(self) -> float:
        """One update from the gradients at hand; returns their norm before clipping."""
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


class PairCritic(ABC):
    """Scores and updates by way of `chosen_score`, a piece at a time (see `Critic`).

    A micro-batch changes memory and time, not the update: losses are means over all pairs.
    """

    config: PairConfig
    optimizer: CriticOptimizer

    def chosen(self, video_BFCHW: Tensor) -> Tensor:
        """What of the videos is looked at; only this is copied and moved to the device."""
        return video_BFCHW

    @abstractmethod
    def chosen_score(self, chosen_BFCHW: Tensor, prompts: Sequence[str]) -> Tensor:
        """Scores [B] of what was chosen, with gradients to it."""

    def differentiable_score(self, video_BFCHW: Tensor, prompts: Sequence[str]) -> Tensor:
        """Scores [B] with gradients to the videos, for a generator's loss.

        The discriminator's own weights get gradients as well; its next `step` clears them.
        """
        return self.chosen_score(self.chosen(video_BFCHW), prompts)

    @torch.no_grad()
    def score(self, video_BFCHW: Tensor, prompts: Sequence[str]) -> Tensor:
        """Scores [B]; no gradient. Scoring changes nothing."""
        size = self.config.micro_batch
        return torch.cat(
            [
                self.differentiable_score(video_BFCHW[part], prompts[part])
                for part in matched_pieces(video_BFCHW, prompts, size)
            ]
        )

    def step(
        self, teacher_BFCHW: Tensor, student_BFCHW: Tensor, prompts: Sequence[str]
    ) -> dict[str, float]:
        """One update on prompt-matched pairs; returns loss, accuracy, margin and gradient norm."""
        alike = teacher_BFCHW.shape == student_BFCHW.shape
        require(alike, "student_BFCHW", student_BFCHW, f"shape {tuple(teacher_BFCHW.shape)}")
        self.optimizer.clear()
        total, seen = 0.0, []
        for part in matched_pieces(teacher_BFCHW, prompts, self.config.micro_batch):
            # In one pass, so that padding and rounding are the same for both.
            both = torch.cat(
                [self.chosen(x[part].detach()) for x in (teacher_BFCHW, student_BFCHW)]
            )
            teacher_B, student_B = self.chosen_score(both, [*prompts[part]] * 2).chunk(2)
            loss = LOSSES[self.config.loss](teacher_B, student_B) * len(teacher_B) / len(prompts)
            loss.backward()
            total += float(loss.detach())
            seen.append(torch.stack([teacher_B, student_B]).detach())
        norm = self.optimizer.step()
        return {"loss": total, "grad_norm": norm, **pair_metrics(*torch.cat(seen, 1))}
