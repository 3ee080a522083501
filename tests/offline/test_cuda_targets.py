"""Every CUDA kernel compiles for every target and stays inside its budget."""

from __future__ import annotations

from concurrent.futures import Future, ProcessPoolExecutor

import pytest

from tests.offline import budget, cuda_sources

Pending = dict[tuple[str, str], Future[list[budget.Result]]]


@pytest.fixture(scope="module")
def pending(workers: ProcessPoolExecutor) -> Pending:
    if cuda_sources.nvcc() is None:
        pytest.skip("nvcc is not on the path: CUDA sources are compiled where it is")
    return cuda_sources.submit_all(workers)


@pytest.mark.parametrize("arch", cuda_sources.ARCHS)
@pytest.mark.parametrize("source", [path.stem for path in cuda_sources.SOURCES])
def test_cuda_kernels_stay_inside_their_budget(pending: Pending, source: str, arch: str) -> None:
    budget.assert_inside(pending[source, arch].result(), arch)


@pytest.mark.parametrize("arch", cuda_sources.ARCHS)
@pytest.mark.parametrize("source", [path.stem for path in cuda_sources.SOURCES])
def test_cuda_kernels_that_stream_load_16_bytes_at_once(
    pending: Pending, source: str, arch: str
) -> None:
    wide = [result for result in pending[source, arch].result() if result.measured.wide_loaded]
    assert wide, f"no kernel of {source}.cu on {arch} has a 16-byte load"
