"""afd::nft_loss: schema, fake, gradient. The public function is afd.ops.nft_loss.

The forward produces the gradient with respect to v_theta; the backward scales it. Where the graph
is not retained the saved gradient is donated: scaled in place and handed out, so that a step holds
one gradient and nothing else.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from afd_kernels import contracts, dispatch, registry


def _nft_loss(
    v_theta: Tensor,
    v_old: Tensor,
    v_ref: Tensor | None,
    x0: Tensor,
    t: Tensor,
    r: Tensor,
    seed: Tensor | None,
    noise: Tensor | None,
    frame_mask: Tensor | None,
    *options: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    tensors = (v_theta, v_old, v_ref, x0, t, r, seed, noise, frame_mask)
    plan = contracts.plan_nft_loss(*tensors, *options)
    contracts.check_values(plan, t, r)
    backend = dispatch.pick("nft_loss", v_theta, x0, noise)
    return backend.nft_loss(*map(contracts.contiguous, tensors), plan)


def _fake(
    v_theta: Tensor,
    v_old: Tensor,
    v_ref: Tensor | None,
    x0: Tensor,
    t: Tensor,
    r: Tensor,
    seed: Tensor | None,
    noise: Tensor | None,
    frame_mask: Tensor | None,
    *options: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    plan = contracts.plan_nft_loss(
        v_theta, v_old, v_ref, x0, t, r, seed, noise, frame_mask, *options
    )
    wide = torch.float64 if torch.float64 in (v_theta.dtype, x0.dtype) else torch.float32
    return (
        x0.new_empty((), dtype=wide),
        x0.new_empty((plan.batch, plan.groups, len(contracts.METRICS)), dtype=torch.float64),
        v_theta.new_empty(v_theta.shape if plan.needs_grad else 0),
    )


def _nft_loss_bwd(grad: Tensor, grad_loss: Tensor) -> Tensor:
    return dispatch.pick("nft_loss", grad).nft_loss_bwd(grad.contiguous(), grad_loss.contiguous())


def _nft_loss_bwd_(grad: Tensor, grad_loss: Tensor) -> None:
    if not grad.is_contiguous():
        grad.copy_(_nft_loss_bwd(grad, grad_loss))
        return
    dispatch.pick("nft_loss", grad).nft_loss_bwd_(grad, grad_loss.contiguous())


_DIFFERENTIABLE = 0  # v_theta; every other input is data


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    for position, value in enumerate(inputs):
        if isinstance(value, Tensor) and value.requires_grad and position != _DIFFERENTIABLE:
            name = _ARGUMENTS[position]
            raise RuntimeError(f"{name}: got a tensor that requires grad; needed: {name}.detach()")
    ctx.needs_grad = inputs[-1]
    ctx.mark_non_differentiable(output[1], output[2])
    ctx.save_for_backward(output[2])
    ctx.set_materialize_grads(False)


def _backward(
    ctx: Any, grad_loss: Tensor | None, _metrics: Tensor | None, _grad: Tensor | None
) -> tuple[Tensor | None, ...]:
    if torch.is_grad_enabled():
        raise RuntimeError(
            "afd::nft_loss has no second derivative (double backward, create_graph=True); "
            "afd_kernels.nft_loss.reference.loss is twice differentiable"
        )
    grad = None
    if grad_loss is not None:
        if not ctx.needs_grad:
            raise RuntimeError("needs_grad: got False; needed: True to differentiate nft_loss")
        (grad,) = ctx.saved_tensors
        if _may_donate(grad):
            torch.ops.afd.nft_loss_bwd_(grad, grad_loss)
        else:
            grad = torch.ops.afd.nft_loss_bwd(grad, grad_loss)
    return grad, *(None,) * (len(_ARGUMENTS) - 1)


def _may_donate(grad: Tensor) -> bool:
    """Whether nobody can ask for the saved gradient again: no retain_graph, no tracing."""
    return type(grad) is Tensor and not torch._C._autograd._get_current_graph_task_keep_graph()


_SCHEMA = (
    "nft_loss(Tensor v_theta, Tensor v_old, Tensor? v_ref, Tensor x0, Tensor t, Tensor r, "
    "Tensor? seed, Tensor? noise, Tensor? frame_mask, float nft_beta, float prior_weight, "
    "float adv_clip, str weighting, str group, bool prior_by_r, str schedule, "
    "float[] schedule_args, str layout, bool needs_grad) "
    "-> (Tensor loss, Tensor metrics, Tensor grad)"
)
_ARGUMENTS = [
    part.split()[-1] for part in _SCHEMA[_SCHEMA.index("(") + 1 : _SCHEMA.index(")")].split(",")
]

registry.define(_SCHEMA, _nft_loss, _fake)
registry.define(
    "nft_loss_bwd(Tensor grad, Tensor grad_loss) -> Tensor",
    _nft_loss_bwd,
    lambda grad, grad_loss: grad.new_empty(grad.shape),
)
registry.define(
    "nft_loss_bwd_(Tensor(a!) grad, Tensor grad_loss) -> ()",
    _nft_loss_bwd_,
    lambda grad, grad_loss: None,
    mutates=True,
)
registry.differentiate("nft_loss", _setup_context, _backward)
registry.refuse_double_backward("nft_loss_bwd", "afd_kernels.nft_loss.reference.loss")
