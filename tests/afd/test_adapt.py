"""Domains one after another: every part is made once, whatever interrupts it, and then measured."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from afd.adapt import run as adapt_run
from afd.adapt.matrix import balance
from afd.adapt.run import adapt
from afd.adapt.sequence import load_chain
from afd.cli import main
from afd.config.run import load_config, plain
from afd.config.yaml import yaml_text
from afd.distributed import ALONE
from afd.errors import DONE, MISTAKE, AfdError, ConfigError
from afd.lab.ablation import AblationConfig, ablation, sequence_study
from afd.trainer import shards
from tests.afd.test_origin import SMALL
from tests.afd.test_resume import assert_same, numbers
from tests.afd.tiny_methods import toy_student

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "python" / "afd" / "configs" / "continual"
FILES = sorted(FOLDER.glob("*.yaml"))
DOMAINS = ("1_fall", "2_sand")


SHARED: dict[str, Path] = {}


@pytest.fixture(scope="module", autouse=True)
def shared(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Teachers and base student of all sequences."""
    SHARED["folder"] = tmp_path_factory.mktemp("shared")
    toy_student().save(SHARED["folder"] / "base.safetensors", torch.float32)


def simulator(domain: str) -> dict[str, Any]:
    # Before the fixture, in parameters, the folder is a place to be filled.
    path = SHARED.get("folder", Path("{shared}")) / domain
    return {"kind": "simulator", "domain": domain, "count": 4, "path": str(path)}


def domains() -> list[dict[str, Any]]:
    return [
        {"name": "fall", "teacher": simulator("heavy"), "evaluation": {"domain": "heavy"}},
        {
            "name": "sand",
            "teacher": simulator("light"),
            "updates": 3,
            "overrides": ["discriminator.steps_per_update=1"],
            "evaluation": {"domain": "light", "metric": "adh", "better": "higher"},
        },
    ]


def written(folder: Path, changes: dict[str, Any] | None = None, **base: Any) -> Path:
    """A sequence of two short domains."""
    settings = {"kind": "physics", "every": 0, "videos": 2, "samples": 0}
    student = {"checkpoint": str(SHARED["folder"] / "base.safetensors")}
    data = {**SMALL, "method": "afd", "evaluation": settings, "student": student, **base}
    del data["teacher"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "base.yaml").write_text(yaml_text(data), encoding="utf-8")
    sequence: dict[str, Any] = {
        "name": "two",
        "base": "base.yaml",
        "overrides": ["replay.fraction=0.5", "afd.prior_reference={pretrained: 1, previous: 1}"],
        "domains": domains(),
        "sets": {"neutral": {"domain": "neutral", "metric": "fit_res"}},
        "out": str(folder / "out"),
    }
    path = folder / "two.yaml"
    path.write_text(yaml_text(sequence | (changes or {})), encoding="utf-8")
    return path


def quiet() -> Console:
    return Console(file=io.StringIO(), width=200)


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = written(tmp_path_factory.mktemp("straight"))
    assert adapt(path, [], quiet())
    return path


def kept(root: Path) -> dict[Path, int]:
    return {p: p.stat().st_mtime_ns for p in root.rglob("*") if p.is_file() and p.suffix != ".lock"}


def test_a_sequence_is_learned_measured_and_drawn(
    straight: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = straight.parent / "out"
    first, second = out / "1_fall", out / "2_sand"
    matrix = json.loads((out / "matrix.json").read_text())
    assert matrix["rows"] == ["base", "fall", "sand"]
    assert list(matrix["columns"]) == ["fall", "sand", "neutral"]
    assert [len(row) for row in matrix["R"]] == [3, 3, 3]
    assert all(isinstance(value, float) for row in matrix["R"] for value in row)
    assert matrix["columns"]["fall"]["metric"] == "phys"
    assert {"fall", "sand"} == matrix["domains"].keys()
    assert [cost["updates"] for cost in matrix["costs"]] == [2, 3]
    # The run's own last evaluation is the cell of its domain.
    line = json.loads((second / "evaluation.jsonl").read_text().splitlines()[-1])
    assert line["metrics"]["adh"] == matrix["metrics"]["sand"]["sand"]["adh"]
    run = load_config(second / "config.yaml")
    assert (run.student.init, run.seed) == (str(first), 1)
    assert "falls" not in (prompts := (out / "replay" / "2.txt").read_text())
    assert len(prompts.splitlines()) == 4
    assert "student/replay_prior" in numbers(second)[-1]
    assert "student/replay_prior" not in numbers(first)[-1]
    assert main(["report", str(out)]) == DONE
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "Gain against the base" in page
    assert page.count("<svg") == 3
    assert re.search(r"after +its own domain", page)


def test_a_finished_sequence_repeats_nothing(straight: Path) -> None:
    out = straight.parent / "out"
    before = kept(out)
    assert adapt(straight, [], quiet())
    changed = {p.name for p, time in kept(out).items() if before.get(p) != time}
    assert changed <= {"sequence.json", "matrix.json"}


KILLED = """
import io, os, signal, sys
from pathlib import Path
from rich.console import Console
from afd.adapt import run
from afd.trainer.loop import Trainer

moment = sys.argv[2]

def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)

def before_the_second(function, calls=[]):
    def counted(*given):
        calls.append(1)
        die() if len(calls) == 2 else function(*given)
    return counted

def after_an_update(save):
    def saved(self):
        save(self)
        die() if self.update == 1 and "2_sand" in str(self.out) else None
    return saved

if moment == "between":
    run.measure = before_the_second(run.measure)
if moment == "within":
    Trainer._save = after_an_update(Trainer._save)
run.adapt(Path(sys.argv[1]), sys.argv[3:], Console(file=io.StringIO()))
"""


def assert_same_sequence(ours: Path, theirs: Path) -> None:
    for name in DOMAINS:
        assert numbers(ours / name) == numbers(theirs / name)
        a, b = (
            shards.read(sorted((root / name / "checkpoints").iterdir())[-1], ALONE)
            for root in (ours, theirs)
        )
        for key in ("method_state", "random", "sampler", "replay", "update"):
            assert_same(a[key], b[key], f"{name}.{key}")
    matrices = [json.loads((root / "matrix.json").read_text()) for root in (ours, theirs)]
    assert matrices[0]["metrics"] == matrices[1]["metrics"]


@pytest.mark.parametrize("moment", ["between", "within"])
def test_a_sequence_killed_anywhere_ends_with_the_same_bits(
    straight: Path, tmp_path: Path, moment: str
) -> None:
    path = written(tmp_path)
    words = [sys.executable, "-c", KILLED, str(path), moment, "checkpoint.every=1"]
    killed = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert adapt(path, [], quiet())
    assert_same_sequence(tmp_path / "out", straight.parent / "out")


def test_a_changed_list_is_refused_from_the_first_domain_that_differs(
    straight: Path, tmp_path: Path
) -> None:
    before = kept(straight.parent / "out")
    out = f"out={straight.parent / 'out'}"
    other = domains()
    other[1]["updates"] = 2
    renamed = domains()
    renamed[1]["name"] = "dune"
    swapped = domains()[::-1]
    longer = domains()
    longer[0]["updates"] = 5
    for changed, words in (
        (other, r"domain 2 is another .*updates: 3 there \(finished\), 2 now"),
        (renamed, r"domain 2 is another .*2_sand there, dune now"),
        (swapped, r"domain 1 is another .*1_fall there, sand now"),
        (domains()[:1], r"domain 2 is another .*2_sand there, absent now"),
        (longer, r"domain 1 is another .*fewer than 5 updates when the next began"),
    ):
        path = written(tmp_path, {"domains": changed})
        with pytest.raises(ConfigError, match=re.compile(words, re.S)) as raised:
            adapt(path, [out], quiet())
        assert "domains before it are kept" in str(raised.value)
    assert kept(straight.parent / "out") == before


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"domains": []}, "domains is []"),
        ({"domains": [domains()[0]] * 2}, "fall stands twice; needed: a name of its own"),
        ({"domains": [{"name": "x"}]}, "domains.0.teacher"),
        ({"base": "two.yaml"}, "two.yaml is a sequence itself"),
        ({"base": "none.yaml"}, "none.yaml: cannot be read"),
        ({"sets": {"fall": {}}}, "fall is a domain's name"),
        ({"sets": {"x": {"domain": "sun"}}}, "domain: got sun; needed: one of"),
        (
            {"domains": [domains()[0], domains()[1] | {"overrides": ["student.init=x"]}]},
            "domain 2 (sand): overrides: got student.init; needed: none after the first",
        ),
        (
            {"domains": [domains()[0] | {"overrides": ["student.init={out}/2_sand"]}]},
            "domain 1 (fall): student.init: {out}/2_sand lies in {out}, the folder of this",
        ),
        (
            {"domains": [domains()[0], domains()[1] | {"overrides": ["video.fps=4"]}]},
            "domain 2 (sand): video.fps is 4.0, and None in fall; needed: the same",
        ),
        (
            {"domains": [domains()[0], domains()[1] | {"overrides": ["stepz=4"]}]},
            "domain 2 (sand): override 'stepz=4': unknown key",
        ),
        (
            {"overrides": ["afd.prior_reference={previous: 0}"]},
            "afd.prior_reference is {'previous': 0}; needed: pretrained, previous, or positive",
        ),
        (
            {"domains": [domains()[0], domains()[1] | {"evaluation": {"metric": "fysics"}}]},
            "sand: evaluation.metric: got fysics; needed: one that is measured there: ",
        ),
        (
            {"domains": [domains()[0] | {"prompts": "{folder}/odd.txt"}]},
            "'no such ball' is a prompt of no teacher here",
        ),
    ],
)
def test_a_sequence_that_cannot_be_is_one_sentence(
    tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    (tmp_path / "odd.txt").write_text("no such ball\n", encoding="utf-8")
    places = {"{out}": str(tmp_path / "out"), "{folder}": str(tmp_path)}
    places["{shared}"] = str(SHARED["folder"])
    text = json.dumps(changes)
    for name, place in places.items():
        text, words = text.replace(name, place), words.replace(name, place)
    path = written(tmp_path, json.loads(text))
    with pytest.raises(AfdError) as raised:
        adapt(path, [], quiet())
    assert words in str(raised.value)
    assert "\n" not in str(raised.value)
    assert not list((tmp_path / "out").glob("*_*/metrics.jsonl"))


def test_the_discriminator_can_be_carried_on(tmp_path: Path) -> None:
    path = written(tmp_path, {"discriminator": "carried"})
    assert adapt(path, [], quiet())
    log = (tmp_path / "out" / "2_sand" / "train.log").read_text()
    assert f"discriminator.init {tmp_path / 'out' / '1_fall'}: after update 2" in log
    other = ["discriminator.backbone=motion", f"out={tmp_path / 'x'}"]
    changed = domains()
    changed[1]["overrides"] = other[:1]
    path = written(tmp_path / "y", {"discriminator": "carried", "domains": changed})
    with pytest.raises(ConfigError, match=r"discriminator\.init: that of .* has other settings"):
        adapt(path, [], quiet())


def test_ctrl_c_stops_a_sequence_and_the_command_continues(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = written(tmp_path)
    measure = adapt_run.measure

    def interrupted(*args: Any) -> None:
        measure(*args)
        if args[1] is not None:
            monkeypatch.setattr(adapt_run, "measure", measure)
            raise KeyboardInterrupt

    monkeypatch.setattr(adapt_run, "measure", interrupted)
    assert main(["adapt", str(path)]) == 130
    assert main(["adapt", str(path)]) == DONE
    assert (tmp_path / "out" / "report.html").is_file()
    assert os.path.exists(tmp_path / "out" / "2_sand" / "DONE")


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_shipped_sequence_is_planned_as_it_is(
    path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["adapt", str(path), "--dry-run"]) == DONE
    said = " ".join(capsys.readouterr().out.split())
    chain = load_chain(path)
    for domain in chain.domains:
        assert f"{domain.number}: {domain.name}" in said
    assert "in total" in said
    assert "student.init" not in said
    assert f"{len(chain.domains) + 1} students x {len(chain.columns)} held-out sets" in said
    if "480x832" in path.stem:
        assert "replay" in said
        assert "takes back parents of rank 256" in re.sub(r"[│ ]+", " ", said)
    assert list(tmp_path.iterdir()) == []
    assert main(["adapt", str(path), "--dry-run", "stepz=1"]) == MISTAKE


def test_gain_and_forgetting_count_in_the_direction_of_the_metric() -> None:
    rows = ["base", "a", "b", "c"]
    found = balance([1.0, 0.4, 0.5, 0.7], "lower", rows, "a")
    assert found == pytest.approx({"gain": 0.6, "forgetting": 0.3, "lost": 0.5})
    found = balance([0.1, 0.1, 0.6, 0.5], "higher", rows, "b")
    assert found == pytest.approx({"gain": 0.5, "forgetting": 0.1, "lost": 0.2})
    assert balance([1.0, 1.0, 1.0, 1.2], "lower", rows, "c")["lost"] is None
    assert balance([1.0, None, 1.0, 1.2], "lower", rows, "a")["gain"] is None
    assert balance([1.0], "lower", ["base"], "a")["gain"] is None


ABLATION = ROOT / "python" / "afd" / "configs" / "ablations" / "continual.yaml"


def test_every_row_of_the_ablation_is_another_sequence(tmp_path: Path) -> None:
    config = load_config(ABLATION, [], AblationConfig)
    assert config.seeds == [0, 1, 2]
    study = sequence_study(ABLATION, config, [f"out={tmp_path}", "seeds=[5]"])
    made = []
    for row in config.rows:
        chain = load_chain(*study.cell(row, 5))
        assert chain.root == tmp_path / row / "seed5"
        assert [domain.run.seed for domain in chain.domains] == [5, 6, 7][: len(chain.domains)]
        assert set(chain.columns) == {"heavy", "style", "light", "neutral"}
        runs = [plain(domain.run) for domain in chain.domains]
        for run in runs:
            del run["name"], run["out"], run["student"]["init"], run["replay"]["prompts"]
        made.append(runs)
    assert all(made.count(one) == 1 for one in made)


def test_an_ablation_of_sequences_is_tabulated(tmp_path: Path) -> None:
    base = written(tmp_path, {"out": None})
    path = tmp_path / "ablation.yaml"
    rows = {"naive": ["replay.fraction=0"], "other": ["sequence=other.yaml", "updates=1"]}
    shutil.copy(base, tmp_path / "other.yaml")
    data = {"name": "tiny", "question": "why?", "base": base.name, "rows": rows, "seeds": [0]}
    path.write_text(yaml_text(data), encoding="utf-8")
    assert ablation(path, [f"out={tmp_path / 'study'}", "updates=1"], quiet())
    results = json.loads((tmp_path / "study" / "results.json").read_text())
    assert list(results) == ["naive", "other"]
    assert {"fall phys", "fall gain", "fall forgetting", "s"} <= results["naive"]["mean"].keys()
    text = (tmp_path / "study" / "results.md").read_text()
    assert text.startswith("## tiny\n\nwhy?")
    assert "| naive | 1 |" in text
    assert (tmp_path / "study" / "curves.png").read_bytes().startswith(b"\x89PNG")
    data["rows"] = {"odd": ["sequence=none.yaml"]}
    path.write_text(yaml_text(data), encoding="utf-8")
    with pytest.raises(ConfigError, match=r"row odd: .*none"):
        ablation(path, [f"out={tmp_path / 'study'}"], quiet())


def test_a_sequence_grows_at_its_end_and_by_columns(tmp_path: Path) -> None:
    first = written(tmp_path, {"domains": domains()[:1]})
    assert adapt(first, ["updates=1"], quiet())
    out = tmp_path / "out"
    done = {p: t for p, t in kept(out / "1_fall").items() if p.name != "train.log"}
    before = json.loads((out / "matrix.json").read_text())["metrics"]
    sets = {"neutral": {"domain": "neutral"}, "paper": {"domain": "style", "metric": "rend"}}
    longer = written(tmp_path, {"sets": sets})
    assert adapt(longer, ["updates=1"], quiet())
    assert {p: p.stat().st_mtime_ns for p in done} == done
    after = json.loads((out / "matrix.json").read_text())
    assert after["rows"] == ["base", "fall", "sand"]
    assert list(after["columns"]) == ["fall", "sand", "neutral", "paper"]
    for row in ("base", "fall"):
        assert after["metrics"][row].keys() == {"fall", "sand", "neutral", "paper"}
        for column in ("fall", "neutral"):
            assert after["metrics"][row][column] == before[row][column]
