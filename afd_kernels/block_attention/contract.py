"""Argument checks of block_attention on metadata only, shared with the fakes.

Letters: B streams, L queries, N keys, Nc keys of the context, h heads, d channels of a head.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from afd_kernels.block_attention.intervals import Intervals
from afd_kernels.contracts import FLOATS, require


class AttentionInputs(NamedTuple):
    """The tensors of a call; afd.ops.block_attention describes them."""

    q: Tensor
    k: Tensor
    v: Tensor
    k_context: Tensor | None = None
    v_context: Tensor | None = None


def plan_block_attention(
    inputs: AttentionInputs, flat: Sequence[int], streams: int, scale: float
) -> Intervals:
    """Checks the arguments of the op and returns its intervals.

    Raises:
        ValueError: names the argument, its value and the requirement.
    """
    _check_tensors(inputs, streams, scale)
    q, k, _, k_context, _ = inputs
    intervals = Intervals.from_flat(list(flat), streams)
    queries = q.shape[1]
    if intervals.queries != queries:
        got = f"rows for {intervals.queries} queries"
        require(False, "intervals", got, f"{queries}, L of q")
    border = 0 if k_context is None else int(k_context.shape[1])
    _check_keys(intervals, border, border + int(k.shape[1]))
    return intervals


def check_traced(inputs: AttentionInputs, flat: Sequence[int], streams: int, scale: float) -> None:
    """The checks of a fake: all of them, or only those of tensors if lengths are symbolic.

    Reading a symbolic number would specialise the graph to it; the op checks the numbers on every
    call.
    """
    q, k, _, k_context, _ = inputs
    lengths = (q.shape[1], k.shape[1], 0 if k_context is None else k_context.shape[1])
    if all(type(x) is int for x in (*flat, *lengths)):
        plan_block_attention(inputs, flat, streams, scale)
    else:
        _check_tensors(inputs, streams, scale)


def _check_tensors(inputs: AttentionInputs, streams: int, scale: float) -> None:
    q, k, v, k_context, v_context = inputs
    if (k_context is None) != (v_context is None) or not (
        _fits(q, k, v) and (k_context is None or _fits(q, k_context, v_context))
    ):
        _explain(inputs)
    require(
        math.isfinite(scale) and scale > 0, "scale", scale, "a finite number > 0 (or None: d^-1/2)"
    )
    batch = q.shape[0]
    if streams not in (1, batch):
        require(False, "intervals", f"{streams} streams", f"1 or {batch}, B of q")


def _fits(q: Tensor, k: Tensor, v: Tensor | None) -> bool:
    """Whether k and v match q. Runs on every call, so errors are formatted only on failure."""
    if v is None or q.ndim != 4 or k.ndim != 4 or k.shape != v.shape:
        return False
    batch, _, heads, width = q.shape
    return (
        q.numel() > 0
        and k.shape[0] == batch
        and k.shape[2] == heads
        and k.shape[3] == width
        and q.dtype in FLOATS
        and k.dtype == q.dtype == v.dtype
        and k.device == q.device == v.device
    )


def _explain(inputs: AttentionInputs) -> None:
    """Raises for the first mismatched tensor."""
    q, k, v, k_context, v_context = inputs
    require(q.dtype in FLOATS, "q", q, "float32, bfloat16, float16 or float64")
    require(q.ndim == 4 and q.numel() > 0, "q", q, "[B, L, h, d] without empty dimensions")
    batch, _, heads, width = q.shape
    if (k_context is None) != (v_context is None):
        got = "only " + ("v_context" if k_context is None else "k_context")
        raise ValueError(f"k_context, v_context: got {got}; needed: both or neither")
    pairs = [("k", k, "v", v)]
    if k_context is not None and v_context is not None:
        pairs.append(("k_context", k_context, "v_context", v_context))
    for key_name, key, value_name, value in pairs:
        require(
            key.ndim == 4 and (key.shape[0], *key.shape[2:]) == (batch, heads, width),
            key_name,
            key,
            f"[{batch}, N, {heads}, {width}], as q has",
        )
        require(
            value.shape == key.shape,
            value_name,
            value,
            f"the shape of {key_name}, {list(key.shape)}",
        )
        for name, x in ((key_name, key), (value_name, value)):
            require(x.dtype == q.dtype, name, x, f"the dtype of q, {q.dtype}")
            require(x.device == q.device, name, x, f"the device of q, {q.device}")


@functools.lru_cache(maxsize=4096)
def _check_keys(intervals: Intervals, border: int, keys: int) -> None:
    for stream in intervals.rows:
        for row in stream:
            for low, high in (row[2:4], row[4:6]):
                require(high <= keys, "intervals", row, f"keys below {keys}, the number of keys")
                require(
                    high <= border or low >= border or low == high,
                    "intervals",
                    row,
                    f"no interval across key {border}, where the context ends",
                )


def rowwise(x: Tensor) -> Tensor:
    """x itself if the channels of a head are contiguous, else a contiguous copy.

    Slices of a fused QKV projection or of a cache, and expanded batches, are not copied.
    """
    return x if x.stride(-1) == 1 else x.contiguous()
