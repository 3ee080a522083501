"""Base class of the methods: the student's versions, its denoising settings and its optimizer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, Protocol

import torch
from torch import Generator, Tensor

from afd.discriminators.base import Discriminator
from afd.distributed import ALONE, Ranks
from afd.methods.base import Batch, Shown
from afd.methods.config import ReplayConfig, StudentOptimizerConfig, TimesConfig
from afd.methods.copies import Copies, draw_copies
from afd.methods.generation import Streaming
from afd.methods.inputs import InputPipeline
from afd.methods.optimizer import StudentOptimizer
from afd.methods.rollouts import Rollouts, roll_out
from afd.models.codec import Codec, Pixels
from afd.models.policies import Policies
from afd.rewards.base import Reward
from afd.video.config import VideoConfig


class Stateful(Protocol):
    """A part of a method that a checkpoint holds."""

    def state_dict(self) -> Any: ...

    def load_state_dict(self, state: Any, /) -> None: ...


class StudentMethod:
    """State and behaviour common to every `Method`.

    Attributes:
        stateful: the parts a checkpoint holds, by key; a method adds its own. None: absent.

    Args:
        policies: the versions of the student's weights, including "theta".
        discriminator: scores the videos; None: the method has none, and the teacher's videos are
            given as latents.
        rewards: frozen scorers of the videos.
        denoising_steps, first_chunk_steps, context_noise: the student's denoising settings
            (`afd.rollout.stream`).
        codec: between the student's space and pixels.
        video: with its `codec_match` the student's videos are passed through h264 if the
            discriminator takes pixels.
        rollout_batch: videos streamed and decoded together; None: all.
        rollout_overlap: whether those are decoded and rated while the next are streamed.
        seed: seeds every random draw of the method.
        replay: settings of replayed prompts.
    """

    def __init__(
        self,
        policies: Policies,
        config: StudentOptimizerConfig,
        discriminator: Discriminator | None = None,
        *,
        rewards: Sequence[Reward] = (),
        denoising_steps: Sequence[float],
        codec: Codec | None = None,
        video: VideoConfig | None = None,
        ranks: Ranks = ALONE,
        first_chunk_steps: Sequence[float] | None = None,
        context_noise: float = 0.0,
        rollout_batch: int | None = None,
        rollout_overlap: bool = True,
        seed: int = 0,
        replay: ReplayConfig | None = None,
    ) -> None:
        self.policies, self.ranks, self.codec = policies, ranks, codec or Pixels()
        self.config: StudentOptimizerConfig = config
        self.input_space: Literal["pixels", "latents"] = (
            "latents" if discriminator is None else discriminator.input_space
        )
        self._discriminator = discriminator
        self.to_input = None
        if discriminator is not None or rewards:
            self.to_input = InputPipeline(discriminator, self.codec, video, rewards)
        rolled = rollout_batch, rollout_overlap
        self.streaming = Streaming(denoising_steps, first_chunk_steps, context_noise, *rolled)
        student = policies.student
        self.chunks = student.frames // student.chunk
        self.times = student.times(denoising_steps)
        self.first_times = student.times(first_chunk_steps) if first_chunk_steps else None
        self.generator = Generator().manual_seed(seed)
        # Of its own, so that other draws are those of a run without replay.
        self._replay_generator: Generator | None = None
        self.replay_weight = float(getattr(config, "prior_weight", 0.0))
        if replay is not None and replay.fraction > 0:
            self._replay_generator = Generator().manual_seed(seed ^ 0x5E91A7)
            self.replay_weight = replay.weight or self.replay_weight
        self.optimizer = StudentOptimizer(policies.weights("theta"), config, ranks)
        self.stateful: dict[str, Stateful | None] = {
            "policies": policies,
            "optimizer": self.optimizer,
        }
        self.shown: Shown | None = None
        self._rollouts: Rollouts | None = None

    def reference(self, velocity: Callable[[str], Tensor]) -> Tensor | None:
        """What the prior holds on to: the mean of its references' velocities by their weights; None
        without a prior. Its gradient is that of one prior per reference.

        `velocity`: that of a frozen version, without gradient.
        """
        shares: dict[str, float] = {}
        for name, weight in self.config.references.items():
            version = self.policies.reference(name)
            shares[version] = shares.get(version, 0.0) + weight
        if len(shares) == 1:
            return velocity(*shares)
        total = sum(shares.values())
        parts = [velocity(version) * (weight / total) for version, weight in shares.items()]
        return torch.stack(parts).sum(0) if parts else None

    @property
    def prior_weight(self) -> float:
        """Weight of the prior to the mean of its references."""
        weight = float(getattr(self.config, "prior_weight", 0.0))
        return weight * sum(self.config.references.values())

    def prepare(self, video_BFCHW: Tensor) -> Tensor:
        """Reduce a teacher's video [-1, 1] to what is stored when `input_space` is "pixels"."""
        return (
            video_BFCHW if self._discriminator is None else self._discriminator.prepare(video_BFCHW)
        )

    # --- replay ---

    def replay_velocities(self, rollouts: Rollouts, copies: Copies) -> tuple[Tensor, Tensor]:
        """Velocities of theta, with gradients, and of the start at the copies of replayed rollouts,
        [N, F, C, H, W]; 0 in chunks that were not drawn. Implemented by methods that replay."""
        raise NotImplementedError

    def add_replay(
        self, batch: Batch, policy: str, per_prompt: int, *, keep_context: bool = False
    ) -> dict[str, float]:
        """Add the loss of an update's replayed prompts to the optimizer's gradients: the prior to
        the start on `per_prompt` rollouts of each by a version of the student."""
        replay, config = batch.replay, self.config
        if replay is None:
            return {}
        assert isinstance(config, TimesConfig)
        rollouts = self.replayed(replay, policy, per_prompt, keep_context=keep_context)
        assert self._replay_generator is not None
        copies = draw_copies(
            config,
            replay.count * per_prompt,
            self.chunks,
            self.times,
            self._replay_generator,
            own=replay.own(per_prompt),
            first_times=self.first_times,
        )
        drawn = self.chunks if copies.chunks_NM is None else copies.chunks_NM.shape[1]
        prior = torch.zeros(())
        for piece in copies.pieces(config.micro_batch):
            v_theta, v_ref = self.replay_velocities(rollouts, piece)
            loss = (v_theta - v_ref).float().square().mean() * (self.chunks / drawn)
            self.optimizer.add(loss * (self.replay_weight * piece.share * batch.replay_share))
            prior += loss.detach().cpu() * piece.share
        self.ranks.sum_([prior])
        return {"student/replay_prior": float(prior)}

    def replayed(self, replay: Batch, policy: str, per_prompt: int, **kept: Any) -> Rollouts:
        """Rollouts of the replayed prompts by a version of the student, unscored. `kept`: see
        `roll_out`."""
        assert self._replay_generator is not None
        with self.policies.using(policy) as student:
            return roll_out(
                student, replay, per_prompt, self._replay_generator, self.streaming, **kept
            )

    def _current(self) -> Rollouts:
        """This update's rollouts."""
        if self._rollouts is None:
            raise RuntimeError(
                "no rollouts: call rollout(batch) before discriminator_step, student_step"
            )
        return self._rollouts

    def state_dict(self) -> dict[str, Any]:
        """State of every part, and of the random numbers."""
        state = {
            key: None if part is None else part.state_dict() for key, part in self.stateful.items()
        }
        replay = self._replay_generator
        drawn = {} if replay is None else {"replay_generator": replay.get_state()}
        return state | {"generator": self.generator.get_state()} | drawn

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for key, part in self.stateful.items():
            if part is not None:
                part.load_state_dict(state[key])
        self.generator.set_state(state["generator"])
        if self._replay_generator is not None:
            self._replay_generator.set_state(state["replay_generator"])
        self._rollouts = None
