"""Typed settings of videos: size, frame rate, length, and decoding limits."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from afd.config.base import Count, Natural, Positive, Section
from afd.video.source import Limits

# Frames per second of a student's videos if none are configured: that of the released students.
DEFAULT_FPS = 16.0


class VideoConfig(Section):
    """The size, frame rate and length of a run's videos, and how clips are converted to them."""

    frames: Count = Field(default=12, description="frames per video")
    height: Count = Field(default=16, description="height of a frame in pixels")
    width: Count = Field(default=16, description="width of a frame in pixels")
    fps: Annotated[float, Field(ge=1e-3, le=1e4)] | None = Field(
        default=None,
        description="resample clips to this rate (nearest frame in time); null: keep their rate",
    )
    short: Literal["error", "repeat"] = Field(
        default="error",
        description="a clip that is too short: refuse it, or repeat its last frame",
    )

    hdr: Literal["tonemap", "refuse"] = Field(
        default="tonemap",
        description="HDR clips (HLG or PQ): map them to BT.709, reference white to white, or "
        "refuse them",
    )
    max_pixels: Count = Field(
        default=2**25, description="a clip with larger stored frames is refused before decoding"
    )
    max_frames: Count = Field(default=500_000, description="a clip with more frames is refused")
    max_seconds: Positive = Field(
        default=14_400.0, description="a clip that is read to beyond this time is refused"
    )

    decoder: Literal["tiny"] | None = Field(
        default=None,
        description="tiny: what scores pixels sees the student's and the teacher's latents, both "
        "decoded by student.tiny_vae; null: the student's, decoded by its autoencoder, and the "
        "teacher's clips",
    )
    codec_match: bool = Field(
        default=False,
        description="if the discriminator reads pixels: encode the student's videos with the h264 "
        "codec of the teacher's, so that codec artifacts do not distinguish them; teacher clips "
        "that were scaled are encoded again at this size",
    )
    crf: Natural = Field(default=18, description="rate factor of that codec; lower is better")

    @property
    def rate(self) -> float:
        """Frames per second: `fps`, or DEFAULT_FPS if clips are not resampled."""
        return self.fps or DEFAULT_FPS

    @property
    def limits(self) -> Limits:
        """Decoding limits beyond which a clip is refused."""
        return Limits(self.max_pixels, self.max_frames, self.max_seconds)
