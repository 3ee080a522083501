"""Random appearance augmentation that leaves the motion unchanged.

Shape letters: B videos, F frames, C colour channels, H x W pixels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Generator, Tensor


def _uniform(n: int, low: float, high: float, generator: Generator) -> Tensor:
    return (torch.rand(n, generator=generator) * (high - low) + low).view(n, 1, 1, 1, 1)


def _field(n: int, height: int, width: int, generator: Generator) -> Tensor:
    """Static grey textures [n, 1, 1, H, W] of random coarseness, standard deviation about 1."""
    cells = int(torch.randint(1, 5, (), generator=generator))
    rows, columns = -(-height // cells), -(-width // cells)
    coarse = torch.randn(n, 1, rows, columns, generator=generator)
    return F.interpolate(coarse, (height, width), mode="nearest").unsqueeze(1)


def random_look(
    video_BFCHW: Tensor, generator: Generator, strength: float = 1.0, shared: bool = False
) -> Tensor:
    """Randomise contrast, brightness, tint, texture, corner patch and pixel noise per video.

    A discriminator that sees both sides under random looks cannot tell them apart by the look.
    `shared`: one draw for all videos, so that they can be compared under the same look.
    """
    B, frames, C, H, W = video_BFCHW.shape
    n = 1 if shared else B
    gain = 1 + strength * _uniform(n, -0.5, 0.2, generator)
    lift = strength * _uniform(n, -0.3, 0.5, generator)
    tint = strength * 0.05 * torch.randn(n, 1, C, 1, 1, generator=generator)
    grain = strength * _uniform(n, 0.0, 0.25, generator)
    video = gain * video_BFCHW + lift + tint + grain * _field(n, H, W, generator)
    size, patched = max(2, H // 5), torch.rand(n, generator=generator) < 0.3 * strength
    right, bottom = torch.randint(2, (2, n), generator=generator).bool()
    level = _uniform(n, -1.0, 1.0, generator).flatten().tolist()
    for i in patched.nonzero().flatten().tolist():
        rows = slice(H - size - 1, H - 1) if bottom[i] else slice(1, 1 + size)
        columns = slice(W - size - 1, W - 1) if right[i] else slice(1, 1 + size)
        video[slice(None) if shared else i, ..., rows, columns] = level[i]
    noise = strength * _uniform(n, 0.0, 1.0, generator).square() * 0.3
    video = video + noise * torch.randn(n, frames, C, H, W, generator=generator)
    return video.clamp(-1, 1)
