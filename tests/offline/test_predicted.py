"""The order of backends on a GPU rests on predicted instructions, until it is measured."""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor

import pytest

from afd_kernels.dispatch import OPS
from tests.offline import cuda_sources, predicted
from tests.offline.budget import INSTRUCTION_SLACK


@pytest.mark.parametrize("op", predicted.NATIVE)
def test_the_backend_that_comes_first_has_no_more_instructions(
    workers: ProcessPoolExecutor, op: str
) -> None:
    if cuda_sources.nvcc() is None:
        pytest.skip("nvcc is not on the path: CUDA sources are compiled where it is")
    counts = {
        name: workers.submit(count, op, "sm_90")
        for name, count in (("native", predicted.native), ("triton", predicted.triton))
    }
    first, second = (name for name in OPS[predicted.NATIVE[op][0]] if name in counts)
    assert counts[first].result() <= INSTRUCTION_SLACK * counts[second].result()
