"""What this machine can run, and what would make it run more."""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import afd
from afd_kernels import dispatch

PACKAGES = (
    "torch", "triton", "numpy", "einops", "rich", "PyYAML", "pydantic", "av", "safetensors",
    "tensorboard", "matplotlib",
)  # fmt: skip
# Package, its import name, and what it adds.
OPTIONAL = (
    ("flash-attn", "flash_attn", "attention baselines in benchmarks on CUDA", "afd[flash]"),
    ("xformers", "xformers", "attention baselines in benchmarks on CUDA", "afd[xformers]"),
    ("pytest", "pytest", "the test suite", "afd[dev]"),
)
COMPILERS = (("c++", "--version"), ("cmake", "--version"), ("ninja", "--version"))


def inspect() -> dict[str, Any]:
    """Plain data, ready for JSON: versions, devices, compilers, compiled core, ops, what lacks."""
    devices = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    return {
        "afd": afd.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": {
            "model": _cpu_model(),
            "capability": torch.backends.cpu.get_cpu_capability(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
        },
        "gpus": [_gpu(i) for i in range(torch.cuda.device_count())],
        "packages": {name: _version(name) for name in PACKAGES},
        "compilers": {name: _first_line(name, flag) for name, flag in COMPILERS}
        | {"nvcc": _nvcc()},
        "compiled_core": _compiled_core(),
        "ops": dispatch.report("cpu"),
        "ops_by_device": {device: dispatch.report(device) for device in devices},
        "missing_optional": [
            {"package": package, "for": purpose, "install": f"pip install '{extra}'"}
            for package, module, purpose, extra in OPTIONAL
            if importlib.util.find_spec(module) is None
        ],
    }


def show(facts: dict[str, Any], console: Console) -> None:
    """The facts of `inspect` for a reader."""
    cpu, core = facts["cpu"], facts["compiled_core"]
    console.print(f"afd {facts['afd']}, Python {facts['python']}, {facts['platform']}")
    console.print(
        f"CPU: {cpu['model']}, {cpu['cores']} cores, {cpu['threads']} threads, {cpu['capability']}"
    )
    for gpu in facts["gpus"]:
        console.print(f"GPU: {gpu['name']}, {gpu['memory_gib']} GiB, {gpu['architecture']}")
    if not facts["gpus"]:
        console.print("GPU: none that torch can use")
    versions = (f"{name} {version or 'missing'}" for name, version in facts["packages"].items())
    console.print("packages: " + ", ".join(versions))
    for name, version in facts["compilers"].items():
        console.print(f"{name}: {version or 'not found'}")
    console.print(
        f"compiled core: {core['file']}" if core["present"] else f"compiled core: {core['why']}"
    )
    for device, ops in facts["ops_by_device"].items():
        table = Table("op", *dispatch.BACKENDS, title=f"backends on {device}", title_justify="left")
        for op, states in ops.items():
            cells = (
                "[bold]runs[/bold]" if name == states["chosen"] else states[name]
                for name in dispatch.BACKENDS
            )
            table.add_row(op, *cells)
        console.print(table)
    for missing in facts["missing_optional"]:
        console.print(f"optional: {missing['package']} ({missing['for']}): {missing['install']}")


def _compiled_core() -> dict[str, Any]:
    try:
        core = importlib.import_module("afd_kernels._native")
    except ImportError as error:
        why = f"absent ({error}); install a C++20 compiler, then: pip install --no-deps -e ."
        return {"present": False, "why": why}
    return {"present": True, "file": core.__file__}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _gpu(index: int) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(index)
    return {
        "name": properties.name,
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "architecture": f"sm_{properties.major}{properties.minor}",
    }


def _cpu_model() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            models = (line.partition(":")[2].strip() for line in lines if "model name" in line)
            return next(models, platform.machine())
    except OSError:
        return platform.processor() or platform.machine()


@functools.cache
def _first_line(program: str, flag: str) -> str | None:
    """The first line a program says of itself, or None where it is not on the PATH."""
    path = shutil.which(program, path=_search_path())
    if path is None:
        return None
    said = subprocess.run([path, flag], capture_output=True, text=True, timeout=20, check=False)
    return (said.stdout.strip().splitlines() or [path])[0]


@functools.cache
def _nvcc() -> str | None:
    path = shutil.which("nvcc", path=_search_path() + os.pathsep + "/usr/local/cuda/bin")
    if path is None:
        return None
    said = subprocess.run(
        [path, "--version"], capture_output=True, text=True, timeout=20, check=False
    )
    release = [line for line in said.stdout.splitlines() if "release" in line]
    return release[0] if release else path


def _search_path() -> str:
    # Build tools installed in this environment are used even where it is not activated.
    return os.path.dirname(sys.executable) + os.pathsep + os.environ.get("PATH", os.defpath)
