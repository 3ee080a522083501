"""block_attention in Triton: launches the kernels of triton_fwd.py and triton_bwd.py (see MATH.md).

Letters: B streams, L queries, N keys, Nc keys of the context, h heads, d channels of a head.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
from torch import Tensor

from afd_kernels.block_attention.contract import AttentionInputs
from afd_kernels.block_attention.intervals import Intervals
from afd_kernels.block_attention.tiles import key_table, query_table
from afd_kernels.block_attention.triton_bwd import (
    LOG2_E,
    _block_attention_dkdv_kernel,
    _block_attention_dq_kernel,
)
from afd_kernels.block_attention.triton_fwd import _block_attention_fwd_kernel
from afd_kernels.forward_noise import triton_impl as noising
from afd_kernels.kept import Kept
from afd_kernels.launch_config import device_arch, launch_config
from afd_kernels.triton_launch import Launches, repeat

# Wider heads do not fit the registers next to their scores.
MAX_CHANNELS = 128
# Matrix instructions take at least 16 channels.
MIN_CHANNELS = 16


KEEPS = True


def refuse(device: str, dtypes: set[torch.dtype]) -> str | None:
    """The reason why Triton cannot run these dtypes on this device type, or None."""
    return noising.refuse(device, dtypes)


def unfit(tensors: Sequence[Tensor]) -> str | None:
    """The reason why the kernels cannot take these tensors [B, l, h, d], or None."""
    batch, _, heads, width = tensors[0].shape
    if width > MAX_CHANNELS:
        return f"heads of {width} channels; triton takes at most {MAX_CHANNELS}"
    if max(batch, heads) > noising.MAX_BATCH:
        return f"{batch} streams of {heads} heads; triton takes at most {noising.MAX_BATCH}"
    return None


def _config(part: str, q: Tensor) -> tuple[dict[str, int], dict[str, object]]:
    """Tile sizes and constants of one kernel; chosen by dtype and head width."""
    width = max(MIN_CHANNELS, triton.next_power_of_2(q.shape[-1]))
    kind = "fp32" if q.dtype == torch.float32 else "64" if width <= 64 else "128"
    config = launch_config("block_attention", device_arch(q.device))[f"{part}_{kind}"]
    return config, {
        "D": q.shape[-1],
        "BLOCK_D": width,
        "BLOCK_M": config["block_m"],
        "BLOCK_N": config["block_n"],
        "WIDEN": noising.INTERPRETED and q.dtype == torch.bfloat16,
        "num_warps": config["num_warps"],
        "num_stages": config["num_stages"],
        # A single rounding in scores * scale - max, for an accurate exponential.
        "enable_fp_fusion": True,
    }


def _strides(*tensors: Tensor) -> tuple[tuple[int, ...], int]:
    """Batch, token and head strides of each tensor, in units, and the unit.

    The compiler specialises arguments only on divisibility by 16. The strides of 40-channel heads
    are multiples of 8, which suffices for 16-byte loads but must be made explicit.
    """
    strides = tuple(stride for x in tensors for stride in x.stride()[:3])
    unit = 8 if any(s % 16 for s in strides) and all(s % 8 == 0 for s in strides) else 1
    return tuple(stride // unit for stride in strides), unit


def _sources(inputs: AttentionInputs) -> tuple[tuple[Tensor, ...], int]:
    """K, V and their context as the kernels take them, and the key index at which k begins.

    Without a context k begins at key 0; specialising the kernels to that would need more registers,
    because the compiler then hoists more out of their loops.
    """
    _, k, v, k_context, v_context = inputs
    if k_context is None or v_context is None:
        return (k, v, k, v), 0
    return (k, v, k_context, v_context), k_context.shape[1]


def _copies(intervals: Intervals, batch: int) -> int:
    """Number of streams that share a table: all, or one if each has separate rows."""
    return batch if intervals.streams == 1 else 1


def block_attention(
    inputs: AttentionInputs, intervals: Intervals, scale: float, kept: Kept | None = None
) -> tuple[Tensor, Tensor]:
    """out like q and lse fp32 [B, h, L]; the last dimension of every tensor is contiguous."""
    q = inputs.q
    batch, queries, heads, _ = q.shape
    sources, border = _sources(inputs)
    config, constants = _config("fwd", q)
    table = query_table(intervals, config["block_m"], q.device)
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = torch.empty((batch, heads, queries), dtype=torch.float32, device=q.device)
    if repeat(kept, tensors := (q, *sources, out, lse, table.rows)):
        return out, lse
    strides, unit = _strides(q, *sources)
    launches = Launches(kept, tensors)
    launches(_block_attention_fwd_kernel, (table.count, heads, _copies(intervals, batch)))(
        *tensors,
        *strides,
        queries,
        border,
        scale * LOG2_E.value,
        **constants,
        UNIT=unit,
    )
    launches.keep()
    return out, lse


def block_attention_bwd(
    grad_out: Tensor,
    inputs: AttentionInputs,
    out: Tensor,
    lse: Tensor,
    intervals: Intervals,
    scale: float,
    needs: tuple[bool, bool, bool],
    kept: Kept | None = None,
) -> tuple[Tensor | None, ...]:
    """Gradients of q, k, v, k_context and v_context; None if not in `needs` (q, k, context)."""
    out = out.contiguous()
    delta = None
    if needs[1] or needs[2]:
        delta = torch.empty_like(lse)
    dq = None
    if needs[0]:
        dq = _launch_dq(grad_out, inputs, out, lse, delta, intervals, scale)
    elif delta is not None:
        torch.sum((grad_out.float() * out.float()).transpose(1, 2), -1, out=delta)
    q, k, v, k_context, v_context = inputs
    border = 0 if k_context is None else k_context.shape[1]
    own = context = (None, None)
    if needs[1]:
        own = _launch_dkdv(grad_out, q, k, v, lse, delta, border, intervals, scale)
    if needs[2]:
        context = _launch_dkdv(grad_out, q, k_context, v_context, lse, delta, 0, intervals, scale)
    return dq, *own, *context


def _launch_dq(
    grad_out: Tensor,
    inputs: AttentionInputs,
    out: Tensor,
    lse: Tensor,
    delta: Tensor | None,
    intervals: Intervals,
    scale: float,
) -> Tensor:
    """dQ; also fills delta [B, h, L], rowsum(grad_out out), if given."""
    q = inputs.q
    batch, queries, heads, _ = q.shape
    sources, border = _sources(inputs)
    config, constants = _config("dq", q)
    table = query_table(intervals, config["block_m"], q.device)
    dq = q.new_empty(q.shape)
    strides, unit = _strides(q, *sources, grad_out)
    _block_attention_dq_kernel[(table.count, heads, _copies(intervals, batch))](
        q,
        *sources,
        grad_out,
        out,
        lse,
        delta,
        dq,
        table.rows,
        *strides,
        queries,
        border,
        scale,
        scale * LOG2_E.value,
        **constants,
        UNIT=unit,
    )
    return dq


def _launch_dkdv(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    delta: Tensor,
    first: int,
    intervals: Intervals,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """dK and dV of one source, holding keys [first, first + N) of the intervals."""
    batch, queries, heads, _ = q.shape
    keys = k.shape[1]
    dk, dv = k.new_empty(k.shape), v.new_empty(v.shape)
    if keys == 0:
        return dk, dv
    config, constants = _config("dkdv", q)
    blocks = (config["block_n"], config["block_m"])
    table = key_table(intervals, first, first + keys, *blocks, q.device)
    strides, unit = _strides(q, k, v, grad_out)
    _block_attention_dkdv_kernel[(table.count, heads, _copies(intervals, batch))](
        q,
        k,
        v,
        grad_out,
        lse,
        delta,
        dk,
        dv,
        table.rows,
        table.walk,
        *strides,
        queries,
        keys,
        scale,
        scale * LOG2_E.value,
        **constants,
        UNIT=unit,
    )
    return dk, dv
