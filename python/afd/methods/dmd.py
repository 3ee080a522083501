"""Score-free distribution matching: DMD's gradient from two learned velocity fields.

The definition is ours: the sources name this baseline without defining it. The teacher is a black
box without scores, so both fields are initialised from the student and fitted here, by flow
matching under teacher forcing: `real` on the teacher's finished videos, `fake` on the student's
own. A finished video x is noised to x_t; the student is moved along

    g = (x0_fake(x_t) - x0_real(x_t)) / mean |x - x0_real(x_t)|

which is DMD's gradient as normalised in Self-Forcing (arXiv 2405.14867, 2506.08009), applied to the
output x of the last denoising step by the loss |x - stopgrad(x - g)|² / 2. Both fields attend to
clean earlier chunks of the same video, as the student does: they compare, chunk by chunk, the
possible continuations of the student's own past.
Shape letters: B rollouts, G rollouts per prompt, F frames, C channels, H x W pixels or latents, K
chunks, L text tokens, E text channels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from afd import ops
from afd.methods.base import Batch, draw_times
from afd.methods.config import FIELDS, DmdConfig
from afd.methods.last_step import LastStepMethod, clean, pieces
from afd.methods.optimizer import StudentOptimizer
from afd.methods.rollouts import Rollouts
from afd.models.policies import Policies
from afd.models.student import Student

# (smallest, power): the squared x0 error is divided by max(t, smallest)^power, since |v - v*|² is
# |x0 - x0*|² / t².
WEIGHTING = {"x0": (0.1, 1), "velocity": (1e-3, 2)}


class Dmd(LastStepMethod):
    """The DMD baseline (see `Method`); its `discriminator_step` fits the two fields.

    Args:
        policies: the versions of the student required by the configuration.
        how: arguments common to all methods (see `StudentMethod`).
    """

    name = "dmd"

    def __init__(self, policies: Policies, config: DmdConfig, **how: Any) -> None:
        super().__init__(policies, config, **how)
        self.config: DmdConfig = config
        constant = {"learning_rate": config.score_learning_rate, "cosine_updates": None}
        score_config = config.model_copy(update=constant)
        self.fits = {
            name: StudentOptimizer(policies.weights(name), score_config, self.ranks, name)
            for name in FIELDS
        }

    def discriminator_step(self, batch: Batch) -> dict[str, float]:
        """Fit `real` to the teacher's videos and `fake` to the student's videos."""
        rollouts, G = self._current(), self.config.samples_per_prompt
        text_BLE = self.policies.student.encode(batch.prompts)
        teacher_BFCHW = batch.teacher_BFCHW.to(rollouts.x0_BFCHW)
        metrics: dict[str, float] = {}
        for _ in range(self.config.score_updates):
            metrics |= self._fit("real", teacher_BFCHW, text_BLE, batch, 1)
            metrics |= self._fit("fake", rollouts.x0_BFCHW, rollouts.text_BLE, batch, G)
        return metrics

    def _fit(
        self, name: str, x0_BFCHW: Tensor, text_BLE: Tensor, batch: Batch, copies: int
    ) -> dict[str, float]:
        """Update one field; `copies`: videos per prompt."""
        x_t, t_BK = self._noised(x0_BFCHW, batch, copies)
        count = batch.count * copies
        for part in pieces(len(x0_BFCHW), self.config.micro_batch):
            with self.policies.using(name) as student:
                shown = (x0_BFCHW[part], x_t[part], t_BK[part], text_BLE[part])
                error = (self._x0(student, *shown) - x0_BFCHW[part]).square()
                error_BK = error.unflatten(1, (self.chunks, -1)).mean((2, 3, 4, 5))
                smallest, power = WEIGHTING[self.config.score_loss]
                weight_BK = t_BK[part].clamp_min(smallest) ** -power
                self.fits[name].add((error_BK * weight_BK).mean(1).sum() / count)
        return self.fits[name].step()

    def _noised(
        self, x0_BFCHW: Tensor, batch: Batch, copies: int, clamp: tuple[float, float] = (0.0, 1.0)
    ) -> tuple[Tensor, Tensor]:
        """x_t in x0's shape and its times [B, K]; random numbers are drawn for all processes."""
        config, count, own = self.config, batch.count * copies, batch.own(copies)
        t_BK = draw_times(config.timesteps, count, self.chunks, self.times, self.generator)
        if config.timesteps == "student" and self.first_times is not None:
            t_BK[:, :1] = draw_times("student", count, 1, self.first_times, self.generator)
        seed_B = ops.draw_seeds(count, self.generator)[own].to(x0_BFCHW.device)
        t_BK = t_BK[own].clamp(*clamp).to(x0_BFCHW.device)
        return ops.forward_noise(x0_BFCHW, t_BK, seed=seed_B, layout="BFCHW"), t_BK

    def _x0(
        self, student: Student, x0_BFCHW: Tensor, x_t: Tensor, t_BK: Tensor, text_BLE: Tensor
    ) -> Tensor:
        """A field's prediction of the clean video, each chunk given x's clean past; float32."""
        noise = self.streaming.context_noise
        context = student.clean_context(x0_BFCHW, text_BLE, context_noise=noise)
        return clean(x_t, t_BK, student.velocity(x_t, t_BK, text_BLE, context).float())

    def student_step(self, batch: Batch) -> dict[str, float]:
        rollouts, metrics = self._current(), {}
        if self.fits["fake"].updates >= self.config.score_warmup_updates:
            metrics = self._update(rollouts, batch)
        self._rollouts = None
        return metrics

    def _update(self, rollouts: Rollouts, batch: Batch) -> dict[str, float]:
        config, count = self.config, batch.count * self.config.samples_per_prompt
        x_t, t_BK = self._noised(
            rollouts.x0_BFCHW, batch, config.samples_per_prompt, clamp=config.t_range
        )
        sizes, priors = [], []
        for part in self._parts(rollouts):
            shown = (rollouts.x0_BFCHW[part], x_t[part], t_BK[part], rollouts.text_BLE[part])
            g_BFCHW = self._direction(*shown)
            x0_BFCHW, prior_B = self.predict(rollouts, part)
            moved = (x0_BFCHW - (x0_BFCHW - g_BFCHW).detach()).square().flatten(1).mean(1) / 2
            self.optimizer.add((moved + self.prior_weight * prior_B).sum() / count)
            sizes.append(g_BFCHW.abs().flatten(1).mean(1))
            priors.append(prior_B.detach())
        return self._finish_update(direction=sizes, prior=priors)

    @torch.no_grad()
    def _direction(self, x0_BFCHW: Tensor, x_t: Tensor, t_BK: Tensor, text_BLE: Tensor) -> Tensor:
        """The normalised difference g of the fields' predictions, in x's shape."""
        seen = {}
        for name in FIELDS:
            with self.policies.using(name) as student:
                seen[name] = self._x0(student, x0_BFCHW, x_t, t_BK, text_BLE)
        size_B = (x0_BFCHW - seen["real"]).abs().flatten(1).mean(1).clamp_min(1e-5)
        return (seen["fake"] - seen["real"]) / size_B[:, None, None, None, None]

    def state_dict(self) -> dict[str, Any]:
        fits = {name: fit.state_dict() for name, fit in self.fits.items()}
        return super().state_dict() | {"fits": fits}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        for name, fit in self.fits.items():
            fit.load_state_dict(state["fits"][name])
