"""The CUDA bandwidth floor: a kernel that only reads five streams and writes one."""
# mypy: ignore-errors
# (@triton.jit bodies are not ordinary Python)

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def _stream_5r1w_kernel(a_ptr, b_ptr, c_ptr, d_ptr, e_ptr, out_ptr, n, BLOCK: tl.constexpr):
    offset = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = offset < n
    total = tl.load(a_ptr + offset, inside) + tl.load(b_ptr + offset, inside)
    total += tl.load(c_ptr + offset, inside) + tl.load(d_ptr + offset, inside)
    total += tl.load(e_ptr + offset, inside)
    tl.store(out_ptr + offset, total, inside)


def stream_5r1w(reads: list[torch.Tensor], out: torch.Tensor) -> None:
    """out = sum(reads), five float32 tensors of out's size, in one pass."""
    grid = (triton.cdiv(out.numel(), 2048),)
    _stream_5r1w_kernel[grid](*reads, out, out.numel(), BLOCK=2048, num_warps=8)
