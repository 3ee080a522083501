"""Video-level GAN: softplus(-D) on the student's videos, through its last denoising step.

The discriminator is the same as in AFD, so that only the student's update differs; its loss is
`discriminator.loss`, "gan" for the vanilla GAN. If it takes pixels, the gradient also passes
through the codec, a micro-batch at a time.
Shape letters: B rollouts of this process, F frames, C channels, H x W pixels or latents.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch.nn.functional as F

from afd.discriminators.base import DifferentiableDiscriminator, held
from afd.methods.base import Batch
from afd.methods.config import GanConfig
from afd.methods.last_step import LastStepMethod
from afd.methods.rollouts import Rollouts
from afd.models.policies import Policies


class Gan(LastStepMethod):
    """The GAN baseline (see `Method`); `video.codec_match` is straight-through for its gradient.

    Args:
        policies: the versions of the student required by the configuration.
        how: arguments common to all methods (see `StudentMethod`).
    """

    name = "gan"

    def __init__(
        self,
        policies: Policies,
        discriminator: DifferentiableDiscriminator,
        config: GanConfig,
        **how: Any,
    ) -> None:
        super().__init__(policies, config, discriminator, **how)
        self.discriminator = self.stateful["discriminator"] = discriminator

    def discriminator_step(self, batch: Batch) -> dict[str, float]:
        rollouts = self._current()
        assert rollouts.input_BFCHW is not None
        teacher = batch.teacher_BFCHW.repeat_interleave(self.config.samples_per_prompt, 0)
        metrics: dict[str, float] = {}
        for _ in range(self.discriminator.config.steps_in(batch.update)):
            metrics = self.discriminator.step(teacher, rollouts.input_BFCHW, rollouts.prompts)
        return {f"discriminator/{key}": value for key, value in metrics.items()}

    def student_step(self, batch: Batch) -> dict[str, float]:
        rollouts, metrics = self._current(), {}
        if not self.discriminator.config.learns_alone(batch.update):
            with held(self.discriminator):
                metrics = self._update(rollouts, batch)
        self._rollouts = None
        return metrics

    def _update(self, rollouts: Rollouts, batch: Batch) -> dict[str, float]:
        count = batch.count * self.config.samples_per_prompt
        assert self.to_input is not None
        scores, priors = [], []
        for part in self._parts(rollouts):
            x0_BFCHW, prior_B = self.predict(rollouts, part)
            score_B = self.discriminator.differentiable_score(
                self.to_input(x0_BFCHW), rollouts.prompts[part]
            )
            loss = F.softplus(-score_B).sum() + self.prior_weight * prior_B.sum()
            self.optimizer.add(loss / count * batch.share)
            scores.append(score_B.detach())
            priors.append(prior_B.detach())
        assert self.shown is not None
        self.shown = replace(self.shown, score=float(scores[0][0]))
        replayed = self.add_last_step_replay(batch)
        return replayed | self._finish_update(score_mean=scores, prior=priors)
