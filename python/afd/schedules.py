"""Noise schedules: what x_t = alpha_t x0 + sigma_t noise and v = dx_t/dt mean."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from afd_kernels.contracts import SCHEDULES
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
    """A schedule by name (defaults for its parameters), or the object itself.

    Raises:
        ValueError: unknown name.
    """
    if isinstance(schedule, Schedule):
        return schedule
    if schedule not in SCHEDULES:
        known = ", ".join(map(repr, SCHEDULES))
        raise ValueError(f"schedule: got {schedule!r}; needed: one of {known}, or a Schedule")
    return vp_linear() if schedule == "vp_linear" else Schedule(schedule)
