"""Micro-benchmarks of the ops: `pytest tests/benchmarks/test_micro.py --benchmark-only`."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from afd import ops
from benchmarks import forward_noise, nft_loss
from benchmarks.suite import OURS, SOURCES

SHAPE = (16, 5, 30, 52)  # a sixteenth of a 480x832 latent
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Without a GPU the tests interpret Triton, which is no speed to measure.
BACKENDS = ["eager", "native", *(["triton"] if DEVICE == "cuda" else [])]


def timed(benchmark: Any, step: Any, inputs: Any) -> None:
    """Waits for the device, so that the launches alone are not what is timed."""

    def call() -> None:
        step(inputs)
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    benchmark(call)


def runs_here(op: str, backend: str, dtypes: set[torch.dtype]) -> None:
    refusal = ops.explain(op, DEVICE, dtypes)[backend] if backend in OURS else None
    if refusal is not None:
        pytest.skip(refusal)


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("dtype", nft_loss.DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_nft_loss(benchmark: Any, backend: str, dtype: str, source: str) -> None:
    runs_here("nft_loss", backend, set(nft_loss.DTYPES[dtype]))
    case = nft_loss.Nft("x0_adaptive", dtype, 2, SHAPE)
    timed(benchmark, case.step(backend, source), case.inputs(DEVICE, 0))


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("dtype", forward_noise.DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_forward_noise(benchmark: Any, backend: str, dtype: str, source: str) -> None:
    runs_here("forward_noise", backend, {forward_noise.DTYPES[dtype]})
    case = forward_noise.Noising(dtype, 2, SHAPE)
    timed(benchmark, case.step(backend, source), case.inputs(DEVICE, 0))
