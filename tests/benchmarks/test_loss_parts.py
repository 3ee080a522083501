"""The parts of the native loss's time on a CPU."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from afd_kernels import native
from benchmarks import loss_parts
from benchmarks.nft_case import Nft

pytestmark = pytest.mark.skipif(native.why_missing() is not None, reason=str(native.why_missing()))

ROOT = Path(__file__).parents[2]


def test_every_instruction_set_has_its_parts(tmp_path: Path) -> None:
    tiny = ["--shape", "4", "3", "10", "13", "--reps", "3", "--budget", "0.1", "--batch", "2"]
    loss_parts.main([*tiny, "--dtype", "bf16", "--out", str(tmp_path)])
    rows = json.loads((tmp_path / "loss_parts.json").read_text())["rows"]
    isas = {isa for isa in native.isas() if isa != "baseline"} or set(native.isas())
    assert {(row["isa"], row["quantile"]) for row in rows} == {
        (isa, quantile) for isa in isas for quantile in ("p20", "median")
    }
    for row in rows:
        assert row["loss_ms"] < row["op_ms"]
        moved = 2 * 4 * 3 * 10 * 13 * 22  # two passes of five operands and a gradient, 2 bytes each
        rate = moved / row["loss_ms"] / 1e6
        assert row["pct_of_stream"] == pytest.approx(100 * rate / row["stream_gb_per_s"])
    assert native.isa() == native.isas()[-1]


def test_what_is_called_without_the_op_computes_the_same() -> None:
    inputs = Nft("x0_adaptive", "bf16", 2, (4, 3, 10, 13)).inputs("cpu", 0)
    _, gradient = Nft("x0_adaptive", "bf16", 2, (4, 3, 10, 13)).step("native", "given")(inputs)
    run = loss_parts.direct(inputs)
    _, results = run.__defaults__[0]
    results[2].zero_()
    run(0)
    assert torch.equal(results[2], gradient)


def test_page_faults_of_a_call_are_counted() -> None:
    """In a process of its own: what an allocator keeps depends on what ran before."""
    program = (
        "import torch\nfrom benchmarks.loss_parts import kernel_share\n"
        "large = lambda _: torch.empty(2**26).fill_(1.0)  # beyond what the allocator keeps\n"
        "print(kernel_share(large)[0], kernel_share(lambda _: None)[0])"
    )
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    large, nothing = map(float, done.stdout.split())
    assert large > 50
    assert nothing < 50
