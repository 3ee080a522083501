"""LongLive's streams: against its goldens, and at other sizes against its rules written out."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from afd.models.wan.network import CausalWan
from afd.models.wan.student import WanStudent
from afd.models.wan.types import WanConfig
from afd.rollout import Switch, stream
from afd.testing.measure import relative_error
from afd.testing.parity import main, run_folder
from tests.afd.longlive_writer import LongLiveWriter, Switches
from tests.tolerances import NETWORK_FLOAT64, NETWORK_FORWARD

NETWORK: dict[str, Any] = {
    "dim": 32,
    "num_heads": 2,
    "ffn_dim": 48,
    "num_layers": 2,
    "freq_dim": 32,
    "text_dim": 12,
    "text_len": 6,
}
STREAM: dict[str, Any] = {
    "chunk": 3,
    "window": 9,
    "sink": 3,
    "H": 4,
    "W": 6,
    "batch": 1,
    "frames": 21,
    "steps": [1000, 500],
    "shift": 5.0,
    "context_noise": 0,
    "prompt_lens_first": [4],
    "prompt_lens_second": [2],
}
PAIR = {"batch": 2, "prompt_lens_first": [5, 1], "prompt_lens_second": [2, 6]}
# Sizes of the network, of the stream, and the last chunk that starts within the window.
SIZES: dict[str, tuple[dict[str, Any], dict[str, Any], int]] = {
    "as_released": ({}, {}, 3),
    "window_no_multiple_sink_below_chunk": (
        {"num_heads": 1, "num_layers": 3},
        {"window": 8, "sink": 2, "steps": [1000, 750, 500, 250], **PAIR},
        2,
    ),
    "framewise": (
        {"dim": 48, "num_heads": 3, "num_layers": 1},
        {"chunk": 1, "window": 5, "sink": 1, "frames": 12, "H": 6},
        5,
    ),
    "no_sink_noisy_context": (
        {},
        {"chunk": 2, "window": 5, "sink": 0, "frames": 14, "context_noise": 40},
        2,
    ),
    "framewise_sink_of_several": (
        {},
        {"chunk": 1, "window": 6, "sink": 3, "frames": 13, **PAIR},
        6,
    ),
    "sink_no_multiple_above_chunk": ({}, {"chunk": 2, "window": 8, "sink": 3, "frames": 18}, 4),
}


def make(folder: Path, name: str) -> LongLiveWriter:
    network, setting, _ = SIZES[name]
    return LongLiveWriter(folder, NETWORK | network, STREAM | setting, seed=len(name))


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A golden folder per size; a switch of every mode, early, at the window's end and late."""
    root = tmp_path_factory.mktemp("longlive")
    for name, (_, _, border) in SIZES.items():
        runs = {
            "early_recache": (1, "recache"),
            "border_recache": (border, "recache"),
            "border_new_sink": (border, "new_sink"),
            "late_plain": (border + 1, "plain"),
            "late_recache": (border + 1, "recache"),
            "late_new_sink": (border + 1, "new_sink"),
        }
        make(root / name, name).write(runs)
    return root


def test_the_released_streams_agree(shared: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(shared / "golden" / "longlive")]) == 0
    assert "6 files, 0 failed" in capsys.readouterr().out


@pytest.mark.parametrize("name", SIZES)
def test_other_sizes_agree_with_the_rules_written_out(written: Path, name: str) -> None:
    reports = list(run_folder(written / name, dtype=torch.float64))
    assert len(reports) == 8
    for report in reports:
        assert report.ok, report.line()
        assert report.values.error < NETWORK_FLOAT64, report.line()


def test_float32_stays_within_the_tolerance(written: Path) -> None:
    assert main([str(written / "framewise")]) == 0


@pytest.mark.parametrize(
    ("name", "tensor", "index"),
    [
        ("late_recache", "after_recache.kv.1.k", (0, -1, 0, 0)),
        ("late_new_sink", "final.kv.1.v", (0, 0, 0, 0)),
        ("late_plain", "after_switch.flow", (0, 0, 3, 1, 1)),
        ("early_recache", "recache.flow", (0, 1, 0, 0, 0)),
        ("rollout_window_sink", "calls.meta", (4, 3)),
    ],
)
def test_one_wrong_number_fails_its_file(
    written: Path, tmp_path: Path, name: str, tensor: str, index: tuple[int, ...]
) -> None:
    copy = Path(shutil.copytree(written / "as_released", tmp_path / "copy"))
    golden = load_file(copy / f"{name}.safetensors")
    golden[tensor][index] += 1
    save_file(golden, copy / f"{name}.safetensors")
    failed = {report.name: report for report in run_folder(copy) if not report.ok}
    assert set(failed) == {name}
    assert tensor in failed[name].line()


def test_a_mode_taken_for_another_fails(written: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(written / "as_released", tmp_path / "copy"))
    config = json.loads((copy / "config.json").read_text())
    for name in ("late_recache", "late_new_sink"):
        config["files"][name]["global_sink"] ^= True
    (copy / "config.json").write_text(json.dumps(config))
    assert {r.name for r in run_folder(copy) if not r.ok} == {"late_recache", "late_new_sink"}


SEVERAL: list[Switches] = [
    {2: "recache", 4: "recache"},
    {3: "new_sink", 4: "recache", 6: "new_sink"},
    {1: "new_sink", 4: "plain", 5: "recache", 6: "recache"},
    {0: "recache", 5: "new_sink"},
]


@pytest.mark.parametrize("switches", SEVERAL, ids=str)
@pytest.mark.parametrize("name", ["as_released", "window_no_multiple_sink_below_chunk"])
def test_several_switches_in_one_stream(tmp_path: Path, name: str, switches: Switches) -> None:
    writer = make(tmp_path, name)
    s = writer.stream
    net = CausalWan(WanConfig(**writer.network, chunk=3, window=s["window"], sink=s["sink"]))
    net.load_state_dict(writer.weights)
    student = WanStudent(net.requires_grad_(False), height=s["H"], width=s["W"])
    texts = [writer.texts[(i + 1) % 2] for i in range(len(switches))]
    pairs = zip(switches.items(), texts, strict=True)
    chunks = stream(
        student,
        writer.texts[0],
        lambda c, step: writer.draws[c][step - 1] if step else writer.noise[:, 3 * c : 3 * c + 3],
        frames=21,
        denoising_steps=s["steps"],
        switches={chunk: Switch(text, mode) for (chunk, mode), text in pairs},  # type: ignore[arg-type]
    )
    expected = writer.run(switches)["latents"]
    assert relative_error(torch.cat(list(chunks), 1), expected) < NETWORK_FORWARD
