"""A package of one's own, installed beside afd: the blocks of docs/EXTENDING.md are its files."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "EXTENDING.md").read_text(encoding="utf-8")
# A second package, whose entry points are all broken.
BROKEN = """\
[afd.students]
absent = nowhere.to.be.found:Config
function = os.path:join
[afd.teachers]
faulty = faulty:Config
[afd.discriminators]
bare = bare:Bare
toy = bare:Bare
[afd.rewards]
bare = bare:Reward
[afd.metrics]
absent = json:nothing
"""
BARE = """\
from afd.discriminators.config import PairConfig
from afd.rewards.base import RewardConfig


class Bare(PairConfig):
    pass


class Reward(RewardConfig):
    pass
"""


def files() -> dict[str, str]:
    """The blocks of the page by the name in their first line."""
    blocks = re.findall(r"```(?:toml|python|yaml)\n# (\S+)\n(.*?)```", PAGE, re.S)
    return dict(blocks)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the package is installed; its configuration lies beside."""
    home = tmp_path_factory.mktemp("squares")
    for name, text in files().items():
        (home / name).parent.mkdir(exist_ok=True)
        (home / name).write_text(text, encoding="utf-8")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    pip += ["--no-deps", "--no-build-isolation", "--no-index", "--target", str(home / "site")]
    subprocess.run([*pip, str(home)], check=True, capture_output=True)
    broken = home / "site" / "broken-1.0.dist-info"
    broken.mkdir()
    (broken / "METADATA").write_text("Metadata-Version: 2.1\nName: broken\nVersion: 1.0\n")
    (broken / "entry_points.txt").write_text(BROKEN)
    (home / "site" / "faulty.py").write_text("def (")
    (home / "site" / "bare.py").write_text(BARE)
    return home / "site"


# Runs commands one after another, as a start of Python and torch takes longer than each of them.
COMMANDS = """
import contextlib, io, json, sys
from afd.cli import main
for words in json.loads(sys.argv[1]):
    with contextlib.redirect_stderr(io.StringIO()) as errors:
        code = main(words)
    print(json.dumps([code, errors.getvalue()]), flush=True)
"""


def afd(site: Path, *commands: list[str]) -> list[tuple[int, str]]:
    """Exit code and errors of `afd WORDS` for each command, in one process that finds the package,
    in the folder of its configuration."""
    environment = os.environ | {"PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"}
    words = [sys.executable, "-c", COMMANDS, json.dumps(commands)]
    done = subprocess.run(
        words, cwd=site.parent, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if re.match(r'\[\d+, "', line)]
    return [(code, errors) for code, errors in map(json.loads, lines)]


def test_every_block_is_a_file_of_the_package() -> None:
    fences = re.findall(r"```(\w+)\n", PAGE)
    assert len(files()) == sum(language != "sh" for language in fences)
    for name, text in files().items():
        lines = [line for line in text.splitlines() if line.strip()]
        imports = sum(line.startswith(("import ", "from ")) for line in lines)
        if name.endswith(".py"):
            assert len(lines) - imports <= 50, f"{name} is no longer short"


def test_a_student_of_another_architecture_trains_and_exports_and_is_planned(site: Path) -> None:
    """Its own network, whole or with adapters on its own layers, from one folder of the package."""
    lora = "student={kind: parallel, denoising_steps: [1.0, 0.5], lora: {rank: 2, alpha: 2}}"
    whole = "student={kind: parallel, denoising_steps: [1.0, 0.5]}"
    start = "student.checkpoint=one_trained/network.safetensors"
    done = afd(
        site,
        ["train", "squares.yaml", "out=one", lora],
        ["export", "one", "out=one_trained", "kind=student"],
        ["train", "squares.yaml", "out=two", whole, start],
        ["train", "squares.yaml", "out=three", whole, "--dry-run"],
    )
    assert done == [(0, "")] * 4
    for run in ("one", "two"):
        lines = (site.parent / run / "metrics.jsonl").read_text().splitlines()
        assert len(lines) == 2
        assert all(json.loads(line)["student/grad_norm"] > 0 for line in lines)


def test_the_commands_of_the_page_train_measure_and_export(site: Path) -> None:
    commands = [words.split() for words in re.findall(r"^afd (.+?)(?:  +#.*)?$", PAGE, re.M)]
    assert [words[0] for words in commands] == ["train", "eval", "export"]
    again = ["out=again", "updates=1", "student.checkpoint=trained/network.safetensors"]
    done = afd(site, *commands, ["train", "squares.yaml", *again])
    assert done == [(0, "")] * 4
    run = site.parent / "runs" / "squares"
    updates = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert len(updates) == 2
    assert all(math.isfinite(update["discriminator/loss"]) for update in updates)
    for update in updates:
        assert update["reward/steady/mean"] <= 0
        assert -1 <= update["reward/steady/agreement"] <= 1
    measured = json.loads((run / "evaluation.jsonl").read_text().splitlines()[-1])
    assert set(measured["metrics"]) == {"brightness", "change"}
    assert (run / "samples" / "001.mp4").is_file()
    assert sorted(path.name for path in (run / "teacher").glob("*.mp4")) == [
        "a square moves across.mp4",
        "a square moves down.mp4",
        "a square moves right.mp4",
    ]
    assert (site.parent / "again" / "DONE").is_file()


def test_a_name_that_cannot_be_used_is_one_sentence(site: Path) -> None:
    refused = {
        "student={kind: letter}": "student.kind: got 'letter'; needed: one of the students toy",
        "evaluation.kind=bright": "evaluation.kind: got 'bright'; needed: one of the metrics",
        "teacher.sides=3": "unknown key 'teacher.sides'; did you mean teacher.side",
        "student.kind=absent": "nowhere.to.be.found:Config, registered in afd.students, cannot",
        "student.kind=function": "is not a subclass of afd.models.config.StudentConfig",
        "teacher.kind=faulty": "cannot be imported (SyntaxError: ",
        "discriminator.kind=bare": "'bare': bare:Bare, registered in afd.discriminators, does not",
        "rewards.steady.kind=bare": "'bare': bare:Reward, registered in afd.rewards, does not",
        "rewards.steady.gaps=3": "key 'rewards.steady.gaps'; did you mean rewards.steady.gap",
        "evaluation.kind=absent": "'absent': json:nothing, registered in afd.metrics, cannot be",
    }
    done = afd(site, *(["train", "squares.yaml", override] for override in refused))
    for (code, errors), (override, sentence) in zip(done, refused.items(), strict=True):
        assert code == 2, override
        assert sentence in " ".join(errors.split()), (override, errors)
