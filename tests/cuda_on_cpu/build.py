"""Compiles csrc with the shim: one extension module that holds the CPU core and the CUDA kernels.

Variants: "plain"; "address" with AddressSanitizer and UBSan; "threads" with ThreadSanitizer and
real threads. Each also with changed sources, in which the faults of faults.py wait to be switched
on. And the kernels that test the device itself.
"""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.cuda_on_cpu.rewrite import rewritten

ROOT = Path(__file__).parents[2]
CSRC = ROOT / "csrc"
CUDA = CSRC / "cuda"
SHIM = Path(__file__).with_name("shim")
KERNELS = Path(__file__).with_name("kernels")
CPU_LOOPS = ("kernels", "forward_noise", "nft_loss", "qk_norm_rope", "adaln")
SANITIZERS = {"address": "address,undefined", "threads": "thread"}

_COMMON = ["-std=c++20", "-fPIC", "-ffp-contract=off", "-fvisibility=hidden"]
# Every access is checked against the alignment of its type; the shim has the handler.
_ALIGNED = ["-fsanitize=alignment", "-fno-sanitize-recover=alignment"]
_DEVICE = [
    *("-O1", "-g1", "-Wall", "-Wextra", "-Wno-unknown-pragmas"),
    *("-D__CUDACC__", "-D__CUDA_ARCH__=900"),
    *("-include", "cuda_runtime.h", f"-I{SHIM}"),
]


class BuildError(RuntimeError):
    """A source did not compile; the message is the compiler's."""


@functools.cache
def why_not() -> str | None:
    """Why nothing can be compiled here, or None."""
    if sys.platform != "linux":
        return f"fibers and guard pages are written for Linux, this is {sys.platform}"
    if compiler() is None:
        return "no g++ or clang++ on the path"
    with tempfile.TemporaryDirectory() as folder:
        trial = Path(folder) / "trial.cpp"
        trial.write_text("#include <span>\n#include <ucontext.h>\n#include <Python.h>\nint x;\n")
        command = _command(trial, Path(folder) / "trial.o", [*_ALIGNED, *_python()])
        done = subprocess.run(command, capture_output=True, text=True)
    words = " ".join(done.stderr.split())[-300:]
    return f"{compiler()} cannot compile C++20 with Python's headers ({words})" if words else None


def compiler() -> str | None:
    return shutil.which("g++") or shutil.which("clang++")


def build(
    folder: Path, variant: str = "plain", changes: Mapping[str, Mapping[str, str]] | None = None
) -> Path:
    """The extension module `_native` of one variant, in its own folder.

    Args:
        folder: where to; objects that variants share are made once per folder.
        changes: by source name, texts to replace; each must be there exactly once.

    Raises:
        BuildError: with the compiler's words.
    """
    place = folder / (f"{variant}_planted" if changes else variant)
    sanitize = [f"-fsanitize={SANITIZERS[variant]}"] if variant in SANITIZERS else []
    extra = (
        [*sanitize, "-DCUDA_ON_CPU_SANITIZED", "-fno-sanitize-recover"] if sanitize else _ALIGNED
    )
    generate(CUDA, place, changes or {})
    host = {
        folder / "module.o": (CSRC / "bindings" / "module.cpp", _binding()),
        **{
            folder / f"cpu_{source.stem}.o": (source, _cpu(source.stem))
            for source in [*sorted((CSRC / "cpu").glob("*.cpp")), SHIM / "baseline.cpp"]
        },
    }
    device = {
        place / f"{source.stem}.o": (source, [*_DEVICE, *extra, f"-I{CSRC / 'include'}"])
        for source in sorted(place.glob("*.cpp"))
    }
    machine = {
        place / f"{name}.o": (SHIM / f"{name}.cpp", ["-O1", f"-I{SHIM}", *sanitize])
        for name in ("launch", "machine_threads" if variant == "threads" else "machine_fibers")
    }
    module = place / f"_native{sysconfig.get_config_var('EXT_SUFFIX')}"
    _compile({**host, **device, **machine})
    _link(module, [*host, *device, *machine], sanitize)
    return module


def build_kernels(folder: Path) -> Path:
    """The shared library of kernels/, which test the device itself."""
    place = folder / "kernels"
    generate(KERNELS, place, {})
    objects = {
        place / f"{source.stem}.o": (source, [*_DEVICE, *_ALIGNED])
        for source in sorted(place.glob("*.cpp"))
    }
    objects |= {
        place / f"{name}.o": (SHIM / f"{name}.cpp", ["-O1", f"-I{SHIM}"])
        for name in ("launch", "machine_fibers")
    }
    library = place / "kernels.so"
    _compile(objects)
    _link(library, list(objects), [])
    return library


def generate(source: Path, to: Path, changes: Mapping[str, Mapping[str, str]]) -> None:
    """Rewrites a folder of CUDA sources and headers, after `changes`, for the host compiler."""
    to.mkdir(parents=True, exist_ok=True)
    for path in sorted(source.iterdir()):
        text = path.read_text(encoding="utf-8")
        for right, wrong in changes.get(path.name, {}).items():
            if text.count(right) != 1:
                raise BuildError(f"{path.name}: {text.count(right)} times {right!r}; needed: once")
            text = text.replace(right, wrong)
        name = f"{path.stem}.cpp" if path.suffix == ".cu" else path.name
        (to / name).write_text(f'#line 1 "{path}"\n{rewritten(text)}', encoding="utf-8")


def _python() -> list[str]:
    return [f"-I{sysconfig.get_path('include')}"]


def _binding() -> list[str]:
    import pybind11

    macros = ["-DAFD_WITH_CUDA", '-DAFD_CUDA_ARCHS="90"']
    return ["-O0", *macros, f"-I{pybind11.get_include()}", f"-I{CSRC / 'include'}", *_python()]


def _cpu(name: str) -> list[str]:
    isa = ["-DAFD_ISA=baseline"] if name in CPU_LOOPS else []
    return ["-O0", *isa, f"-I{CSRC}", f"-I{CSRC / 'include'}"]


def _command(source: Path, target: Path, flags: list[str]) -> list[str]:
    program = compiler()
    assert program is not None
    return [program, *_COMMON, *flags, "-c", str(source), "-o", str(target)]


def _compile(objects: Mapping[Path, tuple[Path, list[str]]]) -> None:
    """Build every missing object, one per processor in parallel."""

    def one(target: Path) -> None:
        source, flags = objects[target]
        done = subprocess.run(_command(source, target, flags), capture_output=True, text=True)
        if done.returncode:
            raise BuildError(f"{source.name}:\n{done.stderr[-4000:]}")

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(one, [target for target in objects if not target.exists()]))


def _link(module: Path, objects: list[Path], flags: list[str]) -> None:
    program = compiler()
    assert program is not None
    command = [program, "-shared", "-pthread", *flags, "-o", str(module), *map(str, objects)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise BuildError(f"{module.name}:\n{done.stderr[-4000:]}")
