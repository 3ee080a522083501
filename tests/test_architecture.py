"""The floors, arrows and limits of the house (docs/ARCHITECTURE.md)."""

from __future__ import annotations

import ast
import re
import subprocess
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = [
    ROOT / line
    for line in subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    if Path(line).suffix in {".py", ".cpp", ".cu", ".h"} and (ROOT / line).is_file()
]
PYTHON = [p for p in SOURCES if p.suffix == ".py"]


# From the ground up. A module belongs to its longest entry and imports its own floor or lower ones,
# at any depth of its code; within a floor no file imports in a circle.
FLOORS = (
    "afd.errors",
    "afd.listing",
    "afd.extras",
    "afd.files",
    "afd.terminal",
    "afd.registry",
    "afd.config.base",
    "afd.config.yaml",
    "afd.arguments",
    "afd.optimality",
    "afd.schedules",
    "afd.ops",
    "afd.machine",
    "afd.distributed",
    "afd.hub",
    "afd.cache",
    "afd.video",
    "afd.models",
    "afd.context",
    "afd.rollout",
    "afd.discriminators",
    "afd.rewards",
    "afd.teachers",
    "afd.methods",
    "afd.config",
    "afd.data",
    "afd.audit",
    "afd.trainer",
    "afd.export",
    "afd.integrations",
    "afd.sampling",
    "afd.planning",
    "afd.benchmarks",
    "afd.doctor",
    "afd.teachers.paid",
    "afd.adapt",
    "afd.lab",
    "afd.audit.command",
    "afd.live",
    "afd.testing",
    "afd.verbs",
    "afd.cli",
    "afd.__main__",
)
PACKAGE = ROOT / "python" / "afd"


def module(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts).removesuffix(".__init__")


MODULES = {module(path): path for path in PYTHON if path.is_relative_to(PACKAGE)}


def floor(name: str) -> int:
    entries = [f for f in FLOORS if name == f or name.startswith(f"{f}.")]
    assert entries, f"{name} is on no floor"
    return FLOORS.index(max(entries, key=len))


def own_imports(path: Path) -> set[str]:
    """The modules of afd that a file imports, also in functions and for type checkers only."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        found |= {name for name in names if name in MODULES}
    return found - {"afd"}


@pytest.mark.parametrize("name", sorted(MODULES.keys() - {"afd"}))
def test_imports_go_downward(name: str) -> None:
    higher = {other for other in own_imports(MODULES[name]) if floor(other) > floor(name)}
    assert not higher


def test_no_file_imports_in_a_circle() -> None:
    graph = {name: own_imports(path) - {name} for name, path in MODULES.items()}
    TopologicalSorter(graph).prepare()  # raises CycleError, which names the circle


def imports(path: Path) -> set[str]:
    """Top-level names of everything a file imports, at any depth of the code."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module.split(".")[0])
    return names


def under(*folders: str) -> list[Path]:
    return [p for p in PYTHON if p.relative_to(ROOT).as_posix().startswith(folders)]


@pytest.mark.parametrize("path", under("afd_kernels/"), ids=str)
def test_kernels_import_nothing_of_afd(path: Path) -> None:
    assert "afd" not in imports(path)


BARE = ("afd_kernels/", "python/afd/ops.py", "python/afd/integrations/nft.py")


@pytest.mark.parametrize("path", under(*BARE), ids=str)
def test_kernels_and_ops_run_on_a_bare_gpu_box(path: Path) -> None:
    """Nothing beyond torch, triton, numpy and the standard library: the core's dependencies."""
    third_party = {
        "einops",
        "rich",
        "yaml",
        "pydantic",
        "av",
        "safetensors",
        "tensorboard",
        "matplotlib",
        "diffusers",
        "transformers",
        "peft",
        "ftfy",
        "huggingface_hub",
    }
    assert not third_party & imports(path)


@pytest.mark.parametrize("path", under("afd_kernels/", "python/", "benchmarks/"), ids=str)
def test_the_product_never_imports_its_tests_or_benchmarks(path: Path) -> None:
    allowed = {"tests", "benchmarks"} if "benchmarks/" in path.as_posix() else set()
    assert not ({"tests", "benchmarks"} - allowed) & imports(path)


@pytest.mark.parametrize("path", [p for p in SOURCES if "csrc/" in str(p)], ids=str)
def test_the_core_includes_no_torch(path: Path) -> None:
    assert not re.search(r"#include\s*[<\"](torch|ATen|c10)", path.read_text())


@pytest.mark.parametrize("path", SOURCES, ids=str)
def test_no_file_over_500_lines(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 500


def test_every_environment_variable_is_documented() -> None:
    documented = (ROOT / "docs" / "ENVIRONMENT.md").read_text()
    pattern = r"environ(?:\.get|\.setdefault|\.pop)?[\[(]\s*[\"']([A-Z_0-9]+)"
    for path in PYTHON:
        for name in re.findall(pattern, path.read_text()):
            assert f"`{name}`" in documented, f"{name} in {path} is not in docs/ENVIRONMENT.md"


def test_the_package_does_not_name_the_shared_folder() -> None:
    for path in under("afd_kernels/", "python/"):
        assert "../shared" not in path.read_text(), path
