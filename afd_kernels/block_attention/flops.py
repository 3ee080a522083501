"""FLOP formulas of block_attention for `torch.utils.flop_counter`.

Only matrix products count, two operations per multiply-add, over the pairs of queries and keys that
are attended. The other ops of this package are elementwise and count 0, as in PyTorch. Formulas
receive shapes instead of tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from afd_kernels.block_attention.intervals import Intervals

Shape = Sequence[int]


def product_flop(
    q: Shape, k_context: Shape | None, flat: Sequence[int], streams: int
) -> tuple[int, int]:
    """Operations of one product, such as queries by keys: over the own keys, and the context's."""
    batch, _, heads, width = q
    intervals = Intervals.from_flat(list(flat), streams)
    border = 0 if k_context is None else k_context[1]
    past = sum(
        (q1 - q0) * (min(high, border) - min(low, border))
        for stream in intervals.rows
        for q0, q1, *keys in stream
        for low, high in (keys[:2], keys[2:])
    )
    each = 2 * heads * width * (batch // intervals.streams)
    return each * (intervals.pairs - past), each * past


def forward_flop(
    q: Shape,
    k: Shape,
    v: Shape,
    k_context: Shape | None,
    v_context: Shape | None,
    flat: Sequence[int],
    streams: int,
    scale: float,
    *,
    out_shape: Any = None,
) -> int:
    """Two products: the scores, and the weighted sum of the values."""
    return 2 * sum(product_flop(q, k_context, flat, streams))


def backward_flop(
    grad_out: Shape,
    q: Shape,
    k: Shape,
    v: Shape,
    k_context: Shape | None,
    v_context: Shape | None,
    out: Shape,
    lse: Shape,
    flat: Sequence[int],
    streams: int,
    scale: float,
    needs: Sequence[bool],
    *,
    out_shape: Any = None,
) -> int:
    """The recomputed scores, their gradient, and dq, dk and dv as `needs` (q, own keys, context)
    requests: five products over keys with gradients, three over others."""
    own, past = product_flop(q, k_context, flat, streams)
    products = 2 + needs[0]
    return own * (products + 2 * needs[1]) + past * (products + 2 * needs[2])


def register_flop_formulas() -> None:
    """Register the formulas with PyTorch, so that `FlopCounterMode` counts the ops. Idempotent.

    Not done on import: PyTorch's counter imports Triton, which takes longer than all of afd.ops.
    """
    from torch.utils.flop_counter import flop_registry, register_flop_formula

    for op, formula in (
        (torch.ops.afd.block_attention, forward_flop),
        (torch.ops.afd.block_attention_bwd, backward_flop),
    ):
        if op not in flop_registry:
            register_flop_formula(op)(formula)
