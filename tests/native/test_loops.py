"""The loops of the compiled core: instruction sets, threads, tails, misalignment, rounding."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from afd_kernels import native
from afd_kernels.forward_noise import native_impl as forward_noise
from afd_kernels.forward_noise import reference as forward_noise_reference
from afd_kernels.forward_noise.contract import NoiseInputs, NoiseOptions, plan_forward_noise
from afd_kernels.nft_loss import native_impl as nft_loss
from afd_kernels.nft_loss.contract import (
    WEIGHTINGS,
    NftInputs,
    NftOptions,
    NftPlan,
    plan_nft_loss,
)
from tests.tolerances import assert_elementwise

pytestmark = pytest.mark.skipif(native.why_missing() is not None, reason=str(native.why_missing()))

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
STRAIGHT = NoiseOptions("rectified_flow", (), "BCFHW")


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _misaligned(x: Tensor, shift: int) -> Tensor:
    """A contiguous copy of x that starts `shift` elements into its storage."""
    room = x.new_empty(x.numel() + shift)
    room[shift:] = x.flatten()
    return room[shift:].view(x.shape)


def _case(shape, predictions, latents, *, per_frame=False, mask=False, given=False, shift=0):
    """Everything nft_loss needs, and its plan."""
    make = torch.Generator().manual_seed(5)

    def draw(dtype: torch.dtype) -> Tensor:
        return _misaligned(torch.randn(shape, generator=make).to(dtype), shift)

    v_theta, v_old, v_ref = (draw(predictions) for _ in range(3))
    x0 = draw(latents)
    batch, frames = shape[0], shape[2] if len(shape) == 5 else 1
    times = (batch, frames) if per_frame else (batch,)
    t, r = torch.rand(times, generator=make), torch.rand(times, generator=make)
    noise = draw(latents) if given else None
    seed = None if given else torch.arange(batch) - 1
    frame_mask = torch.rand((batch, frames), generator=make) < 0.7 if mask else None
    tensors = NftInputs(v_theta, v_old, v_ref, x0, t, r, seed, noise, frame_mask)

    def plan(weighting: str) -> NftPlan:
        options = NftOptions(0.7, 1e-2, 5.0, weighting, prior_by_r=True, schedule="vp_cosine")
        return plan_nft_loss(tensors, options)

    return tensors, plan


def _assert_same(got, expected):
    for name, a, b in zip(("loss", "metrics", "grad"), got, expected, strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("isa", native.isas())
@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("latents", DTYPES)
@pytest.mark.parametrize("predictions", DTYPES)
def test_every_instruction_set_gives_the_same_loss(isa, weighting, predictions, latents):
    for shape, per_frame in (
        ((2, 3, 4, 5, 7), True),
        ((2, 3, 4, 31, 37), True),
        ((2, 9001), False),
    ):
        tensors, plan = _case(shape, predictions, latents, per_frame=per_frame, mask=per_frame)
        expected = nft_loss.nft_loss(tensors, plan(weighting))
        with native.use_isa(isa):
            _assert_same(nft_loss.nft_loss(tensors, plan(weighting)), expected)


@pytest.mark.parametrize("isa", native.isas())
@pytest.mark.parametrize("noise", [None, torch.float32])
@pytest.mark.parametrize("latents", DTYPES)
@pytest.mark.parametrize("predictions", DTYPES)
def test_every_instruction_set_gives_the_same_loss_of_given_noise(isa, predictions, latents, noise):
    for shape, shift in (((2, 3, 4, 31, 37), 3), ((2, 9001), 0)):
        tensors, plan = _case(shape, predictions, latents, given=True, shift=shift)
        tensors = tensors._replace(noise=tensors.noise.to(noise or latents))
        for weighting in WEIGHTINGS:
            expected = nft_loss.nft_loss(tensors, plan(weighting))
            with native.use_isa(isa):
                _assert_same(nft_loss.nft_loss(tensors, plan(weighting)), expected)


@pytest.mark.parametrize("isa", native.isas())
@pytest.mark.parametrize("dtype", DTYPES)
def test_given_noise_counts_as_that_of_the_seed(isa, dtype):
    """To the bit: runs of given noise are added in the order of the seed's tiles."""
    shape = (2, 3, 4, 31, 37)
    seeded, plan = _case(shape, dtype, torch.float32)
    drawn = [native.normals(int(x), 0, 3 * 4 * 31 * 37) for x in seeded.seed]
    noise = torch.stack(drawn).view(shape)
    with native.use_isa(isa):
        found = nft_loss.nft_loss(seeded, plan("x0_adaptive"))
        _, given_plan = _case(shape, dtype, torch.float32, given=True)
        inputs = seeded._replace(seed=None, noise=noise)
        given = nft_loss.nft_loss(inputs, given_plan("x0_adaptive"))
    _assert_same(given, found)


@pytest.mark.parametrize("isa", native.isas())
@pytest.mark.parametrize("dtype", DTYPES)
def test_elements_that_are_no_numbers_stay_where_they_are(isa, dtype):
    """In every place of a whole line, and of a partial one."""
    odd = [float("nan"), float("inf"), -float("inf")]
    for place in range(70):
        tensors, plan = _case((1, 70), dtype, dtype, given=True)
        v_theta = tensors.v_theta
        v_theta[0, place] = odd[place % 3]
        with native.use_isa(isa):
            grad = nft_loss.nft_loss(tensors, plan("velocity"))[2]
        assert torch.equal(~grad.isfinite(), ~v_theta.isfinite())


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_one_thread_and_three_threads_give_the_same_bits(weighting, given):
    tensors, plan = _case((2, 4, 6, 41, 67), torch.float32, torch.bfloat16, given=given)
    with threads(1):
        expected = nft_loss.nft_loss(tensors, plan(weighting))
    for count in (2, 3):
        with threads(count):
            for _ in range(3):
                _assert_same(nft_loss.nft_loss(tensors, plan(weighting)), expected)


@pytest.mark.parametrize("isa", native.isas())
@pytest.mark.parametrize("dtype", DTYPES)
def test_pointers_need_no_alignment(isa, dtype):
    aligned, plan = _case((2, 3, 2, 5, 9), dtype, dtype, given=True)
    with native.use_isa(isa):
        expected = nft_loss.nft_loss(aligned, plan("x0_adaptive"))
        for shift in (1, 3, 5):
            shifted, _ = _case((2, 3, 2, 5, 9), dtype, dtype, given=True, shift=shift)
            _assert_same(nft_loss.nft_loss(shifted, plan("x0_adaptive")), expected)


@pytest.mark.parametrize("isa", native.isas())
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_tail_length_is_complete_and_touches_nothing_beyond(isa, dtype):
    t, seed = torch.tensor([0.3]), torch.tensor([9])
    for size in range(1, 68):
        x0 = torch.randn(1, size).to(dtype)
        plan = plan_forward_noise(NoiseInputs(x0, t, seed=seed), STRAIGHT)
        expected = forward_noise_reference.forward_noise(x0, t, seed, None, plan)
        with native.use_isa(isa):
            assert_elementwise(forward_noise.forward_noise(x0, t, seed, None, plan), expected)
            room = torch.full((size + 64,), 7.0, dtype=dtype)
            native.scale(x0[0], torch.tensor(0.5), room)
        assert torch.equal(room[:size], x0[0] * 0.5)
        assert bool((room[size:] == 7.0).all()), size


@pytest.mark.parametrize("isa", native.isas())
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_outputs_round_to_nearest_even_as_pytorch_does(isa, dtype):
    # x_t = 1 * x0 + sigma * noise with given fp32 noise: alpha = 0 leaves the noise itself.
    every = torch.arange(2**16, dtype=torch.int32).to(torch.uint16).view(dtype).float()
    every = every[every.isfinite()]
    between = torch.nextafter(every, torch.full_like(every, float("inf")))
    halfway = (every + every.roll(1)) / 2
    big = torch.tensor([65504.0, 65519.99, 65520.0, 1e30, -1e30, float("inf"), -float("inf")])
    values = torch.cat([every, between, halfway, halfway * (1 + 2**-20), big, big * 1e8])
    noise = values[None]
    x0 = torch.zeros_like(noise).to(dtype)
    t = torch.ones(1)
    plan = plan_forward_noise(NoiseInputs(x0, t, noise=noise), STRAIGHT)
    with native.use_isa(isa):
        got = forward_noise.forward_noise(x0, t, None, noise, plan)
    assert torch.equal(got, noise.to(dtype))
    nan = torch.full((1, 5), float("nan"))
    plan = plan_forward_noise(NoiseInputs(x0[:, :5], t, noise=nan), STRAIGHT)
    with native.use_isa(isa):
        assert bool(forward_noise.forward_noise(x0[:, :5], t, None, nan, plan).isnan().all())


@pytest.mark.parametrize("isa", native.isas())
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_inputs_are_read_exactly(isa, dtype):
    every = torch.arange(2**16, dtype=torch.int32).to(torch.uint16).view(dtype)
    every = every[every.isfinite()]
    out = torch.empty_like(every)
    with native.use_isa(isa):
        native.scale(every, torch.tensor(1.0), out)
    assert torch.equal(out.view(torch.uint16), every.view(torch.uint16))


@pytest.mark.parametrize(
    ("outer", "frames", "inner"), [(1, 1, 2**31 + 5), (16, 21, 2**27), (3, 2**33, 1)]
)
def test_index_arithmetic_is_64_bit(outer, frames, inner):
    per_sample = outer * frames * inner
    for sample in (0, 1, 7):
        for position in (0, inner, per_sample // 2, per_sample - 1):
            offset, frame = native.core().locate(outer, frames, inner, sample, position)
            assert offset == sample * per_sample + position
            assert frame == position // inner % frames


def test_scaling_in_place_by_one_writes_nothing():
    grad = torch.randn(1000)
    before, version = grad.clone(), grad.data_ptr()
    nft_loss.nft_loss_bwd_(grad, torch.tensor(1.0))
    assert torch.equal(grad, before)
    assert grad.data_ptr() == version
    nft_loss.nft_loss_bwd_(grad, torch.tensor(-2.0))
    assert torch.equal(grad, before * -2)
    assert torch.equal(nft_loss.nft_loss_bwd(before, torch.tensor(3.0)), before * 3)


def test_the_stream_floor_adds_five_arrays():
    inputs = [torch.randn(100_003) for _ in range(5)]
    a, b, c, d, e = inputs
    for non_temporal in (False, True):
        out = torch.zeros(100_003)
        native.stream_5r1w(inputs, out, non_temporal=non_temporal)
        assert torch.equal(out, a + b + c + d + e)


def test_a_forked_process_can_use_the_core():
    # DataLoader workers fork after the thread pool has started.

    x = torch.randn(1_000_000)
    expected = x * 2
    with threads(2):
        out = torch.empty_like(x)
        native.scale(x, torch.tensor(2.0), out)
        child = os.fork()
        if child == 0:
            again = torch.empty_like(x)
            native.core().scale_cpu(0, x.data_ptr(), again.data_ptr(), x.numel(), 2.0, 2)
            same = bytes(again.numpy().data) == bytes(expected.numpy().data)
            os._exit(0 if same else 1)
        _, status = os.waitpid(child, 0)
    assert torch.equal(out, expected)
    assert os.waitstatus_to_exitcode(status) == 0
