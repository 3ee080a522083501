"""Supervised flow matching on the teacher's videos, under teacher forcing: the baseline.

Shape letters: B videos, F frames, C channels, H x W pixels, K chunks.
"""

from __future__ import annotations

import copy
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch
from torch import Generator, Tensor

from afd import ops
from afd.methods.base import Batch, StudentOptimizer, draw_times, ema_update
from afd.methods.config import SftConfig
from afd.models.toy import ToyStudent


def denoising_loss(
    student: ToyStudent,
    x0_BFCHW: Tensor,
    text_BLE: Tensor,
    t_BK: Tensor,
    context_noise: float,
    generator: Generator,
) -> Tensor:
    """Mean (x0 - predicted x0)² / max(t, 0.1) under teacher forcing.

    The clean context carries noise of a level up to `context_noise`, one per video, because at
    sampling time the context is the student's own and never exact. The 1/t lies between the flow
    loss (1/t², which did not converge here) and plain denoising.
    """
    B = x0_BFCHW.shape[0]
    level_B = context_noise * torch.rand(B, generator=generator)
    context_seed = ops.draw_seeds(B, generator)
    seen = ops.forward_noise(x0_BFCHW, level_B, seed=context_seed, layout="BFCHW")
    context = student.clean_context(seen, text_BLE)
    seed = ops.draw_seeds(B, generator)
    x_t = ops.forward_noise(x0_BFCHW, t_BK, seed=seed, layout="BFCHW")
    error = (student.predict_x0(x_t, t_BK, text_BLE, context) - x0_BFCHW).square()
    weight_BK = 1 / t_BK.clamp_min(0.1)
    return (error.unflatten(1, (t_BK.shape[1], -1)).mean((2, 3, 4, 5)) * weight_BK).mean()


class Sft:
    """Fine-tuning on finished teacher videos (see `Method`)."""

    name, needs_rollout, needs_critic = "sft", False, False
    sees: Literal["video", "latent"] = "latent"

    def __init__(
        self, student: ToyStudent, config: SftConfig, steps: list[float], seed: int = 0
    ) -> None:
        self.config, self.steps = config, steps
        self.theta = student
        self.average = copy.deepcopy(student).requires_grad_(False)
        self.generator = Generator().manual_seed(seed)
        self.optimizer = StudentOptimizer(student, config)

    def look(self, video_BFCHW: Tensor) -> Tensor:
        return video_BFCHW

    def rollout(self, batch: Batch) -> None:
        """Nothing: the videos are the teacher's."""

    def critic_step(self, batch: Batch) -> dict[str, float]:
        return {}

    def student_step(self, batch: Batch) -> dict[str, float]:
        videos = batch.teacher_BFCHW.repeat(self.config.draws, 1, 1, 1, 1)
        text = self.theta.encode(batch.prompts).repeat(self.config.draws, 1, 1)
        chunks = videos.shape[1] // self.theta.chunk
        t_BK = draw_times(self.config.timesteps, len(videos), chunks, self.steps, self.generator)
        loss = denoising_loss(
            self.theta, videos, text, t_BK, self.config.context_noise, self.generator
        )
        metrics = self.optimizer.step(loss)
        ema_update(self.average, self.theta, min(self.config.ema_decay, 0.02 * batch.step))
        return metrics

    def evaluation_policy(self) -> AbstractContextManager[ToyStudent]:
        return nullcontext(self.average)

    def state_dict(self) -> dict[str, Any]:
        return {
            "theta": self.theta.state_dict(),
            "average": self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "generator": self.generator.get_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.theta.load_state_dict(state["theta"])
        self.average.load_state_dict(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.generator.set_state(state["generator"])
