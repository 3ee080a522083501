"""Reference forward_noise in plain PyTorch, twice differentiable, for any dtype and device."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from afd_kernels.contracts import Plan

_MASK = 0xFFFFFFFF


def refuse(device: str, dtypes: set[torch.dtype]) -> str | None:
    return None


def philox4x32(counter: Tensor, seed: Tensor) -> Tensor:
    """Philox4x32-10 (Salmon et al., SC'11) of int64 counters [..., n] with int64 seeds [..., 1].

    Returns the four 32-bit words as int64 [..., n, 4]. The counter fills words 0 and 1.
    """
    c0, c1 = counter & _MASK, counter >> 32
    c2 = c3 = torch.zeros_like(counter)
    k0, k1 = seed & _MASK, (seed >> 32) & _MASK
    for _ in range(10):
        high0, low0 = _multiply(0xD2511F53, c0)
        high1, low1 = _multiply(0xCD9E8D57, c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) & _MASK, (k1 + 0xBB67AE85) & _MASK
    return torch.stack([x.broadcast_to(c0.shape) for x in (c0, c1, c2, c3)], dim=-1)


def _multiply(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of a 32x32-bit product, without overflowing int64."""
    low, high = a * (b & 0xFFFF), a * (b >> 16)
    middle = (low >> 16) + (high & 0xFFFF)
    return (high >> 16) + (middle >> 16), ((middle & 0xFFFF) << 16) | (low & 0xFFFF)


def normal(seed: Tensor, count: int) -> Tensor:
    """Standard normals fp32 [B, count] of int64 seeds [B]: Box-Muller on Philox, in fp64, rounded.

    Element i depends only on (seed, i). docs/NUMERICS.md has the specification.
    """
    counter = torch.arange((count + 3) // 4, device=seed.device)
    words = philox4x32(counter[None], seed[:, None])
    # float32(word) * 2^-32 + 2^-33 as one fp32 fma: two roundings, like every other backend.
    uniform = (words[..., 0::2].float().double() * 2.0**-32 + 2.0**-33).float().double()
    signed = torch.where(words[..., 1::2] >= 2**31, words[..., 1::2] - 2**32, words[..., 1::2])
    angle = signed.double() * (math.pi * 2.0**-31)
    radius = (-2 * uniform.log()).sqrt()
    pairs = torch.stack([radius * angle.cos(), radius * angle.sin()], dim=-1)
    return pairs.flatten(1)[:, :count].float()


def coefficients(schedule: str, args: tuple[float, ...], t: Tensor) -> tuple[Tensor, ...]:
    """alpha, sigma, alpha', sigma' at t: x_t = alpha x0 + sigma noise and v = dx_t/dt."""
    if schedule == "rectified_flow":
        return 1 - t, t, -torch.ones_like(t), torch.ones_like(t)
    if schedule == "vp_cosine":
        half = math.pi / 2
        alpha, sigma = (half * t).cos(), (half * t).sin()
        return alpha, sigma, -half * sigma, half * alpha
    low, high = args
    rate = low + (high - low) * t
    integral = low * t + 0.5 * (high - low) * t * t
    alpha, sigma = (-0.5 * integral).exp(), (-torch.expm1(-integral)).sqrt()
    return alpha, sigma, -0.5 * rate * alpha, 0.5 * rate * alpha * alpha / sigma


def as_rows(x: Tensor, plan: Plan) -> Tensor:
    """x as [B, outer, frames, inner]."""
    return x.reshape(plan.batch, plan.outer, plan.frames, plan.inner)


def per_frame(value: Tensor, frames: int) -> Tensor:
    """t or r, [B] or [B, K], as [B, frames]."""
    value = value.reshape(value.shape[0], -1)
    return value.repeat_interleave(frames // value.shape[1], dim=1)


def draw(seed: Tensor | None, noise: Tensor | None, like: Tensor, plan: Plan) -> Tensor:
    """The given or generated noise as rows [B, outer, frames, inner], in its own dtype."""
    if noise is not None:
        return as_rows(noise, plan)
    assert seed is not None
    return as_rows(normal(seed, like[0].numel()), plan)


def wide(*values: Tensor | None) -> torch.dtype:
    """The dtype used for the arithmetic: float64 if any input is float64, else float32."""
    given = [x.dtype for x in values if x is not None]
    return torch.float64 if torch.float64 in given else torch.float32


def forward_noise(
    x0: Tensor, t: Tensor, seed: Tensor | None, noise: Tensor | None, plan: Plan
) -> Tensor:
    """x_t = alpha_t x0 + sigma_t noise, shape and dtype of x0."""
    dtype = wide(x0)
    times = per_frame(t, plan.frames).double()
    alpha, sigma, _, _ = coefficients(plan.schedule, plan.schedule_args, times)
    eps = draw(seed, noise, x0, plan).to(dtype)
    x_t = (
        alpha.to(dtype)[:, None, :, None] * as_rows(x0, plan).to(dtype)
        + sigma.to(dtype)[:, None, :, None] * eps
    )
    return x_t.to(x0.dtype).reshape(x0.shape)


def forward_noise_bwd(grad: Tensor, t: Tensor, plan: Plan) -> Tensor:
    """The gradient with respect to x0: alpha_t grad."""
    dtype = wide(grad)
    times = per_frame(t, plan.frames).double()
    alpha = coefficients(plan.schedule, plan.schedule_args, times)[0].to(dtype)
    scaled = alpha[:, None, :, None] * as_rows(grad, plan).to(dtype)
    return scaled.to(grad.dtype).reshape(grad.shape)
