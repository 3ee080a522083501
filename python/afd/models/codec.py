"""The codec between pixels and a student's latents.

Shape letters: B videos, F frames (of video or latent), C channels, H x W size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from torch import Tensor


class Codec(Protocol):
    """Encodes videos [B, F, 3, H, W] in [-1, 1] into latents and decodes them."""

    @property
    def identity(self) -> str | None:
        """Cache key of everything latents depend on besides the video; None for pixels."""
        ...

    def encode(self, video_BFCHW: Tensor) -> Tensor:
        """Latents on the codec's device; deterministic."""
        ...

    def decode(self, latent_BFCHW: Tensor) -> Tensor:
        """Videos in [-1, 1]; differentiable with respect to latents that require a gradient."""
        ...

    def stream(self) -> Callable[[Tensor], Tensor]:
        """A decoder for one batch of streams, called once per chunk."""
        ...


def redecodes(codec: Codec) -> bool:
    """Whether the teacher's pixels pass encoder and decoder too, so that they differ from the
    student's in content only; so if the codec's attribute `redecodes` is true."""
    return bool(getattr(codec, "redecodes", False))


class Pixels:
    """Identity codec of the toy student, whose latents are the pixels."""

    identity = None

    def encode(self, video_BFCHW: Tensor) -> Tensor:
        return video_BFCHW

    def decode(self, latent_BFCHW: Tensor) -> Tensor:
        return latent_BFCHW

    def stream(self) -> Callable[[Tensor], Tensor]:
        return self.decode
