"""docs/PAID_TEACHERS.md: its sections load, its commands parse, its quotes are what is printed."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from afd.audit.command import AuditOptions
from afd.cli import _parser, main
from afd.config.run import load_config, make_config
from afd.config.shipped import find_config
from afd.export import ExportConfig
from afd.teachers.paid.config import PaidConfig
from afd.teachers.paid.teacher import PROVIDERS, price_of

PAGE = (Path(__file__).parents[2] / "docs" / "PAID_TEACHERS.md").read_text(encoding="utf-8")
SECTIONS = re.findall(r"```yaml\n(teacher:.*?)```", PAGE, re.S)
QUOTED = "".join(re.findall(r"```text\n(.*?)```", PAGE, re.S)).splitlines()
COMMANDS = [
    shlex.split(line, comments=True)
    for line in re.findall(r"^(?:torchrun .*-m )?afd (.+)$", PAGE, re.M)
]


@pytest.fixture(params=SECTIONS, ids=lambda text: text.split()[2])
def bought(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> PaidConfig:
    """The copy with its section, beside 200 prompts."""
    monkeypatch.chdir(tmp_path)
    for provider in PROVIDERS.values():
        monkeypatch.delenv(provider.key_variable, raising=False)
    Path("prompts.txt").write_text("".join(f"a ball falls, number {n}\n" for n in range(200)))
    text = find_config("afd_self_forcing_480x832").read_text(encoding="utf-8")
    text, count = re.subn(r"^teacher:\n(?:  .*\n)+", request.param, text, flags=re.M)
    assert count == 1
    Path("bought.yaml").write_text(text, encoding="utf-8")
    teacher = load_config("bought.yaml").teacher
    assert isinstance(teacher, PaidConfig)
    return teacher


def test_every_service_has_its_section() -> None:
    assert [text.split()[2] for text in SECTIONS] == list(PROVIDERS)


def test_the_dry_run_prints_what_the_page_quotes(
    bought: PaidConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ["train", "bought.yaml", "--dry-run", "--processes", "8"] in COMMANDS
    assert main(["train", "bought.yaml", "--dry-run", "--processes", "8"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert len(QUOTED) == 7
    for line in QUOTED:
        own = line.replace("ARK_API_KEY", PROVIDERS[bought.kind](None).key_variable)
        assert own.replace("teacher: ark", f"teacher: {bought.kind}") in printed


def test_its_commands_parse_with_their_keys(bought: PaidConfig) -> None:
    for words in COMMANDS:
        options = _parser().parse_args(words)
        if words[0] == "export":
            make_config({}, options.overrides, "page", ExportConfig)
        elif "audit" in words:
            make_config({}, options.overrides, "page", AuditOptions)
        elif words[0] in ("train", "teacher"):
            load_config(options.config, options.overrides)


def test_the_tokens_of_the_page_are_those_of_the_estimate(bought: PaidConfig) -> None:
    if bought.kind == "ark":
        fetch = bought.fetch.model_copy(update={"price_per": "million_tokens"})
        by_token = bought.model_copy(update={"fetch": fetch})
        provider = PROVIDERS["ark"](None)
        price = price_of(by_token, provider, provider.defaults() | bought.api.options)
        assert f"{round(price * 1e6):,} tokens" in PAGE
