"""The benchmark of whole videos runs in small; a longer stream holds no more memory."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path

import pytest
import torch

from benchmarks import videos
from benchmarks.hardware import Machine
from tests.fake_cuda import fake_cuda

QUICK = ["--quick", "--device", "cpu"]


def test_providers_make_the_same_videos_and_a_window_goes_on(tmp_path: Path) -> None:
    videos.main([*QUICK, "--out", str(tmp_path)])
    document = json.loads((tmp_path / "videos.json").read_text())
    assert document["failed"] == {}
    rows = {(r["case"], r["provider"], r["B"], r["frames"]): r for r in document["rows"]}
    whole = {key[1:3] for key in rows if key[0] == "quick"}
    assert whole == {("eager", 1), ("eager+text", 1), ("ours", 1), ("eager", 2), ("ours", 2)}
    for (case, provider, batch, frames), row in rows.items():
        assert row["fps"] == pytest.approx(batch * (4 * frames - 3) / row["seconds"])
        if case != "autoencoder":
            assert row["floor_s"] > 0
            assert row["error"] < 1e-4
        if case == "quick" and batch == 1:
            eager = rows["quick", "eager", 1, frames]
            assert row["speedup"] == pytest.approx(eager["seconds"] / row["seconds"])
            assert (row["speedup"] == 1) == (provider == "eager")
    short, long = (rows["quick, window", "ours", 1, frames] for frames in (9, 90))
    assert long["cache_mib"] == short["cache_mib"]
    assert long["peak_mib"] < 1.1 * short["peak_mib"]
    assert rows["autoencoder", "diffusers", 1, 3]["fps"] > 0


def test_a_provider_that_disagrees_is_not_timed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(videos.BOUND, "fp32", -1.0)
    with pytest.raises(SystemExit):
        videos.main([*QUICK, "--providers", "ours"])
    assert "FAILED quick B=1 ours: relative error" in capsys.readouterr().out


def test_on_a_gpu_videos_are_made_and_a_graph_that_fails_takes_nothing_along() -> None:
    args = Namespace(device="cuda", quick=True, budget=0.1, providers=["eager", "ours", "graph"])
    before, firsts, failed = list[videos.Row](), dict[int, torch.Tensor](), dict[str, str]()
    with fake_cuda():
        for run in videos.runs(args):
            failed |= videos.measure(run, Machine(1e12, 1e15), before, firsts, args)[1]
    assert {(row.provider, row.B) for row in before} == {("eager", 1), ("ours", 1), ("eager", 2)}
    assert all(row.error < 1e-4 for row in before if row.error is not None)
    assert {why for why in failed.values()} == {"RuntimeError: no CUDA graph on a fake GPU"}
