"""afd::nft_loss: schema, fake, gradient. The public function is afd.ops.nft_loss.

The forward produces the gradient with respect to v_theta; the backward scales it. If the graph is
not retained, the saved gradient is donated: scaled in place and returned, so that a step holds a
single gradient.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from afd_kernels import aliasing, contracts, metadata, plans, registry
from afd_kernels.derivatives import Rule
from afd_kernels.nft_loss import contract
from afd_kernels.nft_loss.contract import NftInputs, NftOptions, NftPlan
from afd_kernels.nft_loss.storage import grad_power

_TENSORS = len(NftInputs._fields)
_V_THETA, _X0, _NOISE = map(NftInputs._fields.index, ("v_theta", "x0", "noise"))
# The backend is picked by the dtypes of these.
_CHOOSING = (_V_THETA, _X0, _NOISE)


def _plan(*arguments: Any) -> NftPlan:
    return contract.plan_nft_loss(
        NftInputs(*arguments[:_TENSORS]), NftOptions(*arguments[_TENSORS:])
    )


def _nft_loss(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    inputs = NftInputs(*arguments[:_TENSORS])
    plan, run, dense = plans.prepared(
        "nft_loss",
        "nft_loss",
        _plan,
        inputs,
        tuple(tuple(x) if isinstance(x, list) else x for x in arguments[_TENSORS:]),
        _CHOOSING,
        contracts.contiguous,
    )
    contract.check_values(inputs, plan)
    return run(inputs if dense else NftInputs._make(contracts.contiguous(inputs)), plan)


def _fake(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    plan = _plan(*arguments)
    v_theta, x0 = arguments[_V_THETA], arguments[_X0]
    wide = torch.float64 if torch.float64 in (v_theta.dtype, x0.dtype) else torch.float32
    return (
        x0.new_empty((), dtype=wide),
        x0.new_empty((plan.batch, plan.groups, len(contract.METRICS)), dtype=torch.float64),
        v_theta.new_empty(v_theta.shape if plan.needs_grad else 0),
    )


def _extents(grad: Tensor, grad_loss: Tensor) -> tuple[int, ...]:
    return aliasing.extent(grad), aliasing.extent(grad_loss)


def _prepared_bwd(function: str, tensors: tuple[Tensor, Tensor]) -> plans.Prepared:
    dense = contracts.contiguous
    return plans.prepared("nft_loss", function, _extents, tensors, (), (0,), dense)


def _nft_loss_bwd(grad: Tensor, grad_loss: Tensor) -> Tensor:
    tensors = (grad, grad_loss)
    _, run, dense = _prepared_bwd("nft_loss_bwd", tensors)
    return run(*(tensors if dense else contracts.contiguous(tensors)))


def _check_bwd_(grad: Tensor, grad_loss: Tensor) -> None:
    aliasing.refuse_overlaps((("grad", grad),), (("grad_loss", grad_loss),))


def _nft_loss_bwd_(grad: Tensor, grad_loss: Tensor) -> None:
    tensors = (grad, grad_loss)
    extents, run, dense = _prepared_bwd("nft_loss_bwd_", tensors)
    if not metadata.apart(tensors, extents, (0,)):
        _check_bwd_(grad, grad_loss)
    if not grad.is_contiguous():
        grad.copy_(_nft_loss_bwd(grad, grad_loss))
        return
    run(grad, grad_loss if dense else grad_loss.contiguous())


def _prepare(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Request the gradient, since vmap hides from the caller that v_theta requires it."""
    return *args[:-1], True


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    for name, value in zip(_ARGUMENTS[1:], inputs[1:], strict=True):
        if isinstance(value, Tensor) and value.requires_grad:
            name = "prior_weight" if name == "prior_weights" else name
            raise RuntimeError(f"{name}: got a tensor that requires grad; needed: {name}.detach()")
    grad = output[2]
    ctx.power, ctx.loss_dtype = 1.0, output[0].dtype
    if grad.dtype == torch.float16:
        ctx.power = grad_power(_plan(*inputs), NftInputs(*inputs[:_TENSORS]))
    # If second derivatives are possible, the gradient stays differentiable, so they can be refused.
    ctx.mark_non_differentiable(output[1], *([] if ctx.transformed else [grad]))
    ctx.save_for_backward(grad)
    ctx.save_for_forward(grad)
    ctx.set_materialize_grads(False)


def _backward(
    ctx: Any, grad_loss: Tensor | None, _metrics: Tensor | None, of_grad: Tensor | None
) -> tuple[Tensor | None, ...]:
    if of_grad is not None or (torch.is_grad_enabled() and not ctx.transformed):
        raise RuntimeError(_ONCE)
    grad = None
    if grad_loss is not None:
        (grad,) = ctx.saved_tensors
        if ctx.power != 1.0:
            grad_loss = grad_loss / ctx.power
        if not ctx.transformed and _may_donate(grad, grad_loss):
            nft_loss_bwd_(grad, grad_loss)
        else:
            grad = nft_loss_bwd(grad, grad_loss)
    return grad, *(None,) * (len(_ARGUMENTS) - 1)


def _jvp(ctx: Any, v_theta: Tensor | None, *others: Tensor | None) -> tuple[Tensor | None, ...]:
    """<gradient, tangent of v_theta>; the metrics have no tangent, as they have no gradient.

    The tangent of the gradient itself, a second derivative, is NaN.
    """
    for name, tangent in zip(_ARGUMENTS[1:], others, strict=True):
        if tangent is not None:
            raise RuntimeError(f"{name}: got a tensor with a tangent; needed: {name}.detach()")
    assert v_theta is not None
    if ctx.inner:
        raise RuntimeError(_ONCE)
    (grad,) = ctx.saved_tensors
    wide = ctx.loss_dtype
    loss = (grad.to(wide) * v_theta.to(wide)).sum(dtype=torch.float64) / ctx.power
    return loss.to(wide), None, torch.full_like(grad, float("nan"))


def _may_donate(grad: Tensor, grad_loss: Tensor) -> bool:
    """Whether the saved gradient cannot be needed again: no retain_graph, tracing or vmap."""
    return (
        type(grad) is Tensor
        and not torch._C._autograd._get_current_graph_task_keep_graph()
        and not torch._C._are_functorch_transforms_active()
        and not torch._C._functorch.is_legacy_batchedtensor(grad_loss)
    )


_ONCE = (
    "afd::nft_loss has no second derivative (double backward, create_graph=True, torch.func.hessian"
    "); afd_kernels.nft_loss.reference.loss is twice differentiable"
)
_SCHEMA = (
    f"nft_loss({registry.schema(NftInputs)}, {registry.schema(NftOptions)}) "
    "-> (Tensor loss, Tensor metrics, Tensor grad)"
)
_ARGUMENTS = (*NftInputs._fields, *NftOptions._fields)

_REFERENCE = "afd_kernels.nft_loss.reference.loss"

nft_loss = registry.define(
    _SCHEMA, _nft_loss, _fake, Rule(_REFERENCE, _setup_context, _backward, _jvp, _prepare)
)
nft_loss_bwd = registry.define(
    "nft_loss_bwd(Tensor grad, Tensor grad_loss) -> Tensor",
    _nft_loss_bwd,
    lambda grad, grad_loss: grad.new_empty(grad.shape),
    Rule(_REFERENCE),
)
nft_loss_bwd_ = registry.define(
    "nft_loss_bwd_(Tensor(a!) grad, Tensor grad_loss) -> ()",
    _nft_loss_bwd_,
    _check_bwd_,
    Rule(_REFERENCE),
    mutates=True,
)
