"""Adversarial flow distillation of a causal student (arXiv 2605.26105), for any student.

The slowly moving `old` policy generates rollouts; a discriminator, frozen rewards or both score
the finished videos; the score, minus a baseline, becomes a weight r that sets how strongly each
video is reinforced or avoided (DiffusionNFT, arXiv 2509.16117). Shape letters: P prompts, G
rollouts per prompt, B = P G videos, N noised copies of them, F frames, C channels, H x W pixels or
latents, K chunks, L text tokens, E text channels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Generator, Tensor

from afd import ops
from afd.discriminators.base import Discriminator
from afd.methods.ahead import Ahead
from afd.methods.base import Batch, Shown
from afd.methods.config import AfdConfig
from afd.methods.copies import Copies, check_chunks, draw_copies, draw_place
from afd.methods.optimizer import ramped_decay
from afd.methods.rewards import (
    Scores,
    combine,
    metrics_of,
    novelty,
    prior_weights,
    score,
    terms_of,
    with_novelty,
)
from afd.methods.rollout_metrics import rollout_metrics
from afd.methods.rollouts import Rollouts, roll_out
from afd.methods.student_method import StudentMethod
from afd.methods.teachers import Weights, by_teacher, note_losses, pairs, teacher_metrics
from afd.models.policies import Policies
from afd.models.student import Student
from afd.models.wan.types import LayerKV
from afd.rewards.base import Term
from afd_kernels.contracts import require

# Maps update, scores [B], videos [B, F, C, H, W], prompts and rollouts per prompt to metrics.
Watch = Callable[[int, Tensor, Tensor, list[str], int], dict[str, float]]
# Metric names, and the per-copy outputs of the loss op that they report.
MEASURED = {
    "student/loss_pos": "loss_pos",
    "student/loss_neg": "loss_neg",
    "student/prior": "prior",
    "student/old_deviation": "old_deviation",
    "student/ref_deviation": "ref_deviation",
}


class Afd(StudentMethod):
    """AFD (see `Method`).

    Args:
        policies: the versions of the student required by the configuration.
        discriminator: learns from the teacher's videos; None: the frozen rewards alone score.
        watch: called with update, scores [B], videos, prompts and group size after every update's
            scoring; returns metrics.
        rewards: the rewards of the run; without an entry for the discriminator its weight is 1.
        teachers: the weights of several teachers, for each of which the discriminator has a head.
        how: arguments common to all methods (see `StudentMethod`).
    """

    name, needs_rollout = "afd", True

    def __init__(
        self,
        policies: Policies,
        discriminator: Discriminator | None,
        config: AfdConfig,
        watch: Watch | None = None,
        rewards: Sequence[Term] = (),
        teachers: Weights | None = None,
        **how: Any,
    ) -> None:
        frozen = [term.reward for term in rewards if term.reward is not None]
        super().__init__(policies, config, discriminator, rewards=frozen, **how)
        self.watch = watch
        self.config: AfdConfig = config
        self.discriminator = self.stateful["discriminator"] = discriminator
        self.needs_discriminator = self.needs_teacher = discriminator is not None
        self.terms = terms_of(discriminator, rewards)
        self.teachers = teachers
        require(bool(self.terms), "rewards", list(rewards), "one, or a discriminator")
        check_chunks(config, self.chunks)
        # With old="current" the student is its own anchor: v_old is v_theta without gradient.
        self.old = "old" if config.old == "ema" else "theta"
        self.ahead: Ahead | None = None
        if config.delay:
            self.ahead = Ahead(policies, self.old, self.generator, self._roll)
        self.score_average: float | None = None
        # Sum over an update's copies of the mean v_theta².
        self._v_square = torch.zeros(())

    # --- one update ---

    def rollout(self, batch: Batch) -> None:
        """Generate `samples_per_prompt` videos for every prompt with the old policy."""
        if self.ahead is not None:
            self._rollouts = self.ahead.take(batch)
            return
        with self.policies.using(self.old) as student:
            self._rollouts = self._roll(batch, student, self.generator)

    def roll_ahead(self, batch: Batch | None) -> None:
        """With `afd.async=1`: begin the rollouts of the next update (`Ahead.begin`)."""
        assert self.ahead is not None
        self.ahead.begin(batch)

    def close(self) -> None:
        """Stop rollouts that have begun; the method is not used any more."""
        if self.ahead is not None:
            self.ahead.close()

    def _roll(self, batch: Batch, student: Student, generator: Generator) -> Rollouts:
        config = self.config
        return roll_out(
            student,
            batch,
            config.samples_per_prompt,
            generator,
            self.streaming,
            to_input=self.to_input,
            keep_context=config.context == "shared_context" and config.keep_context,
            place=draw_place(config, self.chunks, student.chunk, generator),
            switch_mode=config.stream_switch or "plain",
            # A reward may share its network with the discriminator, which learns meanwhile.
            rate=self.ahead is None,
            check=None if self.ahead is None else self.ahead.check,
        )

    def discriminator_step(self, batch: Batch) -> dict[str, float]:
        rollouts, metrics = self._current(), dict[str, float]()
        if self.discriminator is None:
            return metrics
        assert rollouts.input_BFCHW is not None
        group = self.config.samples_per_prompt
        made = pairs(batch, rollouts.input_BFCHW, group, self.teachers is not None)
        given = made.teacher_BFCHW, made.student_BFCHW, made.prompts
        for number in range(self.discriminator.config.steps_in(batch.update)):
            metrics = self.discriminator.step(*given, **made.more)
            if number == 0 and batch.robust is not None:
                margins_B = cast("Any", self.discriminator).margins_B
                noted = note_losses(batch, made, margins_B, self.ranks)
        metrics = {f"discriminator/{key}": value for key, value in metrics.items()}
        return metrics if batch.robust is None else metrics | noted

    def student_step(self, batch: Batch) -> dict[str, float]:
        rollouts = self._current()
        group = self.config.samples_per_prompt
        assert self.to_input is not None
        terms = self.terms
        if self.teachers is not None:
            terms = by_teacher(terms, self.teachers(batch.update))
        scores = score(terms, self.discriminator, self.to_input, rollouts)
        whole_BR = self.ranks.gather(scores.each_RB.T.contiguous())
        novelty_B = None
        if self.config.diversity_weight > 0:
            novelty_B = self.ranks.gather(novelty(rollouts.x0_BFCHW, group))
        whole = Scores(terms, whole_BR.T.contiguous())
        result, prior, metrics = self._weights(batch, whole, novelty_B)
        own = batch.own(group)
        r_B, prior = result.r[own], prior[own] if isinstance(prior, Tensor) else prior
        first = rollouts.x0_BFCHW[0].cpu()
        self.shown = Shown(rollouts.prompts[0], first, scores.shown(0), float(r_B[0]))
        place, config = rollouts.place, self.config
        own_BFCHW = rollouts.x0_BFCHW[:, place.first * self.policies.student.chunk :]
        metrics |= rollout_metrics(own_BFCHW, group, self.ranks)
        if config.group_from_chunk is not None or config.stream_frames is not None:
            metrics |= {"student/from_chunk": float(place.clip + place.first)}
        if self.watch is not None:
            given = scores.total_B, rollouts.x0_BFCHW, rollouts.prompts
            metrics |= self.watch(batch.update, *given, group)
        if not self._waits(batch.update):
            learnt_V = result.selected[own].nonzero().flatten()
            metrics |= self._update(batch, rollouts, r_B, prior, learnt_V)
        self._rollouts = None
        return metrics

    def _waits(self, update: int) -> bool:
        """Whether only the discriminator learns now; never if its score does not count."""
        counts = any(term.reward is None and term.weight > 0 for term in self.terms)
        if self.discriminator is None or not counts:
            return False
        return self.discriminator.config.learns_alone(update)

    def _weights(
        self, batch: Batch, scores: Scores, novelty_B: Tensor | None
    ) -> tuple[ops.Optimality, float | Tensor, dict[str, float]]:
        """Weights r [B], selection and weights of the prior from the scores (and novelty) of all
        processes, and metrics of all."""
        config, score_B = self.config, scores.total_B
        group = config.samples_per_prompt
        scores.refuse_non_finite(batch.update)
        used = scores
        if novelty_B is not None:
            used = with_novelty(scores, novelty_B, config.diversity_weight, group)
        baseline: float | Tensor | None = self.score_average
        if config.advantage == "random":
            random_1B = torch.randn(score_B.shape, generator=self.generator)[None]
            used = Scores((Term("random"),), random_1B)
        if config.baseline == "teacher":
            baseline = self._teacher_scores(batch)
        result = combine(used, config, baseline)
        used_B = used.total_B
        mean = float(used_B.mean())
        before = mean if self.score_average is None else self.score_average
        self.score_average = 0.9 * before + 0.1 * mean
        group_std = used_B.view(-1, group).std(1, correction=0)
        prior = prior_weights(result.disagreement, config) * sum(config.references.values())
        metrics = metrics_of(scores, group) | teacher_metrics(scores, group)
        if len(scores.terms) > 1:
            metrics["student/disagreement"] = float(result.disagreement.abs().mean())
        if isinstance(prior, Tensor):
            metrics["student/prior_share"] = float((prior > 0).float().mean())
        r_B = result.r
        metrics |= {
            "student/r_mean": float(r_B.mean()),
            "student/r_std": float(r_B.std(correction=0)),
            "student/r_at_0": float((r_B == 0).float().mean()),
            "student/r_at_1": float((r_B == 1).float().mean()),
            "student/score_mean": float(score_B.mean()),
            "student/score_std": float(group_std.mean()),
            "student/zero_std_groups": float((group_std < 1e-6).float().mean()),
        }
        return result, prior, metrics

    def _teacher_scores(self, batch: Batch) -> Tensor:
        """Weighted scores [B] of the teacher's video of each rollout, of all processes."""
        assert self.discriminator is not None
        teacher_P = self.discriminator.score(batch.teacher_BFCHW, batch.prompts).float().cpu()
        weight = next(term.weight for term in self.terms if term.reward is None)
        return self.ranks.gather(teacher_P * weight).repeat_interleave(
            self.config.samples_per_prompt
        )

    def _update(
        self,
        batch: Batch,
        rollouts: Rollouts,
        r_B: Tensor,
        prior: float | Tensor,
        learnt_V: Tensor,
    ) -> dict[str, float]:
        """Update the student on noised copies of some rollouts (their indices), then the
        averages."""
        config = self.config
        copies = draw_copies(
            config,
            batch.count * config.learnt_per_prompt,
            self.chunks,
            self.times,
            self.generator,
            own=batch.own(config.learnt_per_prompt),
            first_times=self.first_times,
            from_chunk=rollouts.place.first,
        )
        copies = replace(copies, video_N=learnt_V[copies.video_N])
        sums = torch.zeros(len(MEASURED), dtype=torch.float64)
        self._v_square = torch.zeros((), device=rollouts.x0_BFCHW.device)
        for piece in copies.pieces(config.micro_batch):
            result = self._loss(rollouts, r_B, piece, prior)
            self.optimizer.add(result.loss * (piece.share * batch.share))
            sums += torch.stack([getattr(result, key).sum() for key in MEASURED.values()]).cpu()
        sums = torch.cat([sums, self._v_square.double().cpu()[None]])
        self.ranks.sum_([sums])
        *means, square = (sums / copies.total).tolist()
        metrics = dict(zip(MEASURED, means, strict=True)) | {"student/v_rms": square**0.5}
        keep = config.context == "shared_context" and config.keep_context
        metrics |= self.add_replay(batch, self.old, config.samples_per_prompt, keep_context=keep)
        metrics |= self.optimizer.step()
        if self.old == "old":
            metrics["student/old_decay"] = decay = self._decay(self.optimizer.updates)
            self.policies.average("old", "theta", decay)
        if config.ema_decay is not None:
            decay = ramped_decay(config.ema_decay, self.optimizer.updates - 1)
            self.policies.average("ema", "theta", decay)
        return metrics

    def _loss(
        self, rollouts: Rollouts, r_B: Tensor, copies: Copies, prior: float | Tensor
    ) -> ops.NftLoss:
        """NFT loss, averaged over some of the copies. `prior`: its weight, or one per video [B]."""
        config = self.config
        x0 = rollouts.x0_BFCHW[copies.video_N]
        x_t = copies.noise(x0)
        if isinstance(prior, Tensor):
            prior = prior[copies.video_N].to(x0.device)
        shared = self._shared_context(rollouts, copies)
        with torch.no_grad():
            v_old = self._velocity(self.old, x0, x_t, rollouts, copies, shared)
            v_ref = self.reference(
                lambda name: self._velocity(name, x0, x_t, rollouts, copies, shared)
            )
        # The trained policy comes last: its backward follows.
        v_theta = self._velocity("theta", x0, x_t, rollouts, copies, shared)
        mask_NF = copies.mask(x0.shape[1], self.policies.student.chunk)
        # v is 0 in chunks that were not drawn.
        drawn = self.chunks if copies.chunks_NM is None else copies.chunks_NM.shape[1]
        norm = torch.linalg.vector_norm(v_theta.detach(), dtype=torch.float32)
        self._v_square += norm.square() * (self.chunks / drawn / v_theta[0].numel())
        return ops.nft_loss(
            v_theta=v_theta,
            v_old=v_old,
            v_ref=v_ref,
            x0=x0,
            t=copies.t_NK.to(x0.device),
            r=r_B[copies.video_N].to(x0.device),
            seed=copies.seed_N.to(x0.device),
            nft_beta=config.nft_beta,
            prior_weight=prior,
            prior_space=config.prior_space,
            adv_clip=config.adv_clip,
            weighting=config.weighting,
            layout="BFCHW",
            frame_mask=None if mask_NF is None else mask_NF.to(x0.device),
            prior_by_r=config.prior_by_r,
        )

    def replay_velocities(self, rollouts: Rollouts, copies: Copies) -> tuple[Tensor, Tensor]:
        x0 = rollouts.x0_BFCHW[copies.video_N]
        x_t, shared = copies.noise(x0), self._shared_context(rollouts, copies)
        with torch.no_grad():
            v_ref = self._velocity("ref", x0, x_t, rollouts, copies, shared)
        return self._velocity("theta", x0, x_t, rollouts, copies, shared), v_ref

    def _velocity(
        self,
        name: str,
        x0_NFCHW: Tensor,
        x_t_NFCHW: Tensor,
        rollouts: Rollouts,
        copies: Copies,
        shared: list[LayerKV] | None,
    ) -> Tensor:
        """A version's velocity at x_t, in its shape; 0 in chunks that were not drawn."""
        config, noise = self.config, self.streaming.context_noise
        with self.policies.using(name) as student:
            context = shared
            if config.context == "own_context":
                context = self._clean_context(student, rollouts, copies)
            elif config.context == "recompute":
                context = rollouts.past(copies.video_N)
            v_NFCHW = student.velocity(
                copies.drawn(x_t_NFCHW, student.chunk),
                copies.drawn_t.to(x0_NFCHW.device),
                rollouts.text_BLE[copies.video_N],
                context,
                x0_BFCHW=x0_NFCHW if config.context == "recompute" else None,
                context_noise=noise,
                chunks_BN=copies.chunks_NM,
                start_frame=rollouts.start_frame,
            )
            return copies.whole(v_NFCHW, x0_NFCHW.shape[1], student.chunk)

    def _shared_context(self, rollouts: Rollouts, copies: Copies) -> list[LayerKV] | None:
        """The old policy's clean context if all versions share it; else None."""
        if self.config.context != "shared_context":
            return None
        if rollouts.contexts:
            return rollouts.context(copies.video_N)
        with self.policies.using(self.old) as student:
            return self._clean_context(student, rollouts, copies)

    @torch.no_grad()
    def _clean_context(self, student: Student, rollouts: Rollouts, copies: Copies) -> list[LayerKV]:
        """A network's clean context of the copies' videos, computed once per distinct video."""
        video_V, copy_N = copies.video_N.unique(return_inverse=True)
        context = student.clean_context(
            rollouts.x0_BFCHW[video_V],
            rollouts.text_BLE[video_V],
            context_noise=self.streaming.context_noise,
            past=rollouts.past(video_V),
            start_frame=rollouts.start_frame,
        )
        if torch.equal(video_V, copies.video_N):
            return context
        return [(k[copy_N], v[copy_N]) for k, v in context]

    def _decay(self, update: int) -> float:
        ramp = self.config.old_decay_slope * (update - self.config.old_decay_start)
        return min(self.config.old_decay, max(0.0, ramp))

    # --- state ---

    def evaluation_policy(self) -> AbstractContextManager[Student]:
        """Context with the EMA kept for evaluation if enabled; else the old or current policy."""
        return self.policies.using(self.old if self.config.ema_decay is None else "ema")

    def state_dict(self) -> dict[str, Any]:
        state = super().state_dict() | {"score_average": self.score_average}
        return state if self.ahead is None else state | {"ahead": self.ahead.seed}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.score_average = state["score_average"]
        if self.ahead is not None:
            self.ahead.load(state["ahead"])
