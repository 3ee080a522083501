"""What rule 7 of the architecture asks of block_attention: opcheck, compile, fake tensors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode

from afd import ops
from afd.ops import Intervals, intervals

Place = tuple[str, str]

OP = "block_attention"
SCALE = 32**-0.5
# Two streams of 6 queries with keys of their own, the first of [context 8 | k 6].
UNEQUAL = Intervals((((0, 6, 0, 8, 8, 14),), ((0, 6, 2, 5, 9, 14),)))
ALIKE = intervals.causal(3, 1, 2)


def tensors(device: str, strided: bool, grad: bool = True) -> tuple[Tensor, ...]:
    """q, k, v, k_context, v_context; strided ones are slices of fused projections."""
    g = torch.Generator().manual_seed(0)
    if strided:
        fused = torch.randn(2, 6, 3, 2, 32, generator=g).to(device)
        cache = torch.randn(2, 10, 2, 2, 32, generator=g).to(device)
        made = (*fused.unbind(2), *(x[:, 1:9] for x in cache.unbind(2)))
    else:
        made = tuple(torch.randn(2, n, 2, 32, generator=g).to(device) for n in (6, 6, 6, 8, 8))
    return tuple(x.detach().requires_grad_(grad) for x in made)


def arguments(name: str, device: str, strided: bool, context: bool) -> tuple[Any, ...]:
    """Positional arguments of torch.ops.afd.<name>."""
    given = tensors(device, strided, grad=name == OP)
    case = UNEQUAL if context else ALIKE
    given = given if context else (*given[:3], None, None)
    options = (case.flat(), case.streams, SCALE)
    if name == OP:
        return *given, *options
    out, lse = torch.ops.afd.block_attention(*given, *options)
    return torch.ones_like(out), *given, out, lse, *options, [True, True, context]


@pytest.mark.parametrize("context", [False, True], ids=["alone", "context"])
@pytest.mark.parametrize("strided", [False, True], ids=["contiguous", "sliced"])
@pytest.mark.parametrize("name", [OP, "block_attention_bwd"])
def test_opcheck(place: Place, name: str, strided: bool, context: bool) -> None:
    op = getattr(torch.ops.afd, name).default
    torch.library.opcheck(op, arguments(name, place[1], strided, context))


@pytest.mark.parametrize("needs", [(True, False, False), (False, True, False), (True, True, True)])
def test_the_fake_knows_what_comes_back_empty(place: Place, needs: tuple[bool, ...]) -> None:
    args = (*arguments("block_attention_bwd", place[1], False, True)[:-1], list(needs))
    real = torch.ops.afd.block_attention_bwd(*args)
    with FakeTensorMode() as mode:
        fake = torch.ops.afd.block_attention_bwd(
            *(mode.from_tensor(x) if isinstance(x, Tensor) else x for x in args)
        )
    for made, known in zip(real, fake, strict=True):
        assert (made.shape, made.dtype, made.stride()) == (known.shape, known.dtype, known.stride())
    wanted = (needs[0], needs[1], needs[1], needs[2], needs[2])
    assert [x.numel() > 0 for x in real] == list(wanted)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiles_to_one_graph_with_the_same_bits(backend: str) -> None:
    q, k, v, k_context, v_context = tensors("cpu", strided=True)

    def step(case: Intervals) -> Tensor:
        out, _ = ops.block_attention(
            q * 1, k * 1, v * 1, case, k_context=k_context, v_context=v_context
        )
        return out.square().sum()

    compiled = torch.compile(step, fullgraph=True, backend=backend)
    for case in (UNEQUAL, intervals.after_context(8, 6)):
        eager = torch.autograd.grad(step(case), (q, k, v, k_context, v_context))
        traced = torch.autograd.grad(compiled(case), (q, k, v, k_context, v_context))
        for a, b in zip(eager, traced, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("grad", [False, True], ids=["values", "gradients"])
@pytest.mark.parametrize("sliced", [True, False], ids=["cache", "context"])
def test_a_growing_cache_needs_few_graphs(sliced: bool, grad: bool) -> None:
    q, k, v = (torch.randn(1, n, 2, 16).requires_grad_(grad) for n in (4, 64, 64))
    counter = CompileCounterWithBackend("aot_eager")

    def attend(q: Tensor, k: Tensor, v: Tensor, n: int) -> Tensor:
        if sliced:
            return ops.block_attention(q, k[:, :n], v[:, :n], intervals.cache(n, q.shape[1]))[0]
        case = intervals.after_context(n - 4, 4)
        context = {"k_context": k[:, : n - 4], "v_context": v[:, : n - 4]}
        return ops.block_attention(q, k[:, -4:], v[:, -4:], case, **context)[0]

    compiled = torch.compile(attend, fullgraph=True, backend=counter, dynamic=True)
    for n in range(8, 64, 16 if grad else 4):
        eager, traced = attend(q, k, v, n), compiled(q, k, v, n)
        assert torch.equal(eager, traced)
        if grad:
            want, got = (torch.autograd.grad(x.square().sum(), (q, k, v)) for x in (eager, traced))
            assert all(map(torch.equal, want, got))
    assert counter.frame_count <= 3
    with pytest.raises(Exception, match=r"intervals: got .*; needed: keys below \d+"):
        compiled(q, k, v, 70) if sliced else compiled(q, k[:, :20], v[:, :20], 70)


def test_fake_cuda_tensors_pass_without_a_synchronisation() -> None:
    """A hidden .item() would raise DataDependentOutputException here."""
    with FakeTensorMode():
        q, k, v, k_context, v_context = (
            torch.empty(2, n, 2, 32, device="cuda", dtype=torch.bfloat16) for n in (6, 6, 6, 8, 8)
        )
        out, lse = ops.block_attention(q, k, v, UNEQUAL, k_context=k_context, v_context=v_context)
        assert (out.shape, out.dtype, out.device.type) == (q.shape, torch.bfloat16, "cuda")
        assert (lse.shape, lse.dtype) == ((2, 2, 6), torch.float32)
        grads = torch.ops.afd.block_attention_bwd(
            *(out, q, k, v, k_context, v_context, out, lse, UNEQUAL.flat(), 2, SCALE),
            [True, False, True],
        )
        assert [g.numel() for g in grads] == [q.numel(), 0, 0, *[k_context.numel()] * 2]
