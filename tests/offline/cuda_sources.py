"""Compiles csrc/cuda/*.cu for every target and measures each kernel; no GPU needed."""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from concurrent.futures import Future, ProcessPoolExecutor
from pathlib import Path

from tests.offline import machine_code
from tests.offline.budget import Result

ROOT = Path(__file__).parents[2]
SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
ARCHS = ("sm_80", "sm_90", "sm_100")
PACK = 8  # csrc/cuda/pack.cuh: elements that a thread takes at once
# What a kernel streams, by its short name: packs that it loads and stores in the type it is
# compiled for, and packs that it loads in one of three types chosen at run time.
STREAMS = {
    r"_forward_noise_kernel<(\w+?E?)Lb1EE>": (1, 1, 0),
    r"_forward_noise_kernel<(\w+?E?)Lb0EE>": (1, 1, 1),
    r"_scale_kernel<(\w+?)E>": (1, 1, 0),
    r"_nft_loss_fwd_kernel<(\w+?E?)Lb[01]ELb1EE>": (3, 1, 2),
    r"_nft_loss_fwd_kernel<(\w+?E?)Lb1ELb0EE>": (3, 0, 2),
    r"_nft_loss_(finalize|mean)_kernel": (0, 0, 0),
}
_BYTES = {"f": 4, "NS_4bf16E": 2, "NS_3f16E": 2}
# The flags of CMakeLists.txt that change device code.
FLAGS = ("-O3", "-std=c++17", "--fmad=false", f"-I{ROOT / 'csrc' / 'include'}")


def nvcc() -> str | None:
    return shutil.which("nvcc")


def cuobjdump() -> str | None:
    """The CUDA toolkit's, else the one inside Triton."""
    found = shutil.which("cuobjdump")
    if found:
        return found
    import triton

    bundled = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return str(bundled) if bundled.is_file() else None


def nvcc_version() -> str:
    """ "nvcc 13.0": code generation is held to budgets of the same compiler only."""
    compiler = nvcc()
    assert compiler is not None
    text = subprocess.run([compiler, "--version"], check=True, capture_output=True, text=True)
    found = re.search(r"release (\d+\.\d+)", text.stdout)
    assert found is not None, text.stdout
    return f"nvcc {found[1]}"


def short_name(mangled: str) -> str:
    """ "_nft_loss_fwd_kernel<fLb1ELb0EE>": the name read, its template left mangled."""
    rest = mangled.removeprefix("_ZN")
    name = mangled
    while size := re.match(r"\d+", rest):
        end = size.end() + int(size[0])
        name, rest = rest[size.end() : end], rest[end:]
    template = re.match(r"I(.*)E+v", rest)
    return f"{name}<{template[1]}>" if template else name


def streamed(kernel: str) -> tuple[int, int]:
    """Bytes per thread that a kernel must load and store 16 at once, by its short name.

    Raises:
        KeyError: for a kernel that STREAMS does not know.
    """
    for pattern, (loaded, stored, chosen) in STREAMS.items():
        if found := re.fullmatch(pattern, kernel):
            size = PACK * _BYTES.get(found[1], 0)
            # Each of the three types has its own loads.
            return loaded * size + chosen * PACK * (4 + 2 + 2), stored * size
    raise KeyError(f"{kernel}: say in STREAMS what it loads and stores")


def compile_source(source: Path, arch: str) -> list[Result]:
    """Every kernel of one source on one architecture; runs in a worker."""
    compiler, tool, version = nvcc(), cuobjdump(), nvcc_version()
    assert compiler is not None
    assert tool is not None
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "out.cubin"
        command = [compiler, *FLAGS, f"-arch={arch}", "-cubin", "-o", str(cubin), str(source)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")
        kernels = machine_code.of_cubin(cubin.read_bytes(), tool, "kernel")
    return [
        Result(
            kernel=f"{source.stem}.{short_name(name)}",
            arch=arch,
            compiler=version,
            measured=measured,
            per_element=measured.instructions,
            loaded=loaded,
            stored=stored,
        )
        for name, measured in kernels.items()
        for loaded, stored in [streamed(short_name(name))]
    ]


def submit_all(workers: ProcessPoolExecutor) -> dict[tuple[str, str], Future[list[Result]]]:
    """Every source on every architecture, by ("nft_loss", "sm_90")."""
    return {
        (source.stem, arch): workers.submit(compile_source, source, arch)
        for source in SOURCES
        for arch in ARCHS
    }
