"""The unchanged CUDA kernels against the CPU core: to the bit where MATH.md promises it."""

from __future__ import annotations

from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from afd_kernels import native
from afd_kernels.dispatch import explain, use_backend
from tests.cases import Case
from tests.cuda_on_cpu.cases import LOSSES, NOISES, NoiseCase, run_loss
from tests.cuda_on_cpu.device import Device
from tests.cuda_on_cpu.faults import FEW_SAMPLES
from tests.tolerances import ELEMENTWISE_RTOL, assert_reduced

# cudaError_t.
INSUFFICIENT_DRIVER, NO_KERNEL_IMAGE = 35, 209


def assert_same_noise(case: NoiseCase, device: Device, **how: int) -> None:
    with use_backend("native"):
        expected = case.run()
    with device.running(**how) as memory:
        found = case.run(memory)
    for name, a, b in zip(("x_t", "gradient"), found, expected, strict=True):
        assert torch.equal(a, b), name


def assert_same_loss(case: Case, device: Device, shift: int = 0, **how: int) -> None:
    with use_backend("native"):
        expected = run_loss(case)
    with device.running(**how) as memory:
        found = run_loss(case, memory, shift)
    assert_gradient(found[0], expected[0], exact=case.weighting != "x0_adaptive")
    for a, b in zip(found[1:], expected[1:], strict=True):
        # The sums are of fp32 numbers that are added in another order.
        assert_reduced(a, b)


def assert_gradient(found: Tensor, expected: Tensor, exact: bool) -> None:
    """Without adaptive weights no sum is in it; with them, the last bits of two sums are."""
    if exact:
        assert torch.equal(found, expected)
        return
    bound = ELEMENTWISE_RTOL[found.dtype] * expected.double().abs().max()
    assert ((found.double() - expected.double()).abs() <= bound).all()


@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize("case", NOISES, ids=str)
def test_forward_noise_has_the_bits_of_the_cpu_core(
    device: Device, case: NoiseCase, reverse: bool
) -> None:
    assert_same_noise(case, device, reverse=reverse)


@pytest.mark.parametrize("case", LOSSES, ids=str)
def test_nft_loss_equals_the_cpu_core(device: Device, case: Case) -> None:
    # One order each: which, changes from case to case.
    assert_same_loss(case, device, reverse=LOSSES.index(case) % 2 == 1)


@pytest.mark.parametrize("shift", [2, 6, 8])
def test_half_precision_needs_no_alignment(device: Device, shift: int) -> None:
    case = next(case for case in LOSSES if case.name == "row_bf16")
    assert_same_loss(case, device, shift)


def test_the_order_of_threads_changes_no_bit(device: Device) -> None:
    case = next(case for case in LOSSES if case.name == "many_tiles")
    results = []
    for reverse in (False, True):
        with device.running(reverse=reverse) as memory:
            results.append(run_loss(case, memory))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", ["five_samples", "image_batch_of_five"])
def test_a_batch_beyond_the_grid_takes_several(faulty: Device, name: str) -> None:
    """With two samples to a grid; the real limit is 65,535."""
    case = next(case for case in LOSSES if case.name == name)
    assert_same_loss(case, faulty, fault=FEW_SAMPLES)
    assert_same_noise(NOISES[-1], faulty, fault=FEW_SAMPLES)


@pytest.mark.soak
def test_a_batch_of_more_than_65535_samples(device: Device) -> None:
    assert_same_noise(NoiseCase((65_537, 3)), device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("count", [1, 7, 8, 2048, 2049])
def test_scaling_writes_what_it_should_and_nothing_else(
    device: Device, dtype: torch.dtype, count: int
) -> None:
    x = torch.randn(count, generator=torch.Generator().manual_seed(count)).to(dtype)
    factor = torch.tensor(-0.3)
    with device.running() as memory:
        here = memory.place(x)
        out = torch.empty_like(here)
        native.scale(here, factor, out)
        assert torch.equal(out, (x.float() * factor).to(dtype))
        native.scale(here, factor, here)
        assert torch.equal(here, out)
        before = here.clone()
        native.scale(here, torch.tensor(1.0), here)
        assert torch.equal(here, before)


@pytest.mark.parametrize(
    ("error", "words"),
    [(INSUFFICIENT_DRIVER, "driver version is insufficient"), (NO_KERNEL_IMAGE, "no kernel image")],
)
def test_a_device_that_cannot_run_the_kernels_is_refused_with_the_reason(
    device: Device, error: int, words: str
) -> None:
    with patch.object(native, "_core", device.core):
        assert native.refuse("cuda", {torch.float32}) is None
        with device.broken(error):
            refusal = explain("forward_noise", "cuda", {torch.float32})["native"]
        assert refusal is not None
        assert words in refusal
        assert "sm_90" in refusal
        assert native.refuse("cuda", {torch.float32}) is None


def test_a_kernel_that_never_ran_leaves_no_answer(device: Device) -> None:
    """The core turns errors of the runtime into exceptions."""
    with (
        device.broken(NO_KERNEL_IMAGE),
        device.running() as memory,
        pytest.raises(RuntimeError, match="no kernel image"),
    ):
        NOISES[0].run(memory)
