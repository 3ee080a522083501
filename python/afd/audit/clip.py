"""A clip as the audit sees it: the facts of its file, and all frames as small pictures.

Shape letters: F frames, H x W pixels of a thumbnail.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor
from torch.nn.functional import interpolate

from afd.errors import VideoError
from afd.video import DEFAULT_LIMITS, Limits
from afd.video.picture import displayed_size
from afd.video.source import opened
from afd.video.timeline import decoded

# Longer side of a thumbnail in pixels. Of a longer clip this many to twice as many frames are kept.
SIDE, FRAMES = 64, 48


@dataclass(frozen=True)
class Clip:
    """A teacher's or a student's video.

    Attributes:
        name: its file, or a number for a rollout.
        prompt: what it was asked for.
        problem: why it cannot be read; None if it can. All later attributes are then empty.
        frames_FHWC: float32 in [0, 1], evenly spaced frames with a longer side of at most SIDE.
        frames, height, width, fps, codec, path: of the file.
    """

    name: str
    prompt: str
    problem: str | None
    frames_FHWC: np.ndarray
    frames: int = 0
    height: int = 0
    width: int = 0
    fps: float = 0.0
    codec: str = ""
    path: Path | None = None

    @property
    def seconds(self) -> float:
        return self.frames / self.fps if self.fps else 0.0


def read(path: Path, prompt: str, name: str = "", limits: Limits = DEFAULT_LIMITS) -> Clip:
    """Read a file; one that cannot be read becomes a clip with a `problem`."""
    name = name or path.name
    try:
        return _read(path, prompt, name, limits)
    except (VideoError, OSError, ValueError, RuntimeError) as error:
        return Clip(name, prompt, str(error), np.zeros((0, 1, 1, 3), np.float32), path=path)


def _read(path: Path, prompt: str, name: str, limits: Limits) -> Clip:
    small: list[np.ndarray] = []
    count, size, last, every = 0, (0, 0), 0.0, 1
    with opened(path, limits=limits) as source:
        codec = source.stream.codec_context.name
        for shown in decoded(source):
            if not count:
                size = displayed_size(source, shown.frame)
            if count % every == 0:
                small.append(_thumbnail(shown.frame, size))
            if len(small) == 2 * FRAMES:
                # The length is known only at the end: keep every second one from here.
                small, every = small[::2], 2 * every
            count, last = count + 1, float(shown.time)
        rate = (count - 1) / last if last > 0 else float(source.stream.average_rate or 0)
    return Clip(name, prompt, None, np.stack(small), count, *size, rate, codec, path)


def _thumbnail(frame: Any, size: tuple[int, int]) -> np.ndarray:
    """A frame, not turned, as float32 [H, W, 3] in [0, 1]."""
    height, width = _smaller(*size)
    small = frame.reformat(width, height, "rgb24", interpolation="AREA", threads=1).to_ndarray()
    return np.asarray(small, np.float32) / 255


def of_tensor(video_FCHW: Tensor, prompt: str, name: str, fps: float) -> Clip:
    """A clip of decoded frames in [-1, 1], such as a student's rollout."""
    frames, _, height, width = video_FCHW.shape
    small = video_FCHW[:: 1 + frames // (2 * FRAMES)].float().cpu()
    shape = _smaller(height, width)
    if shape != (height, width):
        small = interpolate(small, size=shape, mode="bilinear", antialias=True)
    pixels = ((small.clamp(-1, 1) + 1) / 2).permute(0, 2, 3, 1).contiguous().numpy()
    return Clip(name, prompt, None, pixels, frames, height, width, fps, "")


def _smaller(height: int, width: int) -> tuple[int, int]:
    """Rows and columns of a thumbnail."""
    scale = min(1.0, SIDE / max(width, height, 1))
    return max(1, round(height * scale)), max(1, round(width * scale))
