"""The command line: exit codes, what it prints, and mistakes reported without a traceback."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
from pathlib import Path

import pytest

import afd.trainer.loop
from afd.cli import main
from afd_kernels.dispatch import OPS
from tests.afd.tiny import Interrupted, TinyMethod, make_clips, tiny_config


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_clips(tmp_path_factory.mktemp("teacher") / "clips")


@pytest.fixture
def written(tmp_path: Path, clips: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """A configuration file for the tiny method, and its run folder."""
    from afd.config.run import to_yaml

    monkeypatch.setattr(afd.trainer.loop, "build_method", lambda *_: TinyMethod())
    monkeypatch.setattr(afd.trainer.loop, "check_size", lambda config: None)
    out = tmp_path / "run"
    path = tmp_path / "tiny.yaml"
    path.write_text(to_yaml(tiny_config(out, clips)), encoding="utf-8")
    return path, out


def test_train_takes_overrides_and_a_second_time_leaves_it_alone(
    written: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    path, out = written
    assert main(["train", str(path), "updates=2", "checkpoint.every=1"]) == 0
    assert (out / "DONE").read_text().startswith("2 updates")
    capsys.readouterr()
    assert main(["train", str(path), "updates=2", "checkpoint.every=1"]) == 0
    assert "is finished; choose another out=" in capsys.readouterr().out


def test_a_stopped_run_exits_130_and_is_resumed(
    written: tuple[Path, Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path, out = written
    stopping = Interrupted(1, signal.SIGINT)
    with monkeypatch.context() as patch:
        patch.setattr(afd.trainer.loop, "build_method", lambda *_: stopping)
        assert main(["train", str(path)]) == 130
    assert f"continue: afd resume {out}" in (out / "train.log").read_text()
    assert main(["resume", str(out)]) == 0
    assert (out / "DONE").is_file()


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["train", "none.yaml"], "none.yaml: cannot be read"),
        (["train", "{path}", "stepz=3"], "unknown key 'stepz'; did you mean"),
        (["train", "{path}", "updates=many"], "updates is 'many'"),
        (["train", "{path}", "teacher.path=/none"], "teacher folder /none: does not exist"),
        (
            ["resume", "{out}/none"],
            "RUN_DIR: {out}/none does not exist; needed: the folder of a run",
        ),
        (["report", "/none"], "RUN_DIR: /none does not exist; needed: the folder of a run, a"),
        (["eval", "{out}/none"], "RUN_DIR: {out}/none does not exist; needed: the folder of a run"),
        (["eval", "{path}", "run=x"], "tiny.yaml, a file; needed: a RUN_DIR; afd benchmark"),
        (["eval", "{path.parent}", "run=x"], "RUN_DIR: {path.parent} has no config.yaml; needed:"),
        (["benchmark", "{path.parent}"], "a directory; needed: CONFIG.yaml; afd eval RUN_DIR"),
        (["benchmark", "none.yaml"], "none.yaml: cannot be read"),
        (["sample", "--config", "{path}"], "got --config; needed: afd sample CONFIG.yaml"),
        (["sample", "{path}", "--config={path}"], "got --config; needed: afd sample CONFIG.yaml"),
        (["export", "{out}", "out=x", "version=ema"], "unknown key 'version'; it is weights now"),
        (["eval", "/"], "RUN_DIR: / has no config.yaml; needed: the folder of a run"),
        (["sample", "{out}"], "cannot be read"),
        (["teacher"], "needs a subcommand: afd teacher simulate"),
        (["quickstart", "teacher.style=oil"], "teacher.style is 'oil'"),
        (["ablation", "none.yaml"], "none.yaml: cannot be read"),
        (["adapt", "none.yaml"], "none.yaml: cannot be read"),
        (["live", "none.yaml"], "none.yaml: cannot be read"),
        (["teacher", "fetch", "none.yaml"], "none.yaml: cannot be read"),
        (["teacher", "status", "none.yaml"], "none.yaml: cannot be read"),
        (["resume", "{path}"], "RUN_DIR: {path} is a file; needed: the folder of a run"),
        (["export", "{out}/none", "out=x"], "RUN_DIR: {out}/none does not exist; needed: the"),
        (["export", "{path}", "out=x"], "RUN_DIR: {path} is a file; needed: the folder of a run"),
        (
            ["teacher", "audit", "none/"],
            "FOLDER|CONFIG.yaml: none does not exist; needed: a folder",
        ),
        (
            ["teacher", "audit", "none.yaml"],
            "FOLDER|CONFIG.yaml: none.yaml does not exist; needed:",
        ),
        (
            ["teacher", "audit", "{path}", "run=none"],
            "run: none does not exist; needed: the folder",
        ),
        (["benchmark", "{benchmark}", "run=none"], "run: none does not exist; needed: the folder"),
        (["export", "{out}"], "export: out is missing; needed: folder to write, new or empty"),
        (["export", "{out}", "kind=peft"], "export: out is missing; needed: folder to write"),
    ],
)
def test_a_mistake_exits_2_with_one_sentence(
    written: tuple[Path, Path],
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    told: str,
) -> None:
    path, out = written
    benchmark = "benchmark_self_forcing_480x832"
    given = {"path": path, "out": out, "benchmark": benchmark}
    assert main([word.format(**given) for word in words]) == 2
    said = capsys.readouterr().err
    assert told.format(**given) in said
    assert len(said.splitlines()) == 1
    assert "Traceback" not in said


def test_a_run_that_fails_exits_1(
    written: tuple[Path, Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    class Broken(TinyMethod):
        def discriminator_step(self, batch: object) -> dict[str, float]:
            return {"discriminator/margin": float("inf")}

    monkeypatch.setattr(afd.trainer.loop, "build_method", lambda *_: Broken())
    assert main(["train", str(written[0])]) == 1
    assert "update 1: discriminator/margin = inf" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (OSError(12, "Cannot allocate memory"), 1, "Cannot allocate memory"),
        (OSError("no number at all"), 1, "no number at all"),
        (PermissionError(13, "Permission denied", "a/b"), 2, "a/b: Permission denied"),
        (OSError(28, "No space left on device"), 3, "No space left on device; free some space"),
    ],
)
def test_every_error_of_the_system_is_one_sentence(
    error: OSError,
    code: int,
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr("afd.lab.report.page.write_report", fail)
    assert main(["report", str(tmp_path)]) == code
    assert capsys.readouterr().err.startswith(f"afd: error: {said}")


@pytest.mark.parametrize("words", [[], ["trian"], ["train"], ["doctor", "--jsn"]])
def test_a_command_that_does_not_exist_exits_2(words: list[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(words)
    assert exit_.value.code == 2


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([], "needs COMMAND; usage: afd [-h]"),
        (["trian"], "COMMAND: got 'trian'; needed: one of "),
        (["train"], "train: needs CONFIG; usage: afd train [-h]"),
        (["sample"], "sample: needs CONFIG; usage: afd sample"),
        (["export"], "export: needs RUN_DIR; usage: afd export"),
        (["resume"], "resume: needs RUN_DIR; usage: afd resume"),
        (["teacher", "audit"], "teacher audit: needs FOLDER|CONFIG.yaml; usage:"),
        (["configs", "copy"], "configs copy: needs NAME; usage: afd configs copy"),
        (["doctor", "--jsn"], "unrecognized arguments: --jsn; usage:"),
        (["live", "--port", "x"], "live: --port: got 'x'; needed: an integer; usage: afd live"),
        (["live", "--port"], "live: --port: expected one argument; usage: afd live"),
        (["eval", "x", "--videos=0"], "eval: --videos: got 0; needed: a whole number of at least"),
    ],
)
def test_a_mistake_in_the_command_line_is_one_sentence(
    words: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(words)
    assert exit_.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith(f"afd: error: {told}")
    assert len(said.splitlines()) == 1


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["--help"])
    assert exit_.value.code == 0
    said = capsys.readouterr().out
    for command in (
        "train",
        "resume",
        "eval",
        "benchmark",
        "export",
        "quickstart",
        "sample",
        "report",
        "doctor",
    ):
        assert command in said


def test_the_simulated_teacher_is_a_program_of_its_own(tmp_path: Path) -> None:
    out = tmp_path / "clips"
    words = ["teacher", "simulate", "--style", "clean", "--count", "2", "--out", str(out)]
    assert main([*words, "--seed", "3"]) == 0
    assert sorted(path.name for path in out.iterdir()) == [
        "000000.mp4",
        "000001.mp4",
        "prompts.jsonl",
    ]
    assert main(words) != 0


def test_doctor_speaks_to_programs(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json"]) == 0
    assert set(json.loads(capsys.readouterr().out)["ops"]) == set(OPS)


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_completion_is_a_script_that_the_shell_takes(
    shell: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["--print-completion", shell])
    assert exit_.value.code == 0
    script = capsys.readouterr().out
    assert "benchmark" in script
    assert "--dry-run" in script
    if shutil.which(shell) is not None:
        path = tmp_path / "completion"
        path.write_text(script)
        subprocess.run([shell, "-n", str(path)], check=True)


def test_bash_completes_verbs_and_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--print-completion", "bash"])
    path = tmp_path / "completion"
    path.write_text(capsys.readouterr().out)
    (tmp_path / "mine.yaml").touch()
    ask = f"""source {path}; COMP_WORDS=($WORDS); COMP_CWORD=$(( ${{#COMP_WORDS[@]}} - 1 ))
        _shtab_afd afd; echo ${{COMPREPLY[@]}}"""
    for words, completed in (("afd bench", "benchmark"), ("afd train min", "mine.yaml")):
        done = subprocess.run(
            ["bash", "-c", f'WORDS="{words}"; {ask}'], capture_output=True, text=True, cwd=tmp_path
        )
        assert completed in done.stdout.split(), done.stderr


def test_a_missing_package_is_one_sentence_with_its_extra(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("afd.extras.find_spec", lambda name: None)
    assert main(["--print-completion", "bash"]) == 2
    said = capsys.readouterr().err
    assert "shtab, which is not installed; pip install 'afd-video[completion]'" in said
