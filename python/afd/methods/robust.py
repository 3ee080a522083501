"""What a run does about a teacher's videos that may be wrong (`teacher.robust`).

Shape letters: N videos of the teacher, B pairs of an update.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from afd.teachers.config import RobustConfig


class Robust:
    """Weights of the teacher's videos in the discriminator's loss.

    It keeps a smoothed loss of every video. From `RobustConfig.after` visits on, those with the
    highest are left out of the loss; their loss is measured on, so that they can return.

    Attributes:
        loss_N, seen_N: smoothed loss and number of visits.
        trust_N: weights from the audit; None: all 1.
        draw_N: how often each video is drawn, relative to the others; None: equally often.
        trimmed_N: which videos are left out now.
    """

    def __init__(self, config: RobustConfig, count: int) -> None:
        self.config = config
        self.loss_N = torch.zeros(count, dtype=torch.float64)
        self.seen_N = torch.zeros(count, dtype=torch.int64)
        self.trimmed_N = torch.zeros(count, dtype=torch.bool)
        self.trust_N: Tensor | None = None
        self.draw_N: Tensor | None = None

    def weights(self, clips: Sequence[int]) -> Tensor:
        """float32 [B]: 0 for a video that is left out, else its trust."""
        index = torch.tensor(clips, dtype=torch.int64)
        weight = (~self.trimmed_N[index]).float()
        return weight if self.trust_N is None else weight * self.trust_N[index].float()

    def update(self, clips_B: Tensor, loss_B: Tensor) -> list[tuple[int, bool]]:
        """Note the losses of an update, all pairs of all processes; returns the videos that are
        left out from now on (True) or come back (False)."""
        for clip in clips_B.unique().tolist():
            mean = float(loss_B[clips_B == clip].double().mean())
            self.seen_N[clip] += 1
            # The first losses are those of a discriminator that knows nothing.
            new = max(self.config.new, 1 / float(self.seen_N[clip]))
            self.loss_N[clip] += new * (mean - self.loss_N[clip])
        known = self.seen_N >= self.config.after
        count = int(self.config.trim * int(known.sum()))
        before, self.trimmed_N = self.trimmed_N, torch.zeros_like(self.trimmed_N)
        if count:
            loss_N = torch.where(known, self.loss_N, -torch.inf)
            self.trimmed_N[loss_N.argsort(descending=True, stable=True)[:count]] = True
        changed = (before != self.trimmed_N).nonzero().flatten().tolist()
        return [(clip, bool(self.trimmed_N[clip])) for clip in changed]

    def state_dict(self) -> dict[str, Any]:
        names = ("loss_N", "seen_N", "trimmed_N", "trust_N", "draw_N")
        held = {name: getattr(self, name) for name in names}
        return {name: None if value is None else value.tolist() for name, value in held.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, dtype in {
            "loss_N": torch.float64,
            "seen_N": torch.int64,
            "trimmed_N": torch.bool,
            "trust_N": torch.float64,
            "draw_N": torch.float64,
        }.items():
            values = state[name]
            setattr(self, name, None if values is None else torch.tensor(values, dtype=dtype))
