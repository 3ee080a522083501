"""Reference nft_loss in plain PyTorch, for any dtype and device; `loss` is twice differentiable.

Letters: B batch, O outer, F frames, I inner (see contracts.Plan), G groups. Algebra in MATH.md.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from afd_kernels.forward_noise.reference import as_rows, coefficients, draw, per_frame, wide
from afd_kernels.nft_loss.contract import LEAST_SIGMA, NftInputs, NftPlan
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


class _Frames(NamedTuple):
    """What the formulas need of a frame, float64 [B, F].

    kappa and prior_kappa turn a velocity error, and v_theta - v_ref, into the space of the loss.
    """

    kappa: Tensor
    prior_kappa: Tensor
    d_alpha: Tensor
    d_sigma: Tensor


def _frames(inputs: NftInputs, plan: NftPlan) -> _Frames:
    times = per_frame(inputs.t, plan.frames).double()
    alpha, sigma, d_alpha, d_sigma = coefficients(plan.schedule, plan.schedule_args, times)
    kappa = sigma / (alpha * d_sigma - sigma * d_alpha)
    if inputs.sigma is not None:
        kappa = per_frame(inputs.sigma, plan.frames).double()
        kappa = kappa.where((kappa >= LEAST_SIGMA * times) & (kappa <= 1), torch.nan)
        if plan.x0_space:
            # x_t - kappa v - x0 = kappa (t / kappa (noise - x0) - v).
            ratio = torch.where(kappa == 0, 1, times / kappa)
            d_alpha, d_sigma = -ratio, ratio
    one = torch.ones_like(times)
    return _Frames(
        kappa if plan.x0_space else one, kappa if plan.prior_in_x0 else one, d_alpha, d_sigma
    )


def _errors(inputs: NftInputs, frames: _Frames, plan: NftPlan) -> _Errors:
    dtype = wide(inputs.v_theta, inputs.x0)
    mask = inputs.frame_mask

    def rows(x: Tensor) -> Tensor:
        """[B, O, F, I], 0 in masked frames, since a weight of 0 would not hide a NaN."""
        wide_rows = as_rows(x, plan).to(dtype)
        return wide_rows if mask is None else wide_rows.masked_fill(~mask[:, None, :, None], 0)

    theta, old, clean = rows(inputs.v_theta), rows(inputs.v_old), rows(inputs.x0)
    eps = rows(draw(inputs.seed, inputs.noise, inputs.x0, plan))
    d_alpha, d_sigma = (c.to(dtype)[:, None, :, None] for c in (frames.d_alpha, frames.d_sigma))
    from_old = theta - old
    e = old - (d_alpha * clean + d_sigma * eps)
    d = plan.nft_beta * from_old
    ref = theta if inputs.v_ref is None else rows(inputs.v_ref)
    return _Errors(e + d, e - d, theta - ref, from_old)


def _per_sample(value: Tensor | None, like: Tensor) -> Tensor:
    """Weights [B, 1], 1 if not given; NaN where they are negative or infinite."""
    if value is None:
        return torch.ones_like(like[:, :1])
    value = value.double()[:, None]
    return value.where((value >= 0) & (value < torch.inf), torch.nan)


def _finish(errors: _Errors, frames: _Frames, inputs: NftInputs, plan: NftPlan) -> _Result:
    """The loss, metrics and gradient coefficients from per-frame sums, in float64."""
    shape, device = (plan.batch, plan.frames), inputs.t.device
    elements = torch.full(shape, plan.outer * plan.inner, dtype=torch.float64, device=device)
    mask = inputs.frame_mask
    valid = torch.ones_like(elements) if mask is None else mask.double()
    elements = elements * valid

    def total(x: Tensor) -> Tensor:
        return x.sum(dim=(1, 3), dtype=torch.float64) * valid

    def group_mean(x: Tensor) -> Tensor:
        per_group = x.unflatten(1, (plan.groups, -1)).sum(-1)
        count = elements.unflatten(1, (plan.groups, -1)).sum(-1)
        return per_group / count.clamp(min=1)

    def spread(x: Tensor) -> Tensor:
        return x.repeat_interleave(plan.frames // plan.groups, dim=1)

    weight = per_frame(inputs.r, plan.frames).double()
    kappa, sample_weight = frames.kappa, _per_sample(inputs.sample_weight, elements)

    def branch(error: Tensor) -> tuple[Tensor, Tensor]:
        """Weighted squared error per frame [B, F] and the weight w per group [B, G]."""
        if plan.adaptive:
            w = group_mean(kappa * total(error.detach().abs())).clamp(min=plan.weight_min)
        else:
            w = torch.ones(plan.batch, plan.groups, dtype=torch.float64, device=device)
        return kappa**2 * total(error.square()) / spread(w), w

    loss_pos, w_pos = branch(errors.positive)
    loss_neg, w_neg = branch(errors.negative)
    prior_by = frames.prior_kappa**2
    prior_by = prior_by * weight if plan.prior_by_r else prior_by
    prior_weight = plan.prior_weight * _per_sample(inputs.prior_weights, elements)
    ref_deviation = total(errors.from_ref.square())
    count = elements.sum(1, keepdim=True).clamp(min=1)
    per_frame_loss = plan.scale * (weight * loss_pos + (1 - weight) * loss_neg)
    per_frame_loss = per_frame_loss + prior_weight * prior_by * ref_deviation
    loss = (sample_weight * per_frame_loss / count).sum(1).mean()

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
    common = 2 * sample_weight * valid / (count * plan.batch)
    pull = common * plan.slope * kappa**2
    return _Result(
        loss,
        metrics,
        pull * weight / spread(w_pos),
        pull * (1 - weight) / spread(w_neg),
        common * prior_weight * prior_by,
    )


def loss(inputs: NftInputs, plan: NftPlan) -> Tensor:
    """The scalar loss in float64 as an ordinary autograd graph, differentiable any number of times.

    The adaptive weights w are constants of the graph, as in the DiffusionNFT code.
    """
    frames = _frames(inputs, plan)
    return _finish(_errors(inputs, frames, plan), frames, inputs, plan).loss


def nft_loss(inputs: NftInputs, plan: NftPlan) -> tuple[Tensor, Tensor, Tensor]:
    """loss [], metrics fp64 [B, G, 7] and grad_power times the closed-form gradient."""
    frames = _frames(inputs, plan)
    errors = _errors(inputs, frames, plan)
    result = _finish(errors, frames, inputs, plan)
    v_theta, dtype = inputs.v_theta, errors.positive.dtype
    value = result.loss.to(dtype)
    if not plan.needs_grad:
        return value, result.metrics, v_theta.new_empty(0)
    power = grad_power(plan, inputs)
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
