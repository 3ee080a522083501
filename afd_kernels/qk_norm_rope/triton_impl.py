"""qk_norm_rope in Triton: one program per token reads its row of q and k (and v) once.

Letters: B streams, L tokens, h heads, d channels of a head (WIDTH), D = h·d (CHANNELS). D need not
be a power of two: lanes past it are masked. Since D is a constant, whole warps past it cost no
instructions.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from afd_kernels.contracts import require
from afd_kernels.forward_noise.triton_impl import MAX_BATCH, refuse
from afd_kernels.kept import Kept
from afd_kernels.launch_config import device_arch, launch_config
from afd_kernels.reduce_triton import factor_of_row, sum_rows
from afd_kernels.triton_launch import Launches, repeat

__all__ = ["qk_norm_rope", "qk_norm_rope_append_", "qk_norm_rope_bwd", "refuse"]

KEEPS = True
MANY = f"at most {MAX_BATCH} streams for triton"


@triton.jit
def _pairs(x, BLOCK: tl.constexpr):
    """Even and odd lanes: the real and imaginary parts that RoPE turns."""
    return tl.split(tl.reshape(x, [BLOCK // 2, 2]))


@triton.jit
def _inverse_rms(x, eps, CHANNELS: tl.constexpr):
    square = tl.sum(x * x) / CHANNELS
    inverse = tl.rsqrt(square + eps)
    factor = factor_of_row(square + eps)
    # Only a scalar is carried out of the branch: a second row would cost registers everywhere.
    if factor != 1.0:
        scaled = x * factor
        inverse = tl.rsqrt(tl.sum(scaled * scaled) / CHANNELS + eps * factor * factor) * factor
    return inverse


@triton.jit
def _load(ptr, lane, CHANNELS: tl.constexpr):
    return tl.load(ptr + lane, mask=lane < CHANNELS, other=0.0).to(tl.float32)


@triton.jit
def _norm_rope(x, weight, cos, sin, poison, eps, CHANNELS: tl.constexpr, BLOCK: tl.constexpr):
    """One row: RoPE(x · inverse rms · weight), NaN where poison is."""
    even, odd = _pairs(x * (_inverse_rms(x, eps, CHANNELS) + poison) * weight, BLOCK)
    return tl.interleave(even * cos - odd * sin, even * sin + odd * cos)


@triton.jit
def _qk_norm_rope_fwd_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    weight_q_ptr,
    weight_k_ptr,
    rope_ptr,
    position_ptr,
    q_out_ptr,
    k_out_ptr,
    v_out_ptr,
    q_batch,
    q_token,
    k_batch,
    k_token,
    v_batch,
    v_token,
    rope_batch,
    position_batch,
    slots,
    frame_tokens,
    sink,
    ring,
    eps,
    WIDTH: tl.constexpr,
    CHANNELS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid (L, B). With v_ptr, k_out and v_out are caches, written at the slot of the frame."""
    stream = tl.program_id(1).to(tl.int64)
    token = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    inside = lane < CHANNELS
    # Issue all loads before the first reduction, whose barrier would delay them.
    q = _load(q_ptr + stream * q_batch + token * q_token, lane, CHANNELS)
    k = _load(k_ptr + stream * k_batch + token * k_token, lane, CHANNELS)
    weight_q = _load(weight_q_ptr, lane, CHANNELS)
    weight_k = _load(weight_k_ptr, lane, CHANNELS)
    angles = rope_ptr + stream * rope_batch + token * WIDTH
    cos, sin = _pairs(tl.load(angles + lane % WIDTH, mask=inside, other=0.0), BLOCK)
    row = stream * tl.num_programs(0) + token
    k_row = row
    poison = 0.0
    if v_ptr is not None:
        v = tl.load(v_ptr + stream * v_batch + token * v_token + lane, mask=inside)
        first = tl.load(position_ptr + stream * position_batch)
        # Rejecting a negative position would need a synchronisation; it produces NaN instead.
        poison = tl.where(first < 0, float("nan"), 0.0)
        frame = tl.maximum(first, 0) + tl.program_id(0) // frame_tokens
        frame = tl.where(frame < sink, frame, sink + (frame - sink) % ring)
        k_row = stream * slots + frame * frame_tokens + tl.program_id(0) % frame_tokens
        tl.store(v_out_ptr + k_row * CHANNELS + lane, v, mask=inside)
    q = _norm_rope(q, weight_q, cos, sin, poison, eps, CHANNELS, BLOCK)
    k = _norm_rope(k, weight_k, cos, sin, poison, eps, CHANNELS, BLOCK)
    element = q_out_ptr.dtype.element_ty
    tl.store(q_out_ptr + row * CHANNELS + lane, q.to(element), mask=inside)
    tl.store(k_out_ptr + k_row * CHANNELS + lane, k.to(element), mask=inside)


@triton.jit
def _rows_bwd(
    grad_ptr, x_ptr, weight_ptr, rope_ptr, dx_ptr, partial_ptr, grad_token, x_token, first, last,
    eps, WIDTH: tl.constexpr, CHANNELS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dx of tokens [first, last) of a stream, and their share of the gain's gradient in fp32."""
    lane = tl.arange(0, BLOCK)
    inside = lane < CHANNELS
    weight = _load(weight_ptr, lane, CHANNELS)
    share = tl.full((BLOCK,), 0.0, tl.float32)
    token = first.to(tl.int64)
    for _ in range(first, last):
        x = _load(x_ptr + token * x_token, lane, CHANNELS)
        grad = _load(grad_ptr + token * grad_token, lane, CHANNELS)
        angles = rope_ptr + token * WIDTH + lane % WIDTH
        cos, sin = _pairs(tl.load(angles, mask=inside, other=0.0), BLOCK)
        even, odd = _pairs(grad, BLOCK)
        grad = tl.interleave(even * cos + odd * sin, odd * cos - even * sin)
        inverse = _inverse_rms(x, eps, CHANNELS)
        normed = x * inverse
        share += grad * normed
        grad *= weight
        dx = inverse * (grad - normed * (tl.sum(grad * normed) / CHANNELS))
        tl.store(dx_ptr + token * CHANNELS + lane, dx.to(dx_ptr.dtype.element_ty), mask=inside)
        token += 1
    tl.store(partial_ptr + lane, share, mask=inside)


@triton.jit
def _qk_norm_rope_bwd_kernel(
    grad_q_ptr,
    grad_k_ptr,
    q_ptr,
    k_ptr,
    weight_q_ptr,
    weight_k_ptr,
    rope_ptr,
    dq_ptr,
    dk_ptr,
    partials_ptr,
    grad_q_batch,
    grad_q_token,
    grad_k_batch,
    grad_k_token,
    q_batch,
    q_token,
    k_batch,
    k_token,
    rope_batch,
    tokens,
    eps,
    WIDTH: tl.constexpr,
    CHANNELS: tl.constexpr,
    BLOCK: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """Grid (blocks of TOKENS tokens, B, q or k)."""
    stream = tl.program_id(1).to(tl.int64)
    first = tl.program_id(0) * TOKENS
    last = tl.minimum(first + TOKENS, tokens)
    rope_ptr += stream * rope_batch
    out = stream * tokens * CHANNELS
    row = stream * tl.num_programs(0) + tl.program_id(0)
    if tl.program_id(2) == 0:
        _rows_bwd(
            grad_q_ptr + stream * grad_q_batch, q_ptr + stream * q_batch, weight_q_ptr, rope_ptr,
            dq_ptr + out, partials_ptr + row * CHANNELS, grad_q_token, q_token, first, last,
            eps, WIDTH, CHANNELS, BLOCK,
        )  # fmt: skip
    else:
        row += tl.num_programs(0) * tl.num_programs(1)
        _rows_bwd(
            grad_k_ptr + stream * grad_k_batch, k_ptr + stream * k_batch, weight_k_ptr, rope_ptr,
            dk_ptr + out, partials_ptr + row * CHANNELS, grad_k_token, k_token, first, last,
            eps, WIDTH, CHANNELS, BLOCK,
        )  # fmt: skip


@triton.jit
def _qk_norm_rope_reduce_kernel(
    partials_ptr,
    dweight_q_ptr,
    dweight_k_ptr,
    rows,
    CHANNELS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Grid (blocks of COLUMNS channels, q or k): the gains' gradients from their shares."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < CHANNELS
    partials_ptr += tl.program_id(1).to(tl.int64) * rows * CHANNELS
    total = sum_rows(partials_ptr, rows, CHANNELS, column, inside, ROWS, COLUMNS)
    if tl.program_id(1) == 0:
        tl.store(dweight_q_ptr + column, total.to(dweight_q_ptr.dtype.element_ty), mask=inside)
    else:
        tl.store(dweight_k_ptr + column, total.to(dweight_k_ptr.dtype.element_ty), mask=inside)


def _per_stream(x: Tensor) -> int:
    """Stride between streams; 0 if one row is shared."""
    return 0 if x.shape[0] == 1 else x.stride(0)


def _rows(q: Tensor, config: dict[str, int]) -> dict[str, int | bool]:
    """Launch constants of kernels that hold whole rows of D channels in registers."""
    channels = q.shape[2] * q.shape[3]
    block = triton.next_power_of_2(channels)
    return {
        "WIDTH": q.shape[3],
        "CHANNELS": channels,
        "BLOCK": block,
        "num_warps": max(1, min(16, block // (32 * config["per_thread"]))),
        "num_stages": config["num_stages"],
        # Without fusion all specialisations are bitwise equal, including append and forward.
        "enable_fp_fusion": False,
    }


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    weight_q: Tensor,
    weight_k: Tensor,
    rope: Tensor,
    position: Tensor | None,
    k_out: Tensor,
    v_out: Tensor | None,
    slots: tuple[int, int, int, int],
    eps: float,
    kept: Kept | None,
) -> Tensor:
    """Launches the forward; `slots` are slots, tokens of a frame, sink frames and ring frames."""
    q_out = torch.empty_like(q, memory_format=torch.contiguous_format)
    tensors = (q, k, v, weight_q, weight_k, rope, position, q_out, k_out, v_out)
    if repeat(kept, tensors):
        return q_out
    require(q.shape[0] <= MAX_BATCH, "q", q, MANY)
    config = launch_config("qk_norm_rope", device_arch(q.device))["fwd"]
    launches = Launches(kept, tensors)
    launches(_qk_norm_rope_fwd_kernel, (q.shape[1], q.shape[0]))(
        *tensors,
        *q.stride()[:2],
        *k.stride()[:2],
        *((0, 0) if v is None else v.stride()[:2]),
        _per_stream(rope),
        0 if position is None else _per_stream(position),
        *slots,
        eps,
        **_rows(q, config),
    )
    launches.keep()
    return q_out


def qk_norm_rope(
    q: Tensor,
    k: Tensor,
    weight_q: Tensor,
    weight_k: Tensor,
    rope: Tensor,
    eps: float,
    kept: Kept | None = None,
) -> tuple[Tensor, Tensor]:
    """q_out and k_out [B, L, h, d]; a token's channels, the weights and tables contiguous."""
    k_out = torch.empty_like(k, memory_format=torch.contiguous_format)
    tensors = (q, k, None, weight_q, weight_k, rope, None, k_out, None)
    return _forward(*tensors, (0, 0, 0, 0), eps, kept), k_out


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
    kept: Kept | None = None,
) -> Tensor:
    """q_out; k_out and v are written into the caches [B, S, h, d]."""
    slots = k_cache.shape[1]
    ring = slots // tokens_per_frame - sink_frames
    tensors = (q, k, v, weight_q, weight_k, rope, position, k_cache, v_cache)
    return _forward(*tensors, (slots, tokens_per_frame, sink_frames, ring), eps, kept)


def qk_norm_rope_bwd(
    grad_q: Tensor,
    grad_k: Tensor,
    q: Tensor,
    k: Tensor,
    weight_q: Tensor,
    weight_k: Tensor,
    rope: Tensor,
    eps: float,
    kept: Kept | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of q, k and the weights."""
    batch, tokens, heads, width = q.shape
    require(batch <= MAX_BATCH, "q", q, MANY)
    configs = launch_config("qk_norm_rope", device_arch(q.device))
    block_tokens, reduce = configs["bwd"]["tokens"], configs["reduce"]
    blocks, channels = triton.cdiv(tokens, block_tokens), heads * width
    dq, dk = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k))
    dweight_q, dweight_k = torch.empty_like(weight_q), torch.empty_like(weight_k)
    size = (2, batch * blocks, channels)
    partials = torch.empty(size, dtype=torch.float32, device=q.device)
    read = (grad_q, grad_k, q, k, weight_q, weight_k, rope)
    if repeat(kept, tensors := (*read, dq, dk, partials, dweight_q, dweight_k)):
        return dq, dk, dweight_q, dweight_k
    launches = Launches(kept, tensors)
    launches(_qk_norm_rope_bwd_kernel, (blocks, batch, 2))(
        *read,
        dq,
        dk,
        partials,
        *grad_q.stride()[:2],
        *grad_k.stride()[:2],
        *q.stride()[:2],
        *k.stride()[:2],
        _per_stream(rope),
        tokens,
        eps,
        **_rows(q, configs["bwd"]),
        TOKENS=block_tokens,
    )
    launches(_qk_norm_rope_reduce_kernel, (triton.cdiv(channels, reduce["columns"]), 2))(
        partials,
        dweight_q,
        dweight_k,
        batch * blocks,
        CHANNELS=channels,
        ROWS=reduce["rows"],
        COLUMNS=reduce["columns"],
        num_warps=reduce["num_warps"],
        num_stages=reduce["num_stages"],
        enable_fp_fusion=False,
    )
    launches.keep()
    return dq, dk, dweight_q, dweight_k
