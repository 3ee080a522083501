"""The parity command: on the shared goldens, on unseen configurations, and where it must fail."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from afd.testing.measure import Report, relative_error
from afd.testing.parity import main, run_folder
from tests.afd.golden_writer import Writer
from tests.tolerances import NETWORK_FLOAT64

# Nothing here equals the shared folders' sizes; names say what is unusual.
BASE: dict[str, Any] = {
    "dim": 64,
    "num_heads": 2,
    "ffn_dim": 80,
    "num_layers": 2,
    "freq_dim": 32,
    "text_dim": 24,
    "text_len": 7,
    "H": 6,
    "W": 4,
    "chunk": 3,
    "batch": 2,
    "frames": 6,
    "prompt_lens": [4, 7, 1],
    "window": 7,
    "sink": 2,
    "roll_chunks": 5,
    "steps": [1000, 750, 500, 250],
    "win_train": 4,
    "sf_exit": 2,
    "sf_frames": 9,
}
UNSEEN: dict[str, tuple[dict[str, Any], list[int] | None]] = {
    "head_dim_40_chunk_2_window_5_sink_2": (
        {
            "dim": 120,
            "num_heads": 3,
            "chunk": 2,
            "window": 5,
            "sink": 2,
            "batch": 3,
            "frames": 8,
            "sf_frames": 6,
            "win_train": 3,
            "H": 6,
            "W": 10,
        },
        None,
    ),
    "framewise_two_steps_with_a_first_chunk_list": (
        {
            "chunk": 1,
            "steps": [1000, 500],
            "window": 4,
            "sink": 1,
            "batch": 1,
            "frames": 5,
            "sf_frames": 3,
            "sf_exit": 1,
            "num_layers": 3,
            "H": 10,
            "W": 6,
            "win_train": 2,
        },
        [1000, 750, 500, 250],
    ),
    "window_and_sink_no_multiples_of_the_chunk": (
        {"dim": 96, "window": 8, "sink": 4, "sf_exit": 0, "sf_frames": 6, "num_layers": 1},
        None,
    ),
}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of golden folders, one per unseen configuration."""
    root = tmp_path_factory.mktemp("golden")
    for seed, (name, (changes, first)) in enumerate(UNSEEN.items()):
        Writer(root / name, {**BASE, **changes, "seed": seed}, first).write()
    return root


def test_every_shared_golden_file_agrees(shared: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(shared / "golden")]) == 0
    lines = capsys.readouterr().out.splitlines()
    files = [p for f in ("A_small", "B_hd128") for p in (shared / "golden" / f).glob("*.saf*")]
    others = [p for f in ("longlive", "taehv") for p in (shared / "golden" / f).glob("*.saf*")]
    # Without three weights, with units and the sum; a LoRA file is compared by its forward.
    assert len(lines) == len(files) - 2 + len(others) - 2 + 1 + 1


def test_bfloat16_stays_within_the_released_code_s_own_error(
    shared: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(shared / "golden"), "--dtype", "bfloat16"]) == 0
    assert "B_hd128/teacher_forcing_aug" in capsys.readouterr().out


@pytest.mark.parametrize("backends", [[], ["reference"], ["native", "library"]], ids=str)
def test_unseen_configurations_agree(written: Path, backends: list[str]) -> None:
    options = [word for backend in backends for word in ("--backend", backend)]
    assert main([str(written), *options]) == 0


def test_float64_agrees_to_the_rounding_of_the_files(written: Path) -> None:
    for report in run_folder(written / next(iter(UNSEEN)), dtype=torch.float64):
        assert report.ok, report.line()
        assert report.values.error < NETWORK_FLOAT64, report.line()
        assert report.gradients.error < NETWORK_FLOAT64, report.line()


@pytest.fixture
def copy(written: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(written / list(UNSEEN)[2], tmp_path / "copy"))


def test_a_wrong_weight_fails_every_file(copy: Path) -> None:
    weights = load_file(copy / "weights.safetensors")
    weights["blocks.0.self_attn.norm_k.weight"][5] += 0.1
    save_file(weights, copy / "weights.safetensors")
    reports = list(run_folder(copy))
    assert len(reports) == 11
    assert not any(report.ok for report in reports)
    assert main([str(copy)]) == 1


@pytest.mark.parametrize(
    ("name", "tensor", "index"),
    [
        ("rollout_rolling", "final.kv.0.k", (0, -1, 0, 0)),
        ("rollout", "call.003.flow", (0, 0, 3, 1, 1)),
        ("sf_train_grad_detached", "gradnorm.head.modulation", ()),
        ("train_causal", "tap.blocks.0.ffn", (0, 2, 5)),
        ("rollout", "call.001.meta", (1,)),
        ("teacher_forcing", "frame_mask", (0, 1)),
    ],
)
def test_one_wrong_number_fails_its_file_and_is_named(
    copy: Path, name: str, tensor: str, index: tuple[int, ...]
) -> None:
    golden = load_file(copy / f"{name}.safetensors")
    value = golden[tensor]
    value[index] = ~value[index] if value.dtype == torch.bool else value[index] * 1.5 + 1
    save_file(golden, copy / f"{name}.safetensors")
    failed = [report for report in run_folder(copy) if not report.ok]
    assert [report.name for report in failed] == [name]
    assert tensor in failed[0].line()


def test_the_two_self_forcing_files_are_told_apart(copy: Path) -> None:
    reference, detached = (
        copy / f"sf_train_grad_{n}.safetensors" for n in ("reference", "detached")
    )
    content = reference.read_bytes()
    reference.write_bytes(detached.read_bytes())
    detached.write_bytes(content)
    failed = [report.name for report in run_folder(copy) if not report.ok]
    assert failed == ["sf_train_grad_detached", "sf_train_grad_reference"]


def test_unknown_files_are_reported(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_file({"a": torch.zeros(3)}, copy / "mystery.safetensors")
    (copy / "notes.txt").write_text("?")
    assert main([str(copy)]) == 1
    out = capsys.readouterr().out
    assert "mystery" in out
    assert "notes.txt" in out
    assert out.count("unknown") == 2


def test_missing_and_extra_weights_are_errors(copy: Path) -> None:
    weights = load_file(copy / "weights.safetensors")
    save_file({**weights, "extra": torch.zeros(1)}, copy / "weights.safetensors")
    assert "extra" in next(run_folder(copy)).line()
    weights.pop("head.modulation")
    save_file(weights, copy / "weights.safetensors")
    assert "head.modulation" in next(run_folder(copy)).line()


def test_a_folder_without_weights_is_no_success(copy: Path) -> None:
    (copy / "weights.safetensors").unlink()
    (report,) = run_folder(copy)
    assert "no weights.safetensors" in report.line()
    assert not report.ok


def test_the_command_runs_as_its_docstring_says(copy: Path) -> None:
    for path in copy.glob("*.safetensors"):
        if path.stem not in ("weights", "rollout_rolling"):
            path.unlink()
    command = [sys.executable, "-m", "afd.testing.parity", str(copy), "--dtype", "float64"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("1 files, 0 failed\n")


def test_an_empty_folder_is_no_success(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path)]) == 2
    assert "neither" in capsys.readouterr().err


def test_not_a_number_is_no_success() -> None:
    bad = torch.tensor([1.0, float("nan")])
    assert relative_error(bad, torch.ones(2)) == float("inf")
    assert relative_error(torch.ones(2), bad) == float("inf")
    assert relative_error(torch.ones(2), torch.ones(3)) == float("inf")
    assert not Report("nothing compared").ok


def test_the_written_configurations_are_as_unusual_as_they_say(written: Path) -> None:
    for name, (changes, _) in UNSEEN.items():
        config = json.loads((written / name / "config.json").read_text())
        assert config | changes == config
        window, sink, chunk = (config[key] for key in ("window", "sink", "chunk"))
        assert config["roll_chunks"] * chunk > window >= sink + chunk
