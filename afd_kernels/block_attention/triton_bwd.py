"""The backward kernels of block_attention (see MATH.md): dQ by query tiles, dK and dV by key tiles.

Letters: B batch, L queries, N keys, h heads, d channels; M queries and N keys of one tile.
Both kernels make P again from the scores and the forward's LSE. No tile is written twice, so there
are no atomics and every sum has a fixed order.
"""
# mypy: ignore-errors
# (@triton.jit bodies are a language of their own)

from __future__ import annotations

import triton
import triton.language as tl

from afd_kernels.block_attention.triton_fwd import (
    QUERY_COLUMNS,
    load_rows,
    matmul,
    place_side,
)

LOG2_E = tl.constexpr(1.4426950408889634)
# A row of the table of key tiles (tiles.py): stream, first and last key, its segments.
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
    q_ptr, k_ptr, v_ptr, context_k_ptr, context_v_ptr, grad_ptr, out_ptr, lse_ptr, delta_ptr,
    dq_ptr, tiles_ptr, q_stride_b, q_stride_t, q_stride_h, k_stride_b, k_stride_t, k_stride_h,
    v_stride_b, v_stride_t, v_stride_h, ck_stride_b, ck_stride_t, ck_stride_h,
    cv_stride_b, cv_stride_t, cv_stride_h, g_stride_b, g_stride_t, g_stride_h,
    queries, context_keys, scale, scale_log2,
    CONTEXT: tl.constexpr, SIDES: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """dQ of one tile of queries, and its delta = rowsum(dO out) where dK and dV will want it."""
    tile_ptr = tiles_ptr + tl.program_id(0) * QUERY_COLUMNS
    head = tl.program_id(1).to(tl.int64)
    batch = tl.program_id(2) + tl.load(tile_ptr)
    first = tl.load(tile_ptr + 1)
    left = tl.load(tile_ptr + 2) - first
    rows = tl.arange(0, BLOCK_M)
    keys = tl.arange(0, BLOCK_N).to(tl.int64)
    channels = tl.arange(0, BLOCK_D)
    columns = channels < D
    PAD: tl.constexpr = D < BLOCK_D
    heads = tl.num_programs(1)

    wide_batch = batch.to(tl.int64)
    wide_rows = rows.to(tl.int64)
    out_start = ((wide_batch * queries + first) * heads + head) * D
    out_offsets = wide_rows[:, None] * (heads * D) + channels[None, :]
    grad_at = grad_ptr + wide_batch * g_stride_b + head * g_stride_h
    grad_at += first.to(tl.int64) * g_stride_t
    grad_offsets = wide_rows[:, None] * g_stride_t + channels[None, :]
    grad = load_rows(grad_at, grad_offsets, rows, columns, left, True, PAD)
    out = load_rows(out_ptr + out_start, out_offsets, rows, columns, left, True, PAD)
    delta = tl.sum(grad.to(tl.float32) * out.to(tl.float32), 1)
    inside = rows < left
    row = (wide_batch * heads + head) * queries + first
    if delta_ptr is not None:
        tl.store(delta_ptr + row + rows, delta, mask=inside)
    lse_2 = tl.load(lse_ptr + row + rows, mask=inside, other=0.0) * LOG2_E
    q_at = q_ptr + wide_batch * q_stride_b + head * q_stride_h
    q_at += first.to(tl.int64) * q_stride_t
    q_offsets = wide_rows[:, None] * q_stride_t + channels[None, :]
    q = load_rows(q_at, q_offsets, rows, columns, left, True, PAD)

    dq = tl.full((BLOCK_M, BLOCK_D), 0.0, tl.float32)
    for side in tl.range(SIDES, num_stages=1):
        k_at, v_at, k_step, v_step, length = place_side(
            tile_ptr, side, k_ptr, v_ptr, context_k_ptr, context_v_ptr, batch, head,
            k_stride_b, k_stride_t, k_stride_h, v_stride_b, v_stride_t, v_stride_h,
            ck_stride_b, ck_stride_t, ck_stride_h, cv_stride_b, cv_stride_t, cv_stride_h,
            context_keys, CONTEXT,
        )  # fmt: skip
        k_offsets = keys[:, None] * k_step + channels[None, :]
        v_offsets = keys[:, None] * v_step + channels[None, :]
        full = length // BLOCK_N
        for _ in range(full):
            dq = _gather_dq(
                q, grad, lse_2, delta, k_at, v_at, k_offsets, v_offsets, keys, columns, BLOCK_N,
                dq, scale_log2, False, PAD, WIDEN,
            )  # fmt: skip
            k_at += tl.full((), BLOCK_N, tl.int64) * k_step
            v_at += tl.full((), BLOCK_N, tl.int64) * v_step
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
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, WIDEN: tl.constexpr,
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
    wide_tile = tile.to(tl.int64)
    rows = tl.arange(0, BLOCK_M)
    wide_rows = rows.to(tl.int64)
    channels = tl.arange(0, BLOCK_D)
    columns = channels < D
    PAD: tl.constexpr = D < BLOCK_D
    heads = tl.num_programs(1)

    k_at = k_ptr + batch * k_stride_b + head * k_stride_h + first.to(tl.int64) * k_stride_t
    v_at = v_ptr + batch * v_stride_b + head * v_stride_h + first.to(tl.int64) * v_stride_t
    k_offsets = wide_tile[:, None] * k_stride_t + channels[None, :]
    v_offsets = wide_tile[:, None] * v_stride_t + channels[None, :]
    k = load_rows(k_at, k_offsets, tile, columns, present, True, PAD)
    v = load_rows(v_at, v_offsets, tile, columns, present, True, PAD)
    q_offsets = wide_rows[:, None] * q_stride_t + channels[None, :]
    g_offsets = wide_rows[:, None] * g_stride_t + channels[None, :]

    q_at = q_ptr + batch * q_stride_b + head * q_stride_h
    grad_at = grad_ptr + batch * g_stride_b + head * g_stride_h
    row = (batch * heads + head) * queries

    dk = tl.full((BLOCK_N, BLOCK_D), 0.0, tl.float32)
    dv = tl.full((BLOCK_N, BLOCK_D), 0.0, tl.float32)
    walk_ptr += 2 * tl.load(tile_ptr + 3)
    for step in range(tl.load(tile_ptr + 4)):
        start = tl.load(walk_ptr + 2 * step).to(tl.int64)
        left = tl.load(walk_ptr + 2 * step + 1)
        inside = rows < left
        q = load_rows(q_at + start * q_stride_t, q_offsets, rows, columns, left, True, PAD)
        scores = matmul(k, tl.trans(q), None, WIDEN)
        lse = tl.load(lse_ptr + row + start + rows, mask=inside, other=0.0)
        p = tl.exp2(scores * scale_log2 - (lse * LOG2_E)[None, :])
        grad = load_rows(grad_at + start * g_stride_t, g_offsets, rows, columns, left, True, PAD)
        dv = matmul(p.to(grad.dtype), grad, dv, WIDEN)
        dp = matmul(v, tl.trans(grad), None, WIDEN)
        delta = tl.load(delta_ptr + row + start + rows, mask=inside, other=0.0)
        ds = p * (dp - delta[None, :])
        dk = matmul(ds.to(q.dtype), q, dk, WIDEN)
    start = ((batch * keys + first) * heads + head) * D
    offsets = wide_tile[:, None] * (heads * D) + channels[None, :]
    mask = (tile < present)[:, None] & columns[None, :]
    tl.store(dk_ptr + start + offsets, (dk * scale).to(dk_ptr.dtype.element_ty), mask=mask)
    tl.store(dv_ptr + start + offsets, dv.to(dv_ptr.dtype.element_ty), mask=mask)
