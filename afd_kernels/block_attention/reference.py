"""block_attention in plain PyTorch: a dense softmax under a mask, in float32 (float64 for float64).

`block_attention` is twice differentiable by autograd. Letters: B streams, L queries, N keys
(context included), h heads, d channels. Algebra in MATH.md.
"""

from __future__ import annotations

import torch
from torch import Tensor

from afd_kernels.block_attention.intervals import Intervals


def refuse(device: str, dtypes: set[torch.dtype]) -> str | None:
    return None


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _all_keys(
    x: Tensor, context: Tensor | None, intervals: Intervals, dtype: torch.dtype
) -> Tensor:
    """[B, N, h, d]; 0 where nobody attends, as a weight of 0 would not hide a NaN."""
    x = (x if context is None else torch.cat((context, x), dim=1)).to(dtype)
    attended_BN = intervals.mask(x.shape[1], x.device).any(1)
    return x.masked_fill(~attended_BN[:, :, None, None], 0)


def _scores(q_BLhd: Tensor, k_BNhd: Tensor, mask_BhLN: Tensor, scale: float) -> Tensor:
    s_BhLN = torch.einsum("blhd,bnhd->bhln", q_BLhd, k_BNhd) * scale
    return s_BhLN.masked_fill(~mask_BhLN, -torch.inf)


def _mask(intervals: Intervals, k_BNhd: Tensor) -> Tensor:
    return intervals.mask(k_BNhd.shape[1], k_BNhd.device)[:, None]


def block_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_context: Tensor | None,
    v_context: Tensor | None,
    intervals: Intervals,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """out [B, L, h, d] in q's dtype and lse [B, h, L] in the wide dtype."""
    dtype = _wide(q)
    key = _all_keys(k, k_context, intervals, dtype)
    value = _all_keys(v, v_context, intervals, dtype)
    mask = _mask(intervals, key)
    scores = _scores(q.to(dtype), key, mask, scale)
    # The maximum of a row is a constant shift; a row without keys shifts by 0 and weighs 0.
    if scores.shape[-1] == 0:
        top = scores.new_zeros(*scores.shape[:-1], 1)
    else:
        top = scores.detach().amax(-1, keepdim=True)
    top = top.masked_fill(top == -torch.inf, 0)
    weights = (scores - top).exp()
    total = weights.sum(-1, keepdim=True)
    empty = total == 0
    out = torch.einsum("bhln,bnhd->blhd", weights / total.masked_fill(empty, 1), value)
    lse = (top + total.masked_fill(empty, 1).log()).masked_fill(empty, -torch.inf).squeeze(-1)
    return out.to(q.dtype).contiguous(), lse


def block_attention_bwd(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_context: Tensor | None,
    v_context: Tensor | None,
    out: Tensor,
    lse: Tensor,
    intervals: Intervals,
    scale: float,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor | None, ...]:
    """dq, dk, dv, dk_context, dv_context in their tensors' dtypes; None where not needed."""
    dtype = _wide(q)
    query, grad = q.to(dtype), grad_out.to(dtype)
    key = _all_keys(k, k_context, intervals, dtype)
    value = _all_keys(v, v_context, intervals, dtype)
    mask = _mask(intervals, key)
    scores = _scores(query, key, mask, scale)
    shift = lse.to(dtype).masked_fill(lse == -torch.inf, 0)[..., None]
    p_BhLN = (scores - shift).exp()
    delta_BhL1 = (grad * out.to(dtype)).sum(-1).transpose(1, 2)[..., None]
    ds_BhLN = p_BhLN * (torch.einsum("blhd,bnhd->bhln", grad, value) - delta_BhL1) * scale
    dq = dk = dv = dk_context = dv_context = None
    if needs[0]:
        dq = torch.einsum("bhln,bnhd->blhd", ds_BhLN, key).to(q.dtype).contiguous()
    border = 0 if k_context is None else k_context.shape[1]
    if needs[1]:
        dk, dv = _key_gradients(p_BhLN[..., border:], ds_BhLN[..., border:], query, grad, k.dtype)
    if needs[2]:
        dk_context, dv_context = _key_gradients(
            p_BhLN[..., :border], ds_BhLN[..., :border], query, grad, k.dtype
        )
    return dq, dk, dv, dk_context, dv_context


def _key_gradients(
    p_BhLN: Tensor, ds_BhLN: Tensor, q: Tensor, grad: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    dk = torch.einsum("bhln,blhd->bnhd", ds_BhLN, q)
    dv = torch.einsum("bhln,blhd->bnhd", p_BhLN, grad)
    return dk.to(dtype).contiguous(), dv.to(dtype).contiguous()
