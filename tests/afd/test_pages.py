"""The commands in README and in docs/ parse, and their configuration keys exist."""

from __future__ import annotations

import re
import shlex
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from afd.benchmarks.config import BenchmarkConfig
from afd.cli import _parser, main
from afd.config.run import RunConfig, load_config, make_config
from afd.errors import ConfigError
from afd.export import ExportConfig
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
    if options.command == "live":
        words = [*filter(None, [path]), *options.overrides]
        if path is not None and path.endswith(".yaml"):
            words[0] = str(ROOT / path)
        # A checkpoint that is to be compared is only there after a run.
        with suppress_absent():
            read_config(words)
    elif options.command == "export":
        make_config({}, options.overrides, "page", ExportConfig)
    elif path is not None and path.suffix == ".yaml" and kind is not None:
        load_config(ROOT / path, options.overrides, kind)


def test_the_page_names_every_configuration_that_trains_at_this_size() -> None:
    page = (ROOT / "docs" / "TRAINING.md").read_text(encoding="utf-8")
    for path in (ROOT / "configs").glob("*_480x832.yaml"):
        if "\nmethod: " in path.read_text(encoding="utf-8"):
            assert path.name in page, path


def test_the_laptop_commands_run_as_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    monkeypatch.chdir(tmp_path)
    for words in commands("TRAINING.md", "On a laptop first"):
        assert main(words) == 0, words
    assert "metrics" in capsys.readouterr().out
    assert (tmp_path / "runs" / "try" / "report.html").is_file()
    assert len(list((tmp_path / "videos" / "try").glob("*.mp4"))) == 1
