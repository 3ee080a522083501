"""Argument checks of qk_norm_rope, shared by all backends and the fakes.

Letters: B streams, L tokens, h heads, d channels of a head, P rope tables (1 or B), S cache slots,
T tokens per frame.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from afd_kernels.aliasing import refuse_overlaps
from afd_kernels.contracts import FLOATS, expect, require


class QkInputs(NamedTuple):
    """The tensors of qk_norm_rope; afd.ops.qk_norm_rope describes them."""

    q: Tensor
    k: Tensor
    weight_q: Tensor
    weight_k: Tensor
    rope: Tensor


class AppendInputs(NamedTuple):
    """The tensors of qk_norm_rope_append_; afd.ops.qk_norm_rope_append_ describes them."""

    q: Tensor
    k: Tensor
    v: Tensor
    weight_q: Tensor
    weight_k: Tensor
    rope: Tensor
    k_cache: Tensor
    v_cache: Tensor
    position: Tensor

    def without_cache(self) -> QkInputs:
        """The tensors that the op shares with qk_norm_rope."""
        return QkInputs(self.q, self.k, self.weight_q, self.weight_k, self.rope)


def check(inputs: QkInputs) -> None:
    """Checks the metadata of qk_norm_rope.

    Raises:
        ValueError: names the argument, its value and the requirement.
    """
    q, k, weight_q, weight_k, rope = inputs
    require(q.dtype in FLOATS, "q", q, "float32, bfloat16, float16 or float64")
    require(q.ndim == 4 and q.numel() > 0, "q", q, "[B, L, h, d] without empty dimensions")
    batch, tokens, heads, width = q.shape
    require(width % 2 == 0, "q", q, "an even d: RoPE turns pairs of channels")
    expect("k", k, q.shape, (q.dtype,), q)
    expect("weight_q", weight_q, (heads * width,), (q.dtype, torch.float32), q)
    expect("weight_k", weight_k, (heads * width,), (weight_q.dtype,), q)
    tables = batch if rope.ndim and rope.shape[0] == batch else 1
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    expect("rope", rope, (tables, tokens, width // 2, 2), (torch.float32, wide), q)


def check_bwd(grad_q: Tensor, grad_k: Tensor, inputs: QkInputs) -> None:
    """Checks the metadata of qk_norm_rope_bwd."""
    check(inputs)
    q = inputs.q
    expect("grad_q", grad_q, q.shape, (q.dtype,), q)
    expect("grad_k", grad_k, q.shape, (q.dtype,), q)


def check_append(inputs: AppendInputs, tokens_per_frame: int, sink_frames: int) -> None:
    """Checks the metadata of qk_norm_rope_append_; the position's value is not read."""
    check(inputs.without_cache())
    q, k_cache, v_cache, position = inputs.q, inputs.k_cache, inputs.v_cache, inputs.position
    expect("v", inputs.v, q.shape, (q.dtype,), q)
    batch, tokens, heads, width = q.shape
    slots = k_cache.shape[1] if k_cache.ndim == 4 else 0
    expect("k_cache", k_cache, (batch, slots, heads, width), (q.dtype,), q)
    expect("v_cache", v_cache, (batch, slots, heads, width), (q.dtype,), q)
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        require(
            cache.is_contiguous(), name, cache, "a contiguous buffer, which is written in place"
        )
    streams = batch if position.ndim and position.shape[0] == batch else 1
    expect("position", position, (streams,), (torch.int64,), q)
    if tokens_per_frame <= 0 or tokens % tokens_per_frame or slots % tokens_per_frame:
        needed = f"a divisor of the {tokens} tokens and of the {slots} slots of the cache"
        require(False, "tokens_per_frame", tokens_per_frame, needed)
    free = slots // tokens_per_frame - tokens // tokens_per_frame
    if not 0 <= sink_frames <= free:
        needed = f"between 0 and {free}: the ring behind the sink must hold the frames of one call"
        require(False, "sink_frames", sink_frames, needed)
    if torch.is_grad_enabled():
        for name in ("q", "k", "v", "weight_q", "weight_k"):
            x = getattr(inputs, name)
            require(not x.requires_grad, name, x, "no gradient (torch.no_grad): a cache keeps none")


def check_aliases(inputs: AppendInputs) -> None:
    """Rejects caches of qk_norm_rope_append_ that share memory with another argument."""
    named = tuple(inputs._asdict().items())
    written = ("k_cache", "v_cache")
    refuse_overlaps(
        tuple(x for x in named if x[0] in written), tuple(x for x in named if x[0] not in written)
    )


def check_position(position: Tensor) -> None:
    """Rejects negative frames; CPU only, since on an accelerator this would synchronise."""
    if position.is_cpu and min(position.tolist()) < 0:
        raise ValueError(f"position: got {position.tolist()}; needed: frames >= 0")


def packed(x: Tensor) -> Tensor:
    """x [.., m, n] itself if a token's m·n elements are contiguous, else a contiguous copy.

    Token and batch strides are arbitrary: a slice of a fused projection is not copied.
    """
    last, rows = x.stride(-1), x.stride(-2)
    is_packed = last == 1 and (rows == x.shape[-1] or x.shape[-2] == 1)
    return x if is_packed else x.contiguous()
