"""forward_noise in Triton: x_t = alpha x0 + sigma noise, with the noise generated in registers.

Letters: B batch, O outer, F frames, I inner (see contracts.Plan); a row is I contiguous elements.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from afd_kernels.contracts import Plan
from afd_kernels.kept import Kept
from afd_kernels.launch_config import device_arch, launch_config
from afd_kernels.philox_triton import normal_tile
from afd_kernels.triton_launch import Launches, repeat

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# CUDA's limit on the second grid dimension, used for the batch.
MAX_BATCH = 65535


@triton.jit
def wide(x: tl.constexpr):
    """A constant in fp64: written as a plain number, Triton would round it to fp32 first."""
    return tl.full((), x, tl.float64)


@triton.jit
def _cos_sin_quarter(t):
    """cos and sin of pi t / 2 for fp64 t in [0, 1]; libdevice's would spill to the stack."""
    mirrored = t > wide(0.5)
    a = tl.where(mirrored, wide(1.0) - t, t) * wide(1.5707963267948966)
    s = a * a
    # Taylor series to x^15 and x^16: below 1e-16 on [0, pi/4].
    sin = tl.fma(s, wide(-7.647163731819816e-13), wide(1.6059043836821613e-10))
    sin = tl.fma(sin, s, wide(-2.505210838544172e-08))
    sin = tl.fma(sin, s, wide(2.7557319223985893e-06))
    sin = tl.fma(sin, s, wide(-1.984126984126984e-04))
    sin = tl.fma(sin, s, wide(8.333333333333333e-03))
    sin = tl.fma(sin, s, wide(-1.6666666666666666e-01))
    sin = tl.fma(sin * s, a, a)
    cos = tl.fma(s, wide(4.779477332387385e-14), wide(-1.1470745597729725e-11))
    cos = tl.fma(cos, s, wide(2.08767569878681e-09))
    cos = tl.fma(cos, s, wide(-2.755731922398589e-07))
    cos = tl.fma(cos, s, wide(2.48015873015873e-05))
    cos = tl.fma(cos, s, wide(-1.388888888888889e-03))
    cos = tl.fma(cos, s, wide(4.1666666666666664e-02))
    cos = tl.fma(cos, s, wide(-0.5))
    cos = tl.fma(cos, s, wide(1.0))
    return tl.where(mirrored, sin, cos), tl.where(mirrored, cos, sin)


@triton.jit
def schedule_coefficients(
    t, SCHEDULE: tl.constexpr, BETA_MIN: tl.constexpr, BETA_MAX: tl.constexpr
):
    """alpha, sigma, alpha', sigma' in fp64 at fp32 t; NaN where t is outside the schedule.

    A device value cannot be refused without a synchronisation, so it poisons the result instead.
    """
    low = 1e-5 if SCHEDULE == "vp_linear" else 0.0
    t = tl.where((t >= low) & (t <= 1.0), t, float("nan"))
    t = t.to(tl.float64)
    if SCHEDULE == "rectified_flow":
        alpha = wide(1.0) - t
        sigma = t
        d_sigma = t * wide(0.0) + wide(1.0)
        d_alpha = -d_sigma
    elif SCHEDULE == "vp_cosine":
        alpha, sigma = _cos_sin_quarter(t)
        d_alpha = wide(-1.5707963267948966) * sigma
        d_sigma = wide(1.5707963267948966) * alpha
    else:
        least, slope = wide(BETA_MIN), wide(BETA_MAX - BETA_MIN)
        half = wide(0.5)
        rate = tl.fma(t, slope, least)
        integral = (least + half * slope * t) * t
        alpha = tl.exp(-half * integral)
        # integral >= 1e-6: 1 - exp keeps ten digits in fp64, more than fp32 resolves.
        sigma = tl.sqrt(wide(1.0) - alpha * alpha)
        d_alpha = -half * rate * alpha
        d_sigma = half * rate * alpha * alpha / sigma
    return alpha, sigma, d_alpha, d_sigma


@triton.jit
def tile_of_row(block, inner, tiles, TILE: tl.constexpr, ONE_ROW: tl.constexpr):
    """Row and first element of the block-th tile of a sample, and the elements left in its row."""
    if ONE_ROW:
        row = block * 0
        tile = block
    else:
        row = block // tiles
        tile = block % tiles
    start = tile.to(tl.int64) * TILE
    return row, start, inner - start


@triton.jit
def lanes_left(left, BLOCK: tl.constexpr):
    """How many of BLOCK lanes lie inside the row, as int32 of known divisibility (wide loads)."""
    return tl.where(left < BLOCK, left, BLOCK).to(tl.int32)


@triton.jit
def _forward_noise_fwd_kernel(
    x0_ptr,
    t_ptr,
    seed_ptr,
    noise_ptr,
    out_ptr,
    row_units,
    rows,
    frames,
    tiles,
    SCHEDULE: tl.constexpr,
    BETA_MIN: tl.constexpr,
    BETA_MAX: tl.constexpr,
    ONE_ROW: tl.constexpr,
    ROW_ALIGN: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK: tl.constexpr,
):
    sample = tl.program_id(1)
    inner = tl.full((), ROW_ALIGN, tl.int64) * row_units
    row, start, left = tile_of_row(tl.program_id(0), inner, tiles, BLOCK, ONE_ROW)
    t = tl.load(t_ptr + sample * frames + row % frames)
    alpha, sigma, _, _ = schedule_coefficients(t, SCHEDULE, BETA_MIN, BETA_MAX)

    in_sample = row.to(tl.int64) * inner + start
    first = sample.to(tl.int64) * inner * rows + in_sample
    lane = tl.arange(0, BLOCK)
    inside = lane < lanes_left(left, BLOCK)
    x0 = tl.load(x0_ptr + first + lane, mask=inside).to(tl.float32)
    if noise_ptr is None:
        noise = normal_tile(tl.load(seed_ptr + sample), in_sample, BLOCK, ROW_ALIGN > 1, VECTOR)
    else:
        noise = tl.load(noise_ptr + first + lane, mask=inside).to(tl.float32)
    x_t = tl.fma(alpha.to(tl.float32), x0, sigma.to(tl.float32) * noise)
    tl.store(out_ptr + first + lane, x_t.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _forward_noise_bwd_kernel(
    grad_ptr,
    t_ptr,
    out_ptr,
    row_units,
    rows,
    frames,
    tiles,
    SCHEDULE: tl.constexpr,
    BETA_MIN: tl.constexpr,
    BETA_MAX: tl.constexpr,
    ONE_ROW: tl.constexpr,
    ROW_ALIGN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    sample = tl.program_id(1)
    inner = tl.full((), ROW_ALIGN, tl.int64) * row_units
    row, start, left = tile_of_row(tl.program_id(0), inner, tiles, BLOCK, ONE_ROW)
    t = tl.load(t_ptr + sample * frames + row % frames)
    alpha, _, _, _ = schedule_coefficients(t, SCHEDULE, BETA_MIN, BETA_MAX)

    first = (sample.to(tl.int64) * rows + row) * inner + start
    lane = tl.arange(0, BLOCK)
    inside = lane < lanes_left(left, BLOCK)
    grad = tl.load(grad_ptr + first + lane, mask=inside).to(tl.float32)
    scaled = alpha.to(tl.float32) * grad
    tl.store(out_ptr + first + lane, scaled.to(out_ptr.dtype.element_ty), mask=inside)


INTERPRETED = not isinstance(_forward_noise_fwd_kernel, triton.runtime.JITFunction)


KEEPS = True


def refuse(device: str, dtypes: set[torch.dtype]) -> str | None:
    """The reason why Triton cannot run these dtypes on this device type, or None."""
    if device != "cuda" and not (INTERPRETED and device == "cpu"):
        return (
            f"triton needs a CUDA or ROCm device, the tensors are on {device} "
            "(TRITON_INTERPRET=1 runs it on CPU tensors, slowly, for tests)"
        )
    for dtype in sorted(dtypes - set(DTYPES), key=str):
        return (
            f"triton takes float32, bfloat16 and float16, not {str(dtype).removeprefix('torch.')}"
        )
    return None


def row_align(inner: int) -> int:
    """The largest of 8, 4, 1 that divides a row length: 8 bf16 elements are one 16-byte access."""
    return next(align for align in (8, 4, 1) if inner % align == 0)


def schedule_constants(plan: Plan) -> dict[str, str | float]:
    beta_min, beta_max = plan.schedule_args or (0.0, 0.0)
    return {"SCHEDULE": plan.schedule, "BETA_MIN": beta_min, "BETA_MAX": beta_max}


def check_batch(batch: int) -> None:
    if batch > MAX_BATCH:
        raise ValueError(f"x0: got a batch of {batch}; needed: at most {MAX_BATCH} for triton")


def _launch(
    kernel: triton.runtime.JITFunction,
    part: str,
    x: Tensor,
    sources: tuple[Tensor | None, ...],
    plan: Plan,
    kept: Kept | None,
    **constants: int,
) -> Tensor:
    """Launch a kernel on x and its other inputs; the result has the shape and dtype of x."""
    out = torch.empty_like(x)
    tensors = (x, *sources, out)
    if repeat(kept, tensors):
        return out
    check_batch(plan.batch)
    launches = Launches(kept, tensors)
    # Frames that share t are adjacent in memory: merge them into one row.
    frames, inner = plan.t_chunks, plan.inner * (plan.frames // plan.t_chunks)
    config = launch_config("forward_noise", device_arch(x.device))[part]
    tiles = triton.cdiv(inner, config["block"])
    rows = plan.outer * frames
    align = row_align(inner)
    launches(kernel, (rows * tiles, plan.batch))(
        *tensors,
        inner // align,
        rows,
        frames,
        tiles,
        **schedule_constants(plan),
        **constants,
        ONE_ROW=rows == 1,
        ROW_ALIGN=align,
        BLOCK=config["block"],
        num_warps=config["num_warps"],
        num_stages=config["num_stages"],
        enable_fp_fusion=False,
    )
    launches.keep()
    return out


def forward_noise(
    x0: Tensor,
    t: Tensor,
    seed: Tensor | None,
    noise: Tensor | None,
    plan: Plan,
    kept: Kept | None = None,
) -> Tensor:
    """x_t with the shape and dtype of x0; tensors contiguous, t [B] or [B, K] fp32."""
    vector = 16 // x0.element_size()
    sources = (t, seed, noise)
    return _launch(_forward_noise_fwd_kernel, "fwd", x0, sources, plan, kept, VECTOR=vector)


def forward_noise_bwd(grad: Tensor, t: Tensor, plan: Plan, kept: Kept | None = None) -> Tensor:
    """The gradient with respect to x0, alpha_t grad, with the shape and dtype of grad."""
    return _launch(_forward_noise_bwd_kernel, "bwd", grad, (t,), plan, kept)
