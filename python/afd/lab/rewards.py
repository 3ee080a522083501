"""Frozen rewards of the toy task: its exact measurements, as stand-ins for a pretrained rater.

Shape letters: B videos, F frames, C colours, H x W pixels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from afd.lab.config import PhysicsRewardConfig
from afd.lab.physics import adheres, measure_each
from afd.lab.simulator import DOMAINS, attribute_table
from afd.models.student import Student
from afd.rewards.base import Reward
from afd.video.config import VideoConfig


class PhysicsReward(Reward):
    """One measurement of each video, with the sign that makes higher better (see `Reward`)."""

    def __init__(self, config: PhysicsRewardConfig) -> None:
        self.config = config

    @torch.no_grad()
    def score(self, input_BFCHW: Tensor, prompts: Sequence[str]) -> Tensor:
        domain = DOMAINS[self.config.domain]
        each = measure_each(input_BFCHW, domain)
        if self.config.measure == "adh":
            wanted_B4 = attribute_table(list(prompts))
            if domain.endless:
                return adheres(each.attributes, wanted_B4, domain).float()
            return (each.attributes == wanted_B4).float().mean(1)
        error_B: Tensor = getattr(each, self.config.measure)
        return -error_B


def build(
    config: PhysicsRewardConfig,
    student: Student,
    video: VideoConfig,
    prompts: Sequence[str] = (),
    *,
    beside: Sequence[object] = (),
) -> PhysicsReward:
    """Build the reward from its configuration (`RewardConfig.build`)."""
    attribute_table(list(prompts))  # fail now for a prompt that the task does not know
    return PhysicsReward(config)
