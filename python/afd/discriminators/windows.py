"""Windows of a clip, for scores that are sums of local scores.

A score of the whole clip can be raised by one global property, such as the height at which a ball
starts. A sum over windows can only be raised by what happens in them.
Shape letters: B videos, F frames, N windows, W frames of a window.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from afd.config.base import Positive
from afd.discriminators.base import DiscriminatorConfig
from afd.video.config import VideoConfig
from afd_kernels.contracts import require


class WindowedConfig(DiscriminatorConfig):
    """Settings of a discriminator that can score windows of a clip."""

    window: Positive | None = Field(
        default=None,
        description="seconds of a window: the score is the sum over windows that overlap by half, "
        "each with the prompt; null: one score of the whole clip",
    )

    def check_video(self, video: VideoConfig) -> None:
        """Raise ValueError if a window is longer than these videos. One shorter than a frame is one
        frame."""
        seconds = video.frames / video.rate
        if self.window is not None and self.window > seconds:
            raise ValueError(
                f"discriminator.window: got {self.window:g} s; needed: at most {seconds:g} s, the "
                f"length of the videos ({video.frames} frames at {video.rate:g} per second)"
            )

    def window_frames(self, video: VideoConfig, frames: int, multiple: int = 1) -> int | None:
        """Frames of a window, a multiple of `multiple`, of an input that has `frames` frames: fewer
        than the video in latents or sampled frames. None: the whole clip."""
        if self.window is None:
            return None
        self.check_video(video)
        share = self.window * video.rate / video.frames
        return min(max(1, round(share * frames / multiple)) * multiple, frames)


def window_starts(frames: int, size: int) -> list[int]:
    """First frames of the windows: half a window apart, the last one at the clip's end."""
    require(1 <= size <= frames, "size", size, f"1 to {frames}, the frames of the clip")
    last = frames - size
    return sorted({*range(0, last, max(1, size // 2)), last})


def windows(input_BF: Tensor, size: int) -> Tensor:
    """The windows of inputs [B, F, ...]: [B, N, W, ...]."""
    starts = window_starts(input_BF.shape[1], size)
    return torch.stack([input_BF[:, start : start + size] for start in starts], 1)
