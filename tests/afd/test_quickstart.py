"""The quickstart and the shipped configurations, shrunken: every part runs, once, and is kept."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console
from safetensors import safe_open

from afd.config.run import load_config
from afd.errors import ConfigError
from afd.hub import CONFIGS
from afd.lab.ablation import ablation
from afd.lab.quickstart import base, final_evaluation, part, quickstart
from afd.trainer.again import evaluate_run
from afd.trainer.loop import Outcome, train
from tests.afd.clips import make_clip_folder

ROOT = Path(__file__).parents[2]
FULL_TABLE = CONFIGS / "ablations" / "quickstart_full.yaml"
SMALL = [
    "updates=2",
    "prompts_per_update=2",
    "teacher.count=36",
    "afd.samples_per_prompt=2",
    "discriminator.warmup_updates=1",
    "evaluation.every=1",
    "evaluation.videos=36",
    "evaluation.curve_videos=36",
    "logging.tensorboard=false",
]


def console() -> Console:
    return Console(file=io.StringIO(), width=200)


def kept(root: Path) -> dict[Path, int]:
    """When every file but the report was last written."""
    files = (path for path in root.rglob("*") if path.is_file() and path.suffix != ".html")
    return {path: path.stat().st_mtime_ns for path in files}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A small quickstart and what it printed."""
    root, screen = tmp_path_factory.mktemp("quickstart") / "q", console()
    assert quickstart([f"out={root}", *SMALL], screen)
    return root, screen.file.getvalue()


def test_the_quickstart_leaves_every_part_and_a_report(finished: tuple[Path, str]) -> None:
    root, _ = finished
    for name in ("base", "sft", "afd"):
        assert (root / name / "DONE").is_file()
        with safe_open(str(root / name / "samples.safetensors"), "pt") as file:
            assert file.get_tensor("videos").shape == (36, 12, 16, 16, 3)
            assert len(json.loads(file.metadata()["prompts"])) == 36
            assert json.loads(file.metadata()["seeds"])[:2] == [1_000_000, 1_000_001]
    assert "<html" in (root / "report.html").read_text(encoding="utf-8")


def test_afd_has_the_updates_of_sfts_time_unless_the_user_gives_others() -> None:
    mine = part([], "afd")
    assert (mine.updates, mine.afd.cosine_updates, part([], "sft").updates) == (100, 70, 400)
    longer = part(["updates=160", "afd.cosine_updates=130"], "afd")
    assert (longer.updates, longer.afd.cosine_updates) == (160, 130)


def test_only_videos_and_prompts_cross_from_the_teacher(finished: tuple[Path, str]) -> None:
    root, _ = finished
    assert {path.suffix for path in (root / "teacher").iterdir()} == {".mp4", ".jsonl"}
    for line in (root / "teacher" / "prompts.jsonl").read_text().splitlines():
        assert set(json.loads(line)) == {"file", "prompt"}


def test_every_part_is_measured_on_the_same_held_out_seeds(finished: tuple[Path, str]) -> None:
    root, screen = finished
    parts = {"teacher": "base", "base": "base", "sft": "sft", "afd": "afd"}
    for method, folder in parts.items():
        line = final_evaluation(root / folder, method)
        assert line is not None
        assert line["videos"] == 36
        assert {"phys", "g_mae", "rend", "adh"} <= set(line["metrics"])
        assert f"│ {method}" in screen
    # Before its first update a run is the base student, with the same numbers.
    base = final_evaluation(root / "base", "base")
    first = json.loads((root / "sft" / "evaluation.jsonl").read_text().splitlines()[0])
    assert base is not None
    assert first["update"] == 0
    assert first["metrics"]["phys"] == base["metrics"]["phys"]


def test_the_quickstart_says_how_long_it_took_and_where_the_report_is(
    finished: tuple[Path, str],
) -> None:
    root, screen = finished
    assert "s in all; open" in screen
    assert str(root / "report.html") in screen


def test_a_second_quickstart_repeats_nothing(finished: tuple[Path, str]) -> None:
    root, _ = finished
    before = kept(root)
    screen = console()
    assert quickstart([f"out={root}", *SMALL], screen)
    assert kept(root) == before
    assert screen.file.getvalue().count("is already finished; kept") == 3


def test_a_quickstart_of_other_settings_does_not_touch_a_finished_one(
    finished: tuple[Path, str],
) -> None:
    root, _ = finished
    before = kept(root)
    with pytest.raises(ConfigError, match="seed: 0 there, 1 now"):
        quickstart([f"out={root}", *SMALL, "seed=1"], console())
    assert kept(root) == before


def test_the_teacher_is_measured_by_the_domain_of_the_evaluation(tmp_path: Path) -> None:
    few = ["teacher.count=36", "evaluation.videos=36"]
    for domain, exact in (("endless", True), ("light", False)):
        own = ["teacher.domain=endless", f"evaluation.domain={domain}", f"out={tmp_path / domain}"]
        base(part([*few, *own], "base"), console())
        measured = final_evaluation(tmp_path / domain / "base", "teacher")
        assert measured is not None
        assert (measured["metrics"]["phys"] < 0.1) == exact


def test_a_finished_run_is_evaluated_again_to_the_same_numbers(finished: tuple[Path, str]) -> None:
    root, _ = finished
    before = final_evaluation(root / "sft", "sft")
    assert before is not None
    assert evaluate_run(root / "sft").metrics == before["metrics"]


def test_the_full_table_runs_chosen_cells_and_skips_finished_ones(tmp_path: Path) -> None:
    arguments = [f"out={tmp_path}", *SMALL, "seeds=[0,1]", "rows=[clean-sft]"]
    assert ablation(FULL_TABLE, arguments, console())
    results = json.loads((tmp_path / "results.json").read_text())
    assert list(results) == ["clean-teacher", "base", "clean-sft"]
    assert set(results["clean-sft"]["seeds"]) == {"0", "1"}
    assert results["clean-sft"]["std"]["phys"] > 0
    document = (tmp_path / "results.md").read_text().splitlines()
    table = [line for line in document if line.startswith("|")]
    assert table[0].startswith("| run | seeds | s | phys |")
    assert len(table) == 5
    before = kept(tmp_path / "clean-sft")
    assert ablation(FULL_TABLE, arguments, console())
    assert kept(tmp_path / "clean-sft") == before


@pytest.mark.parametrize("choice", ["rows=[nuis-gan]", "rows=nuis-sft", "seeds=3", "seeds=[a]"])
def test_a_choice_of_cells_that_do_not_exist_is_refused(tmp_path: Path, choice: str) -> None:
    with pytest.raises(ConfigError, match="needs a list of"):
        ablation(FULL_TABLE, [f"out={tmp_path}", choice], console())


def test_the_quickstart_file_trains(tmp_path: Path) -> None:
    config = load_config("quickstart", [f"out={tmp_path / 'run'}", *SMALL])
    assert train(config, console=console()) is Outcome.FINISHED


def test_the_folder_file_trains_on_real_clips(
    tmp_path: Path, shared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    clips = make_clip_folder(shared, tmp_path / "clips")
    config = load_config("folder", [f"out={tmp_path / 'run'}", f"teacher.path={clips}"])
    assert train(config, console=console()) is Outcome.FINISHED
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == config.updates
    assert "student/loss" in json.loads(lines[-1])
