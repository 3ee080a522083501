"""Reference adaln in plain PyTorch, for any dtype and device.

`residual_norm` is twice differentiable. Letters as in contract.py; T = L/F tokens of a frame.
Modulations are [1 or B, F, D].
"""

from __future__ import annotations

import torch
from torch import Tensor


def refuse(device: str, dtypes: set[torch.dtype]) -> str | None:
    return None


def _wide(x: Tensor) -> torch.dtype:
    """The dtype used for the arithmetic."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _per_token(value: Tensor, tokens: int, dtype: torch.dtype) -> Tensor:
    """A modulation as [1 or B, L, D]."""
    return value.to(dtype).repeat_interleave(tokens // value.shape[1], dim=1)


def _per_frame(value_BLD: Tensor, like: Tensor) -> Tensor:
    """Sum over the tokens (and streams) that share a modulation; shape and dtype of `like`."""
    summed = value_BLD.unflatten(1, (like.shape[1], -1)).sum(2)
    return (summed if like.shape[0] == len(summed) else summed.sum(0, True)).to(like.dtype)


def _normalise(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """LayerNorm without affine [B, L, D] and the inverse standard deviation [B, L, 1].

    In float64, because squares of large and small float32 numbers over- and underflow float32.
    """
    centred = x.double()
    centred = centred - centred.mean(-1, keepdim=True)
    inverse = (centred.square().mean(-1, keepdim=True) + eps).rsqrt()
    return centred * inverse, inverse


def residual_norm(
    x: Tensor,
    branch: Tensor | None,
    gate: Tensor | None,
    scale: Tensor,
    shift: Tensor,
    scale_offset: float,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """x_out = x + gate·branch, and LN(x_out)·(scale_offset + scale) + shift; [B, L, D] each."""
    wide, tokens = _wide(x), x.shape[1]
    x_out = x
    if branch is not None:
        gated = branch.to(wide)
        if gate is not None:
            gated = gated * _per_token(gate, tokens, wide)
        x_out = (x.to(wide) + gated).to(x.dtype)
    normed = _normalise(x_out, eps)[0].to(wide)
    h = normed * (scale_offset + _per_token(scale, tokens, wide)) + _per_token(shift, tokens, wide)
    return x_out, h.to(x.dtype)


def adaln(
    x: Tensor,
    branch: Tensor | None,
    gate: Tensor | None,
    scale: Tensor,
    shift: Tensor,
    scale_offset: float,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """x_out (empty without a branch, since it equals x) and h, contiguous."""
    x_out, h = residual_norm(x, branch, gate, scale, shift, scale_offset, eps)
    return (x.new_empty(0) if branch is None else x_out.contiguous()), h.contiguous()


def adaln_bwd(
    grad_x_out: Tensor | None,
    grad_h: Tensor,
    x_out: Tensor,
    branch: Tensor | None,
    gate: Tensor | None,
    scale: Tensor,
    scale_offset: float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dx, dbranch, dgate (both empty without a gate), dscale and dshift."""
    wide, tokens = _wide(x_out), x_out.shape[1]
    normed, inverse = _normalise(x_out, eps)
    grad = grad_h.double()
    grad_normed = grad * (scale_offset + _per_token(scale, tokens, torch.float64))
    along = (grad_normed * normed).mean(-1, keepdim=True)
    dx = inverse * (grad_normed - grad_normed.mean(-1, keepdim=True) - normed * along)
    dx = dx.to(wide)
    if grad_x_out is not None:
        dx = dx + grad_x_out.to(wide)
    dbranch, dgate = x_out.new_empty(0), x_out.new_empty(0)
    if gate is not None and branch is not None:
        dbranch = (dx * _per_token(gate, tokens, wide)).to(x_out.dtype)
        dgate = _per_frame(dx * branch.to(wide), gate)
    dscale, dshift = _per_frame(grad * normed, scale), _per_frame(grad, scale)
    return dx.to(x_out.dtype), dbranch, dgate, dscale, dshift
