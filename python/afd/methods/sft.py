"""Supervised flow matching on the teacher's videos, under teacher forcing: the baseline.

Shape letters: B videos, N noised copies of them, F frames, C channels, H x W pixels or latents, K
chunks.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any, Literal

import torch
from torch import Tensor

from afd.methods.base import Batch
from afd.methods.common import StudentMethod
from afd.methods.config import SftConfig
from afd.methods.copies import Copies, check_chunks, draw_copies
from afd.methods.optimizer import ramped_decay
from afd.models.policies import Policies
from afd.models.student import Student

VERSIONS = ("theta", "ema")


def denoising_loss(
    student: Student,
    x0_NFCHW: Tensor,
    text_NLE: Tensor,
    copies: Copies,
    loss: Literal["x0", "velocity"] = "x0",
    context_noise: float = 0.0,
) -> Tensor:
    """Mean squared error of noised copies under teacher forcing.

    The clean context carries the copies' own noise, because at sampling time the context is the
    student's and never exact. "x0" is (x0 - predicted x0)² / max(t, 0.1): its 1/t lies between the
    flow loss (1/t², which did not converge on the toy) and plain denoising. "velocity" is the flow
    loss itself.

    Args:
        x0_NFCHW: the video of every copy.
        text_NLE: their embeddings.
        context_noise: the time that the context pass is told, 0-1000.
    """
    device, chunk = x0_NFCHW.device, student.chunk
    seen = copies.noise_context(x0_NFCHW)
    context = student.clean_context(seen, text_NLE, context_noise=context_noise)
    x_t = copies.drawn(copies.noise(x0_NFCHW), chunk)
    t_NK, which = copies.drawn_t.to(device), copies.chunks_NM
    if loss == "velocity":
        wanted = copies.drawn(copies.pure_noise(x0_NFCHW) - x0_NFCHW, chunk)
        v = student.velocity(x_t, t_NK, text_NLE, context, chunks_BN=which)
        return (v - wanted).square().mean()
    wanted = copies.drawn(x0_NFCHW, chunk)
    error = (student.predict_x0(x_t, t_NK, text_NLE, context, chunks_BN=which) - wanted).square()
    weight_NK = 1 / t_NK.clamp_min(0.1)
    return (error.unflatten(1, (t_NK.shape[1], -1)).mean((2, 3, 4, 5)) * weight_NK).mean()


class Sft(StudentMethod):
    """Fine-tuning on finished teacher videos (see `Method`).

    Args:
        policies: versions "theta" and "ema".
        how: what all methods are given (see `StudentMethod`).
    """

    name, needs_rollout, needs_discriminator = "sft", False, False

    def __init__(self, policies: Policies, config: SftConfig, **how: Any) -> None:
        super().__init__(policies, config, **how)
        self.config: SftConfig = config
        check_chunks(config, self.chunks)

    def rollout(self, batch: Batch) -> None:
        """Nothing: the videos are the teacher's."""

    def discriminator_step(self, batch: Batch) -> dict[str, float]:
        return {}

    def student_step(self, batch: Batch) -> dict[str, float]:
        config, student = self.config, self.policies.student
        x0_BFCHW = batch.teacher_BFCHW.to(student.device, torch.float32)
        text_BLE = student.encode(batch.prompts)
        copies = draw_copies(
            config,
            batch.count,
            x0_BFCHW.shape[1] // student.chunk,
            self.times,
            self.generator,
            own=batch.own(),
            first_times=self.first_times,
            context_noise=config.context_noise,
        )
        for piece in copies.pieces(config.micro_batch):
            x0, text = x0_BFCHW[piece.video_N], text_BLE[piece.video_N]
            told = self.streaming.context_noise
            loss = denoising_loss(student, x0, text, piece, config.loss, told)
            self.optimizer.add(loss * piece.share)
        metrics = self.optimizer.step()
        self.policies.average(
            "ema", "theta", ramped_decay(config.ema_decay, self.optimizer.updates - 1)
        )
        return metrics

    def evaluation_policy(self) -> AbstractContextManager[Student]:
        return self.policies.using("ema")

    def state_dict(self) -> dict[str, Any]:
        return {
            "policies": self.policies.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "generator": self.generator.get_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.policies.load_state_dict(state["policies"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.generator.set_state(state["generator"])
