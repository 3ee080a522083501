"""Base class of the methods: the student's versions, its denoising settings and its optimizer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import Generator, Tensor

from afd.discriminators.base import Discriminator
from afd.distributed import ALONE, Ranks
from afd.methods.base import Shown
from afd.methods.config import StudentOptimizerConfig
from afd.methods.optimizer import StudentOptimizer
from afd.methods.rollouts import InputPipeline, Rollouts, Streaming
from afd.models.codec import Codec, Pixels
from afd.models.policies import Policies
from afd.video.config import VideoConfig


class StudentMethod:
    """State and behaviour common to every `Method`.

    Args:
        policies: the versions of the student's weights, including "theta".
        discriminator: scores the videos; None: the method has none, and the teacher's videos are
            given as latents.
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
        self.to_input = (
            None if discriminator is None else InputPipeline(discriminator, self.codec, video)
        )
        self.streaming = Streaming(denoising_steps, first_chunk_steps, context_noise, rollout_batch)
        student = policies.student
        self.chunks = student.frames // student.chunk
        self.times = student.times(denoising_steps)
        self.first_times = student.times(first_chunk_steps) if first_chunk_steps else None
        self.generator = Generator().manual_seed(seed)
        self.optimizer = StudentOptimizer(policies.weights("theta"), config, ranks)
        self.shown: Shown | None = None
        self._rollouts: Rollouts | None = None

    def prepare(self, video_BFCHW: Tensor) -> Tensor:
        """Reduce a teacher's video [-1, 1] to what is stored when `input_space` is "pixels"."""
        return (
            video_BFCHW
            if self.to_input is None
            else self.to_input.discriminator.prepare(video_BFCHW)
        )

    def _current(self) -> Rollouts:
        """This step's rollouts."""
        if self._rollouts is None:
            raise RuntimeError(
                "no rollouts: call rollout(batch) before discriminator_step, student_step"
            )
        return self._rollouts
