"""The source distribution and its wheel: what they hold, install and import."""

from __future__ import annotations

import re
import subprocess
import sys
import zipfile
from email.parser import Parser
from email.policy import default
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from docs.release_notes import notes
from tests.fresh import ROOT, build, needed, try_extra
from tests.lowest import tomllib


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("wheel"))


def test_the_wheel_holds_what_the_packages_read(wheel: Path) -> None:
    held = set(zipfile.ZipFile(wheel).namelist())
    read = {".py", ".yaml", ".json", ".safetensors", ".css", ".html", ".js", ".typed", ".md"}
    for package, folder in (("afd", "python/afd"), ("afd_kernels", "afd_kernels")):
        for path in (ROOT / folder).rglob("*"):
            if path.is_file() and (path.suffix in read or path.name == "py.typed"):
                assert f"{package}/{path.relative_to(ROOT / folder).as_posix()}" in held
    assert not {name for name in held if name.startswith(("tests/", "benchmarks/", "docs/"))}


def test_the_metadata_names_licence_version_and_needs(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    (name,) = (n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
    facts = Parser(policy=default).parsestr(archive.read(name).decode())
    assert (facts["Name"], facts["License-Expression"]) == ("afd-video", "Apache-2.0")
    assert name.replace("METADATA", "licenses/LICENSE") in archive.namelist()
    bare = [text for text in facts.get_all("Requires-Dist") if "extra ==" not in text]
    assert {re.split(r"[><=;\[ ]", text)[0] for text in bare} == {"torch", "triton", "numpy"}
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"\nversion: {facts['Version']}\n" in citation
    assert f"## {facts['Version']}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("extra", ["train", "lab", "live", "wan"])
def test_an_extra_imports_the_packages_of_no_other(extra: str) -> None:
    """Commands of an extra import without the packages that only other extras bring."""
    commands = {
        "train": "afd.trainer.loop, afd.adapt.run, afd.sampling.sample, afd.export",
        "lab": "afd.lab.quickstart, afd.lab.ablation, afd.audit.command",
        "live": "afd.live.run, afd.live.watch",
        "wan": "afd.models.wan.loading, afd.discriminators.videoalign.discriminator",
    }
    brought = {name: brings(name) for name in ("train", "lab", "live", "wan", "teachers")}
    absent = set.union(*brought.values()) - brought[extra] - brings(None)
    blocked = f"""
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {sorted(absent)}:
            raise ModuleNotFoundError("no " + name, name=name)
sys.meta_path.insert(0, Absent())
import {commands[extra]}
"""
    done = subprocess.run(
        [sys.executable, "-c", blocked], check=False, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert absent


def brings(extra: str | None) -> set[str]:
    """Names of the modules of an extra's packages, without what those need in turn."""
    text = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = text["dependencies"] if extra is None else text["optional-dependencies"][extra]
    found: set[str] = set()
    for line in lines:
        wanted = Requirement(line)
        if wanted.name == "afd-video":
            found |= set().union(*map(brings, wanted.extras))
            continue
        same = canonicalize_name(wanted.name)
        tops = packages_distributions().items()
        found |= {top for top, owners in tops if same in map(canonicalize_name, owners)}
    return found


def test_the_release_notes_are_the_section_of_the_version() -> None:
    newest = "## 0.2.0 (unreleased)\n\n- new\n\n### Decisions\n\n- a\n\n"
    text = f"# Changelog\n\n{newest}## 0.1.0\n\n- old\n"
    assert notes(text, "0.2.0") == "- new\n\n### Decisions\n\n- a\n"
    assert notes(text, "0.1.0") == "- old\n"
    for version in ("0.2", "1.0.0"):
        with pytest.raises(ValueError, match=r"no section .*; it has 0\.2\.0, 0\.1\.0"):
            notes(text, version)


def test_every_command_of_the_workflow_is_one_of_make() -> None:
    flow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8"))
    runs = [step["run"] for job in flow["jobs"].values() for step in job["steps"] if "run" in step]
    made = {match[1] for run in runs for match in re.finditer(r"^make ([a-z-]+)", run, re.M)}
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)
    assert {"check", "test", "extras"} <= made <= set(targets)
    assert flow["jobs"]["publish"]["needs"] == [job for job in flow["jobs"] if job != "publish"]


@pytest.mark.slow
def test_the_bare_package_imports_its_core_needs_alone(wheel: Path, tmp_path: Path) -> None:
    used = try_extra("bare", wheel, tmp_path / "bare")
    assert {"torch", "afd-video"} <= set(used)
    assert {name.replace("_", "-").lower() for name in used} <= {
        *needed(("torch", "triton", "numpy")),
        "afd-video",
    }


def test_a_release_without_a_compiler_fails(wheel: Path, tmp_path: Path) -> None:
    (archive,) = wheel.parent.glob("*.tar.gz")
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-index"]
    command += ["--no-build-isolation", "--wheel-dir", str(tmp_path), str(archive)]
    done = subprocess.run(
        command,
        env={"PATH": "/usr/bin:/bin", "CXX": "/nonexistent/c++", "AFD_REQUIRE_CORE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode != 0
    assert "AFD_REQUIRE_CORE=1: the compiled core cannot be built" in done.stdout + done.stderr
    assert not list(tmp_path.glob("*.whl"))
