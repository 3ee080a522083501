"""Inspect this machine: versions, devices, compilers, the compiled core, available op backends."""

from __future__ import annotations

import functools
import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
from typing import Any

import torch

import afd
from afd import extras
from afd_kernels import dispatch, native

# Packages that a run depends on, and whose versions it therefore records.
PACKAGES = (
    "torch", "triton", "numpy",
    *(p.name for p in extras.PACKAGES if p.extra in ("train", "wan", "teachers", "lab")),
)  # fmt: skip
# Default dtype of training and rollout; on a GPU, attention libraries support only 16-bit types.
USUAL = {"cpu": torch.float32, "cuda": torch.bfloat16}
COMPILERS = (("c++", "--version"), ("cmake", "--version"), ("ninja", "--version"))


def inspect() -> dict[str, Any]:
    """JSON-serialisable facts: versions, devices, compilers, compiled core, ops, missing extras."""
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
        "ops_by_device": {device: dispatch.report(device, USUAL[device]) for device in devices},
        "missing_optional": [
            {
                "package": package.name,
                "for": package.purpose,
                "extra": package.extra,
                "install": extras.command(package),
            }
            for package in extras.missing()
        ],
    }


def _compiled_core() -> dict[str, Any]:
    why = native.why_missing()
    if why is not None:
        return {
            "present": False,
            "why": f"{why}; with a C++20 compiler, {extras.build_core()} builds it",
        }
    return {
        "present": True,
        "file": native.core().__file__,
        "cpu": native.isa(),
        "cuda": native.cuda_archs(),
    }


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
    """The first line of a program's version output, or None if it is not on the PATH."""
    path = shutil.which(program, path=_search_path())
    if path is None:
        return None
    done = subprocess.run([path, flag], capture_output=True, text=True, timeout=20, check=False)
    return (done.stdout.strip().splitlines() or [path])[0]


@functools.cache
def _nvcc() -> str | None:
    path = shutil.which("nvcc", path=_search_path() + os.pathsep + "/usr/local/cuda/bin")
    if path is None:
        return None
    done = subprocess.run(
        [path, "--version"], capture_output=True, text=True, timeout=20, check=False
    )
    release = [line for line in done.stdout.splitlines() if "release" in line]
    return release[0] if release else path


def _search_path() -> str:
    # Also find build tools installed in this Python environment when it is not activated.
    return os.path.dirname(sys.executable) + os.pathsep + os.environ.get("PATH", os.defpath)
