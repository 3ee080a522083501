"""The host's time per call is measured for every op on both paths."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from afd_kernels import native
from benchmarks.sections import ROOT, environment


@pytest.mark.skipif(native.why_missing() is not None, reason="the core is not built")
@pytest.mark.skipif(torch.cuda.is_available(), reason="its driver stands in for a GPU's")
def test_every_op_has_its_rows_and_another_checkout_stands_beside(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    command = [sys.executable, "benchmarks/host_overhead.py", "--rounds", "2"]
    env = {k: v for k, v in environment().items() if k != "TRITON_INTERPRET"}
    env["TRITON_CACHE_DIR"] = str(tmp_path / "cache")

    done = subprocess.run(
        [*command, "--out", str(tmp_path), "--against", str(ROOT)],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "host_overhead.json").read_text())["rows"]
    found = {(row["op"], row["path"], row["backward"]) for row in rows}
    for op in ("forward_noise", "nft_loss", "qk_norm_rope", "adaln"):
        assert {(op, path, back) for path in ("native", "triton") for back in (0, 1)} <= found
    assert ("block_attention", "triton", True) in found
    assert ("qk_norm_rope_append_", "native", False) in found
    assert all(row["p20"] <= row["median_us"] <= row["p80"] for row in rows)
    assert all(row["before_us"] > 0 for row in rows)
