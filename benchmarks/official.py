"""DiffusionNFT's training loss in eager PyTorch: the baseline that afd.ops.nft_loss replaces.

Our own implementation of the formula (arXiv 2509.16117, as computed by its released trainer):
float32 noising, predictions mixed in their own dtype, adaptive weights in float64 that promote both
losses, and the metrics the trainer logs on every step. Benchmarks, the example and the tests use
it as the baseline; called with float64 tensors it is their oracle.

Letters: B batch; every other dimension of a sample is free.
"""

from __future__ import annotations

import torch
from torch import Tensor


def noised(x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """x_t = (1 - t) x0 + t noise for t as `per_sample` takes it, in the widest of the dtypes."""
    t = per_sample(t, x0)
    return (1 - t) * x0 + t * noise


def per_sample(value: Tensor, like: Tensor) -> Tensor:
    """[B] as [B, 1, 1, ...], to broadcast against samples; unchanged if it already does."""
    return value if value.ndim == like.ndim else value.view(-1, *(1,) * (like.ndim - 1))


def diffusionnft_loss(
    *,
    v_theta: Tensor,
    v_old: Tensor,
    v_ref: Tensor,
    x0: Tensor,
    x_t: Tensor,
    t: Tensor,
    r: Tensor,
    nft_beta: float,
    prior_weight: float,
    adv_clip: float = 5.0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The trainer's total loss and its logged metrics; x_t as made by `noised`.

    All samples [B, ...] have one shape, r [B], t [B] or [B, F, 1, ...] if it differs within a
    sample; the gradient flows to v_theta.
    """
    dims = tuple(range(1, x0.ndim))
    time = per_sample(t, x0)
    v_old = v_old.detach()

    def branch(velocity: Tensor) -> Tensor:
        """The squared x0 error of one policy over its own mean absolute error, [B]."""
        x0_hat = x_t - time * velocity
        with torch.no_grad():
            weight = (x0_hat.double() - x0.double()).abs().mean(dims, keepdim=True).clip(min=1e-5)
        return ((x0_hat - x0) ** 2 / weight).mean(dims)

    loss_pos = branch(nft_beta * v_theta + (1 - nft_beta) * v_old)
    loss_neg = branch((1.0 + nft_beta) * v_old - nft_beta * v_theta)
    policy = r * loss_pos / nft_beta + (1.0 - r) * loss_neg / nft_beta
    policy_loss = (policy * adv_clip).mean()
    prior = ((v_theta - v_ref.detach()) ** 2).mean(dims)
    loss = policy_loss + prior_weight * prior.mean()
    return loss, _metrics(v_theta, v_old, v_ref, x0) | {
        "policy_loss": policy_loss.detach(),
        "unweighted_policy_loss": policy.mean().detach(),
        "prior": prior.mean().detach(),
        "total_loss": loss.detach(),
    }


def velocity_loss(
    *,
    v_theta: Tensor,
    v_old: Tensor,
    v_ref: Tensor,
    x0: Tensor,
    noise: Tensor,
    r: Tensor,
    nft_beta: float,
    prior_weight: float,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The paper's loss before the adaptive weights: both policies against v* = noise - x0."""
    dims = tuple(range(1, x0.ndim))
    v_old = v_old.detach()
    target = noise - x0
    v_pos = nft_beta * v_theta + (1 - nft_beta) * v_old
    v_neg = (1.0 + nft_beta) * v_old - nft_beta * v_theta
    loss_pos = ((v_pos - target) ** 2).mean(dims)
    loss_neg = ((v_neg - target) ** 2).mean(dims)
    policy_loss = (r * loss_pos + (1.0 - r) * loss_neg).mean()
    prior = ((v_theta - v_ref.detach()) ** 2).mean(dims)
    loss = policy_loss + prior_weight * prior.mean()
    return loss, _metrics(v_theta, v_old, v_ref, x0) | {
        "policy_loss": policy_loss.detach(),
        "prior": prior.mean().detach(),
        "total_loss": loss.detach(),
    }


@torch.no_grad()
def _metrics(v_theta: Tensor, v_old: Tensor, v_ref: Tensor, x0: Tensor) -> dict[str, Tensor]:
    """The metrics that the trainer logs with the loss; each is a pass over the latents."""
    return {
        "x0_norm": (x0**2).mean(),
        "x0_norm_max": (x0**2).max(),
        "old_deviate": ((v_theta - v_old) ** 2).mean(),
        "old_deviate_max": ((v_theta - v_old) ** 2).max(),
        "old_prior": ((v_old - v_ref) ** 2).mean(),
    }
