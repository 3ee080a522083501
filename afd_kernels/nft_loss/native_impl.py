"""nft_loss through the compiled core (csrc/cpu and csrc/cuda)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from afd_kernels import native
from afd_kernels.contracts import METRICS, NftPlan
from afd_kernels.kept import Kept
from afd_kernels.nft_loss.storage import grad_power

KEEPS = True


def refuse(device: str, dtypes: set[torch.dtype]) -> str | None:
    """The reason why the compiled core cannot run this, or None."""
    return native.refuse(device, dtypes)


def nft_loss(
    v_theta: Tensor,
    v_old: Tensor,
    v_ref: Tensor | None,
    x0: Tensor,
    t: Tensor,
    r: Tensor,
    seed: Tensor | None,
    noise: Tensor | None,
    frame_mask: Tensor | None,
    plan: NftPlan,
    kept: Kept | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """loss fp32 [], metrics fp64 [B, G, 7], grad_power times the gradient ([0] if not requested).

    All tensors are contiguous. Apart from the results, nothing of a sample's size is allocated.
    """
    core = native.core()
    loss = torch.empty((), dtype=torch.float32, device=x0.device)
    metrics = torch.empty(
        (plan.batch, plan.groups, len(METRICS)), dtype=torch.float64, device=x0.device
    )
    if plan.needs_grad:
        grad = native.empty_like(v_theta)
    else:
        grad = torch.empty(0, dtype=v_theta.dtype, device=v_theta.device)

    def make() -> Any:
        problem = native.describe(core.NftProblem(), plan)
        problem.r_chunks = plan.r_chunks
        problem.groups = plan.groups
        problem.nft_beta = plan.nft_beta
        problem.prior_weight = plan.prior_weight
        problem.adv_clip = plan.adv_clip
        problem.grad_power = grad_power(v_theta.dtype, plan, frame_mask is not None)
        problem.velocity_weighting = plan.weighting == "velocity"
        problem.prior_by_r = plan.prior_by_r
        problem.prediction_type = native.type_code(v_theta.dtype)
        problem.x0_type = native.type_code(x0.dtype)
        problem.noise_type = native.type_code(torch.float32 if noise is None else noise.dtype)
        return problem

    problem = native.take(kept, make)
    wanted = grad if plan.needs_grad else None
    problem.place(
        *(v_theta, v_old, v_ref, x0, t, r, seed, noise, frame_mask, loss, metrics, wanted)
    )
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
