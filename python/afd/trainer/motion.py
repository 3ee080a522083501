"""Amount of motion in a video: a proxy for VBench's dynamic degree, by block matching.

VBench computes optical flow with a network (RAFT) between frames 1/8 s apart, averages the largest
5 % of its magnitudes in every pair, and counts a video as dynamic if enough pairs exceed 6 pixels
at a short side of 256. Here the flow is estimated for 8 x 8 blocks of the greyscale picture,
downscaled to a short side of 128: a block's displacement is the one of at most 8 pixels in each
direction with the least absolute difference, and 0 unless that is clearly less than the difference
without displacement. The numbers rank videos of one size similarly to VBench, but are not
comparable with VBench's own.
Shape letters: F frames, N pairs of frames, H x W pixels, h x w blocks.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from afd_kernels.contracts import require

SHORT, BLOCK, REACH = 128, 8, 8
# Frames per second that are compared, fraction of blocks (the largest displacements) that is
# averaged, and threshold in pixels (at a short side of 256) above which a video counts as dynamic.
RATE, LARGEST, DYNAMIC = 8.0, 0.05, 6.0
# A displacement must leave less than this fraction of the difference, and reduce it by this many
# grey levels (of 256) per pixel, so that codec artefacts do not count as motion.
GAIN, NOISE = 0.8, 0.5
DEFINITION = (
    "proxy for VBench's dynamic degree: mean displacement of the twentieth of 8 x 8 blocks that "
    "moves most between frames 1/8 s apart, in pixels at a short side of 256 (own block matching)"
)


@torch.no_grad()
def displacements(video_FCHW: Tensor, fps: float) -> Tensor:
    """Block displacements between frames 1/8 s apart, float32 [N, h, w], of a video in [-1, 1].

    In pixels at a short side of 256.
    """
    shape = tuple(video_FCHW.shape)
    fits = len(shape) == 4 and shape[0] >= 2 and shape[1] == 3 and min(shape[2:]) >= BLOCK
    require(fits, "video_FCHW", video_FCHW, f"[F >= 2, 3, H, W] with sides of {BLOCK} or more")
    stride = min(max(1, round(fps / RATE)), shape[0] - 1)
    weight = video_FCHW.new_tensor([0.299, 0.587, 0.114], dtype=torch.float32).view(3, 1, 1)
    grey = ((video_FCHW[::stride].float() * weight).sum(1, keepdim=True) + 1) * 127.5
    short = min(shape[2:])
    if short > SHORT:
        size = [round(side * SHORT / short) for side in shape[2:]]
        grey = F.interpolate(grey, size=size, mode="area")
    rows, columns = (side // BLOCK * BLOCK for side in grey.shape[2:])
    grey = grey[..., :rows, :columns]
    before, after = grey[:-1], grey[1:]
    padded = F.pad(after, (REACH,) * 4, mode="replicate")
    still = F.avg_pool2d((after - before).abs(), BLOCK)
    best, moved = still.clone(), torch.zeros_like(still)
    for down in range(-REACH, REACH + 1):
        for right in range(-REACH, REACH + 1):
            top, left = REACH + down, REACH + right
            shifted = padded[..., top : top + rows, left : left + columns]
            left_over = F.avg_pool2d((shifted - before).abs(), BLOCK)
            size_px = (down * down + right * right) ** 0.5
            # Ties go to the shortest displacement: a flat wall has not moved.
            better = (left_over < best - 1e-4) | ((left_over <= best + 1e-4) & (size_px < moved))
            best = torch.where(better, left_over, best)
            moved = torch.where(better, torch.full_like(moved, size_px), moved)
    sure = (best < GAIN * still) & (still - best > NOISE)
    return (moved * sure)[:, 0] * (256 / min(short, SHORT))


def motion(video_FCHW: Tensor, fps: float) -> float:
    """The motion of one video, as stated in DEFINITION."""
    moved_NB = displacements(video_FCHW, fps).flatten(1)
    count = max(1, round(LARGEST * moved_NB.shape[1]))
    return float(moved_NB.topk(count, dim=1).values.mean())
