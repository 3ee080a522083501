"""Every command works in folders of any legal name, and writes what the umask allows."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from afd.cli import main

# Quotes, glob and format characters, markup, FFmpeg's and a URL's own, a line's end, an emoji.
ODD = "-a 'b' \"c\" #?%d:=&;[red]{x}*$~\\\n :smile: é 😀 ."
LONG = "n" * 255
RUN = """
updates: 2
prompts_per_update: 2
teacher: {count: 6}
evaluation: {videos: 4, curve_videos: 2, samples: 2}
checkpoint: {every: 1}
"""
SAMPLE = """
student: {kind: toy, denoising_steps: [1.0]}
height: 16
width: 16
frames: 12
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def every_command(home: str, run: str) -> None:
    """Train, resume, report, export, sample, two evaluations, an ablation and a folder teacher."""
    folder = Path(home)
    (folder / "run.yaml").write_text(RUN)
    (folder / "sample.yaml").write_text(SAMPLE)
    (folder / "eval.yaml").write_text("suites: [videophy2]\nvideophy2: {samples: 1}\n")
    text = "name: q\nquestion: q\nbase: run.yaml\nrows: {one: [updates=1]}\n"
    (folder / "ablation.yaml").write_text(text)
    (folder / "[prompts] #1.txt").write_text("a [red] ball\n")
    config, prompts = f"{home}/run.yaml", f"{home}/[prompts] #1.txt"
    teacher = f"teacher.path={home}/é #1"
    student = f"{home}/export"
    sampled = [f"prompts={prompts}", f"student.checkpoint={student}/student.safetensors"]
    rated = [f"videophy2.prompts={prompts}", "name=x"]
    for words in (
        ["train", config, f"out={run}", teacher],
        ["resume", run],
        ["report", run],
        ["export", run, f"out={student}", "kind=student"],
        ["eval", run, "--videos", "2"],
        ["sample", f"{home}/sample.yaml", f"out={run}/mp4", *sampled],
        ["benchmark", f"{home}/eval.yaml", f"run={run}", f"out={home}/e", *rated],
        ["ablation", f"{home}/ablation.yaml", f"out={home}/ablation", teacher],
        [
            "train",
            config,
            f"out={home}/again",
            "teacher=null",
            "teacher.kind=folder",
            teacher,
            "updates=1",
        ],
    ):
        assert main(words) == 0, words


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [ODD, pytest.param(LONG, marks=pytest.mark.soak)], ids=["odd", "long"]
)
def test_a_folder_of_any_name_will_do(
    name: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (here / name).mkdir()
    every_command(f"./{name}", f"./{name}/{name}")
    said = capsys.readouterr()
    assert "Traceback" not in said.err
    # The name is printed verbatim: neither markup nor an emoji's code.
    assert name != ODD or ":smile:" in said.out
    assert name != ODD or "[red]" in said.out


def test_a_teacher_may_have_names_that_are_not_utf8(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = os.fsdecode(b"caf\xe9 [1]")
    (here / "run.yaml").write_text(RUN)
    words = ["train", "run.yaml", "updates=1", "logging.tensorboard=false"]
    assert main([*words, "out=first", f"teacher.path={name}"]) == 0
    assert (
        main([*words, "out=second", "teacher=null", "teacher.kind=folder", f"teacher.path={name}"])
        == 0
    )
    assert main(["report", "second"]) == 0
    assert main([*words, f"out={name}"]) == 2
    assert "needed: a name in UTF-8" in capsys.readouterr().err


@pytest.mark.parametrize(
    "umask",
    # umask 022 reveals files made for their owner only; afd.files is tested at all three.
    [0o022, *(pytest.param(umask, marks=pytest.mark.soak) for umask in (0o002, 0o077))],
    ids=oct,
)
def test_everything_written_follows_the_umask(umask: int, here: Path) -> None:
    before = os.umask(umask)
    try:
        Path("all").mkdir()
        every_command("all", "all/run") if umask == 0o002 else _train_and_export()
    finally:
        os.umask(before)
    odd = {
        str(path.relative_to(here)): oct(path.stat().st_mode & 0o777)
        for path in _below(here)
        if path.stat().st_mode & 0o777 != (0o777 if path.is_dir() else 0o666) & ~umask
    }
    assert not odd, odd


def _train_and_export() -> None:
    Path("all/run.yaml").write_text(RUN)
    assert main(["train", "all/run.yaml", "out=all/run", "teacher.path=all/teacher"]) == 0
    for kind in ("student", "self_forcing", "diffusers"):
        assert main(["export", "all/run", f"out=all/{kind}", f"kind={kind}"]) == 0
    assert main(["report", "all/run"]) == 0


def _below(folder: Path) -> Iterator[Path]:
    return (path for path in (folder / "all").rglob("*") if not path.is_symlink())
