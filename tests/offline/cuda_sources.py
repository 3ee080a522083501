"""Compiles csrc/cuda/*.cu for every target and measures each kernel; no GPU needed."""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from concurrent.futures import Future, ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

from tests.offline import machine_code
from tests.offline.budget import Result, resident_programs
from tests.offline.machine_code import Measured

ROOT = Path(__file__).parents[2]
SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
ARCHS = ("sm_80", "sm_90", "sm_100")
PACK = 8  # csrc/cuda/pack.cuh: elements that a thread takes at once
CHANNELS = 1536  # of a token whose kernels are measured


class Streams(NamedTuple):
    """What one thread of a kernel moves, in packs, and how many warps a block has.

    Attributes:
        loaded, stored: in the type that the kernel is compiled for.
        chosen: loaded in one of three types that is known at run time; each has its own loads.
        either: loaded in the kernel's type or in float, likewise.
        loaded32, stored32: in float.
        warps: of a block; of the kernels on rows, for a token of CHANNELS channels.
        rows: whether a block holds a token's row, or each of several in turn.
    """

    loaded: int = 0
    stored: int = 0
    chosen: int = 0
    either: int = 0
    loaded32: int = 0
    stored32: int = 0
    warps: int = 8
    rows: bool = False


# By a kernel's short name. csrc/cuda/rows.cuh: a thread has three packs of each row in a forward,
# two in a backward; with "Lb0", one element at a time, two in either.
STREAMS = {
    r"_forward_noise_kernel<(\w+?E?)Lb1EE>": Streams(1, 1),
    r"_forward_noise_kernel<(\w+?E?)Lb0EE>": Streams(1, 1, chosen=1),
    r"_scale_kernel<(\w+?)E>": Streams(1, 1),
    r"_nft_loss_fwd_kernel<(\w+?E?)Lb[01]ELb1EE>": Streams(3, 1, chosen=2),
    r"_nft_loss_fwd_kernel<(\w+?E?)Lb1ELb0EE>": Streams(3, 0, chosen=2),
    r"_nft_loss_finalize_kernel": Streams(),
    r"_nft_loss_mean_kernel": Streams(warps=1),
    # x, branch; scale, shift, gate; x_out, h.
    r"_adaln_fwd_kernel<(\w+?E?)Lb1EE>": Streams(6, 6, either=9, warps=2, rows=True),
    # x, two gradients, branch; scale, gate; dx, dbranch; three rows of partial sums.
    r"_adaln_bwd_kernel<(\w+?E?)Lb1EE>": Streams(8, 4, either=4, stored32=6, warps=3, rows=True),
    # q, k, v, read and written; two weights; angles.
    r"_qk_norm_rope_fwd_kernel<(\w+?E?)Lb1EE>": Streams(
        9, 9, either=6, loaded32=3, warps=2, rows=True
    ),
    # The row and its gradient; weight; angles; dx; one row of partial sums.
    r"_qk_norm_rope_bwd_kernel<(\w+?E?)Lb1EE>": Streams(
        4, 2, either=2, loaded32=2, stored32=2, warps=3, rows=True
    ),
    r"_(?:adaln|qk_norm_rope)_(?:fwd|bwd)_kernel<(\w+?E?)Lb0EE>": Streams(warps=3, rows=True),
    r"_sum_rows_kernel": Streams(warps=16),
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


def streams_of(kernel: str) -> tuple[Streams, int]:
    """The entry of STREAMS of a kernel, by its short name, and the bytes of its type.

    Raises:
        KeyError: for a kernel that STREAMS does not know.
    """
    for pattern, streams in STREAMS.items():
        if found := re.fullmatch(pattern, kernel):
            return streams, _BYTES[found[1]] if found.groups() else 0
    raise KeyError(f"{kernel}: say in STREAMS what it loads and stores")


def streamed(kernel: str) -> tuple[int, int]:
    """Bytes per thread that a kernel must load and store 16 at once, by its short name."""
    s, size = streams_of(kernel)
    either = size + 4 if size != 4 else 4
    loaded = s.loaded * size + s.chosen * (4 + 2 + 2) + s.either * either + s.loaded32 * 4
    return loaded * PACK, (s.stored * size + s.stored32 * 4) * PACK


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
        _result(source.stem, short_name(name), arch, version, measured)
        for name, measured in kernels.items()
    ]


def _result(source: str, kernel: str, arch: str, version: str, measured: Measured) -> Result:
    streams, _ = streams_of(kernel)
    loaded, stored = streamed(kernel)
    per_element: float = measured.instructions
    if streams.rows:
        per_element *= streams.warps * 32 / CHANNELS
    return Result(
        kernel=f"{source}.{kernel}",
        arch=arch,
        compiler=version,
        measured=measured,
        per_element=per_element,
        loaded=loaded,
        stored=stored,
        programs=resident_programs(measured, arch, streams.warps),
    )


def submit_all(workers: ProcessPoolExecutor) -> dict[tuple[str, str], Future[list[Result]]]:
    """Every source on every architecture, by ("nft_loss", "sm_90")."""
    return {
        (source.stem, arch): workers.submit(compile_source, source, arch)
        for source in SOURCES
        for arch in ARCHS
    }
