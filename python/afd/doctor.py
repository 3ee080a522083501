"""`afd doctor`: report what this machine can run and what is missing."""

from __future__ import annotations

import functools
import os
import shutil
from collections.abc import Iterator
from typing import Any

import torch

from afd import extras, machine
from afd.listing import counted
from afd_kernels import dispatch

# Extras needed to train at full video size.
TRAINING = ("train", "wan")


def inspect() -> dict[str, Any]:
    """The facts of `machine.inspect` and the requirements of training at full video size."""
    return machine.inspect() | {"training": _training()}


def _training() -> dict[str, Any]:
    """Estimated requirements of AFD with LoRA at 480x832 and available resources, in GB; the
    estimates are None without the packages of configurations."""
    memory = [
        torch.cuda.get_device_properties(i).total_memory for i in range(torch.cuda.device_count())
    ]
    lacks = [p for p in extras.missing() if p.extra in TRAINING]
    known = all(p.extra != "train" for p in lacks)
    gpu, disk = (round(size / 1e9, 1) for size in _needs()) if known else (None, None)
    return {
        "gpu_gb": gpu,
        "gpu_gb_here": round(max(memory, default=0) / 1e9, 1),
        "disk_gb": disk,
        "disk_gb_here": round(shutil.disk_usage(os.getcwd()).free / 1e9, 1),
        "missing_packages": [p.name for p in lacks],
    }


@functools.cache
def _needs() -> tuple[int, int]:
    """Estimated bytes of GPU memory, and of checkpoints on disk."""
    # Imported here, as the core installation lacks what configurations need.
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


def lines(facts: dict[str, Any]) -> Iterator[str]:
    """The facts of `inspect` in readable form."""
    yield from _lines(facts)
    for device, ops in facts["ops_by_device"].items():
        yield f"backends on {device}"
        # The reason why a backend is unavailable is shared by many ops: listed once, as a note.
        notes: dict[str, int] = {}
        rows = [["op", *dispatch.BACKENDS]]
        for op, states in ops.items():
            rows.append([op, *(_cell(states, backend, notes) for backend in dispatch.BACKENDS)])
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        for row in rows:
            cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
            yield "  " + "  ".join(cells).rstrip()
        yield from (f"({number}) {sentence}" for sentence, number in notes.items())


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
    counts = f"{counted(cpu['cores'], 'core')}, {counted(cpu['threads'], 'thread')}"
    yield f"CPU: {cpu['model']}, {counts}, {cpu['capability']}"
    for gpu in facts["gpus"]:
        yield f"GPU: {gpu['name']}, {gpu['memory_gib']} GiB, {gpu['architecture']}"
    if not facts["gpus"]:
        yield "GPU: none usable by torch"
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
    if needs["gpu_gb"] is not None:
        here = f"{needs['gpu_gb_here']} GB" if needs["gpu_gb_here"] else "no GPU"
        yield (
            f"training at 480x832 (AFD, LoRA; estimate, details: afd train CONFIG --dry-run): "
            f"{needs['gpu_gb']} GB of GPU memory (here {here}), {needs['disk_gb']} GB of disk for "
            f"checkpoints (here {needs['disk_gb_here']} GB free)"
        )
    if needs["missing_packages"]:
        lacks = [p for p in extras.PACKAGES if p.name in needs["missing_packages"]]
        names = ", ".join(package.name for package in lacks)
        yield f"training at 480x832 lacks {names}: {extras.command(*lacks)}"
    for missing in facts["missing_optional"]:
        yield f"optional: {missing['package']} ({missing['for']}): {missing['install']}"
