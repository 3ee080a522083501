"""The test of the test: every planted fault is found, and without faults nothing is."""

from __future__ import annotations

import pytest

from tests.cuda_on_cpu.cases import LOSSES, NOISES
from tests.cuda_on_cpu.device import Device
from tests.cuda_on_cpu.faults import FAULTS
from tests.cuda_on_cpu.test_kernels import assert_same_loss, assert_same_noise

# Few calls that together reach everything: tails, several blocks, odd addresses, frames, masks.
_LOSSES = [case for case in LOSSES if case.name in ("row", "row_bf16", "odd_sizes", "frames_first")]
_NOISES = [NOISES[i] for i in (0, 2, 6, 7)]


def _check(device: Device, fault: int) -> None:
    for reverse in (False, True):
        for noise in _NOISES:
            assert_same_noise(noise, device, reverse=reverse, fault=fault)
        for loss in _LOSSES:
            assert_same_loss(loss, device, reverse=reverse, fault=fault)


def test_without_a_fault_nothing_is_found(faulty: Device) -> None:
    _check(faulty, 0)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name.replace(" ", "_"))
def test_a_planted_fault_is_found(faulty: Device, fault) -> None:
    with pytest.raises((AssertionError, RuntimeError)):
        _check(faulty, FAULTS.index(fault) + 1)
