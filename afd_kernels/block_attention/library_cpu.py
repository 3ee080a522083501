"""PyTorch's CPU flash attention, and a tiled dq for when keys need no gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from afd_kernels import native
from afd_kernels.block_attention.reference import attend

# Tiles of scores fit the L2 cache; below one tile a single call is cheaper.
_TILE_QUERIES = 256
_TILE_KEYS = 512
_FEW = 64 * 64
# Tile of the rows that are recomputed.
_MENDED_QUERIES = 64


class CpuFlash:
    """aten's CPU flash attention; tensors [B, l, h, d], lse fp32 [B, h, l]."""

    name = "aten flash for CPU"

    def forward(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """out and lse."""
        # 2 us faster than the same op through torch.ops.
        out, lse = torch._scaled_dot_product_flash_attention_for_cpu(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), scale=scale
        )
        out = out.transpose(1, 2)
        _mend(out, lse, q, k, v, scale)
        return out, lse

    def backward(
        self,
        grad_out: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        scale: float,
        keys: bool,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """dq and, if `keys`, dk and dv; float32."""
        if not keys and q.shape[1] * k.shape[1] > _FEW:
            return _dq_by_tiles(grad_out, q, k, v, out, lse, scale), None, None
        heads_first = (x.transpose(1, 2) for x in (grad_out, q, k, v, out))
        dq, dk, dv = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            *heads_first, lse, 0.0, False, scale=scale
        )
        return dq.transpose(1, 2), dk.transpose(1, 2), dv.transpose(1, 2)


def _mend(out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, scale: float) -> None:
    """Recomputes, in place, the outputs of queries with NaN scores.

    The library's row maximum ignores NaN: if a row has only NaN, it returns 0 with an lse of 0.
    Other rows rarely have an lse of 0, so few are recomputed needlessly.
    """
    # A single pass in memory order instead of four passes.
    quick = lse.dtype == torch.float32 and native.why_missing() is None
    if quick and native.core().all_finite_nonzero(lse):
        return
    doubtful = (lse == 0) | ~lse.isfinite()
    if bool(doubtful.any()):
        attend_again(doubtful.any(1), out, lse, q, k, v, scale)


def attend_again(
    which: Tensor, out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, scale: float
) -> None:
    """Recomputes the outputs of the queries selected by `which` [B, l], without the library."""
    for b in range(q.shape[0]):
        rows = which[b].nonzero().squeeze(1)
        if not len(rows):
            continue
        key, value = k[b : b + 1].float(), v[b : b + 1].float()
        for some in rows.split(_MENDED_QUERIES):
            made, its_lse = attend(q[b : b + 1, some].float(), key, value, scale)
            out[b, some] = made[0].to(out.dtype)
            lse[b, :, some] = its_lse[0]


def _dq_by_tiles(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float
) -> Tensor:
    """Tiled dq [B, l, h, d] with three matrix products per tile instead of five."""
    dq = torch.empty_like(q, memory_format=torch.contiguous_format)
    for b in range(q.shape[0]):
        for low in range(0, q.shape[1], _TILE_QUERIES):
            rows = slice(low, low + _TILE_QUERIES)
            query, grad, made = (x[b, rows].transpose(0, 1) for x in (q, grad_out, out))
            minus_delta = (grad * made).sum(-1, keepdim=True).neg_()
            minus_lse = -lse[b, :, rows, None]
            total = torch.zeros_like(query, memory_format=torch.contiguous_format)
            for key, value in zip(k[b].split(_TILE_KEYS), v[b].split(_TILE_KEYS), strict=True):
                key, value = key.transpose(0, 1), value.transpose(0, 1)
                p = torch.baddbmm(minus_lse, query, key.mT, alpha=scale).exp_()
                ds = torch.baddbmm(minus_delta, grad, value.mT).mul_(p)
                total.baddbmm_(ds, key, alpha=scale)
            dq[b, rows] = total.transpose(0, 1)
    return dq
