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


def _plan_append(*arguments: Any) -> tuple[int, ...]:
    check_append(*arguments)
    return tuple(aliasing.extent(x) for x in arguments if isinstance(x, Tensor))


def _qk_norm_rope(
    q: Tensor, k: Tensor, weight_q: Tensor, weight_k: Tensor, rope: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    tensors = (q, k, weight_q, weight_k, rope)
    _, run, as_is = plans.prepared(
        "qk_norm_rope", "qk_norm_rope", check, tensors, (), (0, 2, 4), _dense, eps
    )
    return run(*(tensors if as_is else _dense(tensors)), eps)


def _fake(
    q: Tensor, k: Tensor, weight_q: Tensor, weight_k: Tensor, rope: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    check(q, k, weight_q, weight_k, rope)
    return q.new_empty(q.shape), k.new_empty(k.shape)


def _qk_norm_rope_bwd(
    grad_q: Tensor,
    grad_k: Tensor,
    q: Tensor,
    k: Tensor,
    weight_q: Tensor,
    weight_k: Tensor,
    rope: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    tensors = (grad_q, grad_k, q, k, weight_q, weight_k, rope)
    _, run, as_is = plans.prepared(
        "qk_norm_rope", "qk_norm_rope_bwd", check_bwd, tensors, (), (2, 4, 6), _dense, eps
    )
    return run(*(tensors if as_is else _dense(tensors)), eps)


def _fake_bwd(
    grad_q: Tensor,
    grad_k: Tensor,
    q: Tensor,
    k: Tensor,
    weight_q: Tensor,
    weight_k: Tensor,
    rope: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    check_bwd(grad_q, grad_k, q, k, weight_q, weight_k, rope)
    return tuple(x.new_empty(x.shape) for x in (q, k, weight_q, weight_k))  # type: ignore[return-value]


def _qk_norm_rope_append_(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weight_q: Tensor,
    weight_k: Tensor,
    rope: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    position: Tensor,
    tokens_per_frame: int,
    sink_frames: int,
    eps: float,
) -> Tensor:
    tensors = (q, k, v, weight_q, weight_k, rope, k_cache, v_cache, position)
    options = (tokens_per_frame, sink_frames)
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
        check_aliases(*tensors)
    check_position(position)
    return run(*(tensors if as_is else _dense_append(tensors)), *options, eps)


def _fake_append_(
    q: Tensor, k: Tensor, v: Tensor, weight_q: Tensor, weight_k: Tensor, *rest: Any
) -> Tensor:
    check_append(q, k, v, weight_q, weight_k, *rest[:-1])
    check_aliases(q, k, v, weight_q, weight_k, *rest[:4])
    return q.new_empty(q.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.eps = inputs
    contracts.require(
        not tensors[-1].requires_grad, "rope", tensors[-1], "a table without gradient"
    )
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, grad_q: Tensor, grad_k: Tensor) -> tuple[Tensor | None, ...]:
    grads = qk_norm_rope_bwd(grad_q, grad_k, *ctx.saved_tensors, ctx.eps)
    return *grads, None, None


_INPUTS = "Tensor q, Tensor k, Tensor weight_q, Tensor weight_k, Tensor rope"
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
    "qk_norm_rope_append_(Tensor q, Tensor k, Tensor v, Tensor weight_q, Tensor weight_k, "
    "Tensor rope, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor position, int tokens_per_frame, "
    "int sink_frames, float eps) -> Tensor",
    _qk_norm_rope_append_,
    _fake_append_,
    Rule("afd.ops.qk_norm_rope"),
    mutates=True,
)
