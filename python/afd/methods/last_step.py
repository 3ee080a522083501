"""Shared by GAN and DMD: the student's own rollouts, and a gradient through their last step.

A rollout keeps the noisy input of every chunk's last denoising step. One teacher-forced pass over
all chunks then recomputes the finished video, this time with gradients: everything before that
step, and by default the context, is constant.
Shape letters: B videos of this process, b of a micro-batch, F frames, C channels, H x W pixels or
latents, K chunks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from afd.discriminators.base import Discriminator
from afd.methods.base import Batch, Shown
from afd.methods.config import LastStepConfig
from afd.methods.optimizer import ramped_decay
from afd.methods.rollouts import Rollouts, roll_out
from afd.methods.student_method import StudentMethod
from afd.models.policies import Policies
from afd.models.student import Student


class LastStepMethod(StudentMethod):
    """The student's part of both methods.

    Args:
        policies: versions "theta" and "ema", and the references of the prior.
        how: arguments common to all methods (see `StudentMethod`).
    """

    needs_rollout, needs_discriminator = True, True

    def __init__(
        self,
        policies: Policies,
        config: LastStepConfig,
        discriminator: Discriminator | None = None,
        **how: Any,
    ) -> None:
        super().__init__(policies, config, discriminator, **how)
        self.config: LastStepConfig = config
        first = self.first_times or self.times
        last = [first[-1], *self.times[-1:] * (self.chunks - 1)]
        device = policies.student.device
        self.last_t_1K = torch.tensor([last], dtype=torch.float32, device=device)

    def rollout(self, batch: Batch) -> None:
        """Generate `samples_per_prompt` videos for every prompt with the student."""
        with self.policies.using("theta") as student:
            self._rollouts = roll_out(
                student,
                batch,
                self.config.samples_per_prompt,
                self.generator,
                self.streaming,
                to_input=self.to_input,
                keep_last_inputs=True,
            )
        self.shown = Shown(self._rollouts.prompts[0], self._rollouts.x0_BFCHW[0].cpu())

    def _parts(self, rollouts: Rollouts) -> Iterator[slice]:
        return pieces(len(rollouts.prompts), self.config.micro_batch)

    def predict(self, rollouts: Rollouts, part: slice) -> tuple[Tensor, Tensor]:
        """Recompute some videos, float32 with gradients to theta, and their priors [b].

        A prior is mean |v_theta - v_ref|² over the video, 0 if `prior_weight` is 0.
        """
        assert rollouts.last_inputs_BFCHW is not None
        noisy = rollouts.last_inputs_BFCHW[part]
        prior_B = torch.zeros(len(noisy), device=noisy.device)

        def of(name: str) -> Tensor:
            with self.policies.using(name) as student:
                return self._velocity(student, noisy, rollouts, part)

        with torch.no_grad():
            v_ref = self.reference(of)
        with self.policies.using("theta") as student:
            v = self._velocity(student, noisy, rollouts, part)
        if v_ref is not None:
            prior_B = (v - v_ref).square().flatten(1).mean(1)
        return clean(noisy, self.last_t_1K, v), prior_B

    def add_last_step_replay(self, batch: Batch) -> dict[str, float]:
        """`add_replay`, at the last denoising step."""
        replay = batch.replay
        if replay is None:
            return {}
        group = self.config.samples_per_prompt
        rollouts = self.replayed(replay, "theta", group, keep_last_inputs=True)
        assert rollouts.last_inputs_BFCHW is not None
        weight = self.replay_weight * batch.replay_share / (replay.count * group)
        prior = torch.zeros(())
        for part in self._parts(rollouts):
            noisy = rollouts.last_inputs_BFCHW[part]
            with torch.no_grad(), self.policies.using("ref") as student:
                v_ref = self._velocity(student, noisy, rollouts, part)
            with self.policies.using("theta") as student:
                v = self._velocity(student, noisy, rollouts, part)
            loss_B = (v - v_ref).square().flatten(1).mean(1)
            self.optimizer.add(loss_B.sum() * weight)
            prior += loss_B.detach().sum().cpu() / (replay.count * group)
        self.ranks.sum_([prior])
        return {"student/replay_prior": float(prior)}

    def _velocity(self, student: Student, noisy: Tensor, rollouts: Rollouts, part: slice) -> Tensor:
        x0_BFCHW, text_BLE = rollouts.x0_BFCHW[part], rollouts.text_BLE[part]
        t_BK, noise = self.last_t_1K.expand(len(noisy), -1), self.streaming.context_noise
        if self.config.context == "recompute":
            v = student.velocity(noisy, t_BK, text_BLE, x0_BFCHW=x0_BFCHW, context_noise=noise)
            return v.float()
        with torch.no_grad():
            context = student.clean_context(x0_BFCHW, text_BLE, context_noise=noise)
        return student.velocity(noisy, t_BK, text_BLE, context).float()

    def _finish_update(self, **of_videos: Sequence[Tensor]) -> dict[str, float]:
        """Update theta from the accumulated gradients, then its average.

        `of_videos`: per-video values in parts; their means over all processes become metrics.
        """
        metrics = self.optimizer.step()
        decay = ramped_decay(self.config.ema_decay, self.optimizer.updates - 1)
        self.policies.average("ema", "theta", decay)
        means = {key: self.ranks.gather(torch.cat([*x])).mean() for key, x in of_videos.items()}
        return metrics | {f"student/{key}": float(mean) for key, mean in means.items()}

    def evaluation_policy(self) -> AbstractContextManager[Student]:
        """Context with the averaged student."""
        return self.policies.using("ema")


def pieces(count: int, size: int | None) -> Iterator[slice]:
    """Slices of at most `size` that cover `count` items; None: one slice."""
    width = size or max(count, 1)
    return (slice(start, min(start + width, count)) for start in range(0, count, width))


def clean(x_t_BFCHW: Tensor, t_BK: Tensor, v_BFCHW: Tensor) -> Tensor:
    """x0 = x_t - t v; t float32, per video [B or 1, 1] or chunk [B or 1, K]."""
    t_BF = t_BK.repeat_interleave(v_BFCHW.shape[1] // t_BK.shape[1], 1)
    return x_t_BFCHW - t_BF[..., None, None, None] * v_BFCHW
