"""NaN, infinities, very large and small numbers in any input of an op: float64's classes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from afd import ops
from afd_kernels import dispatch
from afd_kernels.adaln import reference as adaln_reference
from afd_kernels.block_attention import reference as attention_reference
from afd_kernels.block_attention.contract import AttentionInputs
from afd_kernels.block_attention.intervals import Intervals
from afd_kernels.qk_norm_rope import reference as rope_reference

NAN, INF = float("nan"), float("inf")
SPECIALS = (NAN, INF, -INF, 1e20, -1e20, 1e-30, 0.0)
LARGEST = torch.finfo(torch.float32).max
EPS = 1e-6

# (which input, where in it, what): a few per example.
sprinkles = st.lists(
    st.tuples(st.integers(0, 99), st.integers(0, 10**6), st.sampled_from(SPECIALS)), max_size=4
)


def backend_of(op: str, name: str) -> Any:
    reason = dispatch.explain(op, "cpu", {torch.float32})[name]
    if reason:
        pytest.skip(reason)
    with dispatch.use_backend(name, op):
        return dispatch.pick(op, torch.zeros(1, 1, 1, 1))


def sprinkle(tensors: list[Tensor], places: list[tuple[int, int, float]]) -> None:
    for which, at, value in places:
        flat = tensors[which % len(tensors)].view(-1)
        flat[at % len(flat)] = value


def classes(x: Tensor) -> Tensor:
    return x.isnan() + 2 * (x == INF) + 3 * (x == -INF)


def assert_same(name: str, got: Tensor, exact: Tensor, size: Tensor | float) -> None:
    """Equal classes and numbers, where no part of the sum (at most `size`) leaves float32."""
    held = ~(torch.as_tensor(size, dtype=torch.float64).expand_as(exact) > LARGEST / 16)
    assert torch.equal(classes(got)[held], classes(exact.float())[held]), name
    finite = held & exact.isfinite()
    error = (got.double() - exact).abs()[finite]
    bound = 1e-4 * torch.as_tensor(size, dtype=torch.float64).expand_as(exact)[finite] + 1e-5
    assert (error <= bound).all(), name


@pytest.mark.parametrize("backend", ["native", "reference"])
@given(places=sprinkles, width=st.sampled_from([16, 24]), seed=st.integers(0, 2**16))
def test_adaln(backend: str, places: list[Any], width: int, seed: int) -> None:
    module = backend_of("adaln", backend)
    generator = torch.Generator().manual_seed(seed)
    x, branch = torch.randn(2, 1, 4, width, generator=generator).unbind()
    gate, scale, shift = torch.randn(3, 1, 2, width, generator=generator).unbind()
    tensors = [x.clone(), branch.clone(), gate.clone(), scale.clone(), shift.clone()]
    sprinkle(tensors, places)
    x_out, h = module.adaln(*tensors, 1.0, EPS)
    x, branch, gate, scale, shift = (tensor.double() for tensor in tensors)
    whole = [value.repeat_interleave(2, dim=1) for value in (gate, scale, shift)]
    residual = x + whole[0] * branch
    assert_same("x_out", x_out, residual, x.abs() + (whole[0] * branch).abs())
    # From the residual that was stored: what its rounding does to a norm is not the norm's.
    _, exact = adaln_reference.residual_norm(x_out.double(), None, None, scale, shift, 1.0, EPS)
    _, normed = adaln_reference.residual_norm(
        x_out.double(), None, None, torch.zeros_like(scale), torch.zeros_like(shift), 1.0, EPS
    )
    size = (normed * (1 + whole[1])).abs() + whole[2].abs() + 1 + whole[1].abs()
    assert_same("h", h, exact, size)


@pytest.mark.parametrize("backend", ["native", "reference"])
@given(places=sprinkles, width=st.sampled_from([8, 12]), seed=st.integers(0, 2**16))
def test_qk_norm_rope_and_its_ring(backend: str, places: list[Any], width: int, seed: int) -> None:
    module = backend_of("qk_norm_rope", backend)
    generator = torch.Generator().manual_seed(seed)
    q, k, v = torch.randn(3, 1, 4, 2, width, generator=generator).unbind()
    weight_q, weight_k = torch.randn(2, 2 * width, generator=generator).unbind()
    rope = torch.randn(1, 4, width // 2, 2, generator=generator)
    caches = torch.randn(2, 1, 6, 2, width, generator=generator).unbind()
    tensors = [x.clone() for x in (q, k, v, weight_q, weight_k, rope, *caches)]
    sprinkle(tensors, places)
    q, k, v, weight_q, weight_k, rope, *caches = tensors
    before = [cache.clone() for cache in caches]
    got = module.qk_norm_rope(q, k, weight_q, weight_k, rope, EPS)
    for name, out, x, weight in (("q", got[0], q, weight_q), ("k", got[1], k, weight_k)):
        exact = rope_reference.norm_rope(x.double(), weight.double(), rope.double(), EPS)
        # What the two products of a rotation may come to, of either sign.
        most = x.double().abs(), weight.double().abs()
        turns = [rope.double().abs() * torch.tensor([1.0, sign]) for sign in (1.0, -1.0)]
        sizes = sum(rope_reference.norm_rope(*most, turn, EPS).abs() for turn in turns)
        assert_same(name, out, exact, sizes)
    q_out = module.qk_norm_rope_append_(
        q, k, v, weight_q, weight_k, rope, *caches, torch.tensor([1]), 2, 1, EPS
    )
    # Frames 1 and 2 go to the slots of frames 1 and 2; frame 0 stays, whatever it holds.
    assert torch.equal(q_out.nan_to_num(), got[0].nan_to_num())
    for cache, old, new in zip(caches, before, (got[1], v), strict=True):
        assert torch.equal(cache[:, :2].view(torch.int32), old[:, :2].view(torch.int32))
        assert torch.equal(classes(cache[:, 2:]), classes(new))
        assert torch.equal(cache[:, 2:].nan_to_num(), new.nan_to_num())


@pytest.mark.parametrize("backend", ["library", "reference"])
@given(places=sprinkles, split=st.integers(1, 4), seed=st.integers(0, 2**16))
def test_block_attention(backend: str, places: list[Any], split: int, seed: int) -> None:
    module = backend_of("block_attention", backend)
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(1, n, 2, 8, generator=generator) for n in (6, 9, 9))
    # Keys 8 on are attended by nobody; the last query has no keys.
    rows = ((0, 2, 0, split, 0, 0), (2, 5, 0, split, 5, 8), (5, 6, 0, 0, 0, 0))
    intervals = Intervals((rows,))
    tensors = [q, k, v]
    sprinkle(tensors, places)
    out, lse = module.block_attention(AttentionInputs(q, k, v), intervals, 0.25)
    wide = AttentionInputs(*(x.double() for x in tensors))
    exact, exact_lse = attention_reference.block_attention(wide, intervals, 0.25)
    # Scores that leave float32, or where rounding alone decides between keys, are float32's own.
    tame = all(abs(value) < 1e20 or value != value or abs(value) == INF for *_, value in places)
    if tame:
        assert_same("lse", lse, exact_lse, exact_lse.abs().nan_to_num(1, 1, 1) + 1)
        assert_same("out", out, exact, exact.abs().nan_to_num(1, 1, 1) + 1)
    lost = exact.isnan() & torch.tensor(tame)
    assert out[lost].isnan().all()
    assert not out[:, 5].any()
    assert (lse[..., 5] == -INF).all()


@pytest.mark.parametrize("backend", ["native", "reference"])
@given(places=sprinkles, t=st.sampled_from([0.0, 0.25, 1.0]), seed=st.integers(0, 2**16))
def test_forward_noise(backend: str, places: list[Any], t: float, seed: int) -> None:
    backend_of("forward_noise", backend)
    generator = torch.Generator().manual_seed(seed)
    x0, noise = torch.randn(2, 1, 37, generator=generator).unbind()
    tensors = [x0.clone(), noise.clone()]
    sprinkle(tensors, places)
    with dispatch.use_backend(backend, "forward_noise"):
        got = ops.forward_noise(tensors[0], torch.tensor([t]), noise=tensors[1])
    parts = (1 - t) * tensors[0].double(), t * tensors[1].double()
    assert_same("x_t", got, parts[0] + parts[1], parts[0].abs() + parts[1].abs())


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("weighting", ["x0_adaptive", "velocity"])
@given(places=sprinkles, seed=st.integers(0, 2**16))
def test_nft_loss(backend: str, weighting: Any, places: list[Any], seed: int) -> None:
    backend_of("nft_loss", backend)
    generator = torch.Generator().manual_seed(seed)
    names = ("v_theta", "v_old", "v_ref", "x0", "noise")
    tensors = [x.clone() for x in torch.randn(5, 2, 37, generator=generator).unbind()]
    # Squares of 1e20 are infinite in float32 (docs/NUMERICS.md).
    sprinkle(tensors, [place for place in places if abs(place[2]) != 1e20])

    def run(which: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        given = {name: x.to(dtype) for name, x in zip(names, tensors, strict=True)}
        given["v_theta"].requires_grad_()
        options = {"nft_beta": 0.5, "prior_weight": 0.1, "weighting": weighting}
        times = {key: torch.tensor([0.3, 0.6]) for key in ("t", "r")}
        with dispatch.use_backend(which, "nft_loss"):
            loss = ops.nft_loss(**given, **times, **options).loss
        return loss.detach(), torch.autograd.grad(loss, given["v_theta"])[0]

    loss, grad = run(backend, torch.float32)
    exact, exact_grad = run("reference", torch.float64)
    assert_same("loss", loss, exact.double(), exact.double().abs().nan_to_num(1, 1, 1) + 1)
    assert_same("gradient", grad, exact_grad, exact_grad.abs().nan_to_num(1, 1, 1) + 1)
