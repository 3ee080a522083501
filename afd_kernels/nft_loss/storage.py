"""The power-of-two scale with which a float16 gradient of nft_loss is stored."""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch

from afd_kernels.contracts import SCHEDULES
from afd_kernels.nft_loss.contract import NftInputs, NftPlan

_LARGEST = torch.finfo(torch.float16).max
_LARGEST_NOISE = 6.77
# Slack in the bounds below for the rounding of float32 coefficients.
_ROUNDING = 1 + 2.0**-6
# Keeps the power, its inverse and their products with any loss scale within float32.
_MOST = 64


def grad_power(plan: NftPlan, inputs: NftInputs) -> float:
    """The factor by which the forward multiplies the gradient that it stores in v_theta's dtype.

    1 unless that is float16, whose values end at 2^-24: the mean over a latent video would put
    most of the gradient below it before any loss scaling. The power depends only on sizes and
    options, and is the largest with which no element of the gradient of finite float16 predictions
    (and latents within float16's range) can overflow, if no weight of a sample or of its prior that
    is given by a tensor exceeds the batch size. MATH.md derives the bounds.
    """
    if inputs.v_theta.dtype != torch.float16:
        return 1.0
    # int(): traced with symbolic sizes, they become constants.
    frames = 1 if inputs.frame_mask is None else int(plan.frames)
    batch = int(plan.batch)
    return _power(
        int(plan.outer) * int(plan.frames) * int(plan.inner) // frames,
        1.0 if inputs.sample_weight is not None else 1.0 / batch,
        plan.prior_weight * (1 if inputs.prior_weights is None else batch),
        _Terms(plan.adaptive, plan.x0_space, plan.prior_in_x0, plan.nft_beta, plan.slope),
        "given" if inputs.sigma is not None else plan.schedule,
        plan.schedule_args,
    )


class _Terms(NamedTuple):
    adaptive: bool
    x0_space: bool
    prior_in_x0: bool
    nft_beta: float
    slope: float


@functools.lru_cache(maxsize=1024)
def _power(
    fewest: int,
    share: float,
    prior_weight: float,
    terms: _Terms,
    schedule: str,
    schedule_args: tuple[float, ...],
) -> float:
    """`fewest`: the number of valid elements of a sample with only one valid frame.

    `share`: the largest factor of a sample's loss. `schedule` "given": sigma is.
    """
    kappa, d_alpha, d_sigma = _largest(schedule, schedule_args)
    of_error = kappa if terms.x0_space else 1.0
    if terms.adaptive:
        bound = 2 * terms.slope * of_error
    else:
        error = (1 + 2 * terms.nft_beta + d_alpha) * _LARGEST + d_sigma * _LARGEST_NOISE
        bound = 2 * terms.slope * of_error**2 * error / fewest
    of_prior = kappa if terms.prior_in_x0 else 1.0
    bound = (bound + 4 * prior_weight * of_prior**2 * _LARGEST / fewest) * share
    exponent = math.floor(math.log2(_LARGEST) - math.log2(bound * _ROUNDING)) if bound else _MOST
    return float(2.0 ** max(-_MOST, min(exponent, _MOST)))


@functools.cache
def _largest(schedule: str, args: tuple[float, ...]) -> tuple[float, float, float]:
    """The largest kappa, |alpha'| and |sigma'| of a schedule, without tensors for tracing.

    With a given sigma, kappa is sigma and they are t / sigma: the products that count are below 1.
    """
    if schedule in ("rectified_flow", "given"):
        return 1.0, 1.0, 1.0
    if schedule == "vp_cosine":
        return 2 / math.pi, math.pi / 2, math.pi / 2
    low, high = args
    start, end = SCHEDULES[schedule]
    found = []
    for i in range(1025):
        t = start + (end - start) * i / 1024
        rate, integral = low + (high - low) * t, low * t + 0.5 * (high - low) * t * t
        alpha, sigma = math.exp(-0.5 * integral), math.sqrt(-math.expm1(-integral))
        kappa = 2 * sigma * sigma / (rate * alpha)
        found.append((kappa, 0.5 * rate * alpha, 0.5 * rate * alpha * alpha / sigma))
    kappas, d_alphas, d_sigmas = zip(*found, strict=True)
    return max(kappas), max(d_alphas), max(d_sigmas)
