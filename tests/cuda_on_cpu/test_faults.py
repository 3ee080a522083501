"""The test of the test: every planted fault is found, and without faults nothing is."""

from __future__ import annotations

import pytest

from tests.cuda_on_cpu.cases import LOSSES, NOISES
from tests.cuda_on_cpu.device import Device
from tests.cuda_on_cpu.faults import FAULTS
from tests.cuda_on_cpu.row_cases import ADALNS, APPENDS, ROPES, AdalnCase, RopeCase
from tests.cuda_on_cpu.test_kernels import assert_same_loss, assert_same_noise
from tests.cuda_on_cpu.test_rows import assert_same_rows

# Few calls that together reach everything: tails, several blocks, odd addresses, frames, masks.
_LOSSES = [case for case in LOSSES if case.name in ("row", "row_bf16", "odd_sizes", "frames_first")]
_NOISES = [NOISES[i] for i in (0, 2, 6, 7)]
_ROWS: list[AdalnCase | RopeCase] = [ADALNS[4], ADALNS[2], ADALNS[1], ROPES[1], APPENDS[1]]
# The sources of the ops on token rows; all other calls reach the rest.
_OF_ROWS = ("rows.cuh", "adaln.cu", "qk_norm_rope.cu")


def _check(device: Device, fault: int, rows: bool) -> None:
    for reverse in (False, True):
        if rows:
            for case in _ROWS:
                assert_same_rows(case, device, reverse=reverse, fault=fault)
            continue
        for noise in _NOISES:
            assert_same_noise(noise, device, reverse=reverse, fault=fault)
        for loss in _LOSSES:
            assert_same_loss(loss, device, reverse=reverse, fault=fault)


@pytest.mark.parametrize("rows", [False, True], ids=["samples", "rows"])
def test_without_a_fault_nothing_is_found(faulty: Device, rows: bool) -> None:
    _check(faulty, 0, rows)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name.replace(" ", "_"))
def test_a_planted_fault_is_found(faulty: Device, fault) -> None:
    with pytest.raises((AssertionError, RuntimeError)):
        _check(faulty, FAULTS.index(fault) + 1, fault.file in _OF_ROWS)
