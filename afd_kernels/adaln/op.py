"""afd::adaln: schema, fake, gradient. The public function is afd.ops.adaln."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from afd_kernels import plans, registry
from afd_kernels.adaln.contract import (
    AdalnBwdInputs,
    AdalnInputs,
    check,
    check_bwd,
    dense,
    per_frame,
)
from afd_kernels.derivatives import Rule


def _check(*tensors: Any) -> None:
    check(AdalnInputs(*tensors))


def _check_bwd(*tensors: Any) -> None:
    check_bwd(AdalnBwdInputs(*tensors))


def _adaln(*arguments: Any) -> tuple[Tensor, Tensor]:
    tensors: Sequence[Any] = arguments[:-2]
    options = arguments[-2:]
    _, run, as_is = plans.prepared("adaln", "adaln", _check, tensors, (), (0, 2, 3), dense, options)
    if not as_is:
        tensors = dense(tensors)
    if tensors[3].ndim == 1:
        tensors = [*tensors[:3], *map(per_frame, tensors[3:])]
    return run(*tensors, *options)


def _fake(*arguments: Any) -> tuple[Tensor, Tensor]:
    inputs = AdalnInputs(*arguments[:-2])
    check(inputs)
    x = inputs.x
    return x.new_empty(0 if inputs.branch is None else x.shape), x.new_empty(x.shape)


def _adaln_bwd(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    tensors: Sequence[Any] = arguments[:-2]
    options, scale = arguments[-2:], tensors[-1]
    _, run, as_is = plans.prepared(
        "adaln", "adaln_bwd", _check_bwd, tensors, (), (2, 4, 5), dense, options
    )
    if not as_is:
        tensors = dense(tensors)
    *grads, dscale, dshift = run(*tensors[:5], per_frame(tensors[5]), *options)
    if scale.ndim == 3:
        return *grads, dscale, dshift
    return *grads, dscale.reshape(scale.shape), dshift.reshape(scale.shape)


def _fake_bwd(*arguments: Any) -> tuple[Tensor, ...]:
    inputs = AdalnBwdInputs(*arguments[:-2])
    check_bwd(inputs)
    _, _, x_out, _, gate, scale = inputs
    return (
        x_out.new_empty(x_out.shape),
        x_out.new_empty(0 if gate is None else x_out.shape),
        x_out.new_empty(0) if gate is None else gate.new_empty(gate.shape),
        scale.new_empty(scale.shape),
        scale.new_empty(scale.shape),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, branch, gate, scale, _shift, ctx.scale_offset, ctx.eps = inputs
    ctx.has_branch = branch is not None
    # The branch is needed only for the gate's gradient.
    ctx.save_for_backward(
        x if branch is None else output[0], None if gate is None else branch, gate, scale
    )
    ctx.set_materialize_grads(False)


def _backward(
    ctx: Any, grad_x_out: Tensor | None, grad_h: Tensor | None
) -> tuple[Tensor | None, ...]:
    x_out, branch, gate, scale = ctx.saved_tensors
    if grad_h is None:
        grad_h = x_out.new_zeros(()).expand(x_out.shape)
    dx, dbranch, dgate, dscale, dshift = adaln_bwd(
        grad_x_out if ctx.has_branch else None,
        grad_h,
        x_out,
        branch,
        gate,
        scale,
        ctx.scale_offset,
        ctx.eps,
    )
    if gate is None:
        dbranch, dgate = dx if ctx.has_branch else None, None
    return dx, dbranch, dgate, dscale, dshift, None, None


_REFERENCE = "afd_kernels.adaln.reference.residual_norm"
adaln = registry.define(
    f"adaln({registry.schema(AdalnInputs)}, float scale_offset, float eps) "
    "-> (Tensor x_out, Tensor h)",
    _adaln,
    _fake,
    Rule(_REFERENCE, _setup_context, _backward),
)
adaln_bwd = registry.define(
    f"adaln_bwd({registry.schema(AdalnBwdInputs)}, float scale_offset, float eps) "
    "-> (Tensor dx, Tensor dbranch, Tensor dgate, Tensor dscale, Tensor dshift)",
    _adaln_bwd,
    _fake_bwd,
    Rule(_REFERENCE),
)
