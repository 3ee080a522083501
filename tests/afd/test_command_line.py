"""What the commands refuse before anything is spent, and what fits a terminal of 80 columns."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from afd.adapt.config import SequenceConfig
from afd.cli import main
from afd.config.run import load_config, make_config, to_yaml
from afd.errors import ConfigError
from afd.lab.report.page import write_report
from afd.lab.tables import print_table
from afd.planning.plan import dry_run
from afd.trainer.build import check_files, not_training


def screen(width: int = 80) -> Console:
    return Console(file=io.StringIO(), width=width, markup=False, emoji=False)


def printed(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


@pytest.mark.parametrize("columns", [1, 5, 16])
def test_a_wide_table_is_printed_in_parts_that_fit(columns: int) -> None:
    header = ["run", *(f"metric {i}" for i in range(columns))]
    body = [[name, *(f"{i}.250 ± 0.012" for i in range(columns))] for name in ("short", "x" * 28)]
    console = screen()
    print_table(header, body, console)
    lines = printed(console).splitlines()
    assert max(map(len, lines)) <= 80
    text = " ".join(lines)
    for cell in [*header, *body[0], *body[1]]:
        assert cell in text  # whole, not folded
    tables = sum("┏" in line for line in lines)
    assert sum("short" in line for line in lines) == tables
    assert (tables > 1) == (columns > 3)


def test_a_folder_without_a_run_has_no_report(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "teacher").mkdir()
    (tmp_path / "afd").mkdir()
    assert main(["report", str(tmp_path)]) == 2
    assert "holds no run; needed: the folder of a run" in capsys.readouterr().err
    assert not (tmp_path / "report.html").exists()
    (tmp_path / "afd" / "metrics.jsonl").write_text("")
    assert write_report(tmp_path).is_file()


def test_a_missing_key_is_named_without_the_rest_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "sequence.yaml"
    path.write_text("domains:\n- {name: fall, teacher: {kind: simulator, note: secret}}\n")
    with pytest.raises(ConfigError) as refused:
        load_config(path, [], SequenceConfig)
    text = str(refused.value)
    assert f"{path}: base is missing" in text
    assert "name is missing" in text
    assert "secret" not in text
    assert "{" not in text


@pytest.mark.parametrize("verb", ["train", "adapt"])
def test_a_number_of_processes_is_for_a_dry_run(
    verb: str, capsys: pytest.CaptureFixture[str]
) -> None:
    config = {"train": "quickstart", "adapt": "continual/quickstart"}[verb]
    assert main([verb, config, "--processes", "2"]) == 2
    assert f"torchrun --nproc-per-node 2 -m afd {verb}" in capsys.readouterr().err


@pytest.mark.parametrize("count", ["0", "-3", "many"])
def test_a_number_of_videos_is_at_least_one(count: str, tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as refused:
        main(["eval", str(tmp_path), f"--videos={count}"])
    assert refused.value.code == 2


@pytest.mark.parametrize("more", [[], ["--dry-run"]])
def test_an_override_of_another_method_is_refused(
    more: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["train", "quickstart", "method=sft", "afd.nft_beta=0.5", f"out={tmp_path / 'run'}"]
    assert main([*words, *more]) == 2
    assert "'afd.nft_beta=0.5': has no effect with method=sft" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_dry_run_names_the_other_run_in_its_folder(tmp_path: Path) -> None:
    words = [f"out={tmp_path}", "teacher.count=2"]
    config = load_config("quickstart", words)
    dry_run(config, 1, screen())
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    (tmp_path / "metrics.jsonl").write_text('{"update": 1}\n')
    dry_run(config, 1, screen())
    with pytest.raises(ConfigError, match=r"contains another run:\n *afd\.nft_beta"):
        dry_run(load_config("quickstart", [*words, "afd.nft_beta=0.5"]), 1, screen())


@pytest.mark.parametrize(
    ("settings", "first"),
    [
        (["updates=10"], 11),
        (["updates=11"], None),
        (["updates=2", "discriminator.warmup_updates=0"], None),
        (["method=sft", "updates=1"], None),
        (["method=dmd", "updates=3", "dmd.score_warmup_updates=20", "dmd.score_updates=5"], 4),
        (["method=dmd", "updates=4", "dmd.score_warmup_updates=20", "dmd.score_updates=5"], None),
    ],
)
def test_a_run_without_an_update_of_the_student_is_named(
    settings: list[str], first: int | None
) -> None:
    config = make_config({}, settings)
    sentence = not_training(config)
    assert (sentence is None) == (first is None)
    if first is not None:
        assert f"the student's first is update {first}: it will not learn" in str(sentence)
        console = screen(200)
        dry_run(config, 1, console)
        assert str(sentence) in printed(console)


PAID = {
    "teacher": {
        "kind": "ark",
        "api": {"model": "m", "prompts": "prompts.txt"},
        "fetch": {"price_usd": 1.0, "budget_usd": 5.0},
    },
    "evaluation": {"kind": "none"},
}


@pytest.mark.parametrize("kind", ["toy", "wan"])
def test_nothing_is_bought_for_a_student_whose_files_are_missing(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat jumps\n")
    student = [f"student.kind={kind}", f"student.checkpoint={tmp_path / 'none.safetensors'}"]
    data = tmp_path / "run.yaml"
    data.write_text(json.dumps(PAID))
    more = [f"teacher.api.prompts={prompts}", f"out={tmp_path / 'run'}"]
    if kind == "wan":
        more += ["discriminator={kind: latent}", "video={frames: 81, height: 480, width: 832}"]
    assert main(["teacher", "fetch", str(data), *student, *more]) == 2
    assert "student.checkpoint: " in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_damaged_checkpoint_is_found_by_its_header(tmp_path: Path) -> None:
    odd = tmp_path / "odd.safetensors"
    odd.write_bytes(b"no tensors")
    with pytest.raises(ConfigError, match="odd"):
        check_files(make_config({}, [f"student.checkpoint={odd}"]))
    check_files(make_config({}))
