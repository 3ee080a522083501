"""Backward kernels of block_attention (see MATH.md): dQ by query tiles, dK and dV by key tiles.

Letters: B batch, L queries, N keys, h heads, d channels; M queries and N keys of one tile.
Both kernels recompute P from the scores and the forward's LSE. No tile is written twice, so there
are no atomics and every sum has a fixed order.
"""
# mypy: ignore-errors
# (@triton.jit bodies are not ordinary Python)

from __future__ import annotations

import triton
import triton.language as tl

from afd_kernels.block_attention.triton_fwd import (
    QUERY_COLUMNS,
    at,
    load_rows,
    matmul,
    place_side,
    spread,
)

LOG2_E = tl.constexpr(1.4426950408889634)
# Row length of the key-tile table (tiles.py): stream, first and last key, its segments.
KEY_COLUMNS = tl.constexpr(8)


@triton.jit
def _gather_dq(
    q, grad, lse_2, delta, k_at, v_at, k_offsets, v_offsets, keys, columns, left, dq, scale_log2,
    TAIL: tl.constexpr, PAD: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """Adds one tile of keys to dQ / scale; of a TAIL only the first `left` keys exist."""
    k = load_rows(k_at, k_offsets, keys, columns, left, TAIL, PAD)
    scores = matmul(q, tl.trans(k), None, WIDEN)
    v = load_rows(v_at, v_offsets, keys, columns, left, TAIL, PAD)
    dp = matmul(grad, tl.trans(v), None, WIDEN)
    p = tl.exp2(scores * scale_log2 - lse_2[:, None])
    if TAIL:
        p = tl.where((keys < left)[None, :], p, 0.0)
    ds = p * (dp - delta[:, None])
    return matmul(ds.to(k.dtype), k, dq, WIDEN)


@triton.jit
def _block_attention_dq_kernel(
    q_ptr, k_ptr, v_ptr, ck_ptr, cv_ptr, grad_ptr, out_ptr, lse_ptr, delta_ptr,
    dq_ptr, tiles_ptr, q_stride_b, q_stride_t, q_stride_h, k_stride_b, k_stride_t, k_stride_h,
    v_stride_b, v_stride_t, v_stride_h, ck_stride_b, ck_stride_t, ck_stride_h,
    cv_stride_b, cv_stride_t, cv_stride_h, g_stride_b, g_stride_t, g_stride_h,
    queries, context_keys, scale, scale_log2,
    D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, WIDEN: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """dQ of one tile of queries, and its delta = rowsum(dO out) where dK and dV will want it."""
    tile_ptr = tiles_ptr + tl.program_id(0) * QUERY_COLUMNS
    head = tl.program_id(1).to(tl.int64)
    batch = tl.program_id(2) + tl.load(tile_ptr)
    first = tl.load(tile_ptr + 1)
    left = tl.load(tile_ptr + 2) - first
    rows = tl.arange(0, BLOCK_M)
    keys = tl.arange(0, BLOCK_N)
    channels = tl.arange(0, BLOCK_D)
    columns = channels < D
    PAD: tl.constexpr = D < BLOCK_D
    heads = tl.num_programs(1)

    wide_batch = batch.to(tl.int64)
    out_start = ((wide_batch * queries + first) * heads + head) * D
    out_offsets = spread(rows, channels, heads, D)
    grad_at = at(grad_ptr, batch, first, head, g_stride_b, g_stride_t, g_stride_h, UNIT)
    grad_offsets = spread(rows, channels, g_stride_t, UNIT)
    grad = load_rows(grad_at, grad_offsets, rows, columns, left, True, PAD)
    out = load_rows(out_ptr + out_start, out_offsets, rows, columns, left, True, PAD)
    delta = tl.sum(grad.to(tl.float32) * out.to(tl.float32), 1)
    inside = rows < left
    row = (wide_batch * heads + head) * queries + first
    if delta_ptr is not None:
        tl.store(delta_ptr + row + rows, delta, mask=inside)
    lse_2 = tl.load(lse_ptr + row + rows, mask=inside, other=0.0) * LOG2_E
    q_at = at(q_ptr, batch, first, head, q_stride_b, q_stride_t, q_stride_h, UNIT)
    q_offsets = spread(rows, channels, q_stride_t, UNIT)
    q = load_rows(q_at, q_offsets, rows, columns, left, True, PAD)

    dq = tl.full((BLOCK_M, BLOCK_D), 0.0, tl.float32)
    for side in tl.range(2, num_stages=1):
        k_at, v_at, k_step, v_step, length = place_side(
            tile_ptr, side, k_ptr, v_ptr, ck_ptr, cv_ptr, batch, head,
            k_stride_b, k_stride_t, k_stride_h, v_stride_b, v_stride_t, v_stride_h,
            ck_stride_b, ck_stride_t, ck_stride_h, cv_stride_b, cv_stride_t, cv_stride_h,
            context_keys, UNIT,
        )  # fmt: skip
        k_offsets = spread(keys, channels, k_step, UNIT)
        v_offsets = spread(keys, channels, v_step, UNIT)
        full = length // BLOCK_N
        for _ in range(full):
            dq = _gather_dq(
                q, grad, lse_2, delta, k_at, v_at, k_offsets, v_offsets, keys, columns, BLOCK_N,
                dq, scale_log2, False, PAD, WIDEN,
            )  # fmt: skip
            k_at += tl.full((), BLOCK_N * UNIT, tl.int64) * k_step
            v_at += tl.full((), BLOCK_N * UNIT, tl.int64) * v_step
        rest = length - full * BLOCK_N
        if rest > 0:
            dq = _gather_dq(
                q, grad, lse_2, delta, k_at, v_at, k_offsets, v_offsets, keys, columns, rest,
                dq, scale_log2, True, PAD, WIDEN,
            )  # fmt: skip
    dq = (dq * scale).to(dq_ptr.dtype.element_ty)
    tl.store(dq_ptr + out_start + out_offsets, dq, mask=inside[:, None] & columns[None, :])


@triton.jit
def _block_attention_dkdv_kernel(
    q_ptr, k_ptr, v_ptr, grad_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr, tiles_ptr, walk_ptr,
    q_stride_b, q_stride_t, q_stride_h, k_stride_b, k_stride_t, k_stride_h,
    v_stride_b, v_stride_t, v_stride_h, g_stride_b, g_stride_t, g_stride_h,
    queries, keys, scale, scale_log2, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, WIDEN: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """dK and dV of one tile of keys, from the tiles of queries that attend all of it.

    The scores need no mask: absent queries are zero rows of q and dO, which add nothing, and what
    keys beyond the tile's end gather is not stored.
    """
    tile_ptr = tiles_ptr + tl.program_id(0) * KEY_COLUMNS
    head = tl.program_id(1).to(tl.int64)
    batch = (tl.program_id(2) + tl.load(tile_ptr)).to(tl.int64)
    first = tl.load(tile_ptr + 1)
    present = tl.load(tile_ptr + 2) - first
    tile = tl.arange(0, BLOCK_N)
    rows = tl.arange(0, BLOCK_M)
    channels = tl.arange(0, BLOCK_D)
    columns = channels < D
    PAD: tl.constexpr = D < BLOCK_D
    heads = tl.num_programs(1)

    k_at = at(k_ptr, batch, first, head, k_stride_b, k_stride_t, k_stride_h, UNIT)
    v_at = at(v_ptr, batch, first, head, v_stride_b, v_stride_t, v_stride_h, UNIT)
    k_offsets = spread(tile, channels, k_stride_t, UNIT)
    v_offsets = spread(tile, channels, v_stride_t, UNIT)
    k = load_rows(k_at, k_offsets, tile, columns, present, True, PAD)
    v = load_rows(v_at, v_offsets, tile, columns, present, True, PAD)
    q_offsets = spread(rows, channels, q_stride_t, UNIT)
    g_offsets = spread(rows, channels, g_stride_t, UNIT)

    row = (batch * heads + head) * queries

    dk = tl.full((BLOCK_N, BLOCK_D), 0.0, tl.float32)
    dv = tl.full((BLOCK_N, BLOCK_D), 0.0, tl.float32)
    walk_ptr += 2 * tl.load(tile_ptr + 3)
    for step in range(tl.load(tile_ptr + 4)):
        start = tl.load(walk_ptr + 2 * step).to(tl.int64)
        left = tl.load(walk_ptr + 2 * step + 1)
        inside = rows < left
        q_at = at(q_ptr, batch, start, head, q_stride_b, q_stride_t, q_stride_h, UNIT)
        q = load_rows(q_at, q_offsets, rows, columns, left, True, PAD)
        scores = matmul(k, tl.trans(q), None, WIDEN)
        lse = tl.load(lse_ptr + row + start + rows, mask=inside, other=0.0)
        p = tl.exp2(scores * scale_log2 - (lse * LOG2_E)[None, :])
        grad_at = at(grad_ptr, batch, start, head, g_stride_b, g_stride_t, g_stride_h, UNIT)
        grad = load_rows(grad_at, g_offsets, rows, columns, left, True, PAD)
        dv = matmul(p.to(grad.dtype), grad, dv, WIDEN)
        dp = matmul(v, tl.trans(grad), None, WIDEN)
        delta = tl.load(delta_ptr + row + start + rows, mask=inside, other=0.0)
        ds = p * (dp - delta[None, :])
        dk = matmul(ds.to(q.dtype), q, dk, WIDEN)
    start = ((batch * keys + first) * heads + head) * D
    offsets = spread(tile, channels, heads, D)
    mask = (tile < present)[:, None] & columns[None, :]
    tl.store(dk_ptr + start + offsets, (dk * scale).to(dk_ptr.dtype.element_ty), mask=mask)
    tl.store(dv_ptr + start + offsets, dv.to(dv_ptr.dtype.element_ty), mask=mask)
