"""adaln in Triton: one program per token holds its row in registers.

Letters: B streams, L tokens, D width (CHANNELS), F frames of a modulation [1 or B, F, D].
"""

from __future__ import annotations

import math

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

__all__ = ["adaln", "adaln_bwd", "refuse"]

KEEPS = True
MANY = f"at most {MAX_BATCH} streams for triton"


@triton.jit
def _load(ptr, lane, CHANNELS: tl.constexpr):
    return tl.load(ptr + lane, mask=lane < CHANNELS, other=0.0).to(tl.float32)


@triton.jit
def _moments(x, inside, CHANNELS: tl.constexpr):
    """The mean of a row whose lanes outside are 0, and its variance."""
    mean = tl.sum(x) / CHANNELS
    centred = tl.where(inside, x - mean, 0.0)
    return mean, tl.sum(centred * centred) / CHANNELS


@triton.jit
def _normalise(x, inside, eps, CHANNELS: tl.constexpr):
    """LN without affine of a row whose lanes outside are 0, and its inverse deviation.

    x - mean is made a second time: held through the branch it would cost registers.
    """
    mean, variance = _moments(x, inside, CHANNELS)
    factor = factor_of_row(variance + eps)
    if factor != 1.0:
        x *= factor
        mean, variance = _moments(x, inside, CHANNELS)
        eps = eps * factor * factor
    inverse = tl.rsqrt(variance + eps)
    return tl.where(inside, x - mean, 0.0) * inverse, inverse * factor


@triton.jit
def _adaln_fwd_kernel(
    x_ptr,
    branch_ptr,
    gate_ptr,
    scale_ptr,
    shift_ptr,
    x_out_ptr,
    h_ptr,
    x_batch,
    x_token,
    branch_batch,
    branch_token,
    gate_batch,
    gate_frame,
    scale_batch,
    scale_frame,
    shift_batch,
    shift_frame,
    gate_tokens,
    scale_tokens,
    scale_offset,
    eps,
    CHANNELS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid (L, B); gate_tokens and scale_tokens are the tokens that share a modulation."""
    token = tl.program_id(0).to(tl.int64)
    stream = tl.program_id(1).to(tl.int64)
    out = (stream * tl.num_programs(0) + token) * CHANNELS
    lane = tl.arange(0, BLOCK)
    inside = lane < CHANNELS
    # Issue all loads before the first reduction, whose barrier would delay them.
    x = _load(x_ptr + stream * x_batch + token * x_token, lane, CHANNELS)
    frame = (tl.program_id(0) // scale_tokens).to(tl.int64)
    scale = _load(scale_ptr + stream * scale_batch + frame * scale_frame, lane, CHANNELS)
    shift = _load(shift_ptr + stream * shift_batch + frame * shift_frame, lane, CHANNELS)
    if branch_ptr is not None:
        branch = _load(branch_ptr + stream * branch_batch + token * branch_token, lane, CHANNELS)
        if gate_ptr is not None:
            frame = (tl.program_id(0) // gate_tokens).to(tl.int64)
            branch *= _load(gate_ptr + stream * gate_batch + frame * gate_frame, lane, CHANNELS)
        x_out = (x + branch).to(x_out_ptr.dtype.element_ty)
        tl.store(x_out_ptr + out + lane, x_out, mask=inside)
        # Normalise the rounded value, the one that the next residual reads.
        x = x_out.to(tl.float32)
    normed, _ = _normalise(x, inside, eps, CHANNELS)
    h = normed * (scale + scale_offset) + shift
    tl.store(h_ptr + out + lane, h.to(h_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _adaln_bwd_kernel(
    grad_x_out_ptr,
    grad_h_ptr,
    x_out_ptr,
    branch_ptr,
    gate_ptr,
    scale_ptr,
    dx_ptr,
    dbranch_ptr,
    partials_ptr,
    grad_x_out_batch,
    grad_x_out_token,
    grad_h_batch,
    grad_h_token,
    x_out_batch,
    x_out_token,
    branch_batch,
    branch_token,
    gate_batch,
    gate_frame,
    scale_batch,
    scale_frame,
    tokens,
    segment,
    blocks,
    gate_tokens,
    scale_tokens,
    scale_offset,
    eps,
    CHANNELS: tl.constexpr,
    BLOCK: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """Grid (segments · blocks, B): up to TOKENS tokens that share gate, scale and shift.

    A segment is a run of tokens with one modulation of each kind. Each program leaves the partial
    sums of dscale, dshift and dgate, fp32 [3, D].
    """
    stream = tl.program_id(1).to(tl.int64)
    start = tl.program_id(0) // blocks * segment
    first = start + tl.program_id(0) % blocks * TOKENS
    last = tl.minimum(first + TOKENS, start + segment)
    lane = tl.arange(0, BLOCK)
    inside = lane < CHANNELS
    frame = (start // scale_tokens).to(tl.int64)
    scale = _load(scale_ptr + stream * scale_batch + frame * scale_frame, lane, CHANNELS)
    scale += scale_offset
    if gate_ptr is not None:
        frame = (start // gate_tokens).to(tl.int64)
        gate = _load(gate_ptr + stream * gate_batch + frame * gate_frame, lane, CHANNELS)
        dgate = tl.full((BLOCK,), 0.0, tl.float32)
    dscale = tl.full((BLOCK,), 0.0, tl.float32)
    dshift = tl.full((BLOCK,), 0.0, tl.float32)
    token = first.to(tl.int64)
    for _ in range(first, last):
        x = _load(x_out_ptr + stream * x_out_batch + token * x_out_token, lane, CHANNELS)
        grad = _load(grad_h_ptr + stream * grad_h_batch + token * grad_h_token, lane, CHANNELS)
        if grad_x_out_ptr is not None:
            row = stream * grad_x_out_batch + token * grad_x_out_token
            residual = _load(grad_x_out_ptr + row, lane, CHANNELS)
        if gate_ptr is not None:
            branch = _load(
                branch_ptr + stream * branch_batch + token * branch_token, lane, CHANNELS
            )
        normed, inverse = _normalise(x, inside, eps, CHANNELS)
        dscale += grad * normed
        dshift += grad
        grad *= scale
        mean = tl.sum(grad) / CHANNELS
        along = tl.sum(grad * normed) / CHANNELS
        dx = inverse * (grad - mean - normed * along)
        if grad_x_out_ptr is not None:
            dx += residual
        out = (stream * tokens + token) * CHANNELS + lane
        tl.store(dx_ptr + out, dx.to(dx_ptr.dtype.element_ty), mask=inside)
        if gate_ptr is not None:
            dgate += dx * branch
            tl.store(dbranch_ptr + out, (dx * gate).to(dbranch_ptr.dtype.element_ty), mask=inside)
        token += 1
    row = stream * tl.num_programs(0) + tl.program_id(0)
    partials_ptr += row * 3 * CHANNELS
    tl.store(partials_ptr + lane, dscale, mask=inside)
    tl.store(partials_ptr + CHANNELS + lane, dshift, mask=inside)
    if gate_ptr is not None:
        tl.store(partials_ptr + 2 * CHANNELS + lane, dgate, mask=inside)


@triton.jit
def _adaln_reduce_kernel(
    partials_ptr,
    out_ptr,
    streams,
    run,
    CHANNELS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Grid (F, blocks of COLUMNS channels, 1 or B): the gradient of one row of a modulation.

    It is the sum of `run` partial rows of each of `streams` streams.
    """
    frame = tl.program_id(0)
    frames = tl.num_programs(0)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < CHANNELS
    out_row = tl.program_id(2).to(tl.int64) * frames + frame
    total = tl.full((COLUMNS,), 0.0, tl.float32)
    row = out_row * run
    for _ in range(streams):
        rows_ptr = partials_ptr + row * 3 * CHANNELS
        total += sum_rows(rows_ptr, run, 3 * CHANNELS, column, inside, ROWS, COLUMNS)
        row += frames * run
    out = total.to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + out_row * CHANNELS + column, out, mask=inside)


def _like(x: Tensor) -> Tensor:
    """An uninitialised contiguous tensor like x; new_empty(x.shape) takes four times as long."""
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _strides(value: Tensor | None) -> tuple[int, int]:
    """Strides of streams and of tokens (frames); 0 if one row is shared."""
    if value is None:
        return 0, 0
    streams, rows = (0 if n == 1 else value.stride(i) for i, n in enumerate(value.shape[:2]))
    return streams, rows


def _rows(x: Tensor, config: dict[str, int]) -> dict[str, int | bool]:
    """Launch constants of kernels that hold whole rows of D channels in registers."""
    block = triton.next_power_of_2(x.shape[-1])
    return {
        "CHANNELS": x.shape[-1],
        "BLOCK": block,
        "num_warps": max(1, min(16, block // (32 * config["per_thread"]))),
        "num_stages": config["num_stages"],
        # Without fusion all specialisations are bitwise equal, with or without gate or gradient.
        "enable_fp_fusion": False,
    }


def adaln(
    x: Tensor,
    branch: Tensor | None,
    gate: Tensor | None,
    scale: Tensor,
    shift: Tensor,
    scale_offset: float,
    eps: float,
    kept: Kept | None = None,
) -> tuple[Tensor, Tensor]:
    """x_out ([0] without a branch) and h; modulations [1 or B, F, D], channels contiguous."""
    h = _like(x)
    x_out = torch.empty(0, dtype=x.dtype, device=x.device) if branch is None else _like(x)
    inputs = (x, branch, gate, scale, shift)
    tensors = (*inputs, x_out, h)
    if repeat(kept, tensors):
        return x_out, h
    require(x.shape[0] <= MAX_BATCH, "x", x, MANY)
    config = launch_config("adaln", device_arch(x.device))["fwd"]
    tokens = x.shape[1]
    launches = Launches(kept, tensors)
    launches(_adaln_fwd_kernel, (tokens, x.shape[0]))(
        *tensors,
        *(stride for value in inputs for stride in _strides(value)),
        tokens if gate is None else tokens // gate.shape[1],
        tokens // scale.shape[1],
        scale_offset,
        eps,
        **_rows(x, config),
    )
    launches.keep()
    return x_out, h


def adaln_bwd(
    grad_x_out: Tensor | None,
    grad_h: Tensor,
    x_out: Tensor,
    branch: Tensor | None,
    gate: Tensor | None,
    scale: Tensor,
    scale_offset: float,
    eps: float,
    kept: Kept | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dx, dbranch, dgate (both [0] without a gate), dscale, dshift."""
    batch, tokens, channels = x_out.shape
    require(batch <= MAX_BATCH, "x_out", x_out, MANY)
    configs = launch_config("adaln", device_arch(x_out.device))
    block_tokens, reduce = configs["bwd"]["tokens"], configs["reduce"]
    segments = math.lcm(scale.shape[1], 1 if gate is None else gate.shape[1])
    segment = tokens // segments
    blocks = triton.cdiv(segment, block_tokens)
    dx = _like(x_out)
    if gate is None:
        dbranch, dgate = x_out.new_empty(0), x_out.new_empty(0)
    else:
        dbranch, dgate = _like(x_out), _like(gate)
    dscale, dshift = _like(scale), _like(scale)
    size = (batch, segments * blocks, 3, channels)
    partials = torch.empty(size, dtype=torch.float32, device=x_out.device)
    sums = partials[0, 0].unbind()
    inputs = (grad_x_out, grad_h, x_out, branch if gate is not None else None, gate, scale)
    tensors = (*inputs, dx, dbranch, partials, *sums, dgate, dscale, dshift)
    if repeat(kept, tensors):
        return dx, dbranch, dgate, dscale, dshift
    launches = Launches(kept, tensors)
    launches(_adaln_bwd_kernel, (segments * blocks, batch))(
        *inputs,
        dx,
        dbranch,
        partials,
        *(stride for value in inputs for stride in _strides(value)),
        tokens,
        segment,
        blocks,
        tokens if gate is None else tokens // gate.shape[1],
        tokens // scale.shape[1],
        scale_offset,
        eps,
        **_rows(x_out, configs["bwd"]),
        TOKENS=block_tokens,
    )

    wanted = zip(sums, (dscale, dshift, dgate), strict=True)
    for part, out in list(wanted)[: 2 if gate is None else 3]:
        streams, frames, _ = out.shape
        grid = (frames, triton.cdiv(channels, reduce["columns"]), streams)
        launches(_adaln_reduce_kernel, grid)(
            part,
            out,
            batch // streams,
            segments // frames * blocks,
            CHANNELS=channels,
            ROWS=reduce["rows"],
            COLUMNS=reduce["columns"],
            num_warps=reduce["num_warps"],
            num_stages=reduce["num_stages"],
            enable_fp_fusion=False,
        )
    launches.keep()
    return dx, dbranch, dgate, dscale, dshift
