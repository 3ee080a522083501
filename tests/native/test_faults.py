"""Injected failures of allocations and of thread starts in every native op.

Once from Python with a preloaded shim, once without Python under sanitizers (faults/driver.cpp).
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from afd_kernels import native

ROOT = Path(__file__).parents[2]
FAULTS = Path(__file__).with_name("faults")
CPU = ROOT / "csrc" / "cpu"
KERNELS = ("kernels", "forward_noise", "nft_loss", "qk_norm_rope", "adaln")
POOL = ("launch", "launch_norm", "parallel")
SANITIZERS = ("address,undefined", "thread")


def _compile(*arguments: object) -> None:
    compiler = shutil.which("g++")
    if compiler is None or not sys.platform.startswith("linux"):
        pytest.skip("needs g++ on Linux")
    common = ["-std=c++20", "-g1", "-Wall", "-Wextra", "-Werror", f"-I{ROOT / 'csrc/include'}"]
    done = subprocess.run(
        [compiler, *common, "-DAFD_ISA=baseline", *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
    )
    if "cannot find" in done.stderr and "san" in done.stderr:
        pytest.skip("this g++ has no sanitizer libraries")
    assert done.returncode == 0, done.stderr


def _compile_kernels(folder: Path, *flags: str) -> list[Path]:
    objects = [folder / f"{name}.o" for name in KERNELS]
    for made in objects:
        _compile(*flags, "-c", CPU / f"{made.stem}.cpp", "-o", made)
    return objects


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The loops of one instruction set, without optimisation: what is tested is around them."""
    return _compile_kernels(tmp_path_factory.mktemp("kernels"), "-O0")


def _run_driver(folder: Path, sanitizer: str, objects: list[Path]) -> None:
    program = folder / "driver"
    sources = [FAULTS / "driver.cpp", *(CPU / f"{name}.cpp" for name in POOL)]
    wrapped = "-Wl,--wrap=aligned_alloc,--wrap=pthread_create"
    flags = (f"-fsanitize={sanitizer}", "-fno-sanitize-recover=all", "-O1")
    _compile(*flags, *sources, *objects, wrapped, "-pthread", "-o", program)
    run = subprocess.run([program], capture_output=True, text=True, timeout=300, check=False)
    assert run.returncode == 0, run.stderr[-4000:]
    assert run.stdout.endswith("done\n")


@pytest.mark.timeout(400)
@pytest.mark.parametrize("sanitizer", SANITIZERS)
def test_the_pool_survives_every_failure_under_sanitizers(
    tmp_path: Path, kernels: list[Path], sanitizer: str
) -> None:
    _run_driver(tmp_path, sanitizer, kernels)


@pytest.mark.soak
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("sanitizer", SANITIZERS)
def test_the_loops_too_are_clean_under_sanitizers(tmp_path: Path, sanitizer: str) -> None:
    _run_driver(tmp_path, sanitizer, _compile_kernels(tmp_path, "-O0", f"-fsanitize={sanitizer}"))


def test_a_failing_allocation_is_a_memory_error_and_the_op_runs_again(tmp_path: Path) -> None:
    if native.why_missing() is not None:
        pytest.skip(str(native.why_missing()))
    shim = tmp_path / "shim.so"
    _compile("-shared", "-fPIC", "-O1", FAULTS / "shim.cpp", "-o", shim, "-ldl")
    run = subprocess.run(
        [sys.executable, FAULTS / "ops.py", shim],
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
        env=os.environ | {"LD_PRELOAD": str(shim)},
        cwd=ROOT,
    )
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-4000:]
    assert run.stdout.endswith("survived\n")
