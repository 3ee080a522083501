"""Files missing, damaged or not ours to write: exit code 2 and one sentence with their name."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml

from afd.cli import main
from afd.models.wan.checkpoints import save_diffusers
from afd.models.wan.network import CausalWan
from afd.sampling.config import SampleConfig
from tests.afd.released_models import STUDENT
from tests.afd.test_sample import CONFIGS, WanConfig, make, models

__all__ = ["models"]


@pytest.fixture
def words(models: Path, tmp_path: Path) -> list[str]:
    """`afd sample` of the small released layouts, into out/."""
    config: SampleConfig = make(models, tmp_path / "out", denoising_steps=[1000])
    path = tmp_path / "sample.yaml"
    path.write_text(yaml.safe_dump(config.model_dump(mode="json")), encoding="utf-8")
    return ["sample", str(path)]


def told(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert main(words) == 2
    said = capsys.readouterr().err
    assert "Traceback" not in said
    return said


def test_a_tokenizer_that_is_none_is_named(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    said = told([*words, f"student.tokenizer={tmp_path / 'empty'}"], capsys)
    assert f"tokenizer {tmp_path / 'empty'}: it cannot be read" in said
    (tmp_path / "empty" / "tokenizer.json").write_text("{")
    assert "it cannot be read" in told([*words, f"student.tokenizer={tmp_path / 'empty'}"], capsys)
    assert not (tmp_path / "out").exists()


def test_a_damaged_configuration_of_a_part_is_named(
    words: list[str], models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    student = tmp_path / "student"
    save_diffusers(student, CausalWan(WanConfig(**STUDENT)))
    (student / "config.json").write_text('{"eps": 1e-')
    said = told([*words, f"student.checkpoint={student}"], capsys)
    assert f"{student / 'config.json'}: not valid JSON" in said
    said = told([*words, f"student.checkpoint={student}", "--dry-run"], capsys)
    assert f"{student / 'config.json'}: not valid JSON" in said
    (student / "config.json").write_text("[]")
    assert "config.json: got 'list'; needed: a JSON" in told(
        [*words, f"student.checkpoint={student}"], capsys
    )
    for part in ("text_encoder", "vae"):
        copy = tmp_path / part
        shutil.copytree(models, copy)
        (copy / part / "config.json").write_text("{")
        assert f"{part} {copy / part}: it cannot be read" in told(
            [*words, f"student.pretrained={copy}"], capsys
        )


def test_an_index_of_weights_that_is_none_is_named(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    student = tmp_path / "student"
    save_diffusers(student, CausalWan(WanConfig(**STUDENT)))
    index = student / "diffusion_pytorch_model.safetensors.index.json"
    for held in ("{", "{}", '{"weight_map": {"a": 1}}', '{"weight_map": ["a"]}'):
        index.write_text(held)
        assert str(index) in told([*words, f"student.checkpoint={student}"], capsys)


def test_a_folder_that_cannot_be_made_is_named(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "sample.yaml" / "out"
    assert f"{out}: Not a directory" in told([*words, f"out={out}"], capsys)


def test_what_may_not_be_written_or_read_is_named(
    words: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def forbidden(self: Path, *args: object, **kwargs: object) -> None:
        # The tests may run as root, to whom nothing is forbidden.
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "mkdir", forbidden)
    assert f"{tmp_path / 'out'}: Permission denied" in told(words, capsys)


def test_one_process_at_a_time_samples_into_a_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    code = (
        "import sys, time; from pathlib import Path; from afd.files import only_one\n"
        "with only_one(Path(sys.argv[1])):\n print('mine', flush=True); time.sleep(60)"
    )
    words = ["sample", str(CONFIGS / "sample_toy.yaml"), f"out={out}", "device=cpu"]
    other = subprocess.Popen([sys.executable, "-c", code, str(out)], stdout=subprocess.PIPE)
    try:
        assert other.stdout is not None
        assert other.stdout.readline() == b"mine\n"
        (out / "half.mp4.partial").write_bytes(b"being written")
        assert f"{out}: another process is writing videos there" in told(words, capsys)
        assert (out / "half.mp4.partial").exists()
    finally:
        other.kill()
        other.wait()
    # The lock went with the process, and what it left is removed.
    deadline = time.monotonic() + 10
    while main(words) != 0 and time.monotonic() < deadline:
        time.sleep(0.1)
    assert [path.suffix for path in out.iterdir()] == [".mp4"]
