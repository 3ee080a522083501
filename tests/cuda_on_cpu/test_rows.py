"""The unchanged CUDA kernels on token rows against the CPU core. Only sums over a row differ: they
are added in another order."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from afd_kernels.dispatch import use_backend
from afd_kernels.qk_norm_rope import native_impl, reference
from tests.cuda_on_cpu.device import Device
from tests.cuda_on_cpu.faults import FEW_SAMPLES
from tests.cuda_on_cpu.row_cases import ADALNS, APPENDS, ROPES, AdalnCase, RopeCase
from tests.tolerances import assert_elementwise

Case = AdalnCase | RopeCase
CASES: tuple[Case, ...] = (*ADALNS, *ROPES, *APPENDS)


def assert_same_rows(case: Case, device: Device, **how: int) -> None:
    with use_backend("native"):
        expected = case.run()
    with device.running(**how) as memory:
        found = case.run(memory)
    assert expected[0].any()
    for a, b in zip(found, expected, strict=True):
        assert a.isfinite().all()
        assert_elementwise(a, b, scale=float(b.abs().max()))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_rows_equal_the_cpu_core(device: Device, case: Case) -> None:
    # One order each: which, changes from case to case.
    assert_same_rows(case, device, reverse=CASES.index(case) % 2 == 1)


@pytest.mark.parametrize("case", [ADALNS[3], ROPES[1], APPENDS[2]], ids=str)
def test_the_order_of_threads_changes_no_bit(device: Device, case: Case) -> None:
    results = []
    for reverse in (False, True):
        with device.running(reverse=reverse) as memory:
            results.append(case.run(memory))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("case", [ADALNS[-1], ROPES[-1], APPENDS[-1]], ids=str)
def test_a_batch_beyond_the_grid_takes_several(faulty: Device, case: Case) -> None:
    """With two streams to a grid; the real limit is 65,535."""
    assert_same_rows(case, faulty, fault=FEW_SAMPLES)


def test_a_residual_has_the_bits_of_the_cpu_core(device: Device) -> None:
    """No sum is in it."""
    case = ADALNS[0]
    with use_backend("native"):
        expected = case.run()[1]
    with device.running() as memory:
        assert torch.equal(case.run(memory)[1], expected)


def test_appending_has_the_bits_of_the_forward(device: Device) -> None:
    case = APPENDS[2]
    with device.running() as memory:
        q, k_cache, v_cache = case.run(memory)
        inputs = case.inputs(memory)
        given = [inputs[name] for name in ("q", "k", "weight_q", "weight_k", "rope")]
        expected_q, expected_k = native_impl.qk_norm_rope(*given, eps=1e-6)
    frames = reference.frames_of(inputs["position"], case.shape[1], case.frame)
    (slots,) = reference.slots_of(frames, case.slots, case.sink, case.frame)
    assert torch.equal(q, expected_q)
    assert torch.equal(k_cache[:, slots], expected_k)
    assert torch.equal(v_cache[:, slots], inputs["v"])


@pytest.mark.parametrize("case", APPENDS[:3], ids=str)
def test_a_negative_position_makes_nan(device: Device, case: RopeCase) -> None:
    def append(module, memory=None) -> list[Tensor]:
        inputs = case.inputs(memory)
        inputs["position"].fill_(-2)
        q = module.qk_norm_rope_append_(
            **inputs, tokens_per_frame=case.frame, sink_frames=case.sink, eps=1e-6
        )
        return [q, inputs["k_cache"], inputs["v_cache"]]

    expected = append(reference)
    with device.running() as memory:
        found = append(native_impl, memory)
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a.isnan(), b.isnan())
    assert found[0].isnan().all()
    assert torch.equal(found[2], expected[2])


def test_a_value_keeps_its_bits(device: Device) -> None:
    """NaN with a payload, too."""
    case = APPENDS[0]
    with device.running() as memory:
        inputs = case.inputs(memory)
        bits = inputs["v"].view(torch.int16)
        bits.copy_(torch.arange(bits.numel()).view_as(bits) * 257)
        native_impl.qk_norm_rope_append_(
            **inputs, tokens_per_frame=case.frame, sink_frames=case.sink, eps=1e-6
        )
    frames = reference.frames_of(inputs["position"], case.shape[1], case.frame)
    slots = reference.slots_of(frames, case.slots, case.sink, case.frame)
    streams = torch.arange(case.shape[0])[:, None]
    assert torch.equal(inputs["v_cache"].view(torch.int16)[streams, slots], bits)
