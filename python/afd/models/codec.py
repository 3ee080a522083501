"""What stands between a student's latents and pixels.

Shape letters: B videos, F frames (of video or latent), C channels, H x W size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from torch import Tensor


class Codec(Protocol):
    """Videos [B, F, 3, H, W] in [-1, 1] to latents and back."""

    @property
    def identity(self) -> str | None:
        """What latents depend on besides the video, for a cache; None where they are the video."""
        ...

    def encode(self, video_BFCHW: Tensor) -> Tensor:
        """Latents on the codec's device; the same video always gives the same ones."""
        ...

    def decode(self, latent_BFCHW: Tensor) -> Tensor:
        """Videos in [-1, 1], with gradients to the latents where they ask for them."""
        ...

    def stream(self) -> Callable[[Tensor], Tensor]:
        """A decoder of one batch of streams, called chunk by chunk."""
        ...


class Pixels:
    """The toy's: its latents are the pixels."""

    identity = None

    def encode(self, video_BFCHW: Tensor) -> Tensor:
        return video_BFCHW

    def decode(self, latent_BFCHW: Tensor) -> Tensor:
        return latent_BFCHW

    def stream(self) -> Callable[[Tensor], Tensor]:
        return self.decode
