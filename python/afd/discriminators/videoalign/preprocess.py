"""VideoAlign's preprocessing: frame sampling, resize, rounding, normalisation, patches.

It follows the released model (KwaiVGI/VideoAlign, `vision_process.py`, and Qwen2-VL's image
processor); everything runs on the video's device and is differentiable with respect to its pixels.
Shape letters: B videos, F frames, N sampled frames, C = 3 colours, H x W pixels, P patches.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor
from torch.nn.functional import interpolate

from afd_kernels.contracts import require

PATCH, MERGE, TEMPORAL = 14, 2, 2
FACTOR = PATCH * MERGE
# Numbers per patch: colours x temporal patch x rows x columns.
PATCH_DIM = 3 * TEMPORAL * PATCH * PATCH
MIN_PIXELS = 128 * FACTOR * FACTOR
MIN_FRAMES, MAX_FRAMES = 4, 768
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)


def frame_indices(
    total: int, video_fps: float, *, fps: float = 2.0, count: int | None = None
) -> Tensor:
    """Sampled frames of a clip of `total`: int64 [N], evenly spaced, including both ends.

    N is the clip's length at `fps`, at least 4 (if the clip has as many) and even; `count` requests
    a number of frames instead, rounded to even and reduced only if the clip has fewer.
    """
    require(total >= 1, "total", total, "at least one frame")
    if count is None:
        require(video_fps > 0 and fps > 0, "video_fps, fps", (video_fps, fps), "positive rates")
        most = min(MAX_FRAMES, total) // 2 * 2
        wanted = min(max(total / video_fps * fps, MIN_FRAMES), most)
    else:
        require(count >= 1, "count", count, "a positive number of frames")
        wanted = count
    chosen = min(round(wanted / 2) * 2, total)
    return torch.linspace(0, total - 1, chosen).round().long()


def smart_resize(
    height: int, width: int, max_pixels: int, *, min_pixels: int = MIN_PIXELS
) -> tuple[int, int]:
    """Rows and columns after the resize: multiples of 28 with about the frame's aspect ratio and an
    area between the limits. Small frames are enlarged. A `max_pixels` below 28 x 28 may give a side
    of 0.
    """
    require(min(height, width) >= 1, "height, width", (height, width), "positive sizes")
    rows, columns = (max(FACTOR, round(side / FACTOR) * FACTOR) for side in (height, width))
    if rows * columns > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        rows, columns = (math.floor(s / shrink / FACTOR) * FACTOR for s in (height, width))
    elif rows * columns < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        rows, columns = (math.ceil(s * grow / FACTOR) * FACTOR for s in (height, width))
    return rows, columns


def _rounded(x: Tensor) -> Tensor:
    """Rounding with a straight-through gradient."""
    return x + (x.round() - x).detach() if x.requires_grad else x.round()


def resize(frames: Tensor, rows: int, columns: int) -> Tensor:
    """Antialiased bicubic resize of levels 0..255, [..., 3, H, W]; integer levels as float32."""
    levels = frames.float()
    if levels.shape[-2:] != (rows, columns):
        flat = levels.flatten(0, -4)
        flat = interpolate(
            flat, (rows, columns), mode="bicubic", align_corners=False, antialias=True
        )
        levels = flat.unflatten(0, levels.shape[:-3])
    return _rounded(levels.clamp(0, 255))


def patchify(frames_BNCHW: Tensor) -> tuple[Tensor, Tensor]:
    """Normalised patches of levels 0..255, float32 [P, 1176], and the grid (t, h, w) of each video,
    int64 [B, 3] on the CPU. Rows run over t, then blocks of 2 x 2 patches; columns over colour,
    temporal pair, row and column.
    """
    B, count, colours, height, width = frames_BNCHW.shape
    even = count % TEMPORAL == 0 and height % FACTOR == 0 and width % FACTOR == 0
    require(
        colours == 3 and even and min(count, height, width) > 0,
        "frames_BNCHW",
        frames_BNCHW,
        f"[B, even N, 3, H, W] with H and W multiples of {FACTOR}",
    )
    mean, std = (frames_BNCHW.new_tensor(v, dtype=torch.float32).view(3, 1, 1) for v in (MEAN, STD))
    normal = (frames_BNCHW / 255 - mean) / std
    t, h, w = count // TEMPORAL, height // PATCH, width // PATCH
    patches = rearrange(
        normal,
        "B (t pair) c (h mh ph) (w mw pw) -> (B t h w mh mw) (c pair ph pw)",
        pair=TEMPORAL,
        mh=MERGE,
        mw=MERGE,
        ph=PATCH,
        pw=PATCH,
    )
    return patches, torch.tensor([[t, h, w]] * B)


@dataclass(frozen=True)
class Preprocessing:
    """Converts videos to patches, identically for the teacher's and the student's.

    Attributes:
        fps: rate at which frames are sampled.
        count: number of sampled frames instead, if given.
        max_pixels: largest area of a resized frame.
    """

    fps: float = 2.0
    count: int | None = None
    max_pixels: int = 448 * 448

    def choose(self, video_BFCHW: Tensor, video_fps: float) -> Tensor:
        """Sample frames [B, N, 3, H, W] from videos [B, F, 3, H, W]."""
        shape = tuple(video_BFCHW.shape)
        require(
            len(shape) == 5 and shape[2] == 3 and min(shape) > 0,
            "video_BFCHW",
            video_BFCHW,
            "[B, F, 3, H, W] in [-1, 1]",
        )
        chosen_N = frame_indices(shape[1], video_fps, fps=self.fps, count=self.count)
        require(
            len(chosen_N) > 0 and len(chosen_N) % TEMPORAL == 0,
            "video_BFCHW",
            f"{shape[1]} frames, of which {len(chosen_N)} would be taken",
            "an even number of frames to take, two for each temporal patch",
        )
        return video_BFCHW[:, chosen_N.to(video_BFCHW.device)]

    def patches(self, video_BNCHW: Tensor) -> tuple[Tensor, Tensor]:
        """Patches [P, 1176] and grid [B, 3] (see `patchify`) of sampled frames in [-1, 1]."""
        height, width = video_BNCHW.shape[3:]
        rows, columns = smart_resize(height, width, self.max_pixels)
        require(
            min(rows, columns) > 0,
            "max_pixels",
            self.max_pixels,
            f"room for a block of {FACTOR} x {FACTOR} pixels in frames of {height} x {width}",
        )
        # First quantised to 8 bits, as in a decoded file, so that finer levels do not give away
        # either side.
        levels = _rounded(((video_BNCHW.float() + 1) * 127.5).clamp(0, 255))
        return patchify(resize(levels, rows, columns))
