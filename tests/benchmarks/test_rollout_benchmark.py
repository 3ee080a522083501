"""The rollout benchmark in small: providers agree, rows add up, what is counted is right."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import rollout
from benchmarks.hardware import Machine

QUICK = ["--quick", "--device", "cpu", "--reps", "2"]


def test_every_provider_gets_a_row_whose_numbers_belong_together(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rollout.main([*QUICK, "--out", str(tmp_path), "--batch", "1", "2"])
    document = json.loads((tmp_path / "rollout.json").read_text())
    rows = {(row["case"], row["B"], row["provider"]): row for row in document["rows"]}
    assert len(rows) == 2 * 2 * 3
    assert document["failed"] == {}
    for (case, batch, provider), row in rows.items():
        assert 0 < row["p20"] <= row["median_ms"] <= row["p80"]
        assert row["chunks_per_s"] == pytest.approx(1e3 * batch / row["median_ms"])
        assert row["fps"] == pytest.approx(12 * row["chunks_per_s"])
        assert row["floor_ms"] > 0
        assert row["cache_mib"] == row["formula_mib"]
        eager = rows[case, batch, "eager"]
        assert row["speedup"] == pytest.approx(eager["median_ms"] / row["median_ms"])
        if provider == "ours":
            assert row["syncs"] == 0
            assert row["ops"] < eager["ops"] / 2
            assert row["error"] < 1e-4
        else:
            assert row["syncs"] > 0
    assert "chunks/s" in capsys.readouterr().out


def test_a_provider_that_disagrees_is_not_timed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    denoise = rollout.denoise_chunk
    monkeypatch.setattr(rollout, "denoise_chunk", lambda *args: 1.1 * denoise(*args))
    with pytest.raises(SystemExit):
        rollout.main([*QUICK, "--case", "no window"])
    said = capsys.readouterr().out
    assert "FAILED quick, no window ours: relative error" in said
    assert "FAILED quick, no window eager" not in said


def test_a_value_read_back_counts_as_a_wait() -> None:
    with rollout.Counter() as counter:
        x = torch.ones(3)
        x.sum().item()
        x.nonzero()
        x + x
    assert counter.syncs == 2


def test_memory_and_work_are_those_of_the_shape() -> None:
    class Arguments:
        device, quick = "cuda", False

    case = next(iter(rollout.cases(Arguments())))
    work = rollout._work(case, 1, Machine(4.3e12, 788e12))
    assert (work["tokens"], work["keys"]) == (4680, 32760)
    # Five passes that see 21 frames (40.4 TFLOP each).
    assert work["gflop"] == pytest.approx(5 * 40.4e3, rel=0.01)
