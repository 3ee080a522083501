"""The optimizer of discriminators that are too large for one pass."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from afd.discriminators.config import CriticConfig
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

    def __init__(self, parameters: Iterable[Tensor], config: CriticConfig) -> None:
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
