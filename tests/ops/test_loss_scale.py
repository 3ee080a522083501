"""nft_loss under a loss scale: a float16 gradient is the float64 one, scaled and rounded once."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from afd import ops
from afd_kernels.contracts import SCHEDULES
from afd_kernels.dispatch import use_backend
from afd_kernels.forward_noise.reference import coefficients
from afd_kernels.nft_loss.contract import plan_nft_loss
from afd_kernels.nft_loss.storage import _largest, grad_power
from tests.cases import BASE, WAN_480, Case, raw

Place = tuple[str, str]

HALF = replace(BASE, name="video", pred=torch.float16, latent=torch.float16)
CASES = [
    HALF,
    replace(HALF, name="float32_latents", latent=torch.float32),
    replace(HALF, name="one_element", shape=(1, 1)),
    replace(HALF, name="image", shape=(5, 3, 9, 11)),
    replace(HALF, name="chunks", t_chunks=3, r_chunks=3, group="chunk"),
    replace(HALF, name="masked", masked=True, t_chunks=2, prior_by_r=True),
    replace(HALF, name="velocity", weighting="velocity", nft_beta=1.0),
    replace(HALF, name="velocity_masked", weighting="velocity", masked=True),
    replace(HALF, name="heavy_prior", prior_weight=10.0),
    replace(HALF, name="vp_linear", schedule="vp_linear", ref=False),
    replace(HALF, name="vp_cosine", schedule="vp_cosine", t_chunks=2),
]


def float64_gradient(inputs: dict[str, Any], scale: float) -> Tensor:
    """The scaled gradient in float64, by the reference."""
    wide = {
        k: v.detach().double() if isinstance(v, Tensor) and v.is_floating_point() else v
        for k, v in inputs.items()
    }
    wide["v_theta"].requires_grad_()
    with use_backend("reference", "nft_loss"):
        (ops.nft_loss(**wide).loss * scale).backward()
    return wide["v_theta"].grad


def assert_rounded_once(got: Tensor, exact: Tensor) -> None:
    """The error is at most twice that of rounding `exact` once to float16; zeros alike."""
    once, got = exact.half().double().cpu(), got.double().cpu()
    finite = once.isfinite()
    assert torch.equal(got.isfinite(), finite)
    error, floor = ((x - exact.cpu())[finite].norm() for x in (got, once))
    # A float32 result before the rounding, where rounding to float16 is exact.
    assert error <= 2 * floor + 1e-6 * exact.cpu()[finite].norm()
    zeros, zeros_once = ((x == 0).double().mean() for x in (got, once))
    assert zeros <= zeros_once + 1e-3


def scaled_gradient(inputs: dict[str, Any], scale: float) -> Tensor:
    inputs["v_theta"].grad = None
    (ops.nft_loss(**inputs).loss * scale).backward()
    return inputs["v_theta"].grad


@pytest.mark.parametrize("scale", [1.0, 0.3, 65536.0])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_scaled_gradient_is_rounded_once(place: Place, case: Case, scale: float) -> None:
    inputs = case.inputs(place[1])
    assert_rounded_once(scaled_gradient(inputs, scale), float64_gradient(inputs, scale))


@pytest.mark.parametrize("scale", [65536.0, 2.0**24])
@pytest.mark.parametrize("shape", [(9, 16, 64, 64), (2, *WAN_480)], ids=["image", "video"])
def test_the_small_elements_of_large_latents_survive(shape: tuple[int, ...], scale: float) -> None:
    inputs = replace(HALF, shape=shape).inputs()
    got = scaled_gradient(inputs, scale)
    # The kernel in float32, whose error is far below one rounding to float16.
    wide = {
        k: v.detach().float() if isinstance(v, Tensor) and v.is_floating_point() else v
        for k, v in inputs.items()
    }
    wide["v_theta"].requires_grad_()
    assert_rounded_once(got, scaled_gradient(wide, scale).double())


@pytest.mark.soak
def test_a_batch_of_eight_videos() -> None:
    test_the_small_elements_of_large_latents_survive((8, *WAN_480), 65536.0)


def test_every_way_to_the_gradient_gives_the_same_bits(place: Place) -> None:
    """Donated, kept and copied; and an incoming gradient of exactly 1."""
    inputs = HALF.inputs(place[1])
    v = inputs["v_theta"]
    for scale in (1.0, 1024.0):
        loss = ops.nft_loss(**inputs).loss * scale
        (kept,) = torch.autograd.grad(loss, v, retain_graph=True)
        (again,) = torch.autograd.grad(loss, v, retain_graph=True)
        (donated,) = torch.autograd.grad(loss, v)
        assert torch.equal(kept, again)
        assert torch.equal(kept, donated)
        assert_rounded_once(donated, float64_gradient(inputs, scale))


def test_scales_that_overflow_or_vanish(place: Place) -> None:
    inputs = HALF.inputs(place[1])
    exact = float64_gradient(inputs, 1.0)
    huge = scaled_gradient(inputs, 1e30)
    assert torch.equal(huge.isinf(), exact != 0)
    assert torch.equal(huge.sign().double(), exact.sign())
    assert scaled_gradient(inputs, 1e-40).count_nonzero() == 0
    assert not scaled_gradient(inputs, float("inf")).isfinite().any()
    assert scaled_gradient(inputs, 0.0).count_nonzero() == 0


EXTREME = [
    {"adv_clip": 1e4},
    {"adv_clip": 1e-6},
    {"prior_weight": 1e3},
    {"weighting": "velocity", "nft_beta": 3.0},
    {"schedule": "vp_linear"},
    {"frame_mask": torch.arange(6).expand(2, 6) == 3},
]


@pytest.mark.parametrize("change", EXTREME, ids=lambda c: next(iter(c)))
def test_no_finite_prediction_overflows_the_stored_gradient(
    place: Place, change: dict[str, Any]
) -> None:
    """One element holds nearly all of the error, as large as float16 goes."""
    for name, value in (("v_theta", 6e4), ("v_old", -6e4), ("x0", 6e4)):
        inputs = HALF.inputs(place[1]) | {
            k: v.to(place[1]) if isinstance(v, Tensor) else v for k, v in change.items()
        }
        spiked = inputs[name].detach().clone()
        spiked[0, 0, 3, 0, 0] = value
        inputs[name] = spiked.requires_grad_(name == "v_theta")
        for scale in (2.0**-6, 1.0):
            got, exact = scaled_gradient(inputs, scale), float64_gradient(inputs, scale)
            assert torch.equal(got.isfinite().cpu(), exact.half().isfinite().cpu())


def test_the_power_is_one_for_every_other_dtype() -> None:
    tensors, options = raw(BASE.inputs())
    plan = plan_nft_loss(tensors, options)
    for dtype in (torch.float32, torch.bfloat16, torch.float64, torch.float16):
        power = grad_power(plan, tensors._replace(v_theta=tensors.v_theta.to(dtype)))
        assert power > 1.0 if dtype == torch.float16 else power == 1.0


@pytest.mark.parametrize(("schedule", "args"), [(n, (0.1, 20.0)) for n in SCHEDULES])
def test_the_bounds_of_the_schedules(schedule: str, args: tuple[float, ...]) -> None:
    t = torch.linspace(*SCHEDULES[schedule], 4097, dtype=torch.float64)
    alpha, sigma, d_alpha, d_sigma = coefficients(schedule, args, t)
    kappa = sigma / (alpha * d_sigma - sigma * d_alpha)
    want = [x.abs().max().item() for x in (kappa, d_alpha, d_sigma)]
    assert _largest(schedule, args) == pytest.approx(want, rel=1e-3)


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_compiled_step_gives_the_same_bits(dynamic: bool) -> None:
    inputs = HALF.inputs()
    want = scaled_gradient(inputs, 4096.0).clone()

    def step(inputs: dict[str, Any]) -> Tensor:
        return ops.nft_loss(**inputs).loss * 4096.0

    inputs["v_theta"].grad = None
    torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=dynamic)(inputs).backward()
    assert torch.equal(inputs["v_theta"].grad, want)


class Student(nn.Module):
    """Predicts a velocity by one linear map; masters are float32, computed in `dtype`."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.eye(16))
        self.dtype = dtype

    def forward(self, x: Tensor) -> Tensor:
        return x.to(self.dtype) @ self.weight.to(self.dtype)


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_a_float16_student_trains_like_a_float32_one_under_a_grad_scaler(backend: str) -> None:
    """The first steps overflow at a scale of 2^40: they are skipped, and training recovers."""
    g = torch.Generator().manual_seed(0)
    shape = (2, 64, 64, 16)
    x0, old = torch.randn(shape, generator=g), torch.randn(shape, generator=g)
    t, r = torch.tensor([0.3, 0.7]), torch.tensor([0.9, 0.2])
    weights, skipped = [], 0
    for dtype in (torch.float32, torch.float16):
        student = Student(dtype)
        optimizer = torch.optim.SGD(student.parameters(), lr=1e-2)
        enabled = dtype == torch.float16
        scaler = torch.amp.GradScaler(device="cpu", init_scale=2.0**40, enabled=enabled)
        taken = 0
        while taken < 5:
            before = student.weight.detach().clone()
            optimizer.zero_grad()
            with use_backend(backend, "nft_loss"):
                loss = ops.nft_loss(
                    v_theta=student(old),
                    v_old=old.to(dtype),
                    x0=x0,
                    t=t,
                    r=r,
                    seed=torch.tensor([1, 2]),
                    nft_beta=1.0,
                ).loss
                scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            if torch.equal(student.weight, before):
                skipped += 1
                assert enabled
                assert skipped < 60
            else:
                taken += 1
        weights.append(student.weight.detach() - torch.eye(16))
    assert skipped > 0
    error = (weights[1] - weights[0]).norm() / weights[0].norm()
    assert error < 4 * torch.finfo(torch.float16).eps
