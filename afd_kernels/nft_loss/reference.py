"""Reference nft_loss in plain PyTorch, for any dtype and device; `loss` is twice differentiable.

Letters: B batch, O outer, F frames, I inner (see contracts.Plan), G groups. Algebra in MATH.md.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from afd_kernels.contracts import NftPlan
from afd_kernels.forward_noise.reference import as_rows, coefficients, draw, per_frame, wide
from afd_kernels.nft_loss.storage import grad_power


def refuse(device: str, dtypes: set[torch.dtype]) -> str | None:
    return None


class _Errors(NamedTuple):
    """Rows [B, O, F, I]: velocity errors of the two branches and the two deviations."""

    positive: Tensor
    negative: Tensor
    from_ref: Tensor
    from_old: Tensor


class _Result(NamedTuple):
    loss: Tensor
    metrics: Tensor
    # Gradient coefficients [B, F]: grad = pos (e + d) - neg (e - d) + prior (v_theta - v_ref).
    pos: Tensor
    neg: Tensor
    prior: Tensor


def _errors(
    v_theta: Tensor,
    v_old: Tensor,
    v_ref: Tensor | None,
    x0: Tensor,
    t: Tensor,
    seed: Tensor | None,
    noise: Tensor | None,
    frame_mask: Tensor | None,
    plan: NftPlan,
) -> _Errors:
    dtype = wide(v_theta, x0)

    def rows(x: Tensor) -> Tensor:
        """[B, O, F, I], 0 in masked frames, since a weight of 0 would not hide a NaN."""
        wide_rows = as_rows(x, plan).to(dtype)
        if frame_mask is None:
            return wide_rows
        return wide_rows.masked_fill(~frame_mask[:, None, :, None], 0)

    theta, old, clean = rows(v_theta), rows(v_old), rows(x0)
    eps = draw(seed, noise, x0, plan).to(dtype)
    eps = eps if frame_mask is None else eps.masked_fill(~frame_mask[:, None, :, None], 0)
    times = per_frame(t, plan.frames).double()
    _, _, d_alpha, d_sigma = (
        c.to(dtype)[:, None, :, None]
        for c in coefficients(plan.schedule, plan.schedule_args, times)
    )
    from_old = theta - old
    e = old - (d_alpha * clean + d_sigma * eps)
    d = plan.nft_beta * from_old
    ref = theta if v_ref is None else rows(v_ref)
    return _Errors(e + d, e - d, theta - ref, from_old)


def _finish(
    errors: _Errors, t: Tensor, r: Tensor, frame_mask: Tensor | None, plan: NftPlan
) -> _Result:
    """The loss, metrics and gradient coefficients from per-frame sums, in float64."""
    shape = (plan.batch, plan.frames)
    elements = torch.full(shape, plan.outer * plan.inner, dtype=torch.float64, device=t.device)
    valid = torch.ones_like(elements) if frame_mask is None else frame_mask.double()
    elements = elements * valid

    def total(x: Tensor) -> Tensor:
        return x.sum(dim=(1, 3), dtype=torch.float64) * valid

    def group_mean(x: Tensor) -> Tensor:
        per_group = x.unflatten(1, (plan.groups, -1)).sum(-1)
        count = elements.unflatten(1, (plan.groups, -1)).sum(-1)
        return per_group / count.clamp(min=1)

    def spread(x: Tensor) -> Tensor:
        return x.repeat_interleave(plan.frames // plan.groups, dim=1)

    times = per_frame(t, plan.frames).double()
    alpha, sigma, d_alpha, d_sigma = coefficients(plan.schedule, plan.schedule_args, times)
    weight = per_frame(r, plan.frames).double()
    adaptive = plan.weighting == "x0_adaptive"
    kappa = sigma / (alpha * d_sigma - sigma * d_alpha) if adaptive else torch.ones_like(times)
    scale = plan.adv_clip / plan.nft_beta if adaptive else 1.0

    def branch(error: Tensor) -> tuple[Tensor, Tensor]:
        """Weighted squared error per frame [B, F] and the weight w per group [B, G]."""
        if adaptive:
            w = group_mean(kappa * total(error.detach().abs())).clamp(min=1e-5)
        else:
            w = torch.ones(plan.batch, plan.groups, dtype=torch.float64, device=t.device)
        return kappa**2 * total(error.square()) / spread(w), w

    loss_pos, w_pos = branch(errors.positive)
    loss_neg, w_neg = branch(errors.negative)
    prior_by = weight if plan.prior_by_r else torch.ones_like(weight)
    ref_deviation = total(errors.from_ref.square())
    count = elements.sum(1, keepdim=True).clamp(min=1)
    per_frame_loss = scale * (weight * loss_pos + (1 - weight) * loss_neg)
    per_frame_loss = per_frame_loss + plan.prior_weight * prior_by * ref_deviation
    loss = (per_frame_loss / count).sum(1).mean()

    columns = (
        group_mean(loss_pos),
        group_mean(loss_neg),
        group_mean(prior_by * ref_deviation),
        w_pos,
        w_neg,
        group_mean(total(errors.from_old.square())),
        group_mean(ref_deviation),
    )
    metrics = torch.stack([c.detach() for c in columns], dim=-1)
    common = 2 * scale * plan.nft_beta * kappa**2 * valid / (count * plan.batch)
    return _Result(
        loss,
        metrics,
        common * weight / spread(w_pos),
        common * (1 - weight) / spread(w_neg),
        2 * plan.prior_weight * prior_by * valid / (count * plan.batch),
    )


def loss(
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
) -> Tensor:
    """The scalar loss in float64 as an ordinary autograd graph, differentiable any number of times.

    The adaptive weights w are constants of the graph, as in the DiffusionNFT code.
    """
    errors = _errors(v_theta, v_old, v_ref, x0, t, seed, noise, frame_mask, plan)
    return _finish(errors, t, r, frame_mask, plan).loss


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
) -> tuple[Tensor, Tensor, Tensor]:
    """loss [], metrics fp64 [B, G, 7] and grad_power times the closed-form gradient."""
    errors = _errors(v_theta, v_old, v_ref, x0, t, seed, noise, frame_mask, plan)
    result = _finish(errors, t, r, frame_mask, plan)
    dtype = errors.positive.dtype
    value = result.loss.to(dtype)
    if not plan.needs_grad:
        return value, result.metrics, v_theta.new_empty(0)
    power = grad_power(v_theta.dtype, plan, frame_mask is not None)
    pos, neg, prior = (
        (c * power).to(dtype)[:, None, :, None] for c in (result.pos, result.neg, result.prior)
    )
    grad = pos * errors.positive - neg * errors.negative + prior * errors.from_ref
    return value, result.metrics, grad.to(v_theta.dtype).reshape(v_theta.shape)


def nft_loss_bwd(grad: Tensor, grad_loss: Tensor) -> Tensor:
    """grad scaled by the incoming scalar gradient."""
    return (grad * grad_loss.to(wide(grad))).to(grad.dtype)


def nft_loss_bwd_(grad: Tensor, grad_loss: Tensor) -> None:
    """The same, into grad."""
    grad.copy_(nft_loss_bwd(grad, grad_loss))
