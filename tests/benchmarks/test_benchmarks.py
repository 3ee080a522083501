"""The benchmarks run in small, check what they time, and write what their readers expect."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import harness, nft_loss, official, suite
from tests.cases import BASE, oracle

ROOT = Path(__file__).parents[2]


def run(name: str, out: Path, *options: str) -> tuple[dict[str, Any], str]:
    command = [sys.executable, f"benchmarks/{name}.py", "--quick", "--device", "cpu"]
    # As from a shell: neither the interpreter of the tests nor an installed package is needed.
    env = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "PYTHONPATH")}
    done = subprocess.run(
        [*command, "--out", str(out), *options], cwd=ROOT, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads((out / f"{name}.json").read_text()), done.stdout


def test_nft_loss_writes_a_row_per_provider_and_noise_source(tmp_path: Path) -> None:
    document, printed = run("nft_loss", tmp_path, "--all", "--plot")
    rows = document["rows"]
    keys = {(r["backend"], r["case"], r["dtype"], r["noise"]) for r in rows}
    assert len(keys) == len(rows)
    for weighting in ("x0_adaptive", "velocity"):
        for dtype in ("fp32", "bf16", "mixed"):
            for backend in ("eager", "reference"):
                for noise in ("given", "seed"):
                    assert (backend, weighting, dtype, noise) in keys
    for row in rows:
        assert 0 < row["p20"] <= row["median_ms"] <= row["p80"]
        assert row["peak_mib"] > 0
        assert row["gb_per_s"] == pytest.approx(row["bytes"] / row["median_ms"] / 1e6)
        if row["backend"] in suite.OURS:
            assert row["error"]["grad"] < 5e-3
    assert document["environment"]["versions"]["torch"] == torch.__version__
    assert document["floors"][0]["GB/s"]["copy"] > 0
    assert "regenerating the noise" in printed
    assert (tmp_path / "nft_loss.png").stat().st_size > 1000


def test_forward_noise_writes_its_rows(tmp_path: Path) -> None:
    document, _ = run("forward_noise", tmp_path)
    assert {r["dtype"] for r in document["rows"]} == {"fp32", "bf16"}
    assert {"eager", "reference"} <= {r["backend"] for r in document["rows"]}


def test_a_provider_that_disagrees_with_float64_is_not_timed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(nft_loss.BOUND, "fp32", 1e-12)
    quick = ["--all", "--quick", "--device", "cpu", "--dtype", "fp32", "--weighting", "velocity"]
    with pytest.raises(SystemExit):
        nft_loss.main([*quick, "--providers", "eager", "reference", "--out", str(tmp_path)])
    assert "FAILED nft_loss velocity fp32 B=2 reference" in capsys.readouterr().out
    document = json.loads((tmp_path / "nft_loss.json").read_text())
    assert {row["backend"] for row in document["rows"]} == {"eager"}
    assert "is above 1e-12" in next(iter(document["failed"].values()))


@pytest.mark.parametrize("weighting", ["x0_adaptive", "velocity"])
def test_the_official_formula_in_float64_is_the_oracle_of_the_tests(weighting: str) -> None:
    case = nft_loss.Nft(weighting, "fp32", 2, (3, 4, 5, 6))
    inputs = case.inputs("cpu", 0)
    loss, grad = case.oracle(inputs)
    options = {"prior_weight": nft_loss.PRIOR_WEIGHT, "nft_beta": nft_loss.NFT_BETA}
    same = replace(BASE, shape=(2, 3, 4, 5, 6), weighting=weighting, **options)
    expected = oracle(same, inputs | {"frame_mask": None} | options, inputs["noise"])
    torch.testing.assert_close(loss, expected["loss"], rtol=1e-12, atol=0)
    torch.testing.assert_close(grad, expected["grad"], rtol=1e-10, atol=1e-15)


def test_the_metrics_of_the_official_loss_carry_no_gradient() -> None:
    inputs = nft_loss.Nft("x0_adaptive", "fp32", 2, (3, 4)).inputs("cpu", 0)
    x_t = official.noised(inputs["x0"], inputs["noise"], inputs["t"])
    names = ("v_theta", "v_old", "v_ref", "x0", "t", "r")
    tensors: dict[str, Any] = {name: inputs[name] for name in names}
    loss, metrics = official.diffusionnft_loss(x_t=x_t, **tensors, nft_beta=0.1, prior_weight=1e-4)
    assert loss.dtype == torch.float64  # the adaptive weights promote it
    assert len(metrics) == 9
    assert not any(metric.requires_grad for metric in metrics.values())


def test_providers_are_interleaved_and_the_order_rotates() -> None:
    calls: list[str] = []
    runs = {name: lambda _, name=name: calls.append(name) for name in "abc"}
    timings = harness.timed(runs, "cpu", sets=1, reps=4, budget_s=60)
    # After one call each that is not counted.
    assert "".join(calls) == "abc" + "abc" + "bca" + "cab" + "abc"
    assert {t.reps for t in timings.values()} == {4}


def test_a_slow_provider_spends_its_own_share_and_the_others_go_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = 0.0

    def takes(seconds: float) -> harness.Run:
        def run(_: int) -> None:
            nonlocal now
            now += seconds

        return run

    monkeypatch.setattr(harness, "perf_counter", lambda: now)
    runs = {"slow": takes(2.0), "mid": takes(0.25), "fast": takes(0.01)}
    timings = harness.timed(runs, "cpu", sets=1, reps=20, budget_s=4.2)
    # Shares of 1.4 s: three rounds whatever they take, or as many as begin within the share.
    assert {name: timing.reps for name, timing in timings.items()} == {
        "slow": 3, "mid": 6, "fast": 20
    }  # fmt: skip
    assert timings["slow"].median_ms == pytest.approx(2000)
    assert timings["fast"].median_ms == pytest.approx(10)
    # Past the most it may take, every run has its one repetition and no other.
    timings = harness.timed(runs, "cpu", sets=1, reps=20, budget_s=4.2, most_s=3.0)
    assert {name: timing.reps for name, timing in timings.items()} == {
        "slow": 1, "mid": 1, "fast": 1
    }  # fmt: skip


def test_peak_memory_sees_temporaries_that_are_gone_when_the_call_returns() -> None:
    x = torch.ones(2**20)
    one = harness.peak_mib(lambda _: x + 1, "cpu")
    three = harness.peak_mib(lambda _: ((x + 1).double() + 1).sum(), "cpu")
    assert one == pytest.approx(4, abs=0.1)
    # x + 1 is freed after the cast; the float64 copy and its successor are alive together.
    assert three == pytest.approx(16, abs=4.1)


def test_traffic_counts_reads_and_writes_and_no_views() -> None:
    x = torch.ones(1024)
    counted, ops = harness.traffic(lambda _: (x.view(32, 32).t() + 1).sum())
    assert ops == 2
    assert counted == 4 * (1024 + 1024 + 1024 + 1)
