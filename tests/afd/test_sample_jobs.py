"""Forms of prompts: files, lists, or a single prompt."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from afd.cli import main
from afd.config.run import make_config
from afd.errors import ConfigError
from afd.lab.shipped import checkpoint_path
from afd.sampling.config import SampleConfig
from afd.sampling.jobs import read_jobs
from tests.afd.test_sample import CONFIGS


def prompts_of(given: str | list[str]) -> list[str]:
    return [job.prompt for job in read_jobs(make_config({"prompts": given}, (), "x", SampleConfig))]


def test_a_file_from_any_editor_is_read(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_bytes("\ufeffa ball\r\nits\u2028end\r\n".encode())
    assert prompts_of(str(path)) == ["a ball", "its\u2028end"]
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n" + json.dumps({"prompt": "a\u2028b"}, ensure_ascii=False), encoding="utf-8")
    assert prompts_of(str(path)) == ["a\u2028b"]


def test_a_file_of_another_kind_is_not_taken_for_a_prompt(tmp_path: Path) -> None:
    path = tmp_path / "prompts.csv"
    path.write_text("a ball")
    with pytest.raises(ConfigError, match=r"prompts\.csv; needed: its name to end in \.txt"):
        prompts_of(str(path))
    for prompt in ("a ball", "word " * 1000, "half a second. Then", str(tmp_path)):
        assert prompts_of(prompt) == [prompt]


def test_an_empty_prompt_of_a_list_is_told_by_its_number() -> None:
    with pytest.raises(ConfigError, match="prompts: number 2 of the list is empty"):
        prompts_of(["a", " "])


@pytest.mark.parametrize("blank", [" ", "\r", "\t\n"])
def test_a_prompt_of_blanks_is_refused(blank: str) -> None:
    with pytest.raises(ConfigError, match=r"prompts: .*the prompt is blank"):
        prompts_of(blank)


def test_weights_replaced_under_the_same_name_are_noticed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = tmp_path / "student.safetensors"
    held = checkpoint_path("base").read_bytes()
    weights.write_bytes(held)
    words = ["sample", str(CONFIGS / "sample_toy.yaml"), "device=cpu"]
    words += [f"out={tmp_path / 'out'}", f"student.checkpoint={weights}"]
    assert main(words) == main(words) == 0
    assert "1 of 1 videos exist already" in capsys.readouterr().out
    weights.write_bytes(held[:-1] + bytes([held[-1] ^ 1]))
    assert main(words) == 2
    assert "was made from other inputs (student.checkpoint: " in capsys.readouterr().err


@pytest.mark.parametrize("dry", [[], ["--dry-run"]])
def test_weights_of_another_kind_are_named(
    tmp_path: Path, dry: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    for held in (b"", b"no weights", checkpoint_path("base").read_bytes()[:3000]):
        weights = tmp_path / "x.safetensors"
        weights.write_bytes(held)
        words = [
            "sample",
            str(CONFIGS / "sample_toy.yaml"),
            f"student.checkpoint={weights}",
        ]
        assert main([*words, f"out={tmp_path / 'out'}", *dry]) == 2
        assert f"checkpoint {weights}: it cannot be read" in capsys.readouterr().err


def test_a_dry_run_says_whose_sizes_it_takes(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["sample", str(CONFIGS / "self_forcing_480x832.yaml"), "--dry-run"]
    assert main([*words, "student.checkpoint=/none.pt"]) == 0
    assert (
        "the released sizes (student.checkpoint: /none.pt is not there" in capsys.readouterr().out
    )
    assert main(words) == 0
    assert "the released sizes (student.checkpoint is not given" in capsys.readouterr().out
