"""Noise schedules, which define x_t = alpha_t x0 + sigma_t noise and v = dx_t/dt.

`Schedule` is a continuous one for the fused ops; `ShiftedFlow` is the released students' table.
Shape letters: B videos, F frames, C channels, H x W pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import torch
from torch import Tensor

from afd_kernels.contracts import SCHEDULES, require
from afd_kernels.forward_noise.reference import coefficients


@dataclass(frozen=True)
class Schedule:
    """A named schedule with its parameters.

    Attributes:
        name: "rectified_flow" (alpha = 1 - t, sigma = t), "vp_cosine" (alpha = cos(pi t / 2),
            sigma = sin(pi t / 2)) or "vp_linear" (variance preserving, linear beta(t)).
        args: parameters; (beta_min, beta_max) for vp_linear, empty otherwise.
    """

    name: str
    args: tuple[float, ...] = ()

    @property
    def domain(self) -> tuple[float, float]:
        """The closed interval of valid t."""
        return SCHEDULES[self.name]

    def coefficients(self, t: Tensor) -> tuple[Tensor, ...]:
        """alpha, sigma and their derivatives alpha', sigma' at t, in t's shape and dtype."""
        return coefficients(self.name, self.args, t)


RECTIFIED_FLOW = Schedule("rectified_flow")
VP_COSINE = Schedule("vp_cosine")


def vp_linear(beta_min: float = 0.1, beta_max: float = 20.0) -> Schedule:
    """Variance-preserving diffusion with beta(t) = beta_min + (beta_max - beta_min) t."""
    return Schedule("vp_linear", (beta_min, beta_max))


def resolve(schedule: str | Schedule) -> Schedule:
    """Look up a schedule by name (with default parameters); a Schedule is returned as is.

    Raises:
        ValueError: unknown name.
    """
    if isinstance(schedule, Schedule):
        return schedule
    if schedule not in SCHEDULES:
        known = ", ".join(map(repr, SCHEDULES))
        raise ValueError(f"schedule: got {schedule!r}; needed: one of {known}, or a Schedule")
    return vp_linear() if schedule == "vp_linear" else Schedule(schedule)


@dataclass(frozen=True)
class ShiftedFlow:
    """Rectified flow on a discrete table of noise levels, shifted towards noise.

    The table holds sigma_i = s u / (1 + (s - 1) u) with u = 1 - i / count, i = 0 .. count - 1, so
    it descends from 1 to just above 0; its times are 1000 sigma_i. Any other time maps to the
    nearest entry: sigma(0) is the last entry, not 0. Times are on the 0-1000 scale, sigmas in
    (0, 1].
    Source: Wan2.1's training schedule as used by Self-Forcing (arXiv 2506.08009).

    Attributes:
        shift: s; 5 for the students, 8 for the score networks of their training.
        count: number of table entries.
    """

    shift: float = 5.0
    count: int = 1000

    def __post_init__(self) -> None:
        require(self.shift > 0, "shift", self.shift, "a number > 0")
        require(self.count >= 1, "count", self.count, "at least one noise level")

    @property
    def sigmas(self) -> Tensor:
        """Noise levels [count], float32 on the CPU, descending from 1."""
        return _table(self)[0]

    @property
    def times(self) -> Tensor:
        """Times [count], float32 on the CPU, descending from 1000."""
        return _table(self)[1]

    @property
    def training_weights(self) -> Tensor:
        """Weight of the flow-matching loss per entry, [count] float32, mean 1, 0 at t=1000."""
        return _table(self)[2]

    def warp(self, steps: Sequence[float]) -> tuple[float, ...]:
        """Map denoising steps to times: step u becomes the entry 1000 - u, and 0 stays 0.

        Requires a table of 1000 entries and integer steps in [0, 1000].
        """
        require(self.count == 1000, "count", self.count, "1000 to warp a list of steps")
        for step in steps:
            whole = float(step).is_integer() and 0 <= step <= 1000
            require(whole, "steps", step, "whole numbers in [0, 1000]")
        times = [*self.times.tolist(), 0.0]
        return tuple(times[1000 - int(step)] for step in steps)

    def sigma_of(self, t: float) -> float:
        """Noise level of the entry nearest to a time given as a host number."""
        return float(self.sigmas[self.nearest(torch.tensor(t))])

    def nearest(self, t: Tensor) -> Tensor:
        """Index of the entry nearest to each time (the earlier if tied), int64 in t's shape."""
        times = _on(self, t.device)[1].double()
        # The table is descending; searchsorted requires ascending order.
        right = torch.searchsorted(times.flip(0), t.double().contiguous())
        below = (self.count - right).clamp(max=self.count - 1)  # first entry < t, or the last one
        above = (below - 1).clamp(min=0)
        return torch.where(times[above] - t <= t - times[below], above, below)

    def sigma_at(self, t: Tensor) -> Tensor:
        """Noise level at each time, float32 in t's shape, on its device, without a sync."""
        return _on(self, t.device)[0][self.nearest(t)]

    def training_weight(self, t: Tensor) -> Tensor:
        """Loss weight at each time, float32 in t's shape."""
        return _on(self, t.device)[2][self.nearest(t)]


def check_steps(steps: Sequence[float], first: float = 1.0) -> None:
    """Raise ValueError unless the steps descend from `first` (pure noise) and stay above 0."""
    if not steps or steps[0] != first or any(b >= a for a, b in pairwise(steps)):
        raise ValueError(f"steps: got {list(steps)}; needed: times decreasing from {first:g}")
    if steps[-1] <= 0:
        raise ValueError(f"steps: got {steps[-1]} as the last; needed: more than 0")


@lru_cache(maxsize=16)
def _table(flow: ShiftedFlow) -> tuple[Tensor, Tensor, Tensor]:
    """Sigmas, times and training weights on the CPU."""
    # float32 throughout: released checkpoints were trained with this rounding.
    u = torch.linspace(1, 0, flow.count + 1)[:-1]
    sigmas = flow.shift * u / (1 + (flow.shift - 1) * u)
    times = 1000 * sigmas
    weights = torch.exp(-2 * ((times - 500) / 1000) ** 2)
    weights = weights - weights.min()
    # With a single entry the weight is 0, and so is the sum.
    return sigmas, times, weights * (flow.count / weights.sum().clamp_min(1e-12))


@lru_cache(maxsize=64)
def _on(flow: ShiftedFlow, device: torch.device) -> tuple[Tensor, ...]:
    """The table on a device, copied there once."""
    return tuple(column.to(device) for column in _table(flow))


def x0_from_flow(flow: Tensor, x_t: Tensor, sigma: Tensor | float) -> Tensor:
    """The clean video implied by a velocity (noise minus video) at x_t: x_t - sigma v.

    Computed in float64, returned in flow's dtype. `sigma` is a number, or broadcasts from the left,
    [B, F] to [B, F, C, H, W].
    """
    return (x_t.double() - _wide(sigma, x_t) * flow.double()).to(flow.dtype)


def flow_from_x0(x0: Tensor, x_t: Tensor, sigma: Tensor | float) -> Tensor:
    """The velocity implied by x0 at x_t: (x_t - x0) / sigma; dtypes as in `x0_from_flow`."""
    return ((x_t.double() - x0.double()) / _wide(sigma, x_t)).to(x0.dtype)


def renoise(x0: Tensor, noise: Tensor, sigma: Tensor | float) -> Tensor:
    """x_t = (1 - sigma) x0 + sigma noise in float32, returned in noise's dtype."""
    if isinstance(sigma, Tensor):
        sigma = _aligned(sigma.float(), x0)
    return ((1 - sigma) * x0.float() + sigma * noise.float()).to(noise.dtype)


def euler_step(flow: Tensor, x_t: Tensor, sigma: Tensor | float, to: Tensor | float) -> Tensor:
    """One Euler step from noise level `sigma` to `to`, in float32, returned in x_t's dtype."""
    if isinstance(sigma, Tensor):
        sigma = _aligned(sigma.float(), x_t)
    if isinstance(to, Tensor):
        to = _aligned(to.float(), x_t)
    return (x_t.float() + flow.float() * (to - sigma)).to(x_t.dtype)


def _wide(sigma: Tensor | float, like: Tensor) -> Tensor | float:
    return _aligned(sigma.double(), like) if isinstance(sigma, Tensor) else sigma


def _aligned(sigma: Tensor, like: Tensor) -> Tensor:
    """sigma with trailing axes of size 1, so that it broadcasts from the left."""
    return sigma.reshape(*sigma.shape, *(1,) * (like.ndim - sigma.ndim))
