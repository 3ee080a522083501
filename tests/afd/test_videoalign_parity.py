"""The parity command for VideoAlign: on the shared goldens, and where it must fail."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from afd.discriminators.videoalign import model as videoalign_model
from afd.discriminators.videoalign.model import VideoAlign
from afd.discriminators.videoalign.prompt import OWN_TEMPLATE, REWARD_TOKENS, read_template
from afd.testing.videoalign_golden import Folder, Line
from afd.testing.videoalign_parity import main, run_folder


@pytest.fixture
def golden(shared: Path) -> Path:
    return shared / "golden" / "videoalign"


@pytest.fixture
def copy(golden: Path, tmp_path: Path) -> Path:
    """A writable copy without the larger cases."""
    folder = Path(shutil.copytree(golden, tmp_path / "copy", copy_function=shutil.copyfile))
    for file in [folder, *folder.rglob("*")]:
        file.chmod(0o755)
    for name in ("batch2", "single"):
        (folder / f"forward_{name}.safetensors").unlink()
    cases = json.loads((folder / "forward.json").read_text())
    (folder / "forward.json").write_text(json.dumps({"causality": cases["causality"]}))
    return folder


def failed(folder: Path) -> dict[str, str]:
    return {line.name: line.text() for line in run_folder(folder) if not line.ok}


def test_every_shared_golden_file_agrees(golden: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(golden)]) == 0
    lines = capsys.readouterr().out.splitlines()
    prose = ("README.md", "LICENSE.VideoAlign")
    files = {f.name for f in golden.iterdir() if f.is_file() and f.name not in prose}
    assert {line.split()[0] for line in lines[:-1]} == files
    assert lines[-1] == f"{len(files)} files, 0 failed"


@pytest.mark.parametrize(
    ("name", "tensor", "index"),
    [
        ("forward_causality", "rewards", (1, 2)),
        ("forward_causality", "rewards.fp32_bf16rope", (0, 0)),
        ("forward_causality", "rewards.bf16", (0, 1)),
        ("forward_causality", "rewards.lora_disabled", (1, 0)),
        ("forward_causality", "layer_out_at_reward_tokens", (0, 1, 2, 7)),
        ("forward_causality", "vision_premerger_first16", (3, 4)),
        ("forward_causality", "input_ids", (0, 600)),
        ("preprocess_example_1_A", "frame_indices", (3,)),
        ("preprocess_example_1_A", "resize_140x196_uint8", (0, 1, 20, 30)),
        ("preprocess_example_3_B", "pixel_values_84x112", (5, 40)),
        ("preprocess_example_3_B", "pixel_rows", (5, 40)),
        ("preprocess_example_3_B", "resized_frame_channel_mean", (2, 1)),
        ("rope", "llm_sin_bf16buf", (8, 0)),
        ("rope", "vision_freqs_bf16buf_seq32", (31, 3)),
    ],
)
def test_one_wrong_number_fails_its_file(copy: Path, name: str, tensor: str, index: Any) -> None:
    file = copy / f"{name}.safetensors"
    held = load_file(file)
    held[tensor][index] = held[tensor][index] * 0.5 + 3
    save_file(held, file)
    # Its neighbours would only take time.
    for other in copy.glob("*.safetensors"):
        if other != file:
            other.unlink()
    if "forward" not in name:
        (copy / "forward.json").unlink()
    assert f"{name}.safetensors" in failed(copy)


def test_another_lora_weight_fails_every_score_and_nothing_else(copy: Path) -> None:
    file = copy / "checkpoint_root" / "model_config.json"
    settings = json.loads(file.read_text())
    settings["peft_lora_config"]["lora_alpha"] = 8
    file.write_text(json.dumps(settings))
    assert set(failed(copy)) == {"forward.json", "forward_causality.safetensors"}


def test_the_default_rotary_tables_are_the_nearest_to_the_original_s_bfloat16_run(
    golden: Path,
) -> None:
    """Frequencies rounded, and the vision tower's angles, sines and cosines as well."""
    seen: dict[str, dict[str, float]] = {}
    for rotary in ("released", "rounded", "exact"):
        model = VideoAlign.load(
            golden / "checkpoint_root",
            base=golden / "tiny_base",
            template=OWN_TEMPLATE,
            rotary=rotary,
        )
        for name in ("single", "batch2", "causality"):
            held = load_file(golden / f"forward_{name}.safetensors")
            with torch.no_grad():
                found = model.see(held["pixel_values_videos"], held["video_grid_thw"])
            error = float((found.float() - held["vision_tokens.bf16"]).norm())
            seen.setdefault(name, {})[rotary] = error
    for errors in seen.values():
        assert min(errors, key=lambda rotary: errors[rotary]) == "released", errors


def test_other_positions_are_seen(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stretched positions replace M-RoPE's: the network must receive the plain count."""
    plain: Callable[..., torch.Tensor] = torch.arange

    def stretched(*arguments: Any, **settings: Any) -> torch.Tensor:
        return plain(*arguments, **settings) * (2 if "device" in settings else 1)

    class Other:
        def __getattr__(self, name: str) -> Any:
            return stretched if name == "arange" else getattr(torch, name)

    monkeypatch.setattr(videoalign_model, "torch", Other())
    assert set(failed(copy)) == {"forward.json", "forward_causality.safetensors"}


def test_a_key_too_many_is_seen_by_name(copy: Path) -> None:
    file = copy / "checkpoint_root" / "checkpoint-1" / "model.pth"
    state = torch.load(file, weights_only=True)
    state["base_model.model.visual.extra"] = torch.ones(1)
    torch.save(state, file)
    lines = failed(copy)
    assert "tiny_state_dict_keys.json" in lines
    assert "visual.extra" in lines["forward_causality.safetensors"]


def test_unknown_files_and_tensors_are_reported(
    copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_file({"a": torch.zeros(3)}, copy / "mystery.safetensors")
    held = load_file(copy / "rope.safetensors")
    save_file({**held, "stray": torch.zeros(1)}, copy / "rope.safetensors")
    assert main([str(copy)]) == 1
    out = capsys.readouterr().out
    assert out.count("unknown") == 2
    assert "stray" in out


def test_a_folder_without_goldens_is_no_success(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(tmp_path)]) == 2
    assert "checkpoint_root" in capsys.readouterr().err


def test_nothing_compared_and_not_a_number_are_no_success() -> None:
    assert not Line("nothing").ok
    line = Line("nan")
    line.near("x", torch.tensor([float("nan")]), torch.zeros(1), 1.0)
    assert not line.ok
    shape = Line("shape")
    shape.near("x", torch.zeros(2), torch.zeros(1), 1.0)
    assert not shape.ok


def test_the_original_s_template_reads_from_a_checkout(golden: Path, tmp_path: Path) -> None:
    template = Folder(golden, torch.device("cpu")).template
    source = f'DETAILED_PROMPT_WITH_SPECIAL_TOKEN = """{template}"""\n'
    (tmp_path / "prompt_template.py").write_text(source)
    read = read_template(tmp_path)
    assert read == template
    assert all(token in read for token in REWARD_TOKENS)
    entries = json.loads((golden / "prompts.json").read_text())
    for entry in entries:
        assert read.format(text_prompt=entry["prompt"]) == entry["user_text"]
