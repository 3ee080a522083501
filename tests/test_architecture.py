"""The arrows and the limits of the house (docs/ARCHITECTURE.md)."""

from __future__ import annotations

import ast
import re
import subprocess
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


@pytest.mark.parametrize("path", under("afd_kernels/", "python/afd/ops.py"), ids=str)
def test_kernels_and_ops_run_on_a_bare_gpu_box(path: Path) -> None:
    """Nothing beyond torch, triton, numpy, einops, rich and the standard library."""
    third_party = {
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


def test_no_host_synchronisation_in_the_kernels() -> None:
    """contracts.check_values looks at CPU tensors only; nothing else may."""
    for path in under("afd_kernels/"):
        if path.name != "contracts.py":
            assert ".item()" not in path.read_text(), path


def test_every_environment_variable_is_documented() -> None:
    documented = (ROOT / "docs" / "ENVIRONMENT.md").read_text()
    pattern = r"environ(?:\.get|\.setdefault|\.pop)?[\[(]\s*[\"']([A-Z_0-9]+)"
    for path in PYTHON:
        for name in re.findall(pattern, path.read_text()):
            assert f"`{name}`" in documented, f"{name} in {path} is not in docs/ENVIRONMENT.md"


def test_the_package_does_not_name_the_shared_folder() -> None:
    for path in under("afd_kernels/", "python/"):
        assert "../shared" not in path.read_text(), path
