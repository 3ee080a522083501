"""afd::qk_norm_rope and afd::qk_norm_rope_append_: schemas, fakes, gradient.

The public functions are in afd.ops.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from afd_kernels import aliasing, contracts, metadata, plans, registry
from afd_kernels.derivatives import Rule
from afd_kernels.qk_norm_rope.contract import (
    AppendInputs,
    QkInputs,
    check,
    check_aliases,
    check_append,
    check_bwd,
    check_position,
    packed,
)


def _dense(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Token rows, then the weights and the table, with strides that the backends accept."""
    *rows, weight_q, weight_k, rope = tensors
    # An expanded table, whose streams share memory, needs no copy.
    table = rope if rope.is_contiguous() or rope[0].is_contiguous() else rope.contiguous()
    return [*map(packed, rows), weight_q.contiguous(), weight_k.contiguous(), table]


def _dense_append(tensors: Sequence[Tensor]) -> list[Tensor]:
    *others, k_cache, v_cache, position = tensors
    return [*_dense(others), k_cache, v_cache, position.contiguous()]


def _check(*tensors: Tensor) -> None:
    check(QkInputs(*tensors))


def _check_bwd(grad_q: Tensor, grad_k: Tensor, *tensors: Tensor) -> None:
    check_bwd(grad_q, grad_k, QkInputs(*tensors))


def _plan_append(*arguments: Any) -> tuple[int, ...]:
    tensors, options = arguments[:-2], arguments[-2:]
    check_append(AppendInputs(*tensors), *options)
    return tuple(map(aliasing.extent, tensors))


def _qk_norm_rope(*arguments: Any) -> tuple[Tensor, Tensor]:
    tensors, eps = arguments[:-1], arguments[-1]
    _, run, as_is = plans.prepared(
        "qk_norm_rope", "qk_norm_rope", _check, tensors, (), (0, 2, 4), _dense, eps
    )
    return run(*(tensors if as_is else _dense(tensors)), eps)


def _fake(*arguments: Any) -> tuple[Tensor, Tensor]:
    inputs = QkInputs(*arguments[:-1])
    check(inputs)
    return inputs.q.new_empty(inputs.q.shape), inputs.k.new_empty(inputs.k.shape)


def _qk_norm_rope_bwd(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    tensors, eps = arguments[:-1], arguments[-1]
    _, run, as_is = plans.prepared(
        "qk_norm_rope", "qk_norm_rope_bwd", _check_bwd, tensors, (), (2, 4, 6), _dense, eps
    )
    return run(*(tensors if as_is else _dense(tensors)), eps)


def _fake_bwd(*arguments: Any) -> tuple[Tensor, ...]:
    grad_q, grad_k, *tensors = arguments[:-1]
    check_bwd(grad_q, grad_k, QkInputs(*tensors))
    return tuple(x.new_empty(x.shape) for x in tensors[:4])


def _qk_norm_rope_append_(*arguments: Any) -> Tensor:
    tensors, options, eps = arguments[:-3], arguments[-3:-1], arguments[-1]
    extents, run, as_is = plans.prepared(
        "qk_norm_rope",
        "qk_norm_rope_append_",
        _plan_append,
        tensors,
        options,
        (0, 3, 5),
        _dense_append,
        eps,
    )
    if not metadata.apart(tensors, extents, (6, 7)):
        check_aliases(AppendInputs(*tensors))
    check_position(tensors[8])
    return run(*(tensors if as_is else _dense_append(tensors)), *options, eps)


def _fake_append_(*arguments: Any) -> Tensor:
    inputs = AppendInputs(*arguments[:-3])
    check_append(inputs, *arguments[-3:-1])
    check_aliases(inputs)
    return inputs.q.new_empty(inputs.q.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.eps = inputs
    contracts.require(
        not tensors[-1].requires_grad, "rope", tensors[-1], "a table without gradient"
    )
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, grad_q: Tensor, grad_k: Tensor) -> tuple[Tensor | None, ...]:
    grads = qk_norm_rope_bwd(grad_q, grad_k, *ctx.saved_tensors, ctx.eps)
    return *grads, None, None


_INPUTS = registry.schema(QkInputs)
# The caches are written in place.
_APPEND_INPUTS = (
    registry.schema(AppendInputs)
    .replace("Tensor k_cache", "Tensor(a!) k_cache")
    .replace("Tensor v_cache", "Tensor(b!) v_cache")
)
_REFERENCE = "afd_kernels.qk_norm_rope.reference.norm_rope"
qk_norm_rope = registry.define(
    f"qk_norm_rope({_INPUTS}, float eps) -> (Tensor q_out, Tensor k_out)",
    _qk_norm_rope,
    _fake,
    Rule(_REFERENCE, _setup_context, _backward),
)
qk_norm_rope_bwd = registry.define(
    f"qk_norm_rope_bwd(Tensor grad_q, Tensor grad_k, {_INPUTS}, float eps) "
    "-> (Tensor dq, Tensor dk, Tensor dweight_q, Tensor dweight_k)",
    _qk_norm_rope_bwd,
    _fake_bwd,
    Rule(_REFERENCE),
)
qk_norm_rope_append_ = registry.define(
    f"qk_norm_rope_append_({_APPEND_INPUTS}, int tokens_per_frame, int sink_frames, float eps) "
    "-> Tensor",
    _qk_norm_rope_append_,
    _fake_append_,
    Rule("afd.ops.qk_norm_rope"),
    mutates=True,
)
