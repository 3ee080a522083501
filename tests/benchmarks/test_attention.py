"""The attention benchmark runs in small, checks what it times and counts what intervals name."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

import pytest
import torch

from afd.ops import intervals
from benchmarks import attention, attention_parts
from tests.benchmarks.test_benchmarks import run
from tests.fake_cuda import fake_cuda


def test_a_row_per_case_and_provider_that_runs_here(tmp_path: Path) -> None:
    document, printed = run("attention", tmp_path)
    rows = document["rows"]
    keys = {(row["case"], row["provider"]) for row in rows}
    assert len(keys) == len(rows) == 3 * 4 + 2 * 2
    assert {name for _, name in keys if "," not in name} == {
        "dense mask",
        "sdpa per block",
        "ours",
        "library",
    }
    for row in rows:
        assert 0 < row["p20"] <= row["median_ms"] <= row["p80"]
        assert row["error"] < attention.BOUND["fp32"]
        assert row["tflops"] > 0
        assert row["pct_of_floor"] > 0
        assert row["peak_mib"] > 0
        assert (row["speedup"] == 1) == (row["provider"] == "dense mask")
    # The parts: what a merge costs, and a backward for dq alone.
    assert ("context apart", "library, merged") in keys
    assert ("context, backward", "library, dq alone") in keys
    assert any("needs a CUDA device" in reason for reason in document["absent"])
    assert not document["failed"]
    assert "absent flex: --quick compiles nothing" in printed


def test_work_is_counted_by_pairs_and_products() -> None:
    rows = intervals.noisy_half(4, 2, 3)
    forward = attention.Case("", rows, heads=2, width=8, dtype="fp32")
    both = attention.Case("", rows, heads=2, width=8, dtype="fp32", backward=True)
    apart = attention.Case("", rows, heads=2, width=8, dtype="fp32", backward=True, context=12)
    known, own = 6 * 6, 2 * 6 * 6
    assert rows.pairs == known + own
    product = 2 * 2 * 8
    assert forward.flop == 2 * product * (known + own)
    assert both.flop == 7 * product * (known + own)
    assert apart.flop == product * (5 * known + 7 * own)


def test_a_provider_that_disagrees_with_float64_is_not_timed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(attention.BOUND, "fp32", 1e-12)
    with pytest.raises(SystemExit):
        attention.main(["--quick", "--device", "cpu", "--providers", "ours"])
    assert "FAILED causal training, ours: relative error" in capsys.readouterr().out


def test_a_gradient_that_is_not_a_number_is_a_failure() -> None:
    case = attention.Case("nan", intervals.causal(2, 1, 4), 1, 8, "fp32", backward=True)
    given, failed = case.tensors("cpu", 0), {}

    def step(i: attention.Tensors) -> tuple[torch.Tensor, ...]:
        out, dq, dk, dv = attention._step("dense mask", case, "cpu")(i)
        return out, dq, dk, dv * float("nan")

    assert attention._checked(case, given, {"broken": step}, failed) == {}
    assert "relative error nan" in failed["nan, broken"]


def test_providers_agree_where_a_block_has_two_intervals() -> None:
    rows = intervals.windowed(6, 1, 4, window=3, sink=1)
    case = attention.Case("", rows, heads=2, width=8, dtype="fp32", backward=True)
    given = case.tensors("cpu", 0)
    exact = attention.oracle(case, given)
    for name in ("dense mask", "sdpa per block", "ours"):
        output = attention._step(name, case, "cpu")(given)
        for x, y in zip(output, exact, strict=True):
            assert torch.allclose(x[:, :, :1].double(), y, atol=1e-5)


def test_on_a_gpu_the_parts_run_and_equal_float64() -> None:
    with fake_cuda() as gpu:
        for case in attention_parts.cases(Namespace(quick=True, device="cuda")):
            given, failed = case.tensors("cuda", 0), dict[str, str]()
            # The fake GPU has no cuDNN.
            steps = {name: step for name, step in case.steps().items() if "cuDNN" not in name}
            assert attention._checked(case, given, steps, failed).keys() == steps.keys(), failed
    assert gpu.launches["_block_attention_dq_kernel"] > gpu.launches["_block_attention_dkdv_kernel"]
