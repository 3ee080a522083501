"""adaln through the compiled core (csrc/cpu and csrc/cuda). Letters as in contract.py."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from afd_kernels import native
from afd_kernels.kept import Kept

KEEPS = True


def refuse(device: str, dtypes: set[torch.dtype]) -> str | None:
    """The reason why the compiled core cannot run this, or None."""
    return native.refuse(device, dtypes)


def unfit(tensors: Sequence[Tensor]) -> str | None:
    """The reason why the CUDA kernels cannot take these tensors (rows first), or None."""
    return native.refuse_rows(tensors[0], tensors[0].shape[2])


def _modulation(value: Tensor) -> tuple[int, int, int, int, int, int]:
    batches, frames, _ = value.shape
    return (
        value.data_ptr(),
        native.type_code(value.dtype),
        value.stride(0),
        value.stride(1),
        batches,
        frames,
    )


def _problem(
    x: Tensor,
    branch: Tensor | None,
    gate: Tensor | None,
    scale: Tensor,
    scale_offset: float,
    eps: float,
) -> Any:
    """The fields common to both passes, without the addresses."""
    problem = native.core().AdalnProblem()
    problem.batch, problem.tokens, problem.channels = x.shape
    problem.type = native.type_code(x.dtype)
    problem.scale_offset = scale_offset
    problem.eps = eps
    problem.x = native.rows(x)
    if branch is not None:
        problem.branch = native.rows(branch)
    if gate is not None:
        problem.gate = _modulation(gate)
    problem.scale = _modulation(scale)
    return problem


def adaln(
    x: Tensor,
    branch: Tensor | None,
    gate: Tensor | None,
    scale: Tensor,
    shift: Tensor,
    scale_offset: float,
    eps: float,
    kept: Kept | None = None,
) -> tuple[Tensor, Tensor]:
    """x_out ([0] without a branch) and h, contiguous; inputs may be strided except over D."""

    def make() -> Any:
        problem = _problem(x, branch, gate, scale, scale_offset, eps)
        problem.shift = _modulation(shift)
        return problem

    problem = native.take(kept, make)
    h = native.empty_like(x)
    x_out = None if branch is None else native.empty_like(x)
    problem.place(x, branch, gate, scale, shift, x_out, h)
    native.run_rows("adaln", problem, x)
    native.put_back(kept, problem)
    if x_out is None:
        x_out = torch.empty(0, dtype=x.dtype, device=x.device)
    return x_out, h


def adaln_bwd(
    grad_x_out: Tensor | None,
    grad_h: Tensor,
    x_out: Tensor,
    branch: Tensor | None,
    gate: Tensor | None,
    scale: Tensor,
    scale_offset: float,
    eps: float,
    kept: Kept | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dx, dbranch, dgate (both [0] without a gate), dscale and dshift; sums over tokens in fp32."""

    def make() -> Any:
        problem = _problem(x_out, branch, gate, scale, scale_offset, eps)
        problem.grad_h = native.rows(grad_h)
        if grad_x_out is not None:
            problem.grad_x_out = native.rows(grad_x_out)
        return problem

    problem = native.take(kept, make)
    dx = native.empty_like(x_out)
    sums = partial(torch.empty, dtype=torch.float32, device=x_out.device)
    dscale, dshift = sums(scale.shape), sums(scale.shape)
    dbranch = torch.empty(0, dtype=x_out.dtype, device=x_out.device)
    dgate = sums(0 if gate is None else gate.shape)
    if gate is not None:
        dbranch = native.empty_like(x_out)
    gated = (None, None) if gate is None else (dbranch, dgate)
    problem.place_bwd(*(grad_x_out, grad_h, x_out, branch, gate, scale, dx, *gated, dscale, dshift))
    native.run_rows("adaln_bwd", problem, x_out, scratch=True)
    native.put_back(kept, problem)
    like = x_out if gate is None else gate
    return dx, dbranch, dgate.to(like.dtype), dscale.to(scale.dtype), dshift.to(scale.dtype)
