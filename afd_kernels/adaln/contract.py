"""Argument checks of adaln, shared by all backends and the fakes.

Letters: B streams, L tokens, D width, F frames of a modulation (F divides L; 1 or B streams).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from afd_kernels.contracts import FLOATS, expect, require


class AdalnInputs(NamedTuple):
    """The tensors of a call; afd.ops.adaln describes them."""

    x: Tensor
    branch: Tensor | None
    gate: Tensor | None
    scale: Tensor
    shift: Tensor


class AdalnBwdInputs(NamedTuple):
    """The tensors of the backward; grad_x_out is None if there is no branch."""

    grad_x_out: Tensor | None
    grad_h: Tensor
    x_out: Tensor
    branch: Tensor | None
    gate: Tensor | None
    scale: Tensor


def _check_modulation(name: str, value: Tensor, x: Tensor, dtypes: Sequence[torch.dtype]) -> None:
    """Checks [1 or B, F, D] with F dividing L."""
    batch, tokens, width = x.shape
    streams, frames = value.shape[:2] if value.ndim == 3 else (1, 1)
    expect(name, value, (batch if streams == batch else 1, frames, width), dtypes, x)
    if not frames or tokens % frames:
        needed = f"[1 or {batch}, F, {width}] with F dividing the {tokens} tokens of x"
        require(False, name, value, needed)


def check(inputs: AdalnInputs) -> None:
    """Checks the metadata of adaln.

    Raises:
        ValueError: names the argument, its value and the requirement.
    """
    x, branch, gate, scale, shift = inputs
    _check_forward(x, branch, gate, scale)
    expect("shift", shift, scale.shape, (scale.dtype,), x)


def _check_forward(x: Tensor, branch: Tensor | None, gate: Tensor | None, scale: Tensor) -> None:
    require(x.dtype in FLOATS, "x", x, "float32, bfloat16, float16 or float64")
    require(x.ndim == 3 and x.numel() > 0, "x", x, "[B, L, D] without empty dimensions")
    if branch is not None:
        expect("branch", branch, x.shape, (x.dtype,), x)
    allowed = (x.dtype, torch.float32)
    if gate is not None:
        require(branch is not None, "gate", gate, "None, as there is no branch to gate")
        _check_modulation("gate", gate, x, allowed)
    if scale.ndim == 1:
        expect("scale", scale, x.shape[2:], allowed, x)
    else:
        _check_modulation("scale", scale, x, allowed)


def check_bwd(inputs: AdalnBwdInputs) -> None:
    """Checks the metadata of adaln_bwd."""
    grad_x_out, grad_h, x_out, branch, gate, scale = inputs
    _check_forward(x_out, branch, gate, scale)
    expect("grad_h", grad_h, x_out.shape, (x_out.dtype,), x_out)
    if grad_x_out is not None:
        expect("grad_x_out", grad_x_out, x_out.shape, (x_out.dtype,), x_out)


def dense(tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
    """The tensors, copied to contiguous memory unless their last dimension is contiguous."""
    return [x if x is None or x.stride(-1) == 1 else x.contiguous() for x in tensors]


def per_frame(value: Tensor) -> Tensor:
    """A modulation as [streams, frames, D]; [D] means one frame shared by all streams."""
    return value if value.ndim == 3 else value[None, None]
