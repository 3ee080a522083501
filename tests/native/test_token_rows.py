"""qk_norm_rope and adaln of the compiled core: instruction sets, threads, tails, strides.

Their values are held to the references in tests/ops.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from afd_kernels import native
from afd_kernels.adaln import native_impl as adaln
from afd_kernels.qk_norm_rope import native_impl as qk_norm_rope
from tests.native.test_loops import DTYPES, threads

pytestmark = pytest.mark.skipif(native.why_missing() is not None, reason=str(native.why_missing()))

Results = tuple[Tensor, ...]
# Streams, tokens, heads, head width: tails of every kind, and enough for several pieces.
SHAPES = [(2, 6, 1, 2), (2, 12, 3, 10), (1, 6, 2, 40), (3, 42, 4, 32), (2, 390, 2, 64)]


def _qk_norm_rope(
    shape: tuple[int, int, int, int], dtype: torch.dtype
) -> list[Callable[[], Results]]:
    make = torch.Generator().manual_seed(3)
    batch, tokens, heads, width = shape

    def draw(*sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=make).to(dtype)

    q, k, v = draw(batch, tokens, 3, heads, width).unbind(2)
    grads = draw(batch, 2, tokens, heads, width).unbind(1)
    weights = draw(heads * width), draw(heads * width)
    angle = 9 * torch.rand(batch, tokens, width // 2, generator=make)
    rope = torch.stack((angle.cos(), angle.sin()), -1)

    def append() -> Results:
        caches = [torch.zeros(batch, tokens + 6, heads, width, dtype=dtype) for _ in range(2)]
        position = 5 * torch.arange(batch)
        out = qk_norm_rope.qk_norm_rope_append_(
            q, k, v, *weights, rope, *caches, position, 3, 1, 1e-6
        )
        return out, *caches

    return [
        lambda: qk_norm_rope.qk_norm_rope(q, k, *weights, rope, 1e-6),
        lambda: qk_norm_rope.qk_norm_rope_bwd(*grads, q, k, *weights, rope, 1e-6),
        append,
    ]


def _adaln(shape: tuple[int, int, int, int], dtype: torch.dtype) -> list[Callable[[], Results]]:
    make = torch.Generator().manual_seed(4)
    batch, tokens, heads, width = shape
    channels = heads * width

    def draw(*sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=make).to(dtype)

    x, branch, grad, grad_h = draw(batch, tokens, 4, channels).unbind(2)
    gate, scale, shift = draw(batch, 3, 3, channels).unbind(2)
    calls: list[Callable[[], Results]] = []
    for one_scale, one_shift, offset in (
        (scale, shift, 1.0),
        (scale[:1], shift[:1], 1.0),
        (scale[:1, :1], shift[:1, :1], 0.0),
    ):
        arguments = (branch, gate, one_scale)
        calls += [
            lambda a=arguments, s=one_shift, o=offset: adaln.adaln(x, *a, s, o, 1e-6),
            lambda a=arguments, o=offset: adaln.adaln_bwd(grad, grad_h, x, *a, o, 1e-6),
            lambda a=arguments, o=offset: adaln.adaln_bwd(None, grad_h, x, None, None, a[2], o, 1),
        ]
    return calls


def _assert_same(got: Results, expected: Results) -> None:
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("isa", native.isas())
@pytest.mark.parametrize("op", [_qk_norm_rope, _adaln])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_instruction_set_gives_the_same_rows(isa, op, dtype):
    for shape in SHAPES:
        for call in op(shape, dtype):
            expected = call()
            with native.use_isa(isa):
                _assert_same(call(), expected)


@pytest.mark.parametrize("op", [_qk_norm_rope, _adaln])
@pytest.mark.parametrize("dtype", DTYPES)
def test_one_thread_and_three_threads_give_the_same_rows(op, dtype):
    for call in op(SHAPES[-1], dtype):
        with threads(1):
            expected = call()
        for count in (2, 3):
            with threads(count):
                for _ in range(3):
                    _assert_same(call(), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_large_results_that_bypass_the_caches_hold_the_same_numbers(dtype):
    # 33 MiB or more per result; tokens are independent, so a part of them gives the same rows.
    tokens = 2 * 8652 if dtype == torch.float32 else 4 * 8652
    make = torch.Generator().manual_seed(6)
    x, branch = torch.randn(2, 1, tokens, 512, generator=make).to(dtype)
    scale, shift = torch.randn(2, 1, 1, 512, generator=make)
    whole = adaln.adaln(x, branch, None, scale, shift, 1.0, 1e-6)
    part = adaln.adaln(x[:, -100:], branch[:, -100:], None, scale, shift, 1.0, 1e-6)
    _assert_same(tuple(y[:, -100:] for y in whole), part)
    q, k = x.unflatten(-1, (4, 128)), branch.unflatten(-1, (4, 128))
    weight, rope = torch.ones(512), torch.rand(1, tokens, 64, 2, generator=make)
    whole = qk_norm_rope.qk_norm_rope(q, k, weight, weight, rope, 1e-6)
    part = qk_norm_rope.qk_norm_rope(
        q[:, -100:], k[:, -100:], weight, weight, rope[:, -100:].contiguous(), 1e-6
    )
    _assert_same(tuple(y[:, -100:] for y in whole), part)
