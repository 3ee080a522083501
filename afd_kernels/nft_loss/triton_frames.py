"""What nft_loss's kernels need of a frame and a sample: factors, weights and coefficients, in fp64.

MATH.md has the algebra.
"""
# mypy: ignore-errors
# (@triton.jit bodies are not ordinary Python)

from __future__ import annotations

import triton
import triton.language as tl

from afd_kernels.forward_noise.triton_impl import schedule_coefficients, wide
from afd_kernels.nft_loss.contract import LEAST_SIGMA

_LEAST_SIGMA = tl.constexpr(LEAST_SIGMA)


@triton.jit
def valid_frames(mask_ptr, sample, frames, BLOCK: tl.constexpr):
    """How many frames of the sample count."""
    if mask_ptr is None:
        return tl.full((), 0, tl.int64) + frames
    else:
        count = tl.full((BLOCK,), 0, tl.int64)
        for start in range(0, frames, BLOCK):
            f = start + tl.arange(0, BLOCK)
            count += tl.load(mask_ptr + sample * frames + f, mask=f < frames, other=0).to(tl.int64)
        return tl.sum(count)


@triton.jit
def frame_factors(
    t_ptr, sigma_ptr, sample, frame, frames, t_chunks, sigma_chunks, X0: tl.constexpr,
    PRIOR_X0: tl.constexpr, SCHEDULE: tl.constexpr, BETA_MIN: tl.constexpr, BETA_MAX: tl.constexpr,
):  # fmt: skip
    """alpha' and sigma' of the target, and the factors that turn a velocity error, and v_theta -
    v_ref, into the space of the loss; fp64.

    NaN where t or sigma is out of range: a device value cannot be refused without a
    synchronisation.
    """
    t = tl.load(t_ptr + sample * t_chunks + frame // (frames // t_chunks))
    alpha, sigma, d_alpha, d_sigma = schedule_coefficients(t, SCHEDULE, BETA_MIN, BETA_MAX)
    one = d_sigma * 0.0 + 1.0
    if sigma_ptr is None:
        kappa = one
        if X0 or PRIOR_X0:
            kappa = sigma / (alpha * d_sigma - sigma * d_alpha)
    else:
        # x_t - sigma v - x0 = sigma (t / sigma (noise - x0) - v).
        given = tl.load(sigma_ptr + sample * sigma_chunks + frame // (frames // sigma_chunks))
        given = given.to(tl.float64)
        valid = (given >= wide(_LEAST_SIGMA) * sigma) & (given <= 1.0)
        kappa = tl.where(valid, given, float("nan"))
        one = kappa * 0.0 + one
        if X0:
            d_sigma = tl.where(given == 0.0, one, sigma / kappa)
            d_alpha = -d_sigma
    return d_alpha, d_sigma, kappa if X0 else one, kappa if PRIOR_X0 else one


@triton.jit
def optimality(r_ptr, sample, frame, frames, r_chunks):
    """r in fp64, NaN where it is outside [0, 1]."""
    r = tl.load(r_ptr + sample * r_chunks + frame // (frames // r_chunks))
    return tl.where((r >= 0.0) & (r <= 1.0), r, float("nan")).to(tl.float64)


@triton.jit
def sample_factor(weights_ptr, sample):
    """A factor of one sample in fp64, 1 without weights; NaN where it is negative or infinite."""
    factor = tl.full((), 1.0, tl.float64)
    if weights_ptr is not None:
        weight = tl.load(weights_ptr + sample)
        valid = (weight >= 0.0) & (weight < float("inf"))
        factor = tl.where(valid, weight, float("nan")).to(tl.float64)
    return factor


@triton.jit
def share_of_sample(sample_weight_ptr, sample, count, batch):
    """The factor of a sample's summed loss in the batch's loss, fp64."""
    elements = tl.maximum(count, 1).to(tl.float64) * batch
    return sample_factor(sample_weight_ptr, sample) / elements


@triton.jit
def gradient_coefficients(
    kappa, prior_kappa, r, valid, w_pos, w_neg, share, nft_beta, prior_weight, slope,
    PRIOR_BY_R: tl.constexpr,
):  # fmt: skip
    """Coefficients of e, v_theta - v_old and v_theta - v_ref in share / 2 times the gradient of a
    sample's summed loss, in fp64."""
    common = valid.to(tl.float64) * share
    scale = common * kappa * kappa * slope
    pos = scale * r / w_pos
    neg = scale * (1.0 - r) / w_neg
    prior = common * prior_weight * prior_kappa * prior_kappa
    if PRIOR_BY_R:
        prior = prior * r
    return pos - neg, (pos + neg) * nft_beta, prior
