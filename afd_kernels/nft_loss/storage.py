"""The power-of-two scale with which a float16 gradient of nft_loss is stored."""

from __future__ import annotations

import functools
import math

import torch

from afd_kernels.contracts import SCHEDULES, NftPlan

_LARGEST = torch.finfo(torch.float16).max
_LARGEST_NOISE = 6.77
# Slack in the bounds below for the rounding of float32 coefficients.
_ROUNDING = 1 + 2.0**-6
# Keeps the power, its inverse and their products with any loss scale within float32.
_MOST = 64


def grad_power(dtype: torch.dtype, plan: NftPlan, masked: bool) -> float:
    """The factor by which the forward multiplies the gradient that it stores in `dtype`.

    1 unless dtype is float16, whose values end at 2^-24: the mean over a latent video would put
    most of the gradient below it before any loss scaling. The power depends only on sizes and
    options, and is the largest with which no element of the gradient of finite float16 predictions
    (and latents within float16's range) can overflow. MATH.md derives the bounds.
    """
    if dtype != torch.float16:
        return 1.0
    # int(): traced with symbolic sizes, they become constants.
    frames = int(plan.frames) if masked else 1
    elements = int(plan.outer) * int(plan.frames) * int(plan.inner) // frames
    return _power(
        int(plan.batch),
        elements,
        plan.weighting,
        plan.nft_beta,
        plan.prior_weight,
        plan.adv_clip,
        plan.schedule,
        plan.schedule_args,
    )


@functools.lru_cache(maxsize=1024)
def _power(
    batch: int,
    fewest: int,
    weighting: str,
    nft_beta: float,
    prior_weight: float,
    adv_clip: float,
    schedule: str,
    schedule_args: tuple[float, ...],
) -> float:
    """`fewest`: the number of valid elements of a sample with only one valid frame."""
    kappa, d_alpha, d_sigma = _largest(schedule, schedule_args)
    if weighting == "x0_adaptive":
        bound = 2 * adv_clip * kappa
    else:
        error = (1 + 2 * nft_beta + d_alpha) * _LARGEST + d_sigma * _LARGEST_NOISE
        bound = 2 * nft_beta * error / fewest
    bound = (bound + 4 * prior_weight * _LARGEST / fewest) / batch
    exponent = math.floor(math.log2(_LARGEST) - math.log2(bound * _ROUNDING)) if bound else _MOST
    return float(2.0 ** max(-_MOST, min(exponent, _MOST)))


@functools.cache
def _largest(schedule: str, args: tuple[float, ...]) -> tuple[float, float, float]:
    """The largest kappa, |alpha'| and |sigma'| of a schedule, without tensors for tracing."""
    if schedule == "rectified_flow":
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
