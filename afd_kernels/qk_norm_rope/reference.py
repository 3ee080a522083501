"""Reference qk_norm_rope in plain PyTorch, for any dtype and device.

`norm_rope` is twice differentiable. Letters as in contract.py; D = h·d channels of a token.
"""

from __future__ import annotations

import torch
from torch import Tensor


def refuse(device: str, dtypes: set[torch.dtype]) -> str | None:
    return None


def _wide(x: Tensor) -> torch.dtype:
    """The dtype used for the arithmetic."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _turn(x_BLhd: Tensor, rope: Tensor, sign: int = 1) -> Tensor:
    """Rotates channels (2j, 2j+1) by the table's angle times `sign`."""
    cos, sin = rope.to(x_BLhd.dtype)[:, :, None].unbind(-1)
    even, odd = x_BLhd.unflatten(-1, (-1, 2)).unbind(-1)
    sin = sign * sin
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2)


def _inverse_rms(x_BLhd: Tensor, eps: float) -> Tensor:
    """1 / sqrt(mean of the squares of a token's D channels + eps), float64 [B, L, 1, 1].

    In float64, because squares of large and small float32 numbers over- and underflow float32.
    """
    return (x_BLhd.double().square().mean((-2, -1), keepdim=True) + eps).rsqrt()


def norm_rope(x_BLhd: Tensor, weight: Tensor, rope: Tensor, eps: float) -> Tensor:
    """RoPE(RMSNorm over D (x) · weight), rounded once to the dtype of x."""
    x, w = x_BLhd.to(_wide(x_BLhd)), weight.to(_wide(x_BLhd))
    normed = (x * _inverse_rms(x, eps)).to(x.dtype) * w.unflatten(0, x.shape[-2:])
    return _turn(normed, rope).to(x_BLhd.dtype)


def norm_rope_bwd(
    grad: Tensor, x_BLhd: Tensor, weight: Tensor, rope: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """The gradients with respect to x and weight."""
    wide = _wide(x_BLhd)
    w = weight.double().unflatten(0, x_BLhd.shape[-2:])
    inverse = _inverse_rms(x_BLhd, eps)
    normed, grad_y = x_BLhd * inverse, _turn(grad.to(wide), rope, -1).double()
    grad_normed = grad_y * w
    along = (grad_normed * normed).mean((-2, -1), keepdim=True)
    grad_x = inverse * (grad_normed - normed * along)
    grad_weight = (grad_y * normed).sum((0, 1)).flatten()
    return grad_x.to(x_BLhd.dtype), grad_weight.to(weight.dtype)


def qk_norm_rope(
    q: Tensor, k: Tensor, weight_q: Tensor, weight_k: Tensor, rope: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """q_out and k_out [B, L, h, d], contiguous."""
    return norm_rope(q, weight_q, rope, eps), norm_rope(k, weight_k, rope, eps)


def qk_norm_rope_bwd(
    grad_q: Tensor,
    grad_k: Tensor,
    q: Tensor,
    k: Tensor,
    weight_q: Tensor,
    weight_k: Tensor,
    rope: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of q, k [B, L, h, d] and of the weights [D]."""
    dq, dweight_q = norm_rope_bwd(grad_q, q, weight_q, rope, eps)
    dk, dweight_k = norm_rope_bwd(grad_k, k, weight_k, rope, eps)
    return dq, dk, dweight_q, dweight_k


def frames_of(position: Tensor, tokens: int, tokens_per_frame: int) -> Tensor:
    """The absolute frame of each token, int64 [1 or B, L]."""
    token = torch.arange(tokens, device=position.device)
    return position[:, None] + token // tokens_per_frame


def slots_of(frames: Tensor, capacity: int, sink_frames: int, tokens_per_frame: int) -> Tensor:
    """The cache slot of each token: sink frames are fixed, all other frames use the ring."""
    ring = capacity // tokens_per_frame - sink_frames
    around = sink_frames + (frames - sink_frames) % ring
    frame = torch.where(frames < sink_frames, frames, around)
    within = torch.arange(frames.shape[1], device=frames.device) % tokens_per_frame
    return frame * tokens_per_frame + within


def qk_norm_rope_append_(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weight_q: Tensor,
    weight_k: Tensor,
    rope: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    position: Tensor,
    tokens_per_frame: int,
    sink_frames: int,
    eps: float,
) -> Tensor:
    """q_out; k_out and v are written to the cache slots of their frames.

    A negative position makes q_out and the keys NaN, written to the slots starting at frame 0.
    """
    q_out, k_out = qk_norm_rope(q, k, weight_q, weight_k, rope, eps)
    frames = frames_of(position.clamp(min=0), q.shape[1], tokens_per_frame)
    slots = slots_of(frames, k_cache.shape[1], sink_frames, tokens_per_frame)
    lost = (position < 0)[:, None, None, None]
    stream = torch.arange(q.shape[0], device=q.device)[:, None]
    k_cache[stream, slots] = k_out.masked_fill_(lost, float("nan"))
    v_cache[stream, slots] = v
    return q_out.masked_fill_(lost, float("nan"))
