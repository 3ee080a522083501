"""Kernels that must fail the budget: they hold far more values than there are registers."""
# mypy: ignore-errors
# (@triton.jit bodies are a language of their own)

from __future__ import annotations

import triton
import triton.language as tl

from tests.offline.attention_calls import CALLS
from tests.offline.budget import Result, compile_launch
from tests.offline.launches import Launch, record


@triton.jit
def _spilling_kernel(x_ptr, out_ptr, steps, BLOCK: tl.constexpr):
    lane = tl.arange(0, BLOCK)
    a = tl.load(x_ptr + lane)
    b = tl.load(x_ptr + BLOCK + lane)
    for _ in range(steps):
        # Each needs all of the other, so all stay alive through the loop.
        a, b = a * 1.5 + b, b * 0.5 + a
        a = a + tl.sum(b)
    tl.store(out_ptr + lane, a + b)
    tl.atomic_add(out_ptr, 1.0)


def compile_spilling(arch: str) -> Result:
    """Compiles the kernel for `arch`; runs in a worker."""
    launch = Launch(
        _spilling_kernel,
        constants={"BLOCK": 4096},
        types={"x_ptr": "*fp32", "out_ptr": "*fp32", "steps": "i32"},
        options={"num_warps": 1, "enable_fp_fusion": False},
        loaded=2 * 4096 * 4,
        stored=4096 * 4,
    )
    return compile_launch(launch, "spilling", arch)


def compile_wide_attention(arch: str) -> Result:
    """dK and dV by tiles of 128 queries and 128 keys, twice what ships; runs in a worker."""
    call = next(call for call in CALLS if "dkdv" in call.kernels)
    launch = record(call, arch)["dkdv"]
    launch.constants |= {"BLOCK_M": 128, "BLOCK_N": 128}
    return compile_launch(launch, "wide", arch)
