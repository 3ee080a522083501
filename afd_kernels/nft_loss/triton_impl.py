"""nft_loss in Triton: launches the kernels of triton_kernels.py (see MATH.md)."""

from __future__ import annotations

import math

import torch
import triton
from torch import Tensor

from afd_kernels.forward_noise import triton_impl as noising
from afd_kernels.kept import Kept
from afd_kernels.launch_config import device_arch, launch_config
from afd_kernels.nft_loss.contract import METRICS, NftInputs, NftPlan
from afd_kernels.nft_loss.storage import grad_power
from afd_kernels.nft_loss.triton_kernels import (
    COEFFICIENTS,
    SUMS,
    _nft_loss_finalize_kernel,
    _nft_loss_grad_kernel,
    _nft_loss_partials_kernel,
    _nft_loss_scale_kernel,
    _nft_loss_total_kernel,
)
from afd_kernels.triton_launch import Launches, repeat

# Rows of partial sums that the finalisation adds in parallel; affects the summation order.
_PARALLEL = 256


KEEPS = True


def refuse(device: str, dtypes: set[torch.dtype]) -> str | None:
    """The reason why Triton cannot run these dtypes on this device type, or None."""
    return noising.refuse(device, dtypes)


def _segments(plan: NftPlan, frame_mask: Tensor | None) -> int:
    """Number of runs of frames that share t, r, sigma and group; with a mask, of frames."""
    if frame_mask is not None:
        return plan.frames
    return math.lcm(plan.t_chunks, plan.r_chunks, plan.sigma_chunks, plan.groups)


def nft_loss(
    inputs: NftInputs, plan: NftPlan, kept: Kept | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """loss fp32 [], metrics fp64 [B, G, 7], grad_power times the gradient ([0] if unneeded)."""
    v_theta, x0, adaptive = inputs.v_theta, inputs.x0, plan.adaptive
    frames = _segments(plan, inputs.frame_mask)
    inner = plan.inner * (plan.frames // frames)
    rows = plan.outer * frames
    configs = launch_config("nft_loss", device_arch(x0.device))
    one_pass = configs["partials"]
    tiles = triton.cdiv(inner, one_pass["block"] * one_pass["steps"])

    def scratch(dtype: torch.dtype, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=x0.device)

    partials = scratch(torch.float32, plan.batch, rows * tiles, SUMS.value)
    losses = scratch(torch.float64, plan.batch, plan.groups)
    metrics = scratch(torch.float64, plan.batch, plan.groups, len(METRICS))
    loss = scratch(torch.float32)
    grad = torch.empty_like(v_theta) if plan.needs_grad else scratch(v_theta.dtype, 0)
    coefficients = None
    if adaptive and plan.needs_grad:
        coefficients = scratch(torch.float32, plan.batch, frames, COEFFICIENTS.value)
    early_grad = grad if plan.needs_grad and not adaptive else None
    if early_grad is not None and inputs.frame_mask is not None:
        early_grad.zero_()
    tensors = (*inputs, partials, losses, metrics, loss, grad, coefficients)
    if repeat(kept, tensors):
        return loss, metrics, grad

    launches = Launches(kept, tensors)
    noising.check_batch(plan.batch)
    align = noising.row_align(inner)
    chunks = (plan.t_chunks, plan.r_chunks, plan.sigma_chunks)
    numbers = (plan.nft_beta, plan.prior_weight, plan.slope, grad_power(plan, inputs))
    options = {
        "X0": plan.x0_space,
        "PRIOR_X0": plan.prior_in_x0,
        "PRIOR_BY_R": plan.prior_by_r,
        **noising.schedule_constants(plan),
    }
    loads = [x for x in (v_theta, x0, inputs.noise) if x is not None]
    shape = {
        "ONE_ROW": rows == 1,
        "ROW_ALIGN": align,
        "VECTOR": 16 // min(x.element_size() for x in loads),
    }

    # Rows of odd length compute a whole quad per element: use smaller blocks to avoid spills.
    halve = 2 if align == 1 else 1
    launches(_nft_loss_partials_kernel, (rows * tiles, plan.batch))(
        *inputs,
        partials,
        early_grad,
        inner // align,
        rows,
        frames,
        tiles,
        *chunks,
        *numbers,
        **options,
        **shape,
        BLOCK=one_pass["block"] // halve,
        STEPS=one_pass["steps"] * halve,
        num_warps=one_pass["num_warps"],
        num_stages=one_pass["num_stages"],
        enable_fp_fusion=False,
    )
    side_by_side = min(16, triton.next_power_of_2(frames // plan.groups))
    launches(_nft_loss_finalize_kernel, (plan.groups, plan.batch))(
        partials,
        inputs.t,
        inputs.r,
        inputs.frame_mask,
        inputs.sigma,
        inputs.prior_weights,
        inputs.sample_weight,
        metrics,
        losses,
        coefficients,
        inner // align,
        plan.outer,
        frames,
        tiles,
        *chunks,
        *numbers,
        plan.scale,
        plan.weight_min,
        ADAPTIVE=adaptive,
        **options,
        ROW_ALIGN=align,
        FRAMES=side_by_side,
        PARALLEL=_PARALLEL // side_by_side,
        num_warps=configs["finalize"]["num_warps"],
        num_stages=1,
        enable_fp_fusion=False,
    )
    if coefficients is None:
        launches(_nft_loss_total_kernel, (1,))(
            losses, loss, plan.groups, plan.batch, num_warps=1, enable_fp_fusion=False
        )
        launches.keep()
        return loss, metrics, grad
    config = configs["grad"]
    block = config["block"] // halve
    tiles = triton.cdiv(inner, block)
    launches(_nft_loss_grad_kernel, (rows * tiles, plan.batch))(
        v_theta,
        inputs.v_old,
        inputs.v_ref,
        x0,
        inputs.seed,
        inputs.noise,
        inputs.frame_mask,
        coefficients,
        grad,
        losses,
        loss,
        inner // align,
        rows,
        frames,
        tiles,
        plan.groups,
        **shape,
        BLOCK=block,
        num_warps=config["num_warps"],
        num_stages=config["num_stages"],
        enable_fp_fusion=False,
    )
    launches.keep()
    return loss, metrics, grad


def _scale(grad: Tensor, grad_loss: Tensor, out: Tensor, kept: Kept | None) -> None:
    tensors = (grad, grad_loss, out)
    if repeat(kept, tensors):
        return
    launches = Launches(kept, tensors)
    config = launch_config("nft_loss", device_arch(grad.device))["scale"]
    launches(_nft_loss_scale_kernel, (triton.cdiv(grad.numel(), config["block"]),))(
        *tensors,
        grad.numel(),
        IN_PLACE=out is grad,
        BLOCK=config["block"],
        num_warps=config["num_warps"],
        num_stages=config["num_stages"],
        enable_fp_fusion=False,
    )
    launches.keep()


def nft_loss_bwd(grad: Tensor, grad_loss: Tensor, kept: Kept | None = None) -> Tensor:
    """grad * grad_loss in grad's dtype; grad_loss is a scalar on the device."""
    out = torch.empty_like(grad)
    _scale(grad, grad_loss, out, kept)
    return out


def nft_loss_bwd_(grad: Tensor, grad_loss: Tensor, kept: Kept | None = None) -> None:
    """The same, into grad."""
    _scale(grad, grad_loss, grad, kept)
