"""Builds, tests and measures on a machine with a GPU, in under ten minutes, offline.

    make gpu-check OUT=folder
    python benchmarks/gpu_check.py --out folder --sections build,tests

Needs nothing installed but torch, triton, numpy, einops, rich, safetensors, pytest, hypothesis, a
compiler, nvcc, cmake, ninja and pybind11; for the training step also pydantic, pyyaml and peft (it
is skipped without them). A section that fails does not stop the others. Leaves in the folder:
gpu-check.log (everything printed), one JSON per benchmark (nft_loss, forward_noise, attention,
rollout, train_step), plots of the first two, summary.json and summary.md. Exits with 1 if a section
failed.
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
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).resolve().parents[1]
# Golden files of the released code; they lie beside the checkout where there are any.
GOLDEN = ROOT.parent / "shared" / "golden"
# Of the trainer's and student's tests these need a GPU; the others need packages that a bare GPU
# box lacks, and no GPU.
OP_TESTS = ("tests/ops", "tests/contract", "tests/native")
STUDENT_TESTS = ("tests/afd/test_streaming_cost.py", "tests/afd/test_rollout.py")
# Per benchmark, the columns of its table in the summary.
_KERNEL = ("case", "dtype", "B", "noise", "backend", "median_ms", "gb_per_s", "pct_of_floor")
_KERNEL += ("peak_mib", "speedup")
_ATTENTION = ("case", "dtype", "B", "queries", "keys", "backward", "provider", "median_ms")
_ATTENTION += ("tflops", "pct_of_floor", "peak_mib", "error")
_ROLLOUT = ("case", "dtype", "B", "provider", "median_ms", "fps", "floor_ms", "syncs")
_ROLLOUT += ("cache_mib", "peak_mib", "speedup", "speedup_released")
_TRAIN = ("case", "phase", "provider", "dtype", "B", "median_ms", "reps", "floor_ms", "peak_mib")
_TRAIN += ("x_recompute", "speedup")
RESULTS = {
    "nft_loss": _KERNEL,
    "forward_noise": _KERNEL,
    "attention": _ATTENTION,
    "rollout": _ROLLOUT,
    "train_step": _TRAIN,
}
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


def sections(out: Path, build_dir: Path) -> list[Section]:
    """The whole check. The limits add up to less than ten minutes."""
    python = sys.executable
    parity = [python, "-m", "afd.testing.parity", str(GOLDEN), "--device", "cuda"]
    pytest = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    batches = ["--batch", "8", "1", "32", "2", "4"]
    bench = ["--device", "cuda", "--budget", "2", "--out", str(out)]
    sanitizer = ["compute-sanitizer", "--error-exitcode", "9", "--print-limit", "20"]
    drive = [python, "benchmarks/sanitize.py"]
    configure = ["cmake", "-S", ".", "-B", str(build_dir), "-G", "Ninja"]
    configure += [f"-DPython_EXECUTABLE={python}", "-DCMAKE_BUILD_TYPE=Release"]
    configure += [f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={ROOT / 'afd_kernels'}"]
    return [
        Section("build", [configure, ["cmake", "--build", str(build_dir)]], 65),
        Section(
            "tests",
            [
                [*pytest, "-m", "gpu", *OP_TESTS, *STUDENT_TESTS],
                [*pytest, "-m", "not gpu and not slow", *OP_TESTS],
            ],
            185,
            needs_gpu=True,
        ),
        Section(
            "parity",
            [parity, [*parity, "--dtype", "bfloat16"]],
            25,
            needs_gpu=True,
            needs_path=GOLDEN,
        ),
        Section(
            "sanitizer",
            [[*sanitizer, "--tool", tool, *drive] for tool in ("memcheck", "racecheck")],
            50,
            needs_gpu=True,
            needs_tool="compute-sanitizer",
            # Every tensor its own allocation: an access past its end is then one that is seen.
            env={"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        ),
        _bench("nft_loss", [*batches, *bench, "--plot"], 45),
        _bench("forward_noise", [*batches, *bench, "--plot"], 20),
        _bench("attention", bench, 40),
        _bench("rollout", bench, 45),
        _bench("train_step", bench, 60, needs_modules=("pydantic", "yaml", "peft")),
        # The other architectures are proved where there is time.
        Section("offline", [[*pytest, "tests/offline", "-k", "sm_90 or gate"]], 60),
    ]


def _bench(
    name: str, options: list[str], limit_s: float, needs_modules: tuple[str, ...] = ()
) -> Section:
    """A benchmark that starts no case in the last third of its time."""
    command = [sys.executable, f"benchmarks/{name}.py", *options, "--deadline", f"{limit_s / 1.5}"]
    return Section(f"bench-{name}", [command], limit_s, needs_gpu=True, needs_modules=needs_modules)


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


def _environment() -> dict[str, str]:
    """This process's, with the checkout importable without being installed."""
    paths = [str(ROOT), str(ROOT / "python"), os.environ.get("PYTHONPATH", "")]
    path = os.pathsep.join(filter(None, paths))
    return os.environ | {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}


def run(section: Section, machine: Machine, log: IO[str]) -> Outcome:
    """Runs a section or says why not; its output goes to the log."""
    log.write(f"\n===== {section.name} =====\n")
    reason = None
    if section.needs_gpu and not machine.has_gpu:
        reason = "no CUDA device"
    elif section.needs_tool is not None and shutil.which(section.needs_tool) is None:
        reason = f"{section.needs_tool} is not on the PATH"
    elif section.needs_path is not None and not section.needs_path.exists():
        reason = f"{section.needs_path} is not there"
    else:
        missing = [m for m in section.needs_modules if importlib.util.find_spec(m) is None]
        if missing:
            reason = f"{', '.join(missing)} cannot be imported"
    if reason is not None:
        log.write(f"skipped: {reason}\n")
        return Outcome(section.name, "skipped", 0.0, reason)
    start = time.monotonic()
    notes, output = [], []
    for command in section.commands:
        left = section.limit_s - (time.monotonic() - start)
        note, text = _execute(command, section.env, max(left, 1.0))
        log.write(f"$ {' '.join(command)}\n{text}\n")
        log.flush()
        output.append(text)
        if note:
            notes.append(f"`{' '.join(command)}` {note}")
    seconds = time.monotonic() - start
    tail = "\n".join("".join(output).rstrip().splitlines()[-_TAIL:])
    return Outcome(section.name, "failed" if notes else "passed", seconds, "; ".join(notes), tail)


def _execute(command: list[str], env: dict[str, str], limit_s: float) -> tuple[str, str]:
    """What went wrong ("" if nothing) and everything printed. Kills the whole group on time-out."""
    with tempfile.TemporaryFile("w+", errors="replace") as output:
        try:
            process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=_environment() | env,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        except OSError as error:
            return f"could not start ({error})", ""
        try:
            code = process.wait(limit_s)
            note = "" if code == 0 else f"exited with {code}"
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            note = f"was stopped at the limit of {limit_s:.0f} s"
        output.seek(0)
        return note, output.read()


def summarise(out: Path, machine: Machine, outcomes: Sequence[Outcome]) -> None:
    """Writes summary.json and summary.md."""
    document = {"device": machine.name, "sections": [asdict(outcome) for outcome in outcomes]}
    (out / "summary.json").write_text(json.dumps(document, indent=1) + "\n")
    lines = [f"# gpu-check on {machine.name}", "", "| section | outcome | s | note |"]
    lines.append("| --- | --- | ---: | --- |")
    for o in outcomes:
        lines.append(f"| {o.section} | {o.status} | {o.seconds:.0f} | {o.note} |")
    for name in RESULTS:
        path = out / f"{name}.json"
        if f"bench-{name}" in {o.section for o in outcomes} and path.exists():
            lines += ["", *result_table(name, json.loads(path.read_text()))]
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
    parser.add_argument("--sections", help="comma-separated; default: all")
    args = parser.parse_args(argv)
    machine = probe()
    out: Path = args.out or ROOT / "benchmarks" / "results" / machine.slug
    out = out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as build_dir, (out / "gpu-check.log").open("w") as log:
        known = check or sections(out, Path(build_dir))
        names = [section.name for section in known]
        wanted = args.sections.split(",") if args.sections else names
        unknown = sorted(set(wanted) - set(names))
        if unknown:
            parser.error(f"--sections: got {', '.join(unknown)}; needed: of {', '.join(names)}")
        outcomes = []
        for section in known:
            if section.name in wanted:
                outcomes.append(run(section, machine, log))
                last = outcomes[-1]
                print(f"{last.section}: {last.status} ({last.seconds:.0f} s) {last.note}")
                summarise(out, machine, outcomes)  # so that a killed check leaves what it has
    print((out / "summary.md").read_text())
    return int(any(outcome.status == "failed" for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
