"""The benchmarks' CUDA paths on a simulated device (tests/fake_cuda): all but the times."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from afd.models.wan.types import WanConfig
from afd.ops import intervals
from benchmarks import attention, forward_noise, harness, nft_loss, rollout, train_step
from benchmarks.hardware import Machine
from tests.fake_cuda import FakeCuda, fake_cuda

# Where there is one, the benchmarks themselves run on it.
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="a real GPU is here")
WAN = WanConfig(dim=32, num_heads=2, ffn_dim=48, num_layers=2, freq_dim=16, text_dim=16, text_len=8)
MACHINE = Machine(1e12, 1e15)


@pytest.fixture
def gpu() -> Iterator[FakeCuda]:
    with fake_cuda() as machine:
        yield machine


def args(*providers: str) -> Namespace:
    return Namespace(device="cuda", reps=1, budget=0.1, quick=False, providers=list(providers))


def test_the_rollouts_providers_agree_on_the_device(gpu: FakeCuda) -> None:
    case = rollout.Case("tiny", replace(WAN, window=9, sink=3), 4, 6, 21, "bf16")
    rows, failed = rollout.measure(case, 1, MACHINE, args("eager", "ours", "graph"))
    assert {row.provider: row.syncs > 0 for row in rows} == {"eager": True, "ours": False}
    assert failed == {"tiny graph": "RuntimeError: no CUDA graph on a fake GPU"}


def test_both_sides_of_the_training_benchmark_run_on_the_device(gpu: FakeCuda) -> None:
    case = train_step.Case("tiny", 1, 1, 1, WAN, 4, 6, 6, 4, "bf16", True, 1)
    rows, failed = train_step.measure(case, MACHINE, args("eager", *train_step.MODES))
    assert not failed
    assert {row.phase for row in rows} == set(train_step.PHASES)
    assert gpu.launches["nft_loss_cuda"] == gpu.launches["_nft_loss_grad_kernel"] > 0


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_training_benchmarks_settings_at_real_sizes_are_taken(device: str) -> None:
    for case in train_step.cases(Namespace(device=device, quick=False)):
        assert case.afd.samples_per_prompt == case.group


def test_attention_and_its_peers_run_on_the_device(
    gpu: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    timed, absent = harness.timed, dict[str, list[str]]()

    def without_the_floor(runs: dict[str, Any], *how: Any) -> dict[str, harness.Timing]:
        # The product whose rate is the floor is as large as a GPU needs it.
        ours = {name: run for name, run in runs.items() if name != "matmul"}
        return timed(ours, *how) | {"matmul": harness.Timing(1.0, 1.0, 1.0, 1.0, 1)}

    monkeypatch.setattr(harness, "timed", without_the_floor)
    here = args("dense mask", "sdpa per block", "ours", "library", "triton")
    for rows, context in ((intervals.cache(2, 1, 8), 0), (intervals.noisy_half(4, 2, 8), 32)):
        case = attention.Case("tiny", rows, 2, 16, "bf16", context > 0, context)
        measured, failed = attention.measure(case, here, absent)
        assert not failed | absent
        assert {row.provider for row in measured} == set(here.providers)


@pytest.mark.parametrize("script", [nft_loss, forward_noise], ids=["nft_loss", "noise"])
def test_an_ops_benchmark_runs_every_backend_on_the_device(gpu: FakeCuda, script: Any) -> None:
    every = ["--all"] if script is nft_loss else []
    script.main(["--device", "cuda", "--quick", "--dtype", "bf16", *every])
    assert {name for name in gpu.launches if name.endswith("_cuda")}
    assert {name for name in gpu.launches if name.endswith("_kernel")}
