"""The released students: the causal Wan network with its noise schedule and text encoder.

The network predicts the flow (noise minus video) of latents [B, F, 16, H/8, W/8]. Shape letters: B
videos, F latent frames, C channels, H x W latent size, L text tokens, E text channels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from afd.models.noise import EndlessLayout, Layout, NoiseSource, counted_noise
from afd.models.student import Level, Student
from afd.models.wan.network import CausalWan
from afd.schedules import ShiftedFlow, check_steps
from afd_kernels.contracts import require

# prompts -> embeddings [B, text_len, text_dim], zero past the prompt's length.
TextEncoder = Callable[[list[str]], Tensor]


class WanStudent(Student):
    """A Self-Forcing or Causal-Forcing student.

    Args:
        net: the network; its configuration holds window and sink.
        height: rows of a latent frame (pixels / 8).
        width: columns of a latent frame (pixels / 8).
        frames: latent frames of a training video.
        schedule: the table of timesteps and noise levels.
        encoder: used by `encode`; None if embeddings come from elsewhere.
    """

    net: CausalWan

    def __init__(
        self,
        net: CausalWan,
        *,
        height: int = 60,
        width: int = 104,
        frames: int = 21,
        schedule: ShiftedFlow | None = None,
        encoder: TextEncoder | None = None,
    ) -> None:
        super().__init__(net)
        net.config.grid(height, width)
        self.height, self.width = height, width
        self.schedule = schedule or ShiftedFlow()
        self._frames, self._encoder = frames, encoder

    @property
    def text_identity(self) -> str | None:
        """Identity of the text encoder's files, if `encoder` reports it; else None."""
        return getattr(self._encoder, "identity", None)

    @property
    def frames(self) -> int:
        return self._frames

    @property
    def frame_shape(self) -> tuple[int, int, int]:
        return self.net.config.in_dim, self.height, self.width

    def encode(self, prompts: list[str]) -> Tensor:
        """Text embeddings [B, L, E] on the student's device, in its dtype."""
        require(self._encoder is not None, "encoder", None, "a text encoder, or embeddings")
        assert self._encoder is not None
        return self._encoder(prompts).to(self.device, self.dtype)

    def keep_text_encoder(self) -> None:
        """Keep the text encoder in memory, if it otherwise is loaded for new prompts."""
        keep = getattr(self._encoder, "keep", None)
        if keep is not None:
            keep()

    def levels(self, steps: Sequence[float]) -> list[Level]:
        """Convert steps, integers before the warp that descend from 1000 and stay above 0."""
        check_steps(steps, first=1000)
        times = self.schedule.warp(steps)
        return [Level.at(t, self.schedule.sigma_of(t), self.device) for t in times]

    def times(self, steps: Sequence[float]) -> list[float]:
        """The noise levels of the warped steps."""
        return [level.sigma for level in self.levels(steps)]

    def noise_source(
        self, seeds: Sequence[int] | Tensor, layout: Layout | EndlessLayout, draws: int
    ) -> NoiseSource:
        """Counter-based noise of (seed, chunk, step), generated on the student's device."""
        return counted_noise(
            [int(seed) for seed in seeds],
            layout,
            draws,
            self.frame_shape,
            device=self.device,
            dtype=self.dtype,
        )
