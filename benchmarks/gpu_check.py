"""Builds, tests and measures on a machine with a GPU, in under ten minutes, offline.

    make gpu-check OUT=folder
    make gpu-check OUT=folder SECTIONS=build,bench-nft_loss,bench-attention

Needs torch, triton, numpy, safetensors, rich, pytest, pybind11, cmake, ninja, nvcc and a compiler.
What else sections want (pydantic, hypothesis, diffusers) is in the folder that `make gpu-wheels`
fills on a machine with a network; a section without it says so, and the others run. Sections stand
in the order of what is least to be lost: a failure, a limit or the end of the time stops one of
them, not the check, and what was found so far lies in the folder at any moment: gpu-check.log
(everything printed), one JSON per benchmark, and summary.md (sections, targets, tables), at most
eight files. Exits with 1 if a section failed.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.machinery import PathFinder
from math import inf
from pathlib import Path
from typing import IO, Any

if __package__ in (None, ""):  # run as a file
    sys.path.append(str(Path(__file__).resolve().parents[1]))

from benchmarks import gpu_check_targets

ROOT = Path(__file__).resolve().parents[1]
# Golden files of the released code; they lie beside the checkout where there are any.
GOLDEN = ROOT.parent / "shared" / "golden"
# What the build makes.
CORE = ROOT / "afd_kernels" / f"_native{sysconfig.get_config_var('EXT_SUFFIX')}"
# Of the trainer's and student's tests these need a GPU; the others need packages that a bare GPU
# box lacks, and no GPU.
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
# Without the dense mask, which takes gigabytes at full size.
PROVIDERS = ("ours", "library", "triton", "sdpa per block", "flash-attn per block", "flex")
_TAIL = 30  # lines of a failed section's output in the summary


@dataclass(frozen=True)
class Section:
    """Commands run one after the other, all of them, within one time limit."""

    name: str
    commands: list[list[str]]
    limit_s: float
    needs_gpu: bool = False
    needs_tool: str | None = None
    needs_path: Path | None = None
    needs_modules: tuple[str, ...] = ()
    env: dict[str, str] = field(default_factory=dict)
    asked_only: bool = False  # runs only where it is named


@dataclass(frozen=True)
class Outcome:
    """`status` is "passed", "failed" or "skipped"; `note` says why, `tail` is the output's end."""

    section: str
    status: str
    seconds: float
    note: str = ""
    tail: str = ""


@dataclass(frozen=True)
class Machine:
    """What the sections can count on."""

    slug: str
    name: str
    has_gpu: bool
    packages: tuple[str, ...] = ()  # folders that carried wheels were installed to


def sections(out: Path, build_dir: Path, golden: Path = GOLDEN) -> list[Section]:
    """The whole check. The limits add up to less than ten minutes."""
    python = sys.executable
    parity = [python, "-m", "afd.testing.parity", str(golden), "--device", "cuda"]
    # The project's own options ask for a plugin (pytest-benchmark) that these tests do not use.
    pytest = [python, "-m", "pytest", "-q", "-rfE", "-o", "addopts=--strict-markers"]
    pytest += ["-p", "no:cacheprovider", "--continue-on-collection-errors"]
    at_once = ["-n", "6"] if importlib.util.find_spec("xdist") else []
    # torch.compile takes most of the time, so only what the targets name.
    losses = ["--batch", "8", "32", "1", "--dtype", "bf16", "--budget", "1"]
    sanitizer = ["compute-sanitizer", "--error-exitcode", "9", "--print-limit", "20"]
    drive = [python, "benchmarks/sanitize.py"]
    configure = ["cmake", "-S", ".", "-B", str(build_dir), "-G", "Ninja"]
    configure += [f"-DPython_EXECUTABLE={python}", "-DCMAKE_BUILD_TYPE=Release"]
    configure += [f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={ROOT / 'afd_kernels'}"]
    bench = partial(_bench, out=out)
    return [
        Section("build", [configure, ["cmake", "--build", str(build_dir)]], 70),
        Section(
            "tests",
            [
                [*pytest, "-m", "gpu", *OP_TESTS, *STUDENT_TESTS],
                [*pytest, *at_once, "-m", "not gpu and not slow", "-k", "cuda", *OP_TESTS],
            ],
            100,
            needs_gpu=True,
        ),
        bench("nft_loss", [*losses, "--weighting", "x0_adaptive"], 40),
        bench("attention", ["--providers", *PROVIDERS, "--budget", "1"], 60),
        bench("row_ops", ["--budget", "1"], 15),
        bench("videos", ["--budget", "4"], 145, starts_s=112),
        bench("train_step", ["--budget", "8"], 65, needs_modules=("pydantic", "yaml", "peft")),
        bench("forward_noise", losses, 15),
        Section(
            "sanitizer",
            [[*sanitizer, "--tool", tool, *drive] for tool in ("memcheck", "racecheck")],
            40,
            needs_gpu=True,
            needs_tool="compute-sanitizer",
            # Every tensor its own allocation: an access past its end is then one that is seen.
            env={"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        ),
        Section(
            "parity",
            [parity, [*parity, "--dtype", "bfloat16"]],
            15,
            needs_gpu=True,
            needs_path=golden,
        ),
        # Instruction sets that the machine where the rest was proved may not have.
        Section("tests-native", [[*pytest, "tests/native"]], 15, needs_path=CORE),
        # What the whole videos leave out: every provider's chunk, its launches and waits.
        bench("rollout", ["--budget", "2"], 120, asked_only=True),
        # Proved without a GPU; here with this machine's Triton and nvcc.
        Section("offline", [[*pytest, "tests/offline"]], 300, asked_only=True),
    ]


def _bench(
    name: str,
    options: list[str],
    limit_s: float,
    *,
    out: Path,
    starts_s: float | None = None,
    needs_modules: tuple[str, ...] = (),
    asked_only: bool = False,
) -> Section:
    """A benchmark that starts no case after `starts_s`, by default in the last third."""
    command = [sys.executable, f"benchmarks/{name}.py", "--device", "cuda", "--out", str(out)]
    command += [*options, "--deadline", f"{starts_s or limit_s / 1.5:.0f}"]
    return Section(
        f"bench-{name}",
        [command],
        limit_s,
        needs_gpu=True,
        needs_modules=needs_modules,
        asked_only=asked_only,
    )


def probe() -> Machine:
    """Asks torch, in a process of its own, what is here."""
    code = (
        "import json, torch; from benchmarks import report; gpu = torch.cuda.is_available(); "
        "device = 'cuda' if gpu else 'cpu'; "
        "print(json.dumps([report.device_slug(device), report.device_name(device), gpu]))"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, env=_environment(), capture_output=True, text=True)
    if done.returncode != 0:
        return Machine("unknown", f"unknown ({done.stderr.strip().splitlines()[-1]})", False)
    return Machine(*json.loads(done.stdout))


def _environment(packages: tuple[str, ...] = ()) -> dict[str, str]:
    """This process's, with the checkout and the carried packages importable."""
    paths = [str(ROOT), str(ROOT / "python"), *packages, os.environ.get("PYTHONPATH", "")]
    path = os.pathsep.join(filter(None, paths))
    return os.environ | {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}


def carry(wheels: Path, target: Path, log: IO[str]) -> Outcome:
    """Installs the wheels of a folder for the sections, and for nobody else."""
    files = sorted(str(path) for path in wheels.glob("*.whl"))
    if not files:
        return Outcome("wheels", "failed", 0.0, f"{wheels} holds no wheels")
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps"]
    command += ["--no-compile", "--target", str(target), *files]
    start = time.monotonic()
    note, text = _execute(command, _environment(), 60, log)
    status = "failed" if note else "passed"
    return Outcome("wheels", status, time.monotonic() - start, note, text[-2000:])


def run(section: Section, machine: Machine, log: IO[str], left_s: float = inf) -> Outcome:
    """Runs a section or says why not; its output goes to the log as it comes."""
    log.write(f"\n===== {section.name} =====\n")
    reason = _why_not(section, machine)
    if reason is None and left_s < 5:
        reason = "no time is left"
    if reason is not None:
        log.write(f"skipped: {reason}\n")
        return Outcome(section.name, "skipped", 0.0, reason)
    start, limit_s = time.monotonic(), min(section.limit_s, left_s)
    environment = _environment(machine.packages) | section.env
    notes, output = [], []
    for command in section.commands:
        left = limit_s - (time.monotonic() - start)
        log.write(f"$ {' '.join(command)}\n")
        note, text = _execute(command, environment, max(left, 1.0), log)
        output.append(text)
        if note:
            notes.append(f"`{' '.join(command)}` {note}")
    seconds = time.monotonic() - start
    tail = "\n".join("".join(output).rstrip().splitlines()[-_TAIL:])
    return Outcome(section.name, "failed" if notes else "passed", seconds, "; ".join(notes), tail)


def _why_not(section: Section, machine: Machine) -> str | None:
    if section.needs_gpu and not machine.has_gpu:
        return "no CUDA device"
    if section.needs_tool is not None and shutil.which(section.needs_tool) is None:
        return f"{section.needs_tool} is not on the PATH"
    if section.needs_path is not None and not section.needs_path.exists():
        return f"{section.needs_path} is not there"
    missing = [
        name
        for name in section.needs_modules
        if not importlib.util.find_spec(name)
        and not PathFinder.find_spec(name, list(machine.packages))
    ]
    if missing:
        return f"{', '.join(missing)} cannot be imported; `make gpu-wheels` fetches what is missing"
    return None


def _execute(
    command: list[str], env: dict[str, str], limit_s: float, log: IO[str]
) -> tuple[str, str]:
    """What went wrong ("" if nothing) and everything printed. Kills the whole group on time-out."""
    log.flush()
    path = Path(log.name)
    before = path.stat().st_size
    try:
        # The log is open for appending, so both processes write at its end.
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=env,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    except OSError as error:
        return f"could not start ({error})", ""
    try:
        code = process.wait(limit_s)
        note = "" if code == 0 else f"exited with {code}"
    except subprocess.TimeoutExpired:
        note = f"was stopped at the limit of {limit_s:.0f} s"
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return note, path.read_bytes()[before:].decode(errors="replace")


def summarise(out: Path, machine: Machine, outcomes: Sequence[Outcome]) -> None:
    """Writes summary.md: sections, targets, the benchmarks' tables, ends of failed outputs.

    Of JSONs only those of the sections that ran: others may lie there from another run.
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
    """Runs the sections asked for (of `check`, by default all); 1 if one failed, else 0."""
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
        # Kept, so that a build that was stopped goes on in the next check.
        known = check or sections(out, ROOT / "build" / "gpu-check", args.golden.resolve())
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
            summarise(out, machine, outcomes)  # so that a killed check leaves what it has
            outcomes[-1] = run(section, machine, log, args.limit - (time.monotonic() - start))
            last = outcomes[-1]
            print(f"{last.section}: {last.status} ({last.seconds:.0f} s) {last.note}", flush=True)
        summarise(out, machine, outcomes)
    print((out / "summary.md").read_text())
    return int(any(outcome.status == "failed" for outcome in outcomes))


def _stop(*_: object) -> None:
    raise SystemExit("gpu-check was told to stop")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _stop)
    sys.exit(main())
