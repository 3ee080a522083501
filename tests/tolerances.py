"""The only tolerance table. A comparison is |out - ref| <= atol(dtype) * scale + rtol(dtype) |ref|.

fp32 bounds are a few ulps of fp32 arithmetic; half-precision bounds are half an ulp of the output
dtype (one rounding of an fp32 result) plus the fp32 bound. docs/NUMERICS.md explains each.
"""

from __future__ import annotations

import torch
from torch import Tensor

_EPS32 = torch.finfo(torch.float32).eps

# Elementwise results: a handful of fp32 roundings, then one rounding to the output dtype.
ELEMENTWISE_RTOL = {
    torch.float64: 1e-12,
    torch.float32: 16 * _EPS32,
    torch.bfloat16: torch.finfo(torch.bfloat16).eps,
    torch.float16: torch.finfo(torch.float16).eps,
}
# Standard normals against their float64 formula: absolute part near zero crossings.
NORMAL_ATOL = 4e-7
NORMAL_RTOL = 4 * _EPS32
# Means over thousands of fp32 terms summed in fp64.
REDUCTION_RTOL = {torch.float64: 1e-10, torch.float32: 1e-6}

# Attention: root mean square error over that of the answer (or over 0.1, where inputs of size 1
# cancel); a rounding per output, per probability and per merge, as ELEMENTWISE_RTOL counts them.
ATTENTION_RTOL = ELEMENTWISE_RTOL
ATTENTION_FLOOR = 0.1
# Its LSE is float32 whatever the inputs, absolute, for scores of a few units; with half-precision
# inputs libraries approximate the exponential (PyTorch's CPU kernel by 4e-5).
ATTENTION_LSE = {torch.float32: 1e-5, torch.bfloat16: 1e-4, torch.float16: 1e-4}

# Relative L2 error of a whole float32 network against the released code's float32 values.
NETWORK_FORWARD = 1e-5
NETWORK_GRADIENT = 1e-4
# A float64 network against golden values that were rounded to float32, relative L2.
NETWORK_FLOAT64 = 5e-7
# A bfloat16 network against float32, relative L2: every weight and activation is rounded to 2^-9.
NETWORK_BFLOAT16 = 2e-2
# The same float32 network evaluated in another order (streamed, split, batched): elementwise.
NETWORK_REORDERED = {"rtol": 1e-4, "atol": 1e-5}

# One update's gradient (relative L2) and metrics made of other pieces: float32 sums, reordered.
ACCUMULATED = 1e-5

# The same run by another number of processes, after a few updates: sums in another order.
DISTRIBUTED = {"rtol": 1e-4, "atol": 1e-8}

# VideoAlign's rating of one video beside two prompts that it cannot see: only padding differs.
VIDEOALIGN_SAME = 1e-6

# The specification states counted work to three digits; ours may differ in the third.
COUNTED_TO_THREE_DIGITS = 2e-3
# Counted against a formula fitted to the same count: only float rounding of per-pixel rates.
EXACT_COUNT = 1e-9
# A plan leaves out embeddings, the head and the prompt's keys, and with LoRA the first layer's
# missing input gradients: together up to 1.3 % of the operations of two layers at 480 x 832.
PLANNED_WORK = 1.5e-2
# What autograd keeps of a layer differs a little by backend and by LoRA; a plan needs no more.
ACTIVATION_ESTIMATE = 0.2


def assert_elementwise(out: Tensor, ref: Tensor, scale: float = 1.0) -> None:
    """Asserts |out - ref| <= tol (|ref| + scale) with the tolerance of out's dtype."""
    assert out.shape == ref.shape
    tol = ELEMENTWISE_RTOL[out.dtype]
    error = (out.double() - ref.double()).abs() - tol * ref.double().abs()
    worst = error.max().item()
    floor = min(tol, 16 * _EPS32) * scale
    assert worst <= floor, f"worst excess error {worst:.3g} > {floor:.3g} ({out.dtype})"


def assert_normal(out: Tensor, ref: Tensor) -> None:
    """Asserts that normals equal their float64 formula to the last few ulps."""
    error = (out.double() - ref.double()).abs() - NORMAL_RTOL * ref.double().abs()
    assert error.max().item() <= NORMAL_ATOL


def assert_attention(out: Tensor, ref: Tensor, floor: float = ATTENTION_FLOOR) -> None:
    """Asserts that attention's output or a gradient of it equals the float64 one by its rms."""
    assert out.shape == ref.shape
    if ref.numel() == 0:
        return
    error, size = out.double() - ref.double(), ref.double().square().mean().sqrt().item()
    worst = error.square().mean().sqrt().item() / max(size, floor)
    assert worst <= ATTENTION_RTOL[out.dtype], f"relative rms error {worst:.3g} ({out.dtype})"


def assert_reduced(out: Tensor, ref: Tensor, wide: torch.dtype = torch.float32) -> None:
    """Asserts that reduced scalars agree to REDUCTION_RTOL of the arithmetic dtype."""
    torch.testing.assert_close(
        out.double(), ref.double(), rtol=REDUCTION_RTOL[wide], atol=1e-12, equal_nan=False
    )
