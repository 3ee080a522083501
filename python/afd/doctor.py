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
from collections.abc import Iterator
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

import afd
from afd_kernels import dispatch, native

PACKAGES = (
    "torch", "triton", "numpy", "einops", "rich", "PyYAML", "pydantic", "av", "safetensors",
    "diffusers", "transformers", "peft", "ftfy", "huggingface_hub", "httpx",
    "tensorboard", "matplotlib",
)  # fmt: skip
# Package, its import name, and what it adds.
OPTIONAL = (
    ("diffusers", "diffusers", "the autoencoder of Wan students", "afd[wan]"),
    ("transformers", "transformers", "their text encoder, and VideoAlign", "afd[wan]"),
    ("ftfy", "ftfy", "prompts cleaned as that encoder learnt them", "afd[wan]"),
    ("peft", "peft", "LoRA of students and of VideoAlign", "afd[wan]"),
    ("huggingface_hub", "huggingface_hub", "models by hub name", "afd[wan]"),
    ("flash-attn", "flash_attn", "attention on CUDA, timed beside ours", "afd[flash]"),
    ("xformers", "xformers", "attention on CUDA", "afd[xformers]"),
    ("wandb", "wandb", "a board for runs (logging.wandb)", "wandb"),
    ("pytest", "pytest", "the test suite", "afd[dev]"),
)
# What a run at video size needs beside torch.
TRAINING = ("diffusers", "transformers", "peft", "ftfy", "av")
# What training and rollout run in; attention libraries take nothing wider on a GPU.
USUAL = {"cpu": torch.float32, "cuda": torch.bfloat16}
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
        "ops_by_device": {device: dispatch.report(device, USUAL[device]) for device in devices},
        "missing_optional": [
            {"package": package, "for": purpose, "install": f"pip install '{extra}'"}
            for package, module, purpose, extra in OPTIONAL
            if importlib.util.find_spec(module) is None
        ],
        "training": _training(),
    }


def _training() -> dict[str, Any]:
    """What AFD with LoRA at 480x832 needs by estimate, in GB, and what is here."""
    memory = [
        torch.cuda.get_device_properties(i).total_memory for i in range(torch.cuda.device_count())
    ]
    gpu, disk = _needs()
    return {
        "gpu_gb": round(gpu / 1e9, 1),
        "gpu_gb_here": round(max(memory, default=0) / 1e9, 1),
        "disk_gb": round(disk / 1e9, 1),
        "disk_gb_here": round(shutil.disk_usage(os.getcwd()).free / 1e9, 1),
        "missing_packages": [name for name in TRAINING if importlib.util.find_spec(name) is None],
    }


@functools.cache
def _needs() -> tuple[int, int]:
    """Bytes on the GPU, and of checkpoints on the disk."""
    # Imported here: the plan knows every part of a run.
    from afd.config.run import make_config
    from afd.planning.plan import make_plan

    data = {
        "video": {"frames": 81, "height": 480, "width": 832, "fps": 16},
        "student": {"kind": "wan"},
        "discriminator": {"kind": "videoalign", "micro_batch": 1},
        "afd": {"draws": 1, "keep_context": False, "micro_batch": 1},
        "evaluation": {"kind": "video"},
    }
    plan = make_plan(make_config(data))
    return max(plan.peaks().values()), (plan.config.checkpoint.keep + 1) * plan.checkpoint_bytes


def show(facts: dict[str, Any], console: Console) -> None:
    """The facts of `inspect` for a reader."""
    for line in _lines(facts):
        # Brackets in a sentence (as in pip install 'afd[dev]') are not rich's markup.
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    for device, ops in facts["ops_by_device"].items():
        table = Table("op", *dispatch.BACKENDS, title=f"backends on {device}", title_justify="left")
        # Why a backend does not run is one sentence for many ops: said once, below.
        notes: dict[str, int] = {}
        for op, states in ops.items():
            cells = (_cell(states, backend, notes) for backend in dispatch.BACKENDS)
            table.add_row(op, *map(escape, cells))
        console.print(table)
        for sentence, number in notes.items():
            line = f"({number}) {sentence}"
            console.print(line, markup=False, highlight=False, soft_wrap=True)


def _cell(states: dict[str, str], backend: str, notes: dict[str, int]) -> str:
    state = states.get(backend, "-")
    if backend == states["chosen"]:
        return state.replace("available", "runs", 1)
    if state == "-" or state.startswith("available"):
        return state
    return f"no ({notes.setdefault(state, len(notes) + 1)})"


def _lines(facts: dict[str, Any]) -> Iterator[str]:
    cpu, core = facts["cpu"], facts["compiled_core"]
    yield f"afd {facts['afd']}, Python {facts['python']}, {facts['platform']}"
    counts = f"{cpu['cores']} cores, {cpu['threads']} threads"
    yield f"CPU: {cpu['model']}, {counts}, {cpu['capability']}"
    for gpu in facts["gpus"]:
        yield f"GPU: {gpu['name']}, {gpu['memory_gib']} GiB, {gpu['architecture']}"
    if not facts["gpus"]:
        yield "GPU: none that torch can use"
    versions = (f"{name} {version or 'missing'}" for name, version in facts["packages"].items())
    yield "packages: " + ", ".join(versions)
    for name, version in facts["compilers"].items():
        yield f"{name}: {version or 'not found'}"
    if core["present"]:
        cuda = f"CUDA for sm_{', sm_'.join(core['cuda'])}" if core["cuda"] else "without CUDA"
        yield f"compiled core: {core['file']}, {core['cpu']} code in use, {cuda}"
    else:
        yield f"compiled core: {core['why']}"
    needs = facts["training"]
    here = f"{needs['gpu_gb_here']} GB" if needs["gpu_gb_here"] else "no GPU"
    yield (
        f"training at 480x832 (AFD, LoRA; estimate, afd train CONFIG --dry-run says more): "
        f"{needs['gpu_gb']} GB of GPU memory (here {here}), {needs['disk_gb']} GB of disk for "
        f"checkpoints (here {needs['disk_gb_here']} GB free)"
    )
    if needs["missing_packages"]:
        yield f"training at 480x832 lacks: pip install {' '.join(needs['missing_packages'])}"
    for missing in facts["missing_optional"]:
        yield f"optional: {missing['package']} ({missing['for']}): {missing['install']}"


def _compiled_core() -> dict[str, Any]:
    why = native.why_missing()
    if why is not None:
        return {
            "present": False,
            "why": f"{why}; with a C++20 compiler, pip install -e . builds it",
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
