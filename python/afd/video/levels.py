"""Conversion of pixels between uint8 and float."""

from __future__ import annotations

import torch
from torch import Tensor


def to_uint8(video_FCHW: Tensor) -> Tensor:
    """Convert [..., 3, H, W] in [-1, 1] to uint8 [..., H, W, 3], rounded and clipped."""
    levels = (video_FCHW.detach().cpu().float() + 1) * 127.5
    return levels.round().clamp(0, 255).to(torch.uint8).movedim(-3, -1).contiguous()


def from_uint8(video_FHWC: Tensor) -> Tensor:
    """Convert uint8 [..., H, W, 3] to float32 [..., 3, H, W] in [-1, 1]."""
    return (video_FHWC.movedim(-1, -3).float() / 127.5 - 1).contiguous()
