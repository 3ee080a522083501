"""Compiles kernels for GPUs that are not here and holds their machine code to budgets.json.

    python -m tests.offline.budget            prints the table
    python -m tests.offline.budget --write    and writes what it measured to budgets.json,
                                              beside what other compiler versions wrote
    python -m tests.offline.budget nft_loss   only kernels whose name holds "nft_loss"
    python -m tests.offline.budget --arch sm_90 attention   and only for this architecture

Some limits hold always: no stack, no spills, no atomics, 16-byte accesses for streamed data, the
architecture's own matrix instructions. Registers, shared memory, instructions (per element, or of
the loop around matrix products) and programs that fit one multiprocessor are held to what was
written last, per (kernel, architecture, compiler version).
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import tempfile
from collections.abc import Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from tests.offline.calls import CALLS
from tests.offline.launches import ARCHS, Call, Launch
from tests.offline.machine_code import Measured

PATH = Path(__file__).with_name("budgets.json")
WORKERS = min(8, os.cpu_count() or 1)
INSTRUCTION_SLACK = 1.03
WIDE_FRACTION = 0.9
# Bytes of shared memory that one program may have, and that one multiprocessor has.
SHARED_LIMIT = {"sm_80": 163 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "gfx942": 64 << 10}
SHARED_SYSTEM = 1024  # of each program, on NVIDIA
# The matrix instructions of half precision that make an architecture's rate.
PRODUCTS = {"sm_80": "HMMA", "sm_90": "HGMMA", "sm_100": "UTCHMMA", "gfx942": "v_mfma"}


@dataclass(frozen=True)
class Result:
    """A measured kernel and the facts of its launch; `streamed` bytes are per thread."""

    kernel: str  # "nft_loss.bf16.partials"
    arch: str
    compiler: str  # "triton 3.9"
    measured: Measured
    per_element: float  # instructions of one thread, divided by its elements
    loaded: float
    stored: float
    programs: int = 0  # that fit one multiprocessor; 0: not computed
    half_products: bool = False  # multiplies matrices of half precision

    def budget(self) -> dict[str, float]:
        programs = {"programs": self.programs} if self.programs else {}
        return {
            "registers": self.measured.registers,
            "shared": self.measured.shared,
            "instructions": round(self.per_element, 2),
            **programs,
        }


def violations(result: Result, budget: dict[str, float] | None) -> list[str]:
    """Sentences, one per limit that the kernel breaks; the relative ones only with a budget."""
    m = result.measured
    found = []
    for name, value in (("stack bytes", m.stack), ("spills", m.spills), ("atomics", m.atomics)):
        if value:
            found.append(f"{name}: {value}, must be 0")
    if m.shared > SHARED_LIMIT[result.arch]:
        found.append(f"shared memory: {m.shared} bytes, at most {SHARED_LIMIT[result.arch]}")
    if result.half_products and m.products != (PRODUCTS[result.arch],):
        found.append(f"matrix instructions: {m.products}, must be {PRODUCTS[result.arch]}")
    for name, wide, all_ in (
        ("loads", m.wide_loaded, result.loaded),
        ("stores", m.wide_stored, result.stored),
    ):
        if all_ and wide / all_ < WIDE_FRACTION:
            found.append(f"16-byte {name}: {wide} of {all_:g} streamed bytes per thread")
    if budget is None:
        return found
    slack = {"instructions": INSTRUCTION_SLACK}
    measured = result.budget()
    programs = measured.pop("programs", 0)
    if programs < budget.get("programs", 0):
        found.append(f"programs: {programs:g}, budget {budget['programs']:g}")
    for name, value in measured.items():
        limit = budget[name] * slack.get(name, 1.0)
        if value > limit:
            found.append(f"{name}: {value:g}, budget {budget[name]:g}")
    return found


def budgets() -> dict[str, dict[str, dict[str, dict[str, float]]]]:
    """compiler → architecture → kernel → limits."""
    table: dict[str, dict[str, dict[str, dict[str, float]]]] = json.loads(PATH.read_text())
    return table


def assert_inside(results: Sequence[Result], arch: str) -> None:
    """Every kernel compiled for `arch` keeps to its budget, and has one where its compiler does."""
    assert results
    table = budgets()
    for result in results:
        limits = table.get(result.compiler, {}).get(arch, {}).get(result.kernel)
        assert violations(result, limits) == [], result.kernel
        if result.compiler in table:
            assert limits, f"{result.kernel}: no budget; run python -m tests.offline.budget --write"


def start(folder: str) -> None:
    """Prepares a worker: the real compiler instead of the interpreter, and its own cache."""
    os.environ.pop("TRITON_INTERPRET", None)
    os.environ["TRITON_CACHE_DIR"] = folder


def pool(folder: str) -> ProcessPoolExecutor:
    return ProcessPoolExecutor(
        WORKERS, multiprocessing.get_context("spawn"), initializer=start, initargs=(folder,)
    )


def compile_call(call: Call, arch: str) -> list[Result]:
    """Compiles the call's kernels for `arch`; runs in a worker."""
    from tests.offline.launches import record

    return [
        compile_launch(launch, f"{call.op}.{call.name}.{name}", arch)
        for name, launch in record(call, arch).items()
    ]


def compile_launch(launch: Launch, name: str, arch: str) -> Result:
    """Compiles one launch and measures its machine code."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from tests.offline import machine_code

    names = launch.kernel.arg_names
    nvidia = arch.startswith("sm_")
    target = GPUTarget("cuda", int(arch[3:]), 32) if nvidia else GPUTarget("hip", arch, 64)
    source = ASTSource(
        launch.kernel,
        {n: launch.types.get(n, "constexpr") for n in names},
        constexprs={(names.index(n),): value for n, value in launch.constants.items()},
        attrs={(names.index(n),): [["tt.divisibility", 16]] for n in sorted(launch.aligned)},
    )
    compiled = triton.compile(source, target=target, options=launch.options)
    if nvidia:
        tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        (measured,) = machine_code.of_cubin(compiled.asm["cubin"], str(tool), launch.hot).values()
    else:
        measured = machine_code.of_amdgcn(compiled.asm["amdgcn"], launch.hot)
    products = launch.hot == "products"
    if products:
        # Tiles of operands: the launch gives this memory, the binary does not know of it.
        measured = replace(measured, shared=max(measured.shared, compiled.metadata.shared))
    warps = launch.options.get("num_warps", 4)
    threads = warps * target.warp_size
    elements = threads if products else launch.constants.get("BLOCK", threads)
    return Result(
        kernel=name,
        arch=arch,
        compiler="triton " + ".".join(triton.__version__.split(".")[:2]),
        measured=measured,
        per_element=measured.instructions * threads / elements,
        loaded=launch.loaded / threads,
        # AMD's products leave a lane four neighbours, which it stores as 8 bytes.
        stored=launch.stored / threads if nvidia or not products else 0,
        programs=resident_programs(measured, arch, warps),
        half_products=products and launch.types["q_ptr"] != "*fp32",
    )


def resident_programs(measured: Measured, arch: str, warps: int) -> int:
    """Programs that one multiprocessor holds simultaneously; 0 where not even one fits."""
    registers = max(8, -(-measured.registers // 8) * 8)
    if arch.startswith("sm_"):
        by_registers = 65536 // (registers * 32) // 4 * 4 // warps
        by_shared = (SHARED_LIMIT[arch] + SHARED_SYSTEM) // (measured.shared + SHARED_SYSTEM)
        return min(by_registers, by_shared, 64 // warps, 32)
    # Four units of 512 registers per lane, eight waves each at most.
    by_registers = min(512 // registers, 8) * 4 // warps
    return min(by_registers, SHARED_LIMIT[arch] // max(measured.shared, 1), 16)


def submit_all(
    workers: ProcessPoolExecutor, only: str = "", only_arch: str | None = None
) -> dict[tuple[str, str], Future[list[Result]]]:
    """Every call on every architecture, by ("nft_loss.bf16", "sm_90")."""
    return {
        (f"{call.op}.{call.name}", arch): workers.submit(compile_call, call, arch)
        for call in CALLS
        for arch in call.archs
        if only in f"{call.op}.{call.name}" and only_arch in (None, arch)
    }


def _submit_cuda(workers: ProcessPoolExecutor) -> list[Future[list[Result]]]:
    from tests.offline import cuda_sources

    if cuda_sources.nvcc() is None:
        print("no nvcc here: CUDA kernels are not compiled")
        return []
    return list(cuda_sources.submit_all(workers).values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("only", nargs="?", default="", help='part of a name; "cuda": CUDA sources')
    parser.add_argument("--arch", choices=ARCHS, help="only this architecture")
    parser.add_argument("--write", action="store_true", help="write budgets.json")
    args = parser.parse_args()
    if args.write and args.arch:
        parser.error("--arch: got it with --write; needed: every architecture")
    table = budgets() if PATH.is_file() else {}
    fresh: set[str] = set()
    columns = f"{'regs':>5} {'spills':>6} {'shared':>7} {'instr/elem':>10} {'programs':>8}"
    print(f"{'kernel':34} {'arch':7} {columns}  broken limits")
    with tempfile.TemporaryDirectory() as folder, pool(folder) as workers:
        futures = []
        if args.only != "cuda":
            futures = list(submit_all(workers, args.only, args.arch).values())
        if args.only in ("", "cuda"):
            futures += _submit_cuda(workers)
        for future in futures:
            for result in future.result():
                if args.write and not args.only and result.compiler not in fresh:
                    # A full write forgets kernels that are gone, of the compilers present.
                    fresh.add(result.compiler)
                    table[result.compiler] = {}
                kernels = table.setdefault(result.compiler, {}).setdefault(result.arch, {})
                if args.write:
                    kernels[result.kernel] = result.budget()
                broken = violations(result, kernels.get(result.kernel))
                m = result.measured
                print(
                    f"{result.kernel:34} {result.arch:7} {m.registers:5} {m.spills:6} "
                    f"{m.shared:7} {result.per_element:10.2f} {result.programs:8}  "
                    f"{'; '.join(broken)}",
                    flush=True,
                )
    if args.write:
        ordered = {
            compiler: {arch: archs[arch] for arch in ARCHS if arch in archs}
            for compiler, archs in sorted(table.items())
        }
        PATH.write_text(json.dumps(ordered, indent=1) + "\n")


if __name__ == "__main__":
    main()
