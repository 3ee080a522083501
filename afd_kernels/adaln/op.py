"""afd::adaln: schema, fake, gradient. The public function is afd.ops.adaln."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from afd_kernels import plans, registry
from afd_kernels.adaln.contract import check, check_bwd, dense, per_frame
from afd_kernels.derivatives import Rule


def _adaln(
    x: Tensor,
    branch: Tensor | None,
    gate: Tensor | None,
    scale: Tensor,
    shift: Tensor,
    scale_offset: float,
    eps: float,
) -> tuple[Tensor, Tensor]:
    tensors: Sequence[Any] = (x, branch, gate, scale, shift)
    _, run, as_is = plans.prepared(
        "adaln", "adaln", check, tensors, (), (0, 2, 3), dense, (scale_offset, eps)
    )
    if not as_is:
        tensors = dense(tensors)
    if scale.ndim == 1:
        tensors = [*tensors[:3], *map(per_frame, tensors[3:])]
    return run(*tensors, scale_offset, eps)


def _fake(
    x: Tensor,
    branch: Tensor | None,
    gate: Tensor | None,
    scale: Tensor,
    shift: Tensor,
    scale_offset: float,
    eps: float,
) -> tuple[Tensor, Tensor]:
    check(x, branch, gate, scale, shift)
    return x.new_empty(0 if branch is None else x.shape), x.new_empty(x.shape)


def _adaln_bwd(
    grad_x_out: Tensor | None,
    grad_h: Tensor,
    x_out: Tensor,
    branch: Tensor | None,
    gate: Tensor | None,
    scale: Tensor,
    scale_offset: float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    tensors: Sequence[Any] = (grad_x_out, grad_h, x_out, branch, gate, scale)
    _, run, as_is = plans.prepared(
        "adaln", "adaln_bwd", check_bwd, tensors, (), (2, 4, 5), dense, (scale_offset, eps)
    )
    if not as_is:
        tensors = dense(tensors)
    tensors = (*tensors[:5], per_frame(tensors[5]))
    *grads, dscale, dshift = run(*tensors, scale_offset, eps)
    if scale.ndim == 3:
        return *grads, dscale, dshift
    return *grads, dscale.reshape(scale.shape), dshift.reshape(scale.shape)


def _fake_bwd(
    grad_x_out: Tensor | None,
    grad_h: Tensor,
    x_out: Tensor,
    branch: Tensor | None,
    gate: Tensor | None,
    scale: Tensor,
    scale_offset: float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    check_bwd(grad_x_out, grad_h, x_out, branch, gate, scale)
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
    "adaln(Tensor x, Tensor? branch, Tensor? gate, Tensor scale, Tensor shift, "
    "float scale_offset, float eps) -> (Tensor x_out, Tensor h)",
    _adaln,
    _fake,
    Rule(_REFERENCE, _setup_context, _backward),
)
adaln_bwd = registry.define(
    "adaln_bwd(Tensor? grad_x_out, Tensor grad_h, Tensor x_out, Tensor? branch, Tensor? gate, "
    "Tensor scale, float scale_offset, float eps) "
    "-> (Tensor dx, Tensor dbranch, Tensor dgate, Tensor dscale, Tensor dshift)",
    _adaln_bwd,
    _fake_bwd,
    Rule(_REFERENCE),
)
