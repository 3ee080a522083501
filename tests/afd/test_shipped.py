"""Shipped configurations by name, and the name of the distribution."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from afd import extras
from afd.cli import _parser, main
from afd.config.run import load_config, read_yaml
from afd.config.shipped import Shipped, find_config, shipped
from afd.errors import ConfigError
from afd.hub import CONFIGS
from afd.lab.ablation import AblationConfig

ROOT = Path(__file__).parents[2]


def test_the_list_fits_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["configs"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    listed = [line.split()[0] for line in lines if line.startswith("  ")]
    names = [p.relative_to(CONFIGS).with_suffix("").as_posix() for p in CONFIGS.rglob("*.yaml")]
    assert sorted(listed) == sorted(names)


@pytest.mark.parametrize("one", list(shipped()), ids=lambda one: one.name)
def test_a_file_says_what_it_is_for_and_its_command(one: Shipped) -> None:
    assert one.purpose
    assert not one.purpose.startswith("afd ")
    assert _parser().parse_args([*one.command.split(), one.name]).config == Path(one.name)


@pytest.mark.parametrize("named", ["quickstart", "quickstart.yaml", "configs/quickstart.yaml"])
def test_a_name_is_found_from_any_folder(
    named: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "quickstart").mkdir()
    assert find_config(named) == CONFIGS / "quickstart.yaml"
    (tmp_path / named).parent.mkdir(exist_ok=True)
    if not (tmp_path / named).exists():
        (tmp_path / named).write_text("name: own\n")
        assert load_config(named).name == "own"


@pytest.mark.parametrize("named", ["quikstart", "/nowhere/quickstart", "../afd/configs/quickstart"])
def test_what_is_neither_a_file_nor_a_name_is_refused(named: str) -> None:
    closest = r"closest: .*\bquickstart" if named == "quikstart" else "afd configs lists those"
    with pytest.raises(ConfigError, match=rf"neither a file nor .*{closest}"):
        load_config(named)


def test_a_copy_works_where_it_lies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for one in shipped():
        words = ["configs", "copy", one.name]
        assert main(words if one.name == "folder" else [*words, f"{len(one.name)}.yaml"]) in (0, 2)
    assert (tmp_path / "folder.yaml").read_bytes() == (CONFIGS / "folder.yaml").read_bytes()
    capsys.readouterr()
    assert main(["configs", "copy", "ablations/bt_vs_gan", str(tmp_path)]) == 0
    copied = Path(capsys.readouterr().out.strip())
    assert copied == tmp_path / "bt_vs_gan.yaml"
    base = load_config(copied, [], AblationConfig).base
    assert read_yaml(find_config(base, copied))["name"] == "quickstart"
    before = copied.read_bytes()
    copied.write_bytes(before + b"\n")
    assert main(["configs", "copy", "ablations/bt_vs_gan"]) == 2
    assert "bt_vs_gan.yaml exists" in capsys.readouterr().err
    assert copied.read_bytes() == before + b"\n"
    assert main(["configs", "copy", "../run"]) == 2


def test_a_base_beside_the_file_wins_over_a_shipped_name(tmp_path: Path) -> None:
    (tmp_path / "quickstart").write_text("name: own\n")
    assert find_config("quickstart", tmp_path / "study.yaml") == tmp_path / "quickstart"
    assert find_config("folder", tmp_path / "study.yaml") == CONFIGS / "folder.yaml"


@pytest.mark.parametrize("files", [["afd/__init__.py", "afd/cli/main.py"], []])
def test_a_foreign_distribution_of_the_same_packages_is_named(
    files: list[str], tmp_path: Path
) -> None:
    """Without files: an editable installation of this project under its former name."""
    info = tmp_path / "afd-0.10.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: afd\nVersion: 0.10.0\n")
    (info / "RECORD").write_text("".join(f"{name},,\n" for name in [*files, "x.pth"]))
    done = subprocess.run(
        [sys.executable, "-m", "afd", "configs"],
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == (2 if files else 0), done.stderr
    assert ("another distribution, afd 0.10.0, is installed" in done.stderr) == bool(files)
    assert ("pip uninstall --yes afd, then pip install" in done.stderr) == bool(files)


def test_the_hint_is_right_for_what_is_installed() -> None:
    """pip takes the installed distribution, though the name is on no index that it may ask."""
    extra = next(package for package in extras.PACKAGES if package.extra == "wan")
    pip, verb, *words = shlex.split(extras.command(extra))
    assert (pip, verb) == ("pip", "install")
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--no-index", *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert f"Requirement already satisfied: {extras.DISTRIBUTION}[wan]" in done.stdout


def test_the_core_is_built_from_the_checkout_or_from_the_index(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert extras.build_core() == f"pip install --no-deps --editable {shlex.quote(str(ROOT))}"
    monkeypatch.setattr(extras, "DISTRIBUTION", "not-installed-here")
    assert extras.build_core().endswith("--no-binary not-installed-here not-installed-here")
