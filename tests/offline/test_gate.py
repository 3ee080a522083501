"""The budget gate can fail: a kernel that spills is reported, limit by limit."""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace

import pytest

from tests.offline import budget


def _compile_spilling(arch: str) -> budget.Result:
    # Imported in the worker: here Triton may be loaded as an interpreter.
    from tests.offline.spilling import compile_spilling

    return compile_spilling(arch)


def _compile_wide_attention(arch: str) -> budget.Result:
    from tests.offline.spilling import compile_wide_attention

    return compile_wide_attention(arch)


@pytest.fixture(scope="module")
def spilling(workers: ProcessPoolExecutor) -> budget.Result:
    return workers.submit(_compile_spilling, "sm_90").result()


@pytest.mark.parametrize("limit", ["stack bytes", "spills", "atomics", "16-byte loads"])
def test_the_gate_reports_a_spilling_kernel(spilling: budget.Result, limit: str) -> None:
    assert any(sentence.startswith(limit) for sentence in budget.violations(spilling, None))


def test_the_gate_reports_attention_tiles_too_large_for_the_registers(
    workers: ProcessPoolExecutor,
) -> None:
    found = budget.violations(workers.submit(_compile_wide_attention, "sm_90").result(), None)
    assert any(sentence.startswith("stack bytes") for sentence in found)
    assert any(sentence.startswith("spills") for sentence in found)


def test_the_gate_reports_products_of_another_generation(spilling: budget.Result) -> None:
    old = replace(spilling.measured, products=("HMMA",))
    found = budget.violations(replace(spilling, measured=old, half_products=True), None)
    assert any(sentence.startswith("matrix instructions") for sentence in found)


def test_the_gate_reports_fewer_programs_per_multiprocessor(spilling: budget.Result) -> None:
    before = spilling.budget() | {"programs": spilling.programs + 1.0}
    assert any(sentence.startswith("programs") for sentence in budget.violations(spilling, before))


@pytest.mark.parametrize("limit", ["registers", "shared", "instructions"])
def test_the_gate_reports_a_kernel_that_grew(spilling: budget.Result, limit: str) -> None:
    before = {name: value * 0.95 for name, value in spilling.budget().items()} | {"shared": -1.0}
    assert any(sentence.startswith(limit) for sentence in budget.violations(spilling, before))


def test_the_gate_accepts_growth_within_the_slack(spilling: budget.Result) -> None:
    before = spilling.budget()
    before["instructions"] /= 1.02
    growth = set(budget.violations(spilling, before)) - set(budget.violations(spilling, None))
    assert growth == set()
