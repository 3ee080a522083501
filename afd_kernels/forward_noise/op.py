"""afd::forward_noise: schema, fake, gradient. The public function is afd.ops.forward_noise."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from afd_kernels import contracts, plans, registry
from afd_kernels.contracts import Plan
from afd_kernels.derivatives import Rule
from afd_kernels.forward_noise.contract import NoiseInputs, NoiseOptions, plan_forward_noise


def _plan(*arguments: Any) -> Plan:
    return plan_forward_noise(NoiseInputs(*arguments[:-3]), NoiseOptions(*arguments[-3:]))


def _forward_noise(*arguments: Any) -> Tensor:
    tensors, (schedule, schedule_args, layout) = arguments[:-3], arguments[-3:]
    plan, run, dense = plans.prepared(
        "forward_noise",
        "forward_noise",
        _plan,
        tensors,
        (schedule, tuple(schedule_args), layout),
        (0, 3),
        contracts.contiguous,
    )
    contracts.check_times(tensors[1], plan.schedule)
    return run(*(tensors if dense else contracts.contiguous(tensors)), plan)


def _fake(*arguments: Any) -> Tensor:
    _plan(*arguments)
    x0: Tensor = arguments[0]
    return x0.new_empty(x0.shape)


def _plan_bwd(grad: Tensor, t: Tensor, *options: Any) -> Plan:
    return plan_forward_noise(NoiseInputs(grad, t, noise=grad), NoiseOptions(*options))


def _forward_noise_bwd(grad: Tensor, t: Tensor, *options: Any) -> Tensor:
    schedule, schedule_args, layout = options
    plan, run, dense = plans.prepared(
        "forward_noise",
        "forward_noise_bwd",
        _plan_bwd,
        (grad, t),
        (schedule, tuple(schedule_args), layout),
        (0,),
        contracts.contiguous,
    )
    return run(*((grad, t) if dense else contracts.contiguous((grad, t))), plan)


def _fake_bwd(grad: Tensor, t: Tensor, *options: Any) -> Tensor:
    return grad.new_empty(grad.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _x0, t, _seed, noise, ctx.schedule, ctx.schedule_args, ctx.layout = inputs
    ctx.save_for_backward(t)
    ctx.save_for_forward(t)
    ctx.set_materialize_grads(False)
    if noise is not None and noise.requires_grad:
        raise RuntimeError("noise: got a tensor that requires grad; needed: noise without gradient")
    if t.requires_grad:
        raise RuntimeError("t: got a tensor that requires grad; needed: timesteps without gradient")


def _backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 7
    (t,) = ctx.saved_tensors
    grad_x0 = forward_noise_bwd(grad, t, ctx.schedule, ctx.schedule_args, ctx.layout)
    return grad_x0, None, None, None, None, None, None


def _jvp(ctx: Any, x0: Tensor | None, *others: Tensor | None) -> Tensor | None:
    """x_t is linear in x0, so its tangent is alpha_t times that of x0, as for the gradient."""
    _refuse_tangents(others)
    if x0 is None:
        return None
    (t,) = ctx.saved_tensors
    return torch.ops.afd.forward_noise_bwd(x0, t, ctx.schedule, ctx.schedule_args, ctx.layout)


def _setup_context_bwd(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _grad, t, ctx.schedule, ctx.schedule_args, ctx.layout = inputs
    ctx.save_for_forward(t)
    ctx.set_materialize_grads(False)


def _refuse_tangents(others: tuple[Tensor | None, ...]) -> None:
    for name, tangent in zip(("t", "seed", "noise"), others, strict=False):
        if tangent is not None:
            raise RuntimeError(f"{name}: got a tensor with a tangent; needed: {name}.detach()")


_OPTIONS = registry.schema(NoiseOptions)
_REFERENCE = "afd_kernels.forward_noise.reference.forward_noise"
forward_noise = registry.define(
    f"forward_noise({registry.schema(NoiseInputs)}, {_OPTIONS}) -> Tensor",
    _forward_noise,
    _fake,
    Rule(_REFERENCE, _setup_context, _backward, _jvp),
)
forward_noise_bwd = registry.define(
    f"forward_noise_bwd(Tensor grad, Tensor t, {_OPTIONS}) -> Tensor",
    _forward_noise_bwd,
    _fake_bwd,
    Rule(_REFERENCE, _setup_context_bwd, jvp=_jvp),
)
