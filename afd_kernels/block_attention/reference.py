"""Reference block_attention in plain PyTorch: a softmax per query block over its attended keys.

In float32 (float64 for float64). Nothing is masked, since a weight of 0 would not hide a NaN.

`block_attention` is twice differentiable by autograd. Letters: B streams, L queries, N keys
(context included), h heads, d channels. Algebra in MATH.md.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from afd_kernels.block_attention.contract import AttentionInputs
from afd_kernels.block_attention.intervals import Intervals, Row


def refuse(device: str, dtypes: set[torch.dtype]) -> str | None:
    return None


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _all_keys(x: Tensor, context: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Keys (or values) of context and x concatenated, [B, N, h, d]."""
    return (x if context is None else torch.cat((context, x), dim=1)).to(dtype)


def _blocks(intervals: Intervals, batch: int) -> Iterator[tuple[slice, Row]]:
    """Iterate over query blocks with the streams they belong to."""
    for index, rows in enumerate(intervals.rows):
        at = slice(index, index + 1) if intervals.streams > 1 else slice(0, batch)
        for row in rows:
            yield at, row


def _attended(x_BNhd: Tensor, row: Row) -> Tensor:
    """The keys of both intervals [B, n, h, d]."""
    _, _, a0, a1, b0, b1 = row
    return torch.cat((x_BNhd[:, a0:a1], x_BNhd[:, b0:b1]), dim=1)


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Attention of every query with every key: out [B, l, h, d] and lse [B, h, l]."""
    if k.shape[1] == 0:
        batch, queries, heads, _ = q.shape
        return torch.zeros_like(q), q.new_full((batch, heads, queries), -torch.inf)
    scores = torch.einsum("blhd,bnhd->bhln", q, k) * scale
    # The row maximum is a constant shift, so it needs no gradient.
    top = scores.detach().amax(-1, keepdim=True)
    weights = (scores - top).exp()
    total = weights.sum(-1, keepdim=True)
    out = torch.einsum("bhln,bnhd->blhd", weights / total, v)
    return out, (top + total.log()).squeeze(-1)


def block_attention(
    inputs: AttentionInputs, intervals: Intervals, scale: float
) -> tuple[Tensor, Tensor]:
    """out [B, L, h, d] in q's dtype and lse [B, h, L] in the wide dtype."""
    q, k, v, k_context, v_context = inputs
    dtype = _wide(q)
    query = q.to(dtype)
    key, value = _all_keys(k, k_context, dtype), _all_keys(v, v_context, dtype)
    streams: dict[int, list[tuple[Tensor, Tensor]]] = {}
    for at, row in _blocks(intervals, len(q)):
        keys, values = _attended(key[at], row), _attended(value[at], row)
        streams.setdefault(at.start, []).append(
            attend(query[at, row[0] : row[1]], keys, values, scale)
        )
    outs = [torch.cat([out for out, _ in parts], dim=1) for parts in streams.values()]
    lses = [torch.cat([lse for _, lse in parts], dim=2) for parts in streams.values()]
    return torch.cat(outs).to(q.dtype).contiguous(), torch.cat(lses)


def block_attention_bwd(
    grad_out: Tensor,
    inputs: AttentionInputs,
    out: Tensor,
    lse: Tensor,
    intervals: Intervals,
    scale: float,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor | None, ...]:
    """dq, dk, dv, dk_context, dv_context in their tensors' dtypes; None where not needed."""
    q, k, v, k_context, v_context = inputs
    dtype = _wide(q)
    query, grad, made = q.to(dtype), grad_out.to(dtype), out.to(dtype)
    key, value = _all_keys(k, k_context, dtype), _all_keys(v, v_context, dtype)
    dq, dkey, dvalue = (
        torch.zeros_like(x, memory_format=torch.contiguous_format) for x in (query, key, value)
    )
    for at, row in _blocks(intervals, len(q)):
        rows = slice(row[0], row[1])
        keys, values = _attended(key[at], row), _attended(value[at], row)
        scores = torch.einsum("blhd,bnhd->bhln", query[at, rows], keys) * scale
        p_BhLN = (scores - lse[at, :, rows, None].to(dtype)).exp()
        dp_BhLN = torch.einsum("blhd,bnhd->bhln", grad[at, rows], values)
        delta_BhL = (grad[at, rows] * made[at, rows]).sum(-1).transpose(1, 2)
        ds_BhLN = p_BhLN * (dp_BhLN - delta_BhL[..., None]) * scale
        dq[at, rows] = torch.einsum("bhln,bnhd->blhd", ds_BhLN, keys)
        dk = torch.einsum("bhln,blhd->bnhd", ds_BhLN, query[at, rows])
        dv = torch.einsum("bhln,blhd->bnhd", p_BhLN, grad[at, rows])
        first = row[3] - row[2]
        for total, share in ((dkey[at], dk), (dvalue[at], dv)):
            total[:, row[2] : row[3]] += share[:, :first]
            total[:, row[4] : row[5]] += share[:, first:]
    border = 0 if k_context is None else k_context.shape[1]
    own = [x[:, border:].to(k.dtype).contiguous() if needs[1] else None for x in (dkey, dvalue)]
    context = [x[:, :border].to(k.dtype).contiguous() if needs[2] else None for x in (dkey, dvalue)]
    return dq.to(q.dtype) if needs[0] else None, *own, *context
