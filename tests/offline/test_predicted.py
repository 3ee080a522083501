"""The order of backends on a GPU follows from the predicted instructions, until it is measured."""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor

import pytest

from afd_kernels.dispatch import TRITON_FIRST, order
from tests.offline import cuda_sources, predicted


@pytest.mark.parametrize("op", predicted.NATIVE)
def test_the_backend_with_fewer_instructions_comes_first(
    workers: ProcessPoolExecutor, op: str
) -> None:
    if cuda_sources.nvcc() is None:
        pytest.skip("nvcc is not on the path: CUDA sources are compiled where it is")
    triton = workers.submit(predicted.triton, op, "sm_90")
    native = workers.submit(predicted.native, op, "sm_90")
    assert (triton.result() < native.result()) == (op in TRITON_FIRST)


def test_every_function_that_prefers_triton_is_compared() -> None:
    assert set(predicted.NATIVE) > TRITON_FIRST
    assert order("adaln", "cuda", "adaln")[0] == "triton"
    assert order("adaln", "cuda", "adaln_bwd")[0] == "native"
    assert order("adaln", "cpu", "adaln")[0] == "native"
