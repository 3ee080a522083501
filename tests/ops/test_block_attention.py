"""block_attention on every backend: a dense float64 softmax over the intervals' mask is the oracle.

Letters: B streams, L queries, N keys, h heads, d channels of a head.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from afd import ops
from afd.ops import Intervals, intervals, use_backend
from afd_kernels.block_attention import reference
from afd_kernels.block_attention.contract import AttentionInputs, rowwise
from tests.tolerances import ATTENTION_FLOOR, ATTENTION_LSE, assert_attention

Place = tuple[str, str]

OP = "block_attention"


@dataclass(frozen=True)
class Case:
    """Intervals and the shape around them; `context` keys come from tensors of their own."""

    name: str
    intervals: Intervals
    width: int = 32
    heads: int = 2
    batch: int = 1
    context: int = 0
    spare: int = 0  # keys that are not attended

    def tensors(
        self, device: str = "cpu", dtype: torch.dtype = torch.float32, seed: int = 0
    ) -> list[Tensor]:
        """q, k, v and, with a context, k_context, v_context."""
        keys = max(self.intervals.keys - self.context, 1) + self.spare
        lengths = [self.intervals.queries, keys, keys, *[self.context] * (2 * bool(self.context))]
        g = torch.Generator().manual_seed(seed)
        shapes = [(self.batch, n, self.heads, self.width) for n in lengths]
        made = [torch.randn(shape, generator=g).to(device, dtype) for shape in shapes]
        return [x.requires_grad_() for x in made]

    def __str__(self) -> str:
        return self.name


HOLES = Intervals((((0, 4, 0, 3, 5, 9), (4, 6, 0, 0, 0, 0), (6, 9, 2, 9, 0, 0)),))
CASES = [
    Case("causal", intervals.causal(6, 3, 5), width=40, heads=3, batch=2),
    Case("causal_one_token", intervals.causal(5, 2, 1), width=8),
    Case("causal_first_frame_alone", intervals.causal(7, 3, 12, independent_first_frame=True)),
    Case("causal_window", intervals.causal(8, 2, 5, window=3), width=16, batch=2),
    Case("windowed", intervals.windowed(8, 2, 5, window=5, sink=2), width=64),
    Case("windowed_no_sink", intervals.windowed(7, 3, 1, window=4), width=24, batch=3),
    Case("windowed_odd", intervals.windowed(9, 3, 5, window=7, sink=1), batch=2, heads=1),
    Case("teacher_forcing", intervals.teacher_forcing(4, 2, 5), width=128),
    Case("noisy_half", intervals.noisy_half(6, 3, 5), width=48, batch=2),
    Case("noisy_half_context", intervals.noisy_half(6, 2, 5), context=30, batch=2),
    Case("cache", intervals.cache(13, 7), width=72, batch=2, spare=6),
    Case("cache_unequal", intervals.cache([3, 17, 9], 6), batch=3, spare=1),
    Case("cache_empty", intervals.cache([0, 4], 5), batch=2),
    Case("after_context", intervals.after_context(9, 7), width=80, context=9, batch=2),
    Case(
        "unequal_context",
        Intervals((((0, 5, 0, 8, 8, 11),), ((0, 3, 2, 7, 9, 11), (3, 5, 0, 0, 0, 0)))),
        batch=2,
        context=8,
    ),
    Case("holes", HOLES, width=96, heads=3),
    Case("long_frames", intervals.causal(3, 1, 48), width=64, heads=1),
]
FEW = [c for c in CASES if c.name in ("causal", "windowed", "noisy_half_context", "holes")]
HALVES = [torch.bfloat16, torch.float16]


def attend(case: Case, tensors: list[Tensor]) -> tuple[Tensor, Tensor]:
    """The op on the tensors of a case."""
    q, k, v, *context = tensors
    names = dict(zip(("k_context", "v_context"), context, strict=False))
    return ops.block_attention(q, k, v, case.intervals, **names)


def oracle(case: Case, tensors: list[Tensor]) -> tuple[Tensor, Tensor]:
    """out and lse by an explicit mask in float64; differentiable. Shares nothing with the ops."""
    q, k, v, *context = (x.double() for x in tensors)
    if context:
        k, v = torch.cat((context[0], k), 1), torch.cat((context[1], v), 1)
    mask = case.intervals.mask(k.shape[1], q.device)[:, None]
    scores = torch.einsum("blhd,bnhd->bhln", q, k) / q.shape[-1] ** 0.5
    seen = mask.any(-1, keepdim=True)
    scores = scores.masked_fill(~mask & seen, -torch.inf)
    out = torch.einsum("bhln,bnhd->blhd", scores.softmax(-1) * seen, v)
    lse = scores.logsumexp(-1).masked_fill(~seen.squeeze(-1), -torch.inf)
    return out, lse


def assert_lse(lse: Tensor, ref: Tensor, inputs: torch.dtype = torch.float32) -> None:
    assert lse.dtype == torch.float32
    assert torch.equal(lse.isinf(), ref.isinf())
    seen = ~ref.isinf()
    assert ((lse[seen].double() - ref[seen]).abs() <= ATTENTION_LSE[inputs]).all()


def check(case: Case, tensors: list[Tensor], floor: float = ATTENTION_FLOOR) -> None:
    """Output, LSE and every gradient against the oracle's."""
    out, lse = attend(case, tensors)
    ref, ref_lse = oracle(case, tensors)
    assert (out.dtype, out.is_contiguous()) == (tensors[0].dtype, True)
    assert_attention(out.detach(), ref.detach())
    assert_lse(lse, ref_lse.detach(), tensors[0].dtype)
    g = torch.Generator().manual_seed(1)
    grad = torch.randn(out.shape, generator=g).to(out.device, out.dtype)
    grads = torch.autograd.grad(out, tensors, grad)
    refs = torch.autograd.grad(ref, tensors, grad.double())
    for got, expected in zip(grads, refs, strict=True):
        assert_attention(got, expected, floor)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_a_dense_softmax_in_float64(place: Place, case: Case) -> None:
    check(case, case.tensors(place[1]))


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("case", FEW, ids=str)
def test_half_precision_rounds_and_no_more(place: Place, case: Case, dtype: torch.dtype) -> None:
    check(case, case.tensors(place[1], dtype))


@pytest.mark.parametrize("case", FEW, ids=str)
def test_only_gradients_that_are_needed_are_made(place: Place, case: Case) -> None:
    tensors = case.tensors(place[1])
    out, lse = attend(case, tensors)
    assert not lse.requires_grad
    whole = torch.autograd.grad(out, tensors, torch.ones_like(out))
    names = ["q", "keys", *["context"] * (len(tensors) > 3)]
    for wanted in names:
        kept = [
            x.detach().requires_grad_(("q", "keys", "keys", "context", "context")[i] == wanted)
            for i, x in enumerate(tensors)
        ]
        ones = torch.ones_like(out)
        attend(case, kept)[0].backward(ones)
        for x, full in zip(kept, whole, strict=True):
            assert (x.grad is not None) == x.requires_grad
            if x.grad is not None:
                assert_attention(x.grad, full.double())


def test_long_contexts_without_gradient_give_dq_alone(place: Place) -> None:
    """More keys and queries than one tile of the CPU's path for dq alone."""
    if place[0] == "triton" and place[1] == "cpu":
        pytest.skip("too long for the interpreter")
    case = Case("long", intervals.windowed(3, 1, 270, window=2, sink=1), width=16, batch=2)
    tensors = case.tensors(place[1])
    (dq,) = torch.autograd.grad(attend(case, tensors)[0].square().sum(), tensors[:1])
    (expected,) = torch.autograd.grad(oracle(case, tensors)[0].square().sum(), tensors[:1])
    assert_attention(dq, expected.double())


@pytest.mark.parametrize("context", [False, True])
def test_slices_of_fused_projections_and_caches_are_used_where_they_lie(
    place: Place, context: bool
) -> None:
    g = torch.Generator().manual_seed(0)
    fused = torch.randn(2, 6, 3, 2, 32, generator=g).to(place[1]).requires_grad_()
    cache = torch.randn(2, 20, 2, 2, 32, generator=g).to(place[1]).requires_grad_()
    q, k, v = fused.unbind(2)
    past = [x[:, 4:13] for x in cache.unbind(2)] if context else []
    case = Case("slices", intervals.after_context(9 if context else 0, 6), context=9)
    given = [q, k, v, *past]
    assert all(rowwise(x) is x for x in given)
    out, lse = attend(case, given)
    alone, alone_lse = attend(case, [x.contiguous() for x in given])
    assert torch.equal(out, alone)
    assert torch.equal(lse, alone_lse)
    wanted = [fused, *[cache] * context]
    grads = torch.autograd.grad(out, wanted, torch.ones_like(out))
    for got, want in zip(
        grads, torch.autograd.grad(oracle(case, given)[0].sum(), wanted), strict=True
    ):
        assert_attention(got, want.double())


def test_channels_apart_in_memory_are_gathered(place: Place) -> None:
    case = CASES[1]
    tensors = case.tensors(place[1])
    moved = [x.transpose(1, 3).contiguous().transpose(1, 3) for x in tensors]
    assert all(rowwise(x) is not x for x in moved)
    assert torch.equal(attend(case, moved)[0], attend(case, tensors)[0])


@pytest.mark.parametrize("case", FEW[1:3], ids=str)
def test_expanded_and_sliced_incoming_gradients(place: Place, case: Case) -> None:
    tensors = case.tensors(place[1])
    out, _ = attend(case, tensors)
    ref, _ = oracle(case, tensors)
    shape = out.shape
    g = torch.Generator().manual_seed(1)
    for grad in (
        torch.ones(()).expand(shape),
        torch.randn(shape[0], 1, 1, shape[3], generator=g).expand(shape),
        torch.randn(*shape[:3], 2 * shape[3], generator=g)[..., ::2],
        torch.randn(shape[0], shape[2], shape[1], shape[3], generator=g).transpose(1, 2),
    ):
        grad = grad.to(place[1])
        got = torch.autograd.grad(out, tensors, grad, retain_graph=True)
        expected = torch.autograd.grad(ref, tensors, grad.double(), retain_graph=True)
        for x, y in zip(got, expected, strict=True):
            assert_attention(x, y)


def test_keys_shared_by_all_streams_are_not_repeated(place: Place) -> None:
    case = Case("shared", intervals.cache(7, 3), batch=3)
    q, k, v = case.tensors(place[1])
    shared = [x[:1].expand_as(x) for x in (k, v)]
    assert all(rowwise(x) is x for x in shared)
    out, _ = attend(case, [q, *shared])
    assert_attention(out.detach(), oracle(case, [q, *shared])[0].detach())


@pytest.mark.parametrize("case", FEW, ids=str)
def test_two_runs_return_the_same_bits(place: Place, case: Case) -> None:
    def run() -> list[Tensor]:
        tensors = case.tensors(place[1])
        out, lse = attend(case, tensors)
        return [out, lse, *torch.autograd.grad(out.square().sum(), tensors)]

    for a, b in zip(run(), run(), strict=True):
        assert torch.equal(a, b)


def test_keys_that_nobody_attends_may_hold_anything(place: Place) -> None:
    """As the slots of a cache do that were never written."""
    case = Case("spare", intervals.cache([3, 5], 4), batch=2, spare=3)
    clean = case.tensors(place[1])
    dirty = [x.detach().clone() for x in clean]
    for x in dirty[1:]:
        x[:, 5:] = torch.nan
    dirty = [x.requires_grad_() for x in dirty]
    for one, other in zip(attend(case, clean), attend(case, dirty), strict=True):
        assert torch.equal(one, other)
    grads, others = (
        torch.autograd.grad(attend(case, x)[0].square().sum(), x) for x in (clean, dirty)
    )
    for grad, other in zip(grads, others, strict=True):
        assert torch.equal(grad, other)


def test_queries_without_keys_are_zero_and_leave_no_nan(place: Place) -> None:
    case = Case("none", intervals.cache(0, 3), batch=2)
    tensors = case.tensors(place[1])
    out, lse = attend(case, tensors)
    assert torch.equal(out, torch.zeros_like(out))
    assert (lse == -torch.inf).all()
    for grad in torch.autograd.grad(out.sum(), tensors):
        assert torch.equal(grad, torch.zeros_like(grad))


def test_no_keys_at_all_can_be_given(place: Place) -> None:
    q, empty = torch.randn(1, 3, 2, 32).to(place[1]), torch.empty(1, 0, 2, 32).to(place[1])
    context = torch.randn(1, 4, 2, 32).to(place[1])
    out, _ = ops.block_attention(
        q, empty, empty, intervals.cache(4, 3), k_context=context, v_context=context
    )
    alone, _ = ops.block_attention(q, context, context, intervals.cache(4, 3))
    assert torch.equal(out, alone)


def test_large_scores_do_not_overflow(place: Place) -> None:
    case = CASES[4]
    q, k, v = (x.detach() for x in case.tensors(place[1]))
    out, lse = attend(case, [100 * q, 100 * k, v])
    _, ref_lse = oracle(case, [100 * q, 100 * k, v])
    assert torch.allclose(lse.double(), ref_lse, rtol=1e-6)
    assert out.isfinite().all()


def test_the_scale_is_what_is_asked_for(place: Place) -> None:
    case = CASES[0]
    q, k, v = case.tensors(place[1])
    factor = 3.0 * case.width**-0.5
    scaled, _ = ops.block_attention(q, k, v, case.intervals, scale=factor)
    assert_attention(scaled.detach(), oracle(case, [3 * q, k, v])[0].detach())


def test_double_backward_is_refused(place: Place) -> None:
    case = CASES[1]
    tensors = case.tensors(place[1])
    out, _ = attend(case, tensors)
    grad = torch.ones_like(out, requires_grad=True)
    (first,) = torch.autograd.grad(out, tensors[:1], grad, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        first.sum().backward()


@pytest.mark.parametrize("name", ["causal_one_token", "unequal_context", "cache_empty"])
def test_gradcheck_in_double(name: str) -> None:
    (case,) = [c for c in CASES if c.name == name]
    tensors = [x.detach()[..., :3].requires_grad_() for x in case.tensors(dtype=torch.float64)]
    assert torch.autograd.gradcheck(lambda *x: attend(case, list(x))[0], tensors)


def test_the_reference_is_twice_differentiable() -> None:
    tensors = [torch.randn(1, 3, 1, 2, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    rows = Intervals((((0, 2, 0, 1, 2, 3), (2, 3, 0, 0, 0, 0)),))

    def out(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return reference.block_attention(AttentionInputs(q, k, v), rows, 0.7)[0]

    assert torch.autograd.gradgradcheck(out, tensors)


@st.composite
def random_rows(draw: st.DrawFn) -> tuple[int, int, Intervals]:
    """Keys, border of the context and rows in which no interval crosses it."""
    keys, border = draw(st.integers(1, 12)), draw(st.integers(0, 6))
    streams = []
    lengths = draw(st.lists(st.integers(1, 4), min_size=1, max_size=4))
    for _ in range(draw(st.integers(1, 2))):
        rows, start = [], 0
        for length in lengths:
            ends = sorted(draw(st.lists(st.integers(0, border + keys), min_size=4, max_size=4)))
            found = [(a, b) for a, b in (ends[:2], ends[2:]) if a < b and not a < border < b]
            found += [(0, 0)] * (2 - len(found))
            rows.append((start, start + length, *found[0], *found[1]))
            start += length
        streams.append(tuple(rows))
    return keys, border, Intervals(tuple(streams))


@settings(max_examples=60, deadline=None)
@given(drawn=random_rows(), seed=st.integers(0, 99))
@pytest.mark.parametrize("backend", ["library", "reference"])
def test_any_intervals(backend: str, drawn: tuple[int, int, Intervals], seed: int) -> None:
    keys, border, rows = drawn
    spare = keys - max(rows.keys - border, 1)
    case = Case("drawn", rows, width=8, batch=rows.streams, context=border, spare=max(spare, 0))
    with use_backend(backend):
        # One key, and the gradient of its score is a difference of numbers of size 1 that is 0.
        check(case, case.tensors(seed=seed), floor=1.0)


def test_flex_attention_agrees() -> None:
    """A second oracle: PyTorch's own block-masked attention, uncompiled."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    case = Case("flex", intervals.teacher_forcing(4, 2, 16), batch=2)
    q, k, v = (x.detach().transpose(1, 2) for x in case.tensors())
    mask = case.intervals.mask(128)[0]
    blocks = create_block_mask(lambda b, h, i, j: mask[i, j], None, None, 128, 128, device="cpu")
    expected = flex_attention(q, k, v, block_mask=blocks).transpose(1, 2)
    assert_attention(attend(case, case.tensors())[0].detach(), expected.double())


def test_bad_input_names_the_argument() -> None:
    q = torch.randn(2, 6, 2, 32)
    rows = intervals.causal(3, 1, 2)
    for args, kwargs, needle in (
        ((q[0], q, q, rows), {}, r"q: got float32 \[6, 2, 32\]"),
        ((q.long(), q, q, rows), {}, "q: got int64"),
        (
            (q, q[:1], q, rows),
            {},
            r"k: got float32 \[1, 6, 2, 32\] on cpu; needed: \[2, N, 2, 32\]",
        ),
        ((q, q, q[:, :5], rows), {}, "v: got .*needed: the shape of k"),
        ((q, q.half(), q.half(), rows), {}, "k: got float16 .*needed: the dtype of q"),
        ((q, q, q, intervals.causal(4, 1, 2)), {}, "intervals: got 'rows for 8 queries'"),
        (
            (q, q, q, intervals.cache([1, 1, 1], 6)),
            {},
            "intervals: got '3 streams'; needed: 1 or 2",
        ),
        ((q, q, q, intervals.cache(7, 6)), {}, "intervals: got .*needed: keys below 6"),
        ((q, q, q, rows), {"k_context": q}, "k_context, v_context: got only k_context"),
        ((q, q, q, rows), {"k_context": q, "v_context": q[:, :4]}, "v_context: got"),
        (
            (q, q, q, intervals.cache(8, 6)),
            {"k_context": q, "v_context": q},
            "intervals: got .*needed: no interval across key 6",
        ),
        ((q, q, q, rows), {"scale": 0.0}, "scale: got 0.0"),
        ((q, q, q, rows), {"scale": float("nan")}, "scale: got nan"),
    ):
        with pytest.raises(ValueError, match=needle):
            ops.block_attention(*args, **kwargs)


def test_float64_goes_to_the_reference() -> None:
    reasons = ops.explain(OP, "cpu", {torch.float64})
    assert reasons["reference"] is None
    assert "float64" in reasons["library"]
