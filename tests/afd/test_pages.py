"""The commands in README and in docs/ parse, and their configuration keys exist."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from afd.audit.command import AuditOptions, split
from afd.benchmarks.config import BenchmarkConfig
from afd.cli import _parser, main
from afd.config.run import RunConfig, load_config, make_config
from afd.errors import ConfigError
from afd.export import ExportConfig
from afd.hub import CONFIGS
from afd.lab.physics import DEFINITIONS
from afd.lab.quickstart import COLUMNS
from afd.lab.shipped import checkpoint_path
from afd.live.config import read_config
from afd.sampling.config import SampleConfig

ROOT = Path(__file__).parents[2]
PAGES = (
    "../README.md",
    "QUICKSTART.md",
    "TRAINING.md",
    "SAMPLING.md",
    "LIVE.md",
    "EVALUATION.md",
    "TEACHERS.md",
    "ABLATIONS.md",
    "CONTINUAL.md",
    "HOWTO.md",
    "start/adapt.md",
    "start/trainers.md",
)
KINDS = {
    "train": RunConfig,
    "teacher": RunConfig,
    "benchmark": BenchmarkConfig,
    "sample": SampleConfig,
}


def commands(page: str, heading: str = "") -> list[list[str]]:
    """The words after `afd` of every command in the page's code, from a heading to the next."""
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    part = text[text.index(f"## {heading}") :] if heading else text
    part = part[: part.index("\n## ", 3)] if heading else part
    lines = "".join(re.findall(r"```sh\n(.*?)```", part, re.S)).splitlines()
    found = [re.fullmatch(r"(?:torchrun .*-m )?afd (.+)", line) for line in lines]
    return [shlex.split(match[1], comments=True) for match in found if match]


@contextmanager
def suppress_absent() -> Iterator[None]:
    try:
        yield
    except ConfigError as error:
        if "is neither a file nor" not in str(error):
            raise


@pytest.mark.parametrize(
    "words",
    [words for page in PAGES for words in commands(page)],
    ids=" ".join,
)
def test_a_command_and_its_keys_exist(words: list[str]) -> None:
    options = _parser().parse_args(words)
    path = getattr(options, "config", None)
    kind = KINDS.get(options.command)
    overrides = getattr(options, "overrides", [])
    if getattr(options, "verb", None) == "audit":
        own, overrides = split(overrides)
        make_config({}, own, "page", AuditOptions)
    if options.command == "live":
        # A checkpoint that is to be compared is only there after a run.
        with suppress_absent():
            read_config([*filter(None, [path]), *overrides])
    elif options.command == "export":
        make_config({}, overrides, "page", ExportConfig)
    elif path is not None and kind is not None and path.name != "clips":
        load_config(path, overrides, kind)


def test_the_readme_explains_every_metric_that_is_printed() -> None:
    rows = re.findall(r"^\| `(\w+)` \|", (ROOT / "README.md").read_text(encoding="utf-8"), re.M)
    assert sorted(rows) == sorted(DEFINITIONS)
    assert set(COLUMNS) <= set(rows)


def test_the_page_names_every_configuration_that_trains_at_this_size() -> None:
    page = (ROOT / "docs" / "TRAINING.md").read_text(encoding="utf-8")
    for path in CONFIGS.glob("*_480x832.yaml"):
        if "\nmethod: " in path.read_text(encoding="utf-8"):
            assert path.stem in page, path


def test_the_laptop_commands_run_as_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for words in commands("TRAINING.md", "On a laptop first"):
        assert main(words) == 0, words
    assert "metrics" in capsys.readouterr().out
    assert (tmp_path / "runs" / "try" / "report.html").is_file()
    # The few updates are not all the discriminator's.
    lines = (tmp_path / "runs" / "try" / "metrics.jsonl").read_text("utf-8").splitlines()
    assert all(json.loads(line)["student/grad_norm"] > 0 for line in lines)
    base = load_file(checkpoint_path("base"))
    trained = load_file(tmp_path / "exported" / "try" / "student.safetensors")
    assert any(not torch.equal(trained[name], weights) for name, weights in base.items())
    assert len(list((tmp_path / "videos" / "try").glob("*.mp4"))) == 1
