"""Rotary position tables of video tokens (time, row, column), and embeddings of noise levels.

Shape letters: F frames, T tokens per frame, d head channels. A table holds (cos, sin) of every
token and channel pair, float32 [1, F·T, d/2, 2], the form that `afd.ops.qk_norm_rope` takes.
Source: Wan2.1; pairs are interleaved channels (2j, 2j + 1).
"""

from __future__ import annotations

import torch
from torch import Tensor


def pairs_per_axis(head_dim: int) -> tuple[int, int, int]:
    """Split of the d/2 channel pairs over time, row and column (22, 21, 21 for d = 128)."""
    pairs = head_dim // 2
    return pairs - 2 * (pairs // 3), pairs // 3, pairs // 3


def axis_table(position_P: Tensor, pairs: int) -> Tensor:
    """(cos, sin) of one axis, float32 [P, pairs, 2]; each axis has its own frequency range.

    Angles are float64, as in the released code: float32 is too coarse for distant frames.
    """
    exponent = torch.arange(pairs, dtype=torch.float64, device=position_P.device) / pairs
    angle = position_P.double()[:, None] * 10000.0**-exponent
    return torch.stack([angle.cos(), angle.sin()], -1).float()


def rope_table(head_dim: int, frame_F: Tensor, rows: int, cols: int) -> Tensor:
    """The table of whole frames at absolute positions `frame_F` (int64 [F], any magnitude).

    Computed on `frame_F`'s device without reading its values on the host, so a stream's position
    may be a device tensor. Returns float32 [1, F·rows·cols, head_dim/2, 2].
    """
    frames = frame_F.shape[0]
    time, row, col = pairs_per_axis(head_dim)
    places = torch.arange(max(rows, cols), device=frame_F.device)
    grid = (frames, rows, cols)
    axes = [
        axis_table(frame_F, time)[:, None, None].expand(*grid, time, 2),
        axis_table(places[:rows], row)[None, :, None].expand(*grid, row, 2),
        axis_table(places[:cols], col)[None, None].expand(*grid, col, 2),
    ]
    return torch.cat(axes, dim=-2).reshape(1, frames * rows * cols, head_dim // 2, 2)


def sinusoid(t: Tensor, channels: int) -> Tensor:
    """Sinusoidal embedding of t: (cos, sin) at geometric frequencies, float64 [..., channels]."""
    half = channels // 2
    exponent = torch.arange(half, dtype=torch.float64, device=t.device) / half
    angle = t.double().unsqueeze(-1) * 10000.0**-exponent
    return torch.cat([angle.cos(), angle.sin()], -1)
