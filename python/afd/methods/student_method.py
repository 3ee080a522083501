"""Base class of the methods: the student's versions, its denoising settings and its optimizer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, Protocol

from torch import Generator, Tensor

from afd.discriminators.base import Discriminator
from afd.distributed import ALONE, Ranks
from afd.methods.base import Shown
from afd.methods.config import StudentOptimizerConfig
from afd.methods.optimizer import StudentOptimizer
from afd.methods.rollouts import InputPipeline, Rollouts, Streaming
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
        seed: seeds every random draw of the method.
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
        seed: int = 0,
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
        self.streaming = Streaming(denoising_steps, first_chunk_steps, context_noise, rollout_batch)
        student = policies.student
        self.chunks = student.frames // student.chunk
        self.times = student.times(denoising_steps)
        self.first_times = student.times(first_chunk_steps) if first_chunk_steps else None
        self.generator = Generator().manual_seed(seed)
        self.optimizer = StudentOptimizer(policies.weights("theta"), config, ranks)
        self.stateful: dict[str, Stateful | None] = {
            "policies": policies,
            "optimizer": self.optimizer,
        }
        self.shown: Shown | None = None
        self._rollouts: Rollouts | None = None

    def prepare(self, video_BFCHW: Tensor) -> Tensor:
        """Reduce a teacher's video [-1, 1] to what is stored when `input_space` is "pixels"."""
        return (
            video_BFCHW if self._discriminator is None else self._discriminator.prepare(video_BFCHW)
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
        return state | {"generator": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for key, part in self.stateful.items():
            if part is not None:
                part.load_state_dict(state[key])
        self.generator.set_state(state["generator"])
        self._rollouts = None
