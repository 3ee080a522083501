"""Arguments of forward_noise and their checks, shared by all backends and the fakes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from afd_kernels import contracts
from afd_kernels.contracts import Plan


class NoiseInputs(NamedTuple):
    """The tensors of a call; afd.ops.forward_noise has their shapes."""

    x0: Tensor
    t: Tensor
    seed: Tensor | None = None
    noise: Tensor | None = None


class NoiseOptions(NamedTuple):
    """The other arguments of a call; afd.ops.forward_noise describes them."""

    schedule: str
    schedule_args: Sequence[float]
    layout: str


def plan_forward_noise(inputs: NoiseInputs, options: NoiseOptions) -> Plan:
    """Checks the metadata of forward_noise and returns its plan.

    Raises:
        ValueError: names the argument, its value and the requirement.
    """
    x0, t, seed, noise = inputs
    schedule, schedule_args, layout = options
    contracts.check_sample(x0)
    contracts.check_one_of("layout", layout, contracts.LAYOUTS)
    contracts.check_schedule(schedule, schedule_args)
    contracts.check_source(x0, seed, noise)
    t_chunks = contracts.check_per_frame(x0, "t", t, layout)
    outer, frames, inner = contracts.rows(x0, layout, per_video=t_chunks == 1)
    return Plan(
        batch=x0.shape[0],
        outer=outer,
        frames=frames,
        inner=inner,
        t_chunks=t_chunks,
        schedule=schedule,
        schedule_args=tuple(map(float, schedule_args)),
    )
