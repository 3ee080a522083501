"""On-policy adversarial flow distillation (Luo et al., arXiv 2605.26105, with the NFT step of
arXiv 2509.16117).

One step: the old policy rolls out videos; the critic learns to rank the teacher's video of the same
prompt above them; its score becomes an advantage, the advantage an optimality weight r in [0, 1];
the student moves its velocity towards the branch that r prefers.
Shape letters: B rollouts, G rollouts per prompt, F frames, C channels, H x W pixels, K chunks.
"""

from __future__ import annotations

import copy
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Generator, Tensor

from afd import ops
from afd.discriminators.base import Critic
from afd.evaluation.diagnostics import rank_agreement
from afd.methods.base import Batch, StudentOptimizer, draw_times, ema_update
from afd.methods.config import AfdConfig
from afd.models.kv_cache import LayerKV
from afd.models.toy import ToyStudent
from afd.rollout import seeded_noise, stream


@dataclass
class Rollouts:
    """The old policy's videos of one step, with the context it saw while making them."""

    x_BFCHW: Tensor
    prompts: list[str]  # B, group by group
    text_BLE: Tensor
    context: list[LayerKV]


def optimality(
    score_B: Tensor,
    group_size: int,
    config: AfdConfig,
    teacher_B: Tensor | None = None,
    ema: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Advantage A and weight r = clamp(A / (2·adv_clip) + 1/2, 0, 1), each [B].

    `teacher_B` and `ema` are the baselines of that name. A constant group has advantage 0.
    """
    score_PG = score_B.view(-1, group_size)
    if config.baseline == "group":
        baseline = score_PG.mean(1, keepdim=True)
    elif config.baseline == "batch":
        baseline = score_PG.mean()
    elif config.baseline == "teacher":
        if teacher_B is None:
            raise ValueError("teacher_B: None came, baseline='teacher' needs the teacher's scores")
        baseline = teacher_B.view(-1, group_size)
    else:
        baseline = score_PG.mean() if ema is None else torch.tensor(ema)
    advantage_PG = score_PG - baseline
    if config.normalize == "batch":
        advantage_PG = advantage_PG / (advantage_PG.std(correction=0) + 1e-4)
    elif config.normalize == "group":
        spread = advantage_PG.std(1, keepdim=True, correction=0)
        advantage_PG = advantage_PG / (spread + 1e-4)
    advantage_B = advantage_PG.flatten()
    return advantage_B, (advantage_B / (2 * config.adv_clip) + 0.5).clamp(0, 1)


class Afd:
    """AFD on the toy student (see `Method`)."""

    name, needs_rollout, needs_critic = "afd", True, True
    sees: Literal["video", "latent"] = "video"

    def __init__(
        self,
        student: ToyStudent,
        critic: Critic,
        config: AfdConfig,
        steps: list[float],
        critic_warmup: int = 20,
        critic_updates: int = 1,
        seed: int = 0,
    ) -> None:
        self.config, self.steps, self.critic = config, steps, critic
        self.critic_warmup, self.critic_updates = critic_warmup, critic_updates
        self.theta = student
        self.old = copy.deepcopy(student).requires_grad_(False)
        self.ref = copy.deepcopy(student).requires_grad_(False)
        self.generator = Generator().manual_seed(seed)
        self.score_average: float | None = None
        self.optimizer = StudentOptimizer(student, config)
        self._rollouts: Rollouts | None = None

    # --- one step ---

    def look(self, video_BFCHW: Tensor) -> Tensor:
        return video_BFCHW

    def rollout(self, batch: Batch) -> None:
        """Let the old policy make `samples_per_prompt` videos for every prompt."""
        prompts = [p for p in batch.prompts for _ in range(self.config.samples_per_prompt)]
        frames = batch.teacher_BFCHW.shape[1]
        seeds = torch.randint(2**62, (len(prompts),), generator=self.generator)
        toy = self.old.config
        noise = seeded_noise(seeds, (self.old.chunk, toy.wan.in_dim, toy.height, toy.width))
        with torch.no_grad():
            text = self.old.encode(prompts)
            cache = self.old.new_cache(text, frames)
            chunks = stream(self.old, text, noise, frames=frames, steps=self.steps, cache=cache)
            videos = torch.cat(list(chunks), 1)
        # The last chunk's slots hold a denoising step, not its context; no chunk looks at them.
        self._rollouts = Rollouts(videos, prompts, text, cache.self_kv)

    def _current(self) -> Rollouts:
        if self._rollouts is None:
            raise RuntimeError("no rollouts: call rollout(batch) before critic_step, student_step")
        return self._rollouts

    def critic_step(self, batch: Batch) -> dict[str, float]:
        rollouts = self._current()
        teacher = self._matched(batch)
        metrics: dict[str, float] = {}
        for _ in range(self.critic_updates):
            metrics = self.critic.step(teacher, rollouts.x_BFCHW, rollouts.prompts)
        return {f"critic/{key}": value for key, value in metrics.items()}

    def _matched(self, batch: Batch) -> Tensor:
        """Each rollout's teacher video."""
        return batch.teacher_BFCHW.repeat_interleave(self.config.samples_per_prompt, 0)

    def student_step(self, batch: Batch) -> dict[str, float]:
        rollouts = self._current()
        score_B, r_B, metrics = self._weights(batch, rollouts)
        if batch.step % self.config.physics_every == 0:
            metrics |= rank_agreement(
                score_B, rollouts.x_BFCHW, rollouts.prompts, self.config.samples_per_prompt
            )
        if batch.step >= self.critic_warmup:
            loss = self._loss(rollouts, r_B, metrics)
            metrics |= self.optimizer.step(loss)
            metrics["student/old_decay"] = decay = self._decay(self.optimizer.updates)
            ema_update(self.old, self.theta, decay)
        self._rollouts = None
        return metrics

    def _weights(self, batch: Batch, rollouts: Rollouts) -> tuple[Tensor, Tensor, dict[str, float]]:
        """Scores and r, each [B], and what to log about them."""
        config = self.config
        score_B = self.critic.score(rollouts.x_BFCHW, rollouts.prompts)
        used_B, teacher_B = score_B, None
        if config.advantage == "random":
            used_B = torch.randn(score_B.shape, generator=self.generator)
        if config.baseline == "teacher":
            teacher_B = self.critic.score(self._matched(batch), rollouts.prompts)
        _, r_B = optimality(
            used_B, config.samples_per_prompt, config, teacher_B, self.score_average
        )
        mean = float(used_B.mean())
        before = mean if self.score_average is None else self.score_average
        self.score_average = 0.9 * before + 0.1 * mean
        group_std = used_B.view(-1, config.samples_per_prompt).std(1, correction=0)
        return (
            score_B,
            r_B,
            {
                "student/r_mean": float(r_B.mean()),
                "student/r_std": float(r_B.std(correction=0)),
                "student/r_at_0": float((r_B == 0).float().mean()),
                "student/r_at_1": float((r_B == 1).float().mean()),
                "student/score_mean": float(score_B.mean()),
                "student/score_std": float(group_std.mean()),
                "student/zero_std_groups": float((group_std < 1e-6).float().mean()),
            },
        )

    def _loss(self, rollouts: Rollouts, r_B: Tensor, metrics: dict[str, float]) -> Tensor:
        """The NFT loss over `draws` noised copies of every rollout."""
        config = self.config
        x0 = rollouts.x_BFCHW.repeat(config.draws, 1, 1, 1, 1)
        text = rollouts.text_BLE.repeat(config.draws, 1, 1)
        chunks = x0.shape[1] // self.theta.chunk if config.timestep_per == "chunk" else 1
        t_BK = draw_times(config.timesteps, len(x0), chunks, self.steps, self.generator)
        seed = ops.draw_seeds(len(x0), self.generator)
        x_t = ops.forward_noise(x0, t_BK, seed=seed, layout="BFCHW")
        with torch.no_grad():
            v_old = self.old.velocity(x_t, t_BK, text, self._context(self.old, rollouts))
            v_ref = None
            if config.prior_weight > 0:
                v_ref = self.ref.velocity(x_t, t_BK, text, self._context(self.ref, rollouts))
        v_theta = self.theta.velocity(x_t, t_BK, text, self._context(self.theta, rollouts))
        result = ops.nft_loss(
            v_theta=v_theta,
            v_old=v_old,
            v_ref=v_ref,
            x0=x0,
            t=t_BK,
            r=r_B.repeat(config.draws),
            seed=seed,
            nft_beta=config.nft_beta,
            prior_weight=config.prior_weight,
            adv_clip=config.adv_clip,
            weighting=config.weighting,
            layout="BFCHW",
            prior_by_r=config.prior_by_r,
        )
        metrics["student/loss_pos"] = float(result.loss_pos.mean())
        metrics["student/loss_neg"] = float(result.loss_neg.mean())
        metrics["student/prior"] = float(result.prior.mean())
        metrics["student/old_deviation"] = float(result.old_deviation.mean())
        metrics["student/ref_deviation"] = float(result.ref_deviation.mean())
        return result.loss

    def _context(self, student: ToyStudent, rollouts: Rollouts) -> list[LayerKV]:
        """Clean keys and values of the rollouts for one network, repeated for every draw."""
        if self.config.context == "shared_context":
            context = rollouts.context
        else:
            with torch.set_grad_enabled(
                torch.is_grad_enabled() and self.config.context == "recompute"
            ):
                context = student.clean_context(rollouts.x_BFCHW, rollouts.text_BLE)
        copies = (self.config.draws, 1, 1, 1)
        return [(k.repeat(copies), v.repeat(copies)) for k, v in context]

    def _decay(self, update: int) -> float:
        if self.config.old == "current":
            return 0.0
        ramp = self.config.old_decay_slope * (update - self.config.old_decay_start)
        return min(self.config.old_decay, max(0.0, ramp))

    # --- state ---

    def evaluation_policy(self) -> AbstractContextManager[ToyStudent]:
        """The old policy: with old="ema" the average, with old="current" the student itself."""
        return nullcontext(self.old)

    def state_dict(self) -> dict[str, Any]:
        """Weights of all three policies, optimizer, critic and random numbers."""
        return {
            "theta": self.theta.state_dict(),
            "old": self.old.state_dict(),
            "ref": self.ref.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "critic": self.critic.state_dict(),
            "generator": self.generator.get_state(),
            "score_average": self.score_average,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name in ("theta", "old", "ref", "optimizer", "critic"):
            getattr(self, name).load_state_dict(state[name])
        self.generator.set_state(state["generator"])
        self.score_average = state["score_average"]
        self._rollouts = None
