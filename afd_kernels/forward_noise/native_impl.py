"""forward_noise through the compiled core (csrc/cpu and csrc/cuda)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from afd_kernels import native
from afd_kernels.contracts import Plan
from afd_kernels.kept import Kept

KEEPS = True


def refuse(device: str, dtypes: set[torch.dtype]) -> str | None:
    """The reason why the compiled core cannot run this, or None."""
    return native.refuse(device, dtypes)


def _run(
    name: str,
    x0: Tensor,
    t: Tensor,
    seed: Tensor | None,
    noise: Tensor | None,
    plan: Plan,
    kept: Kept | None,
) -> Tensor:
    core = native.core()

    def make() -> Any:
        problem = native.describe(core.NoiseProblem(), plan)
        problem.x0_type = native.type_code(x0.dtype)
        problem.noise_type = native.type_code(torch.float32 if noise is None else noise.dtype)
        return problem

    problem = native.take(kept, make)
    x_t = native.empty_like(x0)
    problem.place(x0, t, seed, noise, x_t)
    if x0.is_cpu:
        getattr(core, f"{name}_cpu")(problem, native.threads(x0))
    else:
        with torch.cuda.device(x0.device):
            getattr(core, f"{name}_cuda")(problem, native.stream(x0))
    native.put_back(kept, problem)
    return x_t


def forward_noise(
    x0: Tensor,
    t: Tensor,
    seed: Tensor | None,
    noise: Tensor | None,
    plan: Plan,
    kept: Kept | None = None,
) -> Tensor:
    """x_t = alpha_t x0 + sigma_t noise, shape and dtype of x0; every tensor contiguous."""
    return _run("forward_noise", x0, t, seed, noise, plan, kept)


def forward_noise_bwd(grad: Tensor, t: Tensor, plan: Plan, kept: Kept | None = None) -> Tensor:
    """The gradient with respect to x0: alpha_t grad."""
    return _run("forward_noise_bwd", grad, t, None, None, plan, kept)
