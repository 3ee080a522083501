"""Builds, tests and measures on a machine with a GPU, in under ten minutes, offline.

    make gpu-check OUT=folder
    make gpu-check OUT=folder SECTIONS=build,bench-nft_loss,bench-attention

Needs torch, triton, numpy, safetensors, rich, pytest, pybind11, cmake, ninja, nvcc and a compiler.
Further packages that sections need (einops, pydantic, hypothesis, diffusers) are in the folder that
`make gpu-wheels` fills on a machine with a network; a section that lacks them reports it, and the
remaining sections run. Sections are ordered by importance: a failure, a limit or the end of the
time stops a section, not the check, and results so far are always in the folder: gpu-check.log
(everything printed), one JSON per benchmark, and summary.md (sections, targets, tables), at most
eight files. Exits with 1 if a section failed or ran out of time.

Triton's cache is assumed empty. While the core is built, the tests run on a simulated GPU, in as
many processes as there are cores, so that their kernels are already compiled when the real tests
run, split in the same way. `make gpu-rehearsal` runs all this without a GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import IO, Any

if __package__ in (None, ""):  # run as a file
    sys.path.append(str(Path(__file__).resolve().parents[1]))

from benchmarks import gpu_check_targets
from benchmarks.sections import (
    ROOT,
    SIMULATED,
    Machine,
    Outcome,
    Section,
    environment,
    execute,
    run,
)

# Golden files of the released code, beside the checkout if present.
GOLDEN = ROOT.parent / "shared" / "golden"
# The build's output.
CORE = ROOT / "afd_kernels" / f"_native{sysconfig.get_config_var('EXT_SUFFIX')}"
# The trainer's and student's tests that need a GPU; all other ones need no GPU, but packages that a
# bare GPU machine lacks.
OP_TESTS = ("tests/ops", "tests/contract", "tests/native")
STUDENT_TESTS = ("tests/afd/test_streaming_cost.py", "tests/afd/test_rollout.py")
# Per benchmark, the columns of its table in the summary.
_KERNEL = ("case", "dtype", "B", "noise", "backend", "median_ms", "gb_per_s", "pct_of_floor")
_KERNEL += ("peak_mib", "speedup")
_ROWS = ("case", "dtype", "B", "backend", "median_ms", "gb_per_s", "pct_of_copy", "speedup")
_ATTENTION = ("case", "dtype", "B", "queries", "keys", "backward", "provider", "median_ms")
_ATTENTION += ("tflops", "pct_of_floor", "peak_mib", "error")
_VIDEOS = ("case", "dtype", "B", "frames", "provider", "seconds", "reps", "fps", "floor_s")
_VIDEOS += ("cache_mib", "peak_mib", "speedup", "speedup_released")
_ROLLOUT = ("case", "dtype", "B", "provider", "median_ms", "fps", "floor_ms", "syncs")
_ROLLOUT += ("cache_mib", "peak_mib", "speedup", "speedup_released")
_TRAIN = ("case", "phase", "provider", "dtype", "B", "median_ms", "reps", "floor_ms", "peak_mib")
_TRAIN += ("x_recompute", "speedup")
RESULTS = {
    "nft_loss": _KERNEL,
    "forward_noise": _KERNEL,
    "row_ops": _ROWS,
    "attention": _ATTENTION,
    "videos": _VIDEOS,
    "rollout": _ROLLOUT,
    "train_step": _TRAIN,
}
# Time limits of sections in seconds from the start of their first process, with an empty Triton
# cache; `make gpu-rehearsal` shows their composition.
LIMITS = {
    "build": 70,
    "tests": 65,
    "bench-nft_loss": 40,
    "bench-attention": 60,
    "bench-row_ops": 20,
    "bench-videos": 145,
    "bench-train_step": 65,
    "bench-forward_noise": 20,
    "sanitizer": 40,
    "parity": 40,
    "tests-native": 20,
    "bench-rollout": 120,
    "offline": 300,
}
CORES = os.cpu_count() or 1
FAULTS = Path("tests/native/test_faults.py")
# Without the dense mask, which takes gigabytes at full size.
PROVIDERS = ("ours", "library", "triton", "sdpa per block", "flash-attn per block", "flex")


def sections(
    out: Path, build_dir: Path, golden: Path = GOLDEN, arch: int = SIMULATED, cores: int = CORES
) -> list[Section]:
    """The whole check on a GPU of capability `arch` / 10; its limits total under ten minutes."""
    python = sys.executable
    parity = [python, "-m", "afd.testing.parity", str(golden), "--device", "cuda"]
    parities = [parity, [*parity, "--dtype", "bfloat16"]]
    # The project's own options need a plugin (pytest-benchmark) that these tests do not use.
    pytest = ["pytest", "-q", "-rfE", "-o", "addopts=--strict-markers", "-p", "no:cacheprovider"]
    pytest += ["--continue-on-collection-errors"]
    plain = [*pytest, "-m", "not gpu and not slow", "-k", "cuda", *OP_TESTS]
    shares = max(1, cores - 4)  # the remaining cores build, or wait for the GPU
    # torch.compile takes most of the time, so only what the targets name.
    losses = ["--batch", "8", "32", "1", "--dtype", "bf16", "--budget", "1"]
    sanitizer = ["compute-sanitizer", "--error-exitcode", "9", "--print-limit", "20"]
    drive = [python, "benchmarks/sanitize.py"]
    configure = ["cmake", "-S", ".", "-B", str(build_dir), "-G", "Ninja"]
    configure += [f"-DPython_EXECUTABLE={python}", "-DCMAKE_BUILD_TYPE=Release"]
    configure += [f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={ROOT / 'afd_kernels'}"]
    bench = partial(_bench, out=out)
    ahead = [python, "-m", "benchmarks.compile_ahead"]
    # Some tests fail on the simulated GPU, which is expected: only their compilation matters.
    quiet = ["--tb=no", "-rN"]
    early = [[*ahead, *_share(plain, i, shares, LIMITS["build"]), *quiet] for i in range(shares)]
    early += [[*ahead, "benchmarks.sanitize"]]
    # Without the sanitizer builds of the thread pool, which no CPU's instructions change.
    native = [*pytest, "-m", "not gpu and not slow", "tests/native", "--ignore", str(FAULTS)]
    natives = [
        [python, "-m", *_share(native, i, shares, LIMITS["tests-native"])] for i in range(shares)
    ]
    early += [[*ahead, *command[2:]] for command in parities if golden.exists()]
    return [
        Section(
            "build",
            [configure, ["cmake", "--build", str(build_dir)]],
            LIMITS["build"],
            beside=early if arch == SIMULATED else [],
        ),
        Section(
            "tests",
            [[python, "-m", *_share([*pytest, "-m", "gpu", *OP_TESTS, *STUDENT_TESTS], 0, 1)]],
            LIMITS["tests"],
            beside=[[python, "-m", *_share(plain, i, shares)] for i in range(shares)],
            needs_gpu=True,
        ),
        bench("nft_loss", ["--all", *losses, "--weighting", "x0_adaptive"]),
        bench("attention", ["--providers", *PROVIDERS, "--budget", "1"]),
        bench("row_ops", ["--budget", "0.6"]),
        bench("videos", ["--budget", "4"], last_s=33),
        bench("train_step", ["--budget", "8"], needs_modules=("pydantic", "yaml", "peft")),
        bench("forward_noise", losses),
        Section(
            "sanitizer",
            [[*sanitizer, "--tool", tool, *drive] for tool in ("memcheck", "racecheck")],
            LIMITS["sanitizer"],
            needs_gpu=True,
            needs_tool="compute-sanitizer",
            # One allocation per tensor, so that out-of-bounds accesses are detected.
            env={"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        ),
        Section("parity", parities, LIMITS["parity"], needs_gpu=True, needs_path=golden),
        # Instruction sets that the development machine may lack.
        Section(
            "tests-native",
            [natives[0]],
            LIMITS["tests-native"],
            beside=natives[1:],
            needs_path=CORE,
        ),
        # Not covered by the whole videos: every provider's chunk, its launches and waits.
        bench("rollout", ["--budget", "2"], asked_only=True),
        # Verified without a GPU; repeated here with this machine's Triton and nvcc.
        Section(
            "offline",
            [[python, "-m", *pytest, "tests/offline"]],
            LIMITS["offline"],
            asked_only=True,
        ),
    ]


def _share(pytest: list[str], index: int, count: int, limit_s: float | None = None) -> list[str]:
    """One of `count` processes that split the tests; starts none in the last 10 % of its limit."""
    until = 0.9 * (limit_s or LIMITS["tests"])
    shard = ["-p", "benchmarks.shard", "--shard", f"{index}/{count}", "--until", f"{until:.0f}"]
    return [*pytest, *shard]


def _bench(
    name: str,
    options: list[str],
    *,
    out: Path,
    last_s: float | None = None,
    needs_modules: tuple[str, ...] = (),
    asked_only: bool = False,
) -> Section:
    """A benchmark that starts no case in its last `last_s` seconds, by default the last third."""
    limit_s = LIMITS[f"bench-{name}"]
    starts_s = limit_s - (last_s or limit_s / 3)
    command = [sys.executable, f"benchmarks/{name}.py", "--device", "cuda", "--out", str(out)]
    command += [*options, "--deadline", f"{starts_s:.0f}"]
    return Section(
        f"bench-{name}",
        [command],
        limit_s,
        needs_gpu=True,
        needs_modules=needs_modules,
        asked_only=asked_only,
    )


def probe() -> Machine:
    """Detects the machine with torch in a separate process."""
    code = (
        "import json, torch; from benchmarks import report; gpu = torch.cuda.is_available(); "
        "device = 'cuda' if gpu else 'cpu'; "
        "major, minor = torch.cuda.get_device_capability() if gpu else (9, 0); about = "
        "[report.device_slug(device), report.device_name(device), gpu, 10 * major + minor]; "
        "print(json.dumps(about))"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True)
    if done.returncode != 0:
        return Machine("unknown", f"unknown ({done.stderr.strip().splitlines()[-1]})", False)
    return Machine(*json.loads(done.stdout))


def carry(wheels: Path, target: Path, log: IO[str]) -> Outcome:
    """Installs a folder's wheels for the sections only."""
    files = sorted(str(path) for path in wheels.glob("*.whl"))
    if not files:
        return Outcome("wheels", "failed", 0.0, f"{wheels} holds no wheels")
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps"]
    command += ["--no-compile", "--target", str(target), *files]
    start = time.monotonic()
    note, text = execute(command, environment(), 60, log)
    status = "failed" if note else "passed"
    return Outcome("wheels", status, time.monotonic() - start, note, text[-2000:])


def summarise(out: Path, machine: Machine, outcomes: Sequence[Outcome]) -> None:
    """Writes summary.md: sections, targets, the benchmarks' tables, ends of failed outputs.

    Only JSONs of sections that ran are used: the folder may contain those of another run.
    """
    ran = {outcome.section for outcome in outcomes}
    documents = {
        name: document
        for name, document in gpu_check_targets.read(out).items()
        if f"bench-{name}" in ran
    }
    lines = [f"# gpu-check on {machine.name}", ""]
    for document in list(documents.values())[:1]:
        made = document["environment"]
        versions = ", ".join(f"{name} {number}" for name, number in made["versions"].items())
        lines += [f"{versions}; commit {made['commit']}; {made['date']}", ""]
    lines += ["| section | outcome | s | note |", "| --- | --- | ---: | --- |"]
    for o in outcomes:
        lines.append(f"| {o.section} | {o.status} | {o.seconds:.0f} | {o.note} |")
    if documents:
        lines += ["", "## Targets", "", *gpu_check_targets.table(documents)]
    for name in filter(documents.__contains__, RESULTS):
        lines += ["", *result_table(name, documents[name])]
    for o in outcomes:
        if o.status == "failed":
            lines += ["", f"## {o.section}: end of the output", "", "```", o.tail, "```"]
    (out / "summary.md").write_text("\n".join(lines) + "\n")


def result_table(name: str, document: dict[str, Any]) -> list[str]:
    """A benchmark's JSON as lines of Markdown."""
    columns = RESULTS[name]
    lines = [f"## {name}", "", f"| {' | '.join(columns)} |", f"|{' --- |' * len(columns)}"]
    for row in document["rows"]:
        words = (_word(row[column]) for column in columns)
        lines.append(f"| {' | '.join(words)} |")
    return lines


def _word(value: object) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def main(argv: list[str] | None = None, check: list[Section] | None = None) -> int:
    """Runs the requested sections (of `check`, by default all); 1 if one failed, else 0."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/<device>")
    parser.add_argument("--sections", help="comma-separated; default: all but rollout and offline")
    parser.add_argument("--wheels", type=Path, help="folder that `make gpu-wheels` filled")
    parser.add_argument("--golden", type=Path, default=GOLDEN, help="golden files, for parity")
    parser.add_argument("--limit", type=float, default=585, help="seconds for everything")
    args = parser.parse_args(argv)
    start = time.monotonic()
    machine = probe()
    out: Path = args.out or ROOT / "benchmarks" / "results" / machine.slug
    out = out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    outcomes: list[Outcome] = []
    (out / "gpu-check.log").write_text("")
    with tempfile.TemporaryDirectory() as temporary, (out / "gpu-check.log").open("a") as log:
        site = Path(temporary, "site")
        # Kept, so that an interrupted build continues in the next check.
        build = ROOT / "build" / "gpu-check"
        known = check or sections(out, build, args.golden.resolve(), machine.arch)
        names = [section.name for section in known]
        wanted = [section.name for section in known if not section.asked_only]
        if args.sections:
            wanted = args.sections.split(",")
        unknown = sorted(set(wanted) - set(names))
        if unknown:
            parser.error(f"--sections: got {', '.join(unknown)}; needed: of {', '.join(names)}")
        if args.wheels is not None:
            outcomes.append(carry(args.wheels, site, log))
            machine = replace(machine, packages=(str(site),))
        for section in known:
            if section.name not in wanted:
                continue
            outcomes.append(Outcome(section.name, "failed", 0.0, "was interrupted"))
            summarise(out, machine, outcomes)  # so that a killed check keeps its results
            outcomes[-1] = run(section, machine, log, args.limit - (time.monotonic() - start))
            last = outcomes[-1]
            print(f"{last.section}: {last.status} ({last.seconds:.0f} s) {last.note}", flush=True)
        summarise(out, machine, outcomes)
    print((out / "summary.md").read_text())
    return int(any(outcome.status in ("failed", "incomplete") for outcome in outcomes))


def _stop(*_: object) -> None:
    raise SystemExit("gpu-check was stopped by a signal")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _stop)
    sys.exit(main())
