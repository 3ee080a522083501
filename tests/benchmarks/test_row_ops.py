"""The benchmark of norms, rotation and modulation runs in small and counts what the ops move."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import row_ops
from tests.benchmarks.test_benchmarks import run
from tests.fake_cuda import fake_cuda


def test_a_row_per_op_and_backend_that_runs_here(tmp_path: Path) -> None:
    document, _ = run("row_ops", tmp_path)
    rows = {(row["case"], row["backend"]): row for row in document["rows"]}
    assert {case for case, _ in rows} == set(row_ops.OPS)
    for (_, backend), row in rows.items():
        assert row["error"] < row_ops.BOUND["fp32"]
        assert row["gb_per_s"] == pytest.approx(row["bytes"] / row["median_ms"] / 1e6)
        assert row["pct_of_copy"] > 0
        assert (row["speedup"] == 1) == (backend == "reference")
    assert not document["failed"]


@pytest.mark.parametrize("op", row_ops.OPS)
def test_the_bytes_are_those_of_what_comes_in_and_goes_out(op: str) -> None:
    case = row_ops.Case(op, "fp32", batch=2, frames=3, tokens=5, heads=2, width=8)
    given = case.tensors("cpu", 0)
    out = case.step("reference")(given)
    # Caches are written where the chunk is, not read.
    shared = ("weight_q", "weight_k", "gate", "scale", "shift", "position", "k_cache", "v_cache")
    tokens = [x for name, x in given.items() if name not in shared]
    # The gradients of what tokens share are left out with it.
    chunks = [x[:, : case.length] for x in out if x.ndim > 1 and x.shape[1] >= case.length]
    assert case.bytes == sum(x.numel() * x.element_size() for x in (*tokens, *chunks))


def test_a_backend_that_disagrees_is_not_timed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(row_ops.BOUND, "fp32", -1.0)
    with pytest.raises(SystemExit):
        row_ops.main(["--quick", "--device", "cpu", "--providers", "reference", "--case", "adaln"])
    assert "FAILED adaln fp32 B=2, reference: relative error" in capsys.readouterr().out


def test_on_a_gpu_every_op_is_launched(tmp_path: Path) -> None:
    with fake_cuda() as gpu:
        row_ops.main(["--quick", "--device", "cuda", "--out", str(tmp_path)])
    rows = json.loads((tmp_path / "row_ops.json").read_text())["rows"]
    assert {(r["case"], r["backend"]) for r in rows if r["backend"] != "reference"} == {
        (op, backend) for op in row_ops.OPS for backend in ("native", "triton")
    }
    assert {"_qk_norm_rope_bwd_kernel", "_adaln_fwd_kernel"} <= gpu.launches.keys()
    assert {"qk_norm_rope_cuda", "adaln_bwd_cuda"} <= gpu.launches.keys()
