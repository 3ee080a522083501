"""The codec between pixels and a student's latents.

Shape letters: B videos, F frames (of video or latent), C channels, H x W size.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from afd_kernels.contracts import require


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


class FrameDecoder:
    """A stream's decoder that can encode its recent pictures again, each as an image.

    For streams whose context is recomputed and begins at any frame (`afd.rollout.stream`): where
    latents compress time, a video's first latent frame is one picture, and each other one several.

    Args:
        codec: decodes and encodes.
        time: video frames per latent frame after the first.
        kept: number of the newest latent frames whose last pictures are kept.
    """

    def __init__(self, codec: Codec, time: int, kept: int) -> None:
        self._codec, self._time = codec, time
        self._decode = codec.stream()
        self._last: deque[Tensor] = deque(maxlen=kept)
        self._frames = 0

    def __call__(self, latent_BFCHW: Tensor) -> Tensor:
        """Video frames of the stream's next chunk."""
        video_BFCHW = self._decode(latent_BFCHW)
        count = latent_BFCHW.shape[1]
        # Each latent frame ends with its last picture; the stream's first one has no other.
        ends = range(video_BFCHW.shape[1] - 1 - (count - 1) * self._time, video_BFCHW.shape[1])
        self._last += [video_BFCHW[:, end : end + 1].clone() for end in ends[:: self._time]]
        self._frames += count
        return video_BFCHW

    @torch.no_grad()
    def reencode(self, frame: int) -> Tensor:
        """The last picture of a latent frame of the stream, encoded as an image, [B, 1, C, H, W].

        Raises ValueError if it is not one of the newest frames.
        """
        back = self._frames - frame
        inside = 0 < back <= len(self._last)
        needed = f"one of the newest {len(self._last)} of {self._frames} latent frames"
        require(inside, "frame", frame, needed)
        return self._codec.encode(self._last[-back])
