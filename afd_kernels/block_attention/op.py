"""afd::block_attention: schema, fake, gradient. The public function is afd.ops.block_attention."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from afd_kernels import plans, registry
from afd_kernels.block_attention.contract import (
    AttentionInputs,
    check_traced,
    plan_block_attention,
    rowwise,
)
from afd_kernels.block_attention.intervals import Intervals
from afd_kernels.contracts import require
from afd_kernels.derivatives import Rule


def _rowwise(tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
    return [None if x is None else rowwise(x) for x in tensors]


def _dense_bwd(tensors: Sequence[Any]) -> list[Tensor | None]:
    *rows, lse = tensors
    return [*_rowwise(rows), lse.contiguous()]


def _plan(*arguments: Any) -> Intervals:
    return plan_block_attention(AttentionInputs(*arguments[:-3]), *arguments[-3:])


def _plan_bwd(*arguments: Any) -> Intervals:
    grad_out, *tensors, out, lse = arguments[:-3]
    inputs = AttentionInputs(*tensors)
    intervals = plan_block_attention(inputs, *arguments[-3:])
    _check_saved(grad_out, inputs.q, out, lse)
    return intervals


def _addresses(tensors: Sequence[Tensor | None]) -> tuple[bool, ...]:
    """Whether each address is 16-byte aligned, as GPU libraries require."""
    first = tensors[0]
    if first is None or first.is_cpu:
        return ()
    return tuple(x is None or x.data_ptr() % 16 == 0 for x in tensors)


def _wide(q: Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def _block_attention(*arguments: Any) -> tuple[Tensor, Tensor]:
    tensors, (flat, streams, scale) = arguments[:-3], arguments[-3:]
    intervals, run, as_is = plans.prepared(
        "block_attention",
        "block_attention",
        _plan,
        tensors,
        (tuple(flat), streams, scale),
        range(5),
        _rowwise,
        _addresses(tensors),
    )
    inputs = AttentionInputs._make(tensors if as_is else _rowwise(tensors))
    return run(inputs, intervals, scale)


def _fake(*arguments: Any) -> tuple[Tensor, Tensor]:
    inputs = AttentionInputs(*arguments[:-3])
    check_traced(inputs, *arguments[-3:])
    q = inputs.q
    batch, queries, heads, _ = q.shape
    return q.new_empty(q.shape), q.new_empty((batch, heads, queries), dtype=_wide(q))


def _block_attention_bwd(*arguments: Any) -> tuple[Tensor, ...]:
    tensors, (flat, streams, scale, needs) = arguments[:-4], arguments[-4:]
    intervals, run, as_is = plans.prepared(
        "block_attention",
        "block_attention_bwd",
        _plan_bwd,
        tensors,
        (tuple(flat), streams, scale),
        (1, 2, 3, 4, 5, 0, 6),
        _dense_bwd,
        _addresses(tensors),
    )
    grad_out, *rows, out, lse = tensors if as_is else _dense_bwd(tensors)
    inputs = AttentionInputs._make(rows)
    wanted = (needs[0], needs[1], needs[2] and inputs.k_context is not None)
    grads = run(grad_out, inputs, out, lse, intervals, scale, wanted)
    return tuple(inputs.q.new_empty(0) if grad is None else grad for grad in grads)


def _fake_bwd(*arguments: Any) -> tuple[Tensor, ...]:
    grad_out, *tensors, out, lse, flat, streams, scale, needs = arguments
    inputs = AttentionInputs(*tensors)
    check_traced(inputs, flat, streams, scale)
    _check_saved(grad_out, inputs.q, out, lse)
    wanted = (needs[0], needs[1], needs[1], needs[2], needs[2])
    return tuple(
        x.new_empty(x.shape) if need and x is not None else inputs.q.new_empty(0)
        for x, need in zip(inputs, wanted, strict=True)
    )


def _check_saved(grad_out: Tensor, q: Tensor, out: Tensor, lse: Tensor) -> None:
    for name, x in (("grad_out", grad_out), ("out", out)):
        require(x.shape == q.shape, name, x, f"the shape of q, {list(q.shape)}")
        require(x.dtype == q.dtype, name, x, f"the dtype of q, {q.dtype}")
    batch, queries, heads, _ = q.shape
    ok = lse.shape == (batch, heads, queries) and lse.dtype == _wide(q)
    require(ok, "lse", lse, f"{_wide(q)} [{batch}, {heads}, {queries}]")


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.flat, ctx.streams, ctx.scale = inputs
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(*tensors, out, lse)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_out: Tensor | None, _lse: Tensor | None) -> tuple[Tensor | None, ...]:
    wanted = ctx.needs_input_grad[:5]
    if grad_out is None:
        return (None,) * 8
    needs = (wanted[0], wanted[1] or wanted[2], wanted[3] or wanted[4])
    grads = block_attention_bwd(
        grad_out, *ctx.saved_tensors, ctx.flat, ctx.streams, ctx.scale, needs
    )
    kept = (g if want else None for g, want in zip(grads, wanted, strict=True))
    return *kept, None, None, None


_INPUTS = registry.schema(AttentionInputs)
_REFERENCE = "afd_kernels.block_attention.reference.block_attention"
block_attention = registry.define(
    f"block_attention({_INPUTS}, SymInt[] intervals, int streams, float scale) "
    "-> (Tensor out, Tensor lse)",
    _block_attention,
    _fake,
    Rule(_REFERENCE, _setup_context, _backward),
)
block_attention_bwd = registry.define(
    f"block_attention_bwd(Tensor grad_out, {_INPUTS}, Tensor out, Tensor lse, SymInt[] intervals, "
    "int streams, float scale, bool[3] needs) "
    "-> (Tensor dq, Tensor dk, Tensor dv, Tensor dk_context, Tensor dv_context)",
    _block_attention_bwd,
    _fake_bwd,
    Rule(_REFERENCE),
)
