"""nft_loss through the compiled core (csrc/cpu and csrc/cuda)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from afd_kernels import native
from afd_kernels.kept import Kept
from afd_kernels.nft_loss.contract import METRICS, NftInputs, NftPlan
from afd_kernels.nft_loss.storage import grad_power

KEEPS = True


def refuse(device: str, dtypes: set[torch.dtype]) -> str | None:
    """The reason why the compiled core cannot run this, or None."""
    return native.refuse(device, dtypes)


def _problem(inputs: NftInputs, plan: NftPlan) -> Any:
    """All of a call's problem but its addresses."""
    noise = inputs.noise
    problem = native.describe(native.core().NftProblem(), plan)
    problem.r_chunks = plan.r_chunks
    problem.sigma_chunks = plan.sigma_chunks
    problem.groups = plan.groups
    problem.nft_beta = plan.nft_beta
    problem.prior_weight = plan.prior_weight
    problem.scale = plan.scale
    problem.slope = plan.slope
    problem.weight_min = plan.weight_min
    problem.grad_power = grad_power(plan, inputs)
    problem.adaptive = plan.adaptive
    problem.x0_space = plan.x0_space
    problem.prior_in_x0 = plan.prior_in_x0
    problem.prior_by_r = plan.prior_by_r
    problem.prediction_type = native.type_code(inputs.v_theta.dtype)
    problem.x0_type = native.type_code(inputs.x0.dtype)
    problem.noise_type = native.type_code(torch.float32 if noise is None else noise.dtype)
    return problem


def nft_loss(
    inputs: NftInputs, plan: NftPlan, kept: Kept | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """loss fp32 [], metrics fp64 [B, G, 7], grad_power times the gradient ([0] if not requested).

    All tensors are contiguous. Apart from the results, nothing of a sample's size is allocated.
    """
    core, x0, v_theta = native.core(), inputs.x0, inputs.v_theta
    loss = torch.empty((), dtype=torch.float32, device=x0.device)
    metrics = torch.empty(
        (plan.batch, plan.groups, len(METRICS)), dtype=torch.float64, device=x0.device
    )
    if plan.needs_grad:
        grad = native.empty_like(v_theta)
    else:
        grad = torch.empty(0, dtype=v_theta.dtype, device=v_theta.device)
    problem = native.take(kept, lambda: _problem(inputs, plan))
    results = (loss, metrics, grad if plan.needs_grad else None)
    problem.place(*inputs, *results)  # in the order of NftInputs
    if x0.is_cpu:
        core.nft_loss_cpu(problem, native.threads(x0))
    else:
        size = core.nft_loss_workspace(problem)
        workspace = torch.empty(size, dtype=torch.uint8, device=x0.device)
        with torch.cuda.device(x0.device):
            core.nft_loss_cuda(problem, workspace.data_ptr(), native.stream(x0))
    native.put_back(kept, problem)
    return loss, metrics, grad


def nft_loss_bwd(grad: Tensor, grad_loss: Tensor, kept: Kept | None = None) -> Tensor:
    """grad * grad_loss, a new tensor."""
    out = native.empty_like(grad)
    native.scale(grad, grad_loss, out)
    return out


def nft_loss_bwd_(grad: Tensor, grad_loss: Tensor, kept: Kept | None = None) -> None:
    """grad *= grad_loss; a scale of exactly 1 writes nothing."""
    native.scale(grad, grad_loss, grad)
