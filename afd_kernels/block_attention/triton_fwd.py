"""Forward kernel of block_attention (see MATH.md), and helpers shared by all its kernels.

Letters: B batch, L queries, N keys, h heads, d channels; M queries and N keys of one tile.
"""
# mypy: ignore-errors
# (@triton.jit bodies are not ordinary Python)

from __future__ import annotations

import triton
import triton.language as tl

# Row length of the query-tile table (tiles.py): stream, first and last query, keys a, b, padding.
QUERY_COLUMNS = tl.constexpr(8)
LOWEST = tl.constexpr(-3.0e38)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def load_rows(x_ptr, offsets, rows, columns, left, ROWS: tl.constexpr, PAD: tl.constexpr):
    """A tile of rows; ROWS: only `left` of them exist; PAD: only some of the columns do."""
    if ROWS and PAD:
        x = tl.load(x_ptr + offsets, mask=(rows < left)[:, None] & columns[None, :], other=0.0)
    elif ROWS:
        x = tl.load(x_ptr + offsets, mask=(rows < left)[:, None], other=0.0)
    elif PAD:
        x = tl.load(x_ptr + offsets, mask=columns[None, :], other=0.0)
    else:
        x = tl.load(x_ptr + offsets)
    return x


@triton.jit
def matmul(a, b, acc, WIDEN: tl.constexpr):
    """a b + acc in fp32. WIDEN: for Triton's interpreter, which multiplies the bits of bf16.

    float32 is multiplied as float32: a tensor core's tf32 would drop 13 bits of each operand.
    """
    if WIDEN:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def at(ptr, batch, token, head, stride_b, stride_t, stride_h, UNIT: tl.constexpr):
    """The first channel of a head. UNIT divides the strides, so that wide loads can be proved."""
    place = batch.to(tl.int64) * stride_b + token.to(tl.int64) * stride_t
    return ptr + (place + head.to(tl.int64) * stride_h) * UNIT


@triton.jit
def spread(rows, channels, stride_t, UNIT: tl.constexpr):
    """Offsets of a tile's elements from its first."""
    return rows.to(tl.int64)[:, None] * (tl.full((), UNIT, tl.int64) * stride_t) + channels[None, :]


@triton.jit
def place_side(
    tile_ptr, side, k_ptr, v_ptr, ck_ptr, cv_ptr, batch, head,
    k_stride_b, k_stride_t, k_stride_h, v_stride_b, v_stride_t, v_stride_h,
    ck_stride_b, ck_stride_t, ck_stride_h, cv_stride_b, cv_stride_t, cv_stride_h,
    context_keys, UNIT: tl.constexpr,
):  # fmt: skip
    """Where the tile's interval `side` begins in K and V, their token strides, and its length.

    The interval lies in the context or behind it, never in both: choosing a pointer is enough.
    """
    first = tl.load(tile_ptr + 3 + 2 * side)
    length = tl.load(tile_ptr + 4 + 2 * side) - first
    if first < context_keys:
        k_at = at(ck_ptr, batch, first, head, ck_stride_b, ck_stride_t, ck_stride_h, UNIT)
        v_at = at(cv_ptr, batch, first, head, cv_stride_b, cv_stride_t, cv_stride_h, UNIT)
        k_step = ck_stride_t
        v_step = cv_stride_t
    else:
        first -= context_keys
        k_at = at(k_ptr, batch, first, head, k_stride_b, k_stride_t, k_stride_h, UNIT)
        v_at = at(v_ptr, batch, first, head, v_stride_b, v_stride_t, v_stride_h, UNIT)
        k_step = k_stride_t
        v_step = v_stride_t
    return k_at, v_at, k_step, v_step, length


@triton.jit
def _attend(
    q, k_at, v_at, k_offsets, v_offsets, keys, columns, left, highest, total, acc, scale_log2,
    TAIL: tl.constexpr, PAD: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """One tile of keys; of a TAIL only the first `left` keys exist."""
    k = load_rows(k_at, k_offsets, keys, columns, left, TAIL, PAD)
    scores = matmul(q, tl.trans(k), None, WIDEN)
    if TAIL:
        scores = tl.where((keys < left)[None, :], scores, float("-inf"))
    new_highest = tl.maximum(highest, tl.max(scores, 1) * scale_log2)
    p = tl.exp2(scores * scale_log2 - new_highest[:, None])
    fade = tl.exp2(highest - new_highest)
    total = total * fade + tl.sum(p, 1)
    acc = acc * fade[:, None]
    v = load_rows(v_at, v_offsets, keys, columns, left, TAIL, PAD)
    acc = matmul(p.to(v.dtype), v, acc, WIDEN)
    return new_highest, total, acc


@triton.jit
def _block_attention_fwd_kernel(
    q_ptr, k_ptr, v_ptr, ck_ptr, cv_ptr, out_ptr, lse_ptr, tiles_ptr,
    q_stride_b, q_stride_t, q_stride_h, k_stride_b, k_stride_t, k_stride_h,
    v_stride_b, v_stride_t, v_stride_h, ck_stride_b, ck_stride_t, ck_stride_h,
    cv_stride_b, cv_stride_t, cv_stride_h, queries, context_keys, scale_log2,
    D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, WIDEN: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """Grid (tiles, heads, streams that share the table): tiles of a head are neighbours in L2."""
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

    q_at = at(q_ptr, batch, first, head, q_stride_b, q_stride_t, q_stride_h, UNIT)
    q_offsets = spread(rows, channels, q_stride_t, UNIT)
    q = load_rows(q_at, q_offsets, rows, columns, left, True, PAD)

    # Not -inf: rows with only -inf scores so far then have weights of 0, not NaN.
    highest = tl.full((BLOCK_M,), LOWEST, tl.float32)
    total = tl.full((BLOCK_M,), 0.0, tl.float32)
    acc = tl.full((BLOCK_M, BLOCK_D), 0.0, tl.float32)
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
            highest, total, acc = _attend(
                q, k_at, v_at, k_offsets, v_offsets, keys, columns, BLOCK_N, highest, total, acc,
                scale_log2, False, PAD, WIDEN,
            )  # fmt: skip
            k_at += tl.full((), BLOCK_N * UNIT, tl.int64) * k_step
            v_at += tl.full((), BLOCK_N * UNIT, tl.int64) * v_step
        rest = length - full * BLOCK_N
        if rest > 0:
            highest, total, acc = _attend(
                q, k_at, v_at, k_offsets, v_offsets, keys, columns, rest, highest, total, acc,
                scale_log2, True, PAD, WIDEN,
            )  # fmt: skip

    # Without keys: 0 and -inf. With only -inf scores, or any NaN: NaN.
    attended = tl.load(tile_ptr + 4) > 0
    total = tl.where((total == 0.0) & attended, float("nan"), total)
    acc = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    lse = (highest + tl.log2(total)) * LN_2
    inside = rows < left
    heads = tl.num_programs(1)
    row = batch.to(tl.int64) * queries + first
    out_at = out_ptr + (row * heads + head) * D
    out_offsets = spread(rows, channels, heads, D)
    out = acc.to(out_ptr.dtype.element_ty)
    tl.store(out_at + out_offsets, out, mask=inside[:, None] & columns[None, :])
    lse_at = lse_ptr + (batch.to(tl.int64) * heads + head) * queries + first
    tl.store(lse_at + rows, lse, mask=inside)
