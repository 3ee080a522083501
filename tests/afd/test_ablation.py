"""Ablations: every file's rows are runs, made once, with a table and curves of what is finished."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from afd.config.run import load_config, plain
from afd.config.shipped import find_config
from afd.errors import ConfigError
from afd.lab.ablation import AblationConfig, ablation, study
from tests.afd.test_quickstart import SMALL as QUICKSTART

FOLDER = Path(__file__).parents[2] / "python" / "afd" / "configs" / "ablations"
FILES = sorted(path for path in FOLDER.glob("*.yaml") if path.stem != "continual")
SMALL = [*QUICKSTART, "evaluation.every=0"]


def console() -> Console:
    return Console(file=io.StringIO(), width=250)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_row_of_every_file_is_another_run_of_its_base(path: Path, tmp_path: Path) -> None:
    config = load_config(path, [], AblationConfig)
    assert config.name == path.stem
    table = study(path, config, [f"out={tmp_path}"])
    made = []
    for row in config.rows:
        cell = table.cell(row, 3)
        assert cell.run_dir == tmp_path / row / "seed3"
        assert (cell.seed, cell.name) == (3, row)
        usual = load_config(find_config(config.base, path), [f"method={cell.method}"])
        longer = any(own.startswith("updates=") for own in config.rows[row])
        assert (cell.updates == usual.updates) != longer
        made.append(plain(cell.model_copy(update={"name": "", "out": None})))
    assert all(made.count(one) == 1 for one in made)


def test_rows_of_shared_prefixes_take_the_chunk_passes_of_whole_videos() -> None:
    path = FOLDER / "shared_prefix.yaml"
    config = load_config(path, [], AblationConfig)
    table, chunks = study(path, config, []), 4
    for row in config.rows:
        cell = table.cell(row, 0)
        group, shared = cell.afd.samples_per_prompt, cell.afd.group_from_chunk
        forks = {"random": range(chunks), "last": [chunks - 1]}.get(str(shared), [shared or 0])
        passes = sum(fork + group * (chunks - fork) for fork in forks) / len(forks)
        assert cell.updates * passes == pytest.approx(160 * group * chunks, rel=0.005)
        assert cell.afd.cosine_updates == pytest.approx(130 * cell.updates / 160, rel=0.005)


def test_the_rates_are_the_reported_multiples_of_the_toys_own() -> None:
    path = FOLDER / "discriminator_rate.yaml"
    table = study(path, load_config(path, [], AblationConfig), [])
    reported = [0, 1e-6, 5e-6, 1e-5, 5e-5]
    usual = load_config(FOLDER.parent / "quickstart.yaml").discriminator.learning_rate
    for start in ("rate", "teacher-rate"):
        rows = [row for row in table.rows if row.startswith(start)]
        rates = [table.cell(row, 0).discriminator.learning_rate for row in rows]
        assert rates == pytest.approx([usual * rate / 5e-6 for rate in reported])


def test_an_ablation_draws_its_table_and_curves_and_runs_nothing_twice(tmp_path: Path) -> None:
    arguments = [f"out={tmp_path}", *SMALL, "dmd.score_updates=1", "dmd.score_warmup_updates=1"]
    path = FOLDER / "methods.yaml"
    assert ablation(path, [*arguments, "rows=[gan]", "seeds=[0]"], console())
    results = json.loads((tmp_path / "results.json").read_text())
    assert list(results) == ["nuis-teacher", "base", "gan"]
    done = {file: file.stat().st_mtime_ns for file in tmp_path.glob("gan/**/*") if file.is_file()}
    screen = console()
    assert ablation(path, [*arguments, "rows=[gan,dmd,afd]", "seeds=[0]"], screen)
    results = json.loads((tmp_path / "results.json").read_text())
    assert list(results) == ["nuis-teacher", "base", "gan", "dmd", "afd"]
    assert results["afd"]["mean"]["student/r_mean"] == pytest.approx(0.5, abs=0.2)
    assert {"phys", "discriminator/accuracy", "student/r_at_0"} <= set(results["afd"]["mean"])
    assert "student/r_mean" not in results["gan"]["mean"]
    assert {file: file.stat().st_mtime_ns for file in done} == done
    text = (tmp_path / "results.md").read_text()
    question = load_config(path, [], AblationConfig).question
    assert text.startswith(f"## methods\n\n{question}")
    assert "- `gan`: method=gan, discriminator.loss=gan" in text
    assert "| gan | 1 |" in text
    assert "2 updates of `quickstart`" in text
    assert "torch" in text.splitlines()[-1]
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert "curves.png" in screen.file.getvalue()


def test_a_file_or_choice_that_makes_no_run_is_refused_before_any_run(tmp_path: Path) -> None:
    bad = tmp_path / "bad.yaml"
    base = FOLDER.parent / "quickstart.yaml"
    bad.write_text(
        f"name: bad\nquestion: none\nbase: {base}\nrows: {{good: [], bad: [afd.gravity=1]}}\n"
    )
    with pytest.raises(ConfigError, match=r"unknown key 'afd\.gravity'"):
        ablation(bad, [f"out={tmp_path / 'out'}", *SMALL], console())
    with pytest.raises(ConfigError, match="rows: got"):
        ablation(bad, ["rows=[better]"], console())
    with pytest.raises(ConfigError, match="cannot be read"):
        ablation(tmp_path / "none.yaml", [], console())
    bad.write_text("name: bad\nquestion: none\nbase: nowhere.yaml\nrows: {one: []}\n")
    with pytest.raises(ConfigError, match="nowhere"):
        ablation(bad, [], console())
    assert not (tmp_path / "out").exists()
