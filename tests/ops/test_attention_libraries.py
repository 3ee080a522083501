"""block_attention's library path: how intervals become calls, who answers them, how they merge."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from torch._subclasses.fake_tensor import FakeTensorMode

from afd import ops
from afd.ops import Intervals, intervals
from afd_kernels import dispatch, plans
from afd_kernels.block_attention import library_cuda, library_impl
from tests.ops.test_block_attention import (
    FEW,
    HALVES,
    OP,
    Case,
    assert_lse,
    attend,
    oracle,
    random_rows,
)
from tests.tolerances import assert_attention


@pytest.fixture(autouse=True)
def _library() -> Iterator[None]:
    with ops.use_backend("library", OP):
        yield


def test_merging_equals_attention_over_both() -> None:
    case = Case("both", intervals.cache(11, 5))
    q, k, v = (x.detach() for x in case.tensors())
    whole, whole_lse = attend(case, [q, k, v])
    out, lse = attend(Case("a", intervals.cache(4, 5)), [q, k[:, :4], v[:, :4]])
    rest = attend(Case("b", intervals.cache(7, 5)), [q, k[:, 4:], v[:, 4:]])
    library_impl.merge_(out, lse, *rest)
    assert_attention(out, whole.double())
    assert_lse(lse, whole_lse.double())


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_merging_with_nothing_changes_nothing(dtype: torch.dtype) -> None:
    out, lse = torch.randn(1, 3, 2, 8).to(dtype), torch.randn(1, 2, 3)
    none, minus = torch.zeros_like(out), torch.full_like(lse, -torch.inf)
    kept, kept_lse = out.clone(), lse.clone()
    library_impl.merge_(kept, kept_lse, none, minus)
    assert torch.equal(kept, out)
    assert torch.equal(kept_lse, lse)
    other, other_lse = none.clone(), minus.clone()
    library_impl.merge_(other, other_lse, out, lse)
    assert torch.equal(other, out)
    assert torch.equal(other_lse, lse)
    library_impl.merge_(none, minus, torch.zeros_like(out), torch.full_like(lse, -torch.inf))
    assert not none.any()
    assert (minus == -torch.inf).all()


def test_merging_bears_any_size_of_lse() -> None:
    out, lse = torch.ones(1, 1, 1, 8), torch.full((1, 1, 1), 1e4)
    library_impl.merge_(out, lse, torch.zeros(1, 1, 1, 8), torch.full((1, 1, 1), -1e4))
    assert torch.equal(out, torch.ones(1, 1, 1, 8))
    assert lse.item() == 1e4


def test_blocks_of_equal_size_are_one_call() -> None:
    (rows,) = intervals.teacher_forcing(8, 2, 5).rows
    work = library_impl.plan(rows, 0, True)
    (selves,) = work.second
    assert (selves.blocks, selves.queries, selves.keys, selves.step) == (3, 10, 10, 10)
    assert len(library_impl.plan(rows, 0, False).second) == 3


def test_a_backward_goes_by_keys_where_that_takes_no_more_calls() -> None:
    (rows,) = intervals.causal(6, 2, 5).rows
    work = library_impl.plan(rows, 0, True)
    runs = [(part.q0, part.queries, part.k0, part.keys) for part in work.backward(True, False)]
    assert runs == [(0, 30, 0, 10), (10, 20, 10, 10), (20, 10, 20, 10)]
    assert work.backward(False, False) == [*work.first, *work.second]
    (rows,) = intervals.teacher_forcing(8, 2, 5).rows
    work = library_impl.plan(rows, 0, True)
    assert len(work.by_keys) > len(work.backward(True, False)) == len(work.first) + 1


@settings(max_examples=60, deadline=None)
@given(drawn=random_rows())
def test_by_keys_or_by_rows_the_pairs_are_the_same(drawn: tuple[int, int, Intervals]) -> None:
    _, border, case = drawn
    for stream, mask in zip(case.rows, case.mask(case.keys).long(), strict=True):
        work = library_impl.plan(stream, border, False)
        for parts in ((*work.first, *work.second), work.by_keys):
            counted = torch.zeros_like(mask)
            for part in parts:
                low = part.k0 + (0 if part.context else border)
                counted[part.q0 : part.q0 + part.queries, low : low + part.keys] += 1
            assert torch.equal(counted, mask)


def test_joined_calls_answer_as_single_ones() -> None:
    case = Case("joined", intervals.windowed(9, 1, 5, window=3, sink=1))
    two = Case("single", case.intervals, batch=2)
    tensors = case.tensors()
    doubled = [x.detach().expand(2, -1, -1, -1).clone().requires_grad_() for x in tensors]
    out, both = attend(case, tensors)[0], attend(two, doubled)[0]
    assert torch.allclose(both[:1], out, atol=1e-6)
    grads = torch.autograd.grad(out.square().sum(), tensors)
    twice = torch.autograd.grad(both.square().sum(), doubled)
    for one, pair in zip(grads, twice, strict=True):
        assert torch.allclose(pair[:1], one, atol=1e-5)


def test_on_cuda_each_library_says_why_not() -> None:
    assert "not a multiple of 8" in str(library_cuda.reasons(9, 36)["cuDNN"])
    assert "not for compute capability 8.x" in str(library_cuda.reasons(8, 64)["cuDNN"])
    assert "is not deterministic" in str(library_cuda.reasons(9, 64, backward=True)["cuDNN"])
    refusal = str(library_cuda.refuse({torch.float32}))
    # The fixture `place` knows these words.
    assert refusal == "attention libraries on CUDA take bfloat16 and float16, not float32"


def test_views_that_do_not_begin_at_16_bytes_are_not_given_to_a_library(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of tensors on the CPU, whose addresses and strides are as true as a GPU's."""
    monkeypatch.setattr(library_cuda, "major", lambda device=None: 9)
    monkeypatch.setattr(library_cuda, "first", lambda number, width: width % 8 == 0 or None)
    room = torch.zeros(2, 9, 3, 72, dtype=torch.bfloat16)
    whole = room[..., :64]
    fused = torch.zeros(2, 9, 3 * 3 * 64, dtype=torch.bfloat16).unflatten(2, (9, 64))[:, :, 3:6]
    alone = torch.zeros(1, 9, 1, 67, dtype=torch.bfloat16).as_strided((1, 9, 1, 64), (7, 64, 5, 1))
    for fits in (whole, whole[:, 3:], whole.expand(2, -1, -1, -1), fused, whole[:, :0], alone):
        assert library_cuda.unfit([whole, fits]) is None
    odd_rows = torch.zeros(2, 9, 3, 67, dtype=torch.bfloat16)[..., :64]
    for misfit in (room[..., 4:68], odd_rows):
        assert "multiples of 16 bytes" in str(library_cuda.unfit([whole, misfit]))
    assert "heads of 36 channels" in str(library_cuda.unfit([whole[..., :36]]))


def test_what_no_library_can_take_goes_to_the_next_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    case = FEW[0]
    tensors = case.tensors()
    expected, _ = attend(case, tensors)
    monkeypatch.setattr(library_impl, "unfit", lambda tensors: f"{len(tensors)} tensors")
    plans.clear()
    assert ops.explain(OP, "cpu", {torch.float32})["library"] is None
    assert ops.explain(OP, "cpu", {torch.float32}, tensors)["library"] == "3 tensors"
    with pytest.raises(RuntimeError, match=r"'library' was requested.*library: 3 tensors"):
        attend(case, tensors)
    dispatch._requested.set(())
    assert_attention(attend(case, tensors)[0].detach(), expected.detach().double())
    wide = torch.zeros(1, 2, 1, 136)
    assert "at most 128" in str(ops.explain(OP, "cpu", {torch.float32}, [wide])["triton"])


@pytest.mark.parametrize("forward", [library_cuda.cudnn, library_cuda.aten_flash])
def test_calls_into_pytorch_fit_its_schemas(forward: Callable[..., Any]) -> None:
    """On fake CUDA tensors: arguments, shapes, layouts; numbers need a GPU."""
    with FakeTensorMode():
        q, k, v = (
            torch.empty(2, n, 3, 64, device="cuda", dtype=torch.bfloat16) for n in (12, 20, 20)
        )
        out, lse = forward(q, k, v, 0.125)
        assert (out.shape, out.is_contiguous()) == (q.shape, True)
        assert (lse.shape, lse.dtype) == ((2, 3, 12), torch.float32)
        grads = library_cuda.AtenFlash().backward(out, q, k, v, out, lse, 0.125, True)
        for x, grad in zip((q, k, v), grads, strict=True):
            assert (grad.shape, grad.is_contiguous()) == (x.shape, True)
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize("library", library_cuda.ORDER[:2], ids=lambda x: x.name)
def test_a_library_of_another_version_is_passed_over(
    monkeypatch: pytest.MonkeyPatch, library: Any
) -> None:
    fits = SimpleNamespace(**{name: lambda *args, **kwargs: None for name in library.calls})
    older = SimpleNamespace(**{name: lambda q, k, v, more: None for name in library.calls})
    for module, reason in (
        (fits, None),
        (older, "incompatible version"),
        (object(), "no attribute"),
    ):
        monkeypatch.setattr(library_cuda, "_import", lambda name, found=module: (found, None))
        said = library.missing()
        assert said is None if reason is None else reason in said
    monkeypatch.setattr(library_cuda, "_import", lambda name: (None, "not installed"))
    assert library.missing() == "not installed"


def _first_version(q: torch.Tensor, deterministic: bool) -> None:
    assert deterministic is False, "bwd deterministic only supported for sm100/sm110 for now"


def _later_version(q: torch.Tensor, deterministic: bool) -> None: ...


def test_a_version_of_flash_attention_4_is_known_by_what_its_backward_asserts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    flash4 = library_cuda.Flash4()
    for backward, fixed in ((_first_version, False), (_later_version, True), (print, False)):
        module = SimpleNamespace(_flash_attn_bwd=backward)
        monkeypatch.setattr(library_cuda, "_import", lambda name, found=module: (found, None))
        monkeypatch.setattr(library_cuda.Flash4, "missing", lambda self: None)
        reason = library_cuda.reasons(9, 128, backward=True)["FlashAttention 4"]
        assert (reason is None) == fixed
        assert fixed or "is not deterministic on compute capability 9.x" in str(reason)
        assert not flash4.unordered(10)
        assert library_cuda.reasons(9, 128)["FlashAttention 4"] is None


def test_the_library_is_named() -> None:
    assert "aten flash for CPU" in ops.report("cpu")[OP]["library"]


def test_what_would_be_tried_before_it_is_named_with_its_reason(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(library_cuda, "major", lambda device=None: 9)
    for library in library_cuda.ORDER:
        gone = None if library.name == "cuDNN" else f"no {library.name} here"
        monkeypatch.setattr(type(library), "missing", lambda self, why=gone: why)
    library_cuda.first.cache_clear()
    said = library_impl.describe("cuda", torch.bfloat16)
    library_cuda.first.cache_clear()
    assert said == (
        "forward cuDNN, backward triton; not FlashAttention 3: no FlashAttention 3 here; "
        "not FlashAttention 4: no FlashAttention 4 here"
    )


def test_on_a_gpu_the_newest_library_goes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    def runs(
        *present: type, head_dim: int = 128, keys: bool = True, major: int = 9
    ) -> tuple[str, str]:
        for library in library_cuda.ORDER:
            gone = None if type(library) in present else "absent"
            monkeypatch.setattr(type(library), "missing", lambda self, why=gone: why)
        library_cuda.first.cache_clear()
        found = (
            library_impl.pick(major, head_dim, backward=False),
            library_impl.pick(major, head_dim, backward=True, keys=keys),
        )
        library_cuda.first.cache_clear()
        return tuple(library_impl._name(x) for x in found)

    flash3, flash4, cudnn, aten, _ = (type(library) for library in library_cuda.ORDER)
    assert runs(flash3, flash4, cudnn, aten) == ("FlashAttention 3",) * 2
    monkeypatch.setattr(flash4, "unordered", lambda self, major: major == 9)
    assert runs(flash4, cudnn, aten) == ("FlashAttention 4", "triton")
    assert runs(flash4, cudnn, aten, major=10) == ("FlashAttention 4",) * 2
    monkeypatch.setattr(flash4, "unordered", lambda self, major: False)
    assert runs(flash4, cudnn, aten) == ("FlashAttention 4",) * 2
    assert runs(flash3, keys=False) == ("FlashAttention 3", "triton")
    assert runs(cudnn, aten) == ("cuDNN", "triton")
    assert runs(aten) == ("aten flash", "triton")
    assert runs(aten, head_dim=256) == ("aten flash", "aten flash")
    assert runs() == ("triton", "triton")
    assert runs(head_dim=256) == ("reference", "reference")


@pytest.mark.gpu
@pytest.mark.parametrize("library", library_cuda.ORDER, ids=lambda x: x.name)
@pytest.mark.parametrize("case", FEW, ids=str)
def test_every_library_present_equals_the_oracle(library: object, case: Case) -> None:
    tensors = [x.detach() for x in case.tensors("cuda", torch.bfloat16)]
    reason = library_cuda.reasons(library_cuda.major(), case.width)[library.name]
    if reason is not None:
        pytest.skip(reason)
    sources = library_impl._Keys(*tensors[1:3], *(tensors[3:] or (None, None)))
    scale = case.width**-0.5
    out, lse = library_impl.forward(library, tensors[0], sources, case.intervals, scale)
    wanted = [x.clone().requires_grad_() for x in tensors]
    ref, ref_lse = oracle(case, wanted)
    assert_attention(out, ref.detach())
    assert_lse(lse, ref_lse.detach(), tensors[0].dtype)
    if not hasattr(library, "backward"):
        return
    grad = torch.ones_like(out)
    arguments = (library, grad, tensors[0], sources, out, lse, case.intervals, scale)
    grads = library_impl.backward(*arguments, (True, True, True))
    again = library_impl.backward(*arguments, (True, True, True))
    expected = torch.autograd.grad(ref, wanted, grad.double())
    for got, same, x in zip(grads, again, expected, strict=False):
        assert_attention(got, x.double())
        assert torch.equal(got, same)


@pytest.mark.gpu
def test_on_a_gpu_the_choice_is_named() -> None:
    assert "forward" in library_impl.describe("cuda", torch.bfloat16)
