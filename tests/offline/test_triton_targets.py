"""Every Triton kernel that ships compiles for every target and stays inside its budget."""

from __future__ import annotations

from concurrent.futures import Future, ProcessPoolExecutor

import pytest

from tests.offline import budget
from tests.offline.calls import CALLS

Pending = dict[tuple[str, str], Future[list[budget.Result]]]


@pytest.fixture(scope="module")
def pending(workers: ProcessPoolExecutor) -> Pending:
    return budget.submit_all(workers)


@pytest.mark.parametrize(
    ("call", "arch"),
    [(f"{call.op}.{call.name}", arch) for call in CALLS for arch in call.archs],
)
def test_kernels_stay_inside_their_budget(pending: Pending, call: str, arch: str) -> None:
    budget.assert_inside(pending[call, arch].result(), arch)


def test_budgets_name_only_kernels_that_ship(pending: Pending) -> None:
    compiled = {
        (result.compiler, arch, result.kernel)
        for (_, arch), future in pending.items()
        for result in future.result()
    }
    compiler = next(iter(compiled))[0]
    written = {
        (compiler, arch, kernel)
        for arch, kernels in budget.budgets().get(compiler, {}).items()
        for kernel in kernels
    }
    assert written - compiled == set()
