"""Every CUDA kernel compiles for every target and stays inside its budget."""

from __future__ import annotations

from concurrent.futures import Future, ProcessPoolExecutor
from pathlib import Path

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
def test_cuda_kernels_that_stream_move_16_bytes_at_once(
    pending: Pending, source: str, arch: str
) -> None:
    results = pending[source, arch].result()
    assert any(result.loaded for result in results), f"no kernel of {source}.cu streams"
    for result in results:
        # Exact: a store that is taken apart leaves one wide store less.
        assert result.measured.wide_stored == result.stored, result.kernel


def test_the_gate_reports_a_store_that_is_taken_apart(
    workers: ProcessPoolExecutor, pending: Pending, tmp_path: Path
) -> None:
    """What nvcc makes of a plain assignment of a vector in half precision: four stores."""
    whole, apart = "__stwb(reinterpret_cast<int4*>(p) + v, raw);", "(int4&)p[v * kWidth] = raw;"
    for path in cuda_sources.SOURCES[0].parent.iterdir():
        text = path.read_text(encoding="utf-8")
        assert (whole in text) == (path.name == "pack.cuh")
        (tmp_path / path.name).write_text(text.replace(whole, apart), encoding="utf-8")
    source = tmp_path / "forward_noise.cu"
    results = workers.submit(cuda_sources.compile_source, source, "sm_90").result()
    found = {result.kernel: budget.violations(result, None) for result in results}
    name = "forward_noise._forward_noise_kernel<NS_4bf16ELb0EE>"
    assert any(sentence.startswith("16-byte stores") for sentence in found[name])


def test_a_kernel_of_unknown_streams_is_refused() -> None:
    with pytest.raises(KeyError, match="STREAMS"):
        cuda_sources.streamed("_new_kernel<fE>")
