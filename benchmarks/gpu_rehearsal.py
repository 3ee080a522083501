"""Runs gpu-check's sections without a GPU and sets the seconds they need beside their limits.

    make gpu-rehearsal
    make gpu-rehearsal SECTIONS=build,tests

Sections run one after another on the simulated GPU, sharing an initially empty Triton cache: builds
are real, kernels are compiled for sm_90 with the installed Triton, values come from the CPU, and
benchmarks run at small sizes. Times are processor time, which other load on the machine affects
little. Expected time on a machine with CORES cores as fast as this one's:

    sequential commands: the sum of their times
    parallel processes: the longest, or their sum over CORES if that is more
    the build: its longest job, or their sum over CORES
    a benchmark: until its deadline, as on a GPU, or the compile time of its kernels if that is more
    (the CPU's time for its values does not predict a GPU's)

Not rehearsed: torch.compile's own compilation, C launchers and the loading of kernels, and the
overhead of compute-sanitizer and graphs. Exits with 1 if a section is expected to exceed its limit,
or if the total is less than SLACK times within ten minutes.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

if __package__ in (None, ""):  # run as a file
    sys.path.append(str(Path(__file__).resolve().parents[1]))

from benchmarks.gpu_check import GOLDEN, sections
from benchmarks.sections import ROOT, Section, environment

CORES = 16
SLACK = 1.5
WHOLE_S = 600


@dataclass(frozen=True)
class Need:
    """A section's measured processor time in seconds; `expected_s`: on CORES cores."""

    name: str
    processor_s: float
    longest_s: float
    expected_s: float
    limit_s: float
    kernels: int
    cached: int

    def line(self) -> str:
        """The section as a table row."""
        return (
            f"{self.name:20} {self.processor_s:9.0f} {self.longest_s:9.0f} "
            f"{self.expected_s:10.0f} {self.limit_s:7.0f} {self.kernels:8} {self.cached:10}"
        )


def rehearsed(command: list[str], record: Path) -> list[str]:
    """The command adapted to the simulated GPU; builds are unchanged."""
    ahead = [sys.executable, "-m", "benchmarks.compile_ahead", "--record", str(record)]
    if command[0] == "compute-sanitizer":
        return [*ahead, "benchmarks.sanitize"]
    if command[0] != sys.executable:
        return command
    if command[1] == "-m":
        rest = command[2:] if command[2] != "benchmarks.compile_ahead" else command[3:]
        # Processes get a fraction of a core each here.
        until = rest.index("--until") if "--until" in rest else len(rest)
        return [*ahead, *rest[:until], *rest[until + 2 :]]
    options = command[2:]
    del options[options.index("--out") : options.index("--out") + 2]
    return [*ahead, f"benchmarks.{Path(command[1]).stem}", *options, "--quick"]


def spent(commands: list[list[str]], env: dict[str, str], log: Path) -> list[float]:
    """Runs commands side by side; returns the processor time of each and its children, in seconds.

    They progress alike, as on a machine with a core for each, and so share the compilation alike.
    """
    with log.open("a") as output:
        processes = [
            subprocess.Popen(command, cwd=ROOT, env=env, stdout=output, stderr=subprocess.STDOUT)
            for command in commands
        ]
        seconds = []
        for command, process in zip(commands, processes, strict=True):
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
            seconds.append(usage.ru_utime + usage.ru_stime)
            output.write(
                f"$ {' '.join(command)}\nended with {process.returncode} "
                f"after {seconds[-1]:.1f} s of processor time\n"
            )
    return seconds


def longest_share(build: Path) -> float:
    """The longest job's fraction of a build's time, 1 if there is no Ninja log."""
    log = build / ".ninja_log"
    lines = log.read_text().splitlines()[1:] if log.exists() else []
    jobs = [int(end) - int(start) for start, end, *_ in (line.split("\t") for line in lines)]
    return max(jobs) / sum(jobs) if jobs else 1.0


def expected(row: list[float], beside: list[float], deadline_s: float) -> float:
    """Expected seconds on CORES busy cores for sequential commands and parallel processes."""
    together = (sum(row) + sum(beside)) / CORES if beside else 0.0
    return max(sum(row), *beside, together, deadline_s)


def need(section: Section, folder: Path, build_dir: Path, env: dict[str, str]) -> Need:
    """Rehearses a section and returns its times; `build_dir` is where `build` builds the core."""
    record, log = folder / f"{section.name}.jsonl", folder / "gpu-rehearsal.log"
    env = env | section.env
    whole = [spent([rehearsed(command, record)], env, log)[0] for command in section.commands]
    beside = spent([rehearsed(command, record) for command in section.beside], env, log)
    row = list(whole)
    if section.name == "build":
        row = [whole[0], whole[1] * max(longest_share(build_dir), 1 / CORES)]
    lines = record.read_text().splitlines() if record.exists() else []
    found = [json.loads(line) for line in lines]
    command, deadline = section.commands[-1], 0.0
    if "--deadline" in command:
        deadline = float(command[command.index("--deadline") + 1])
        row = [sum(kernel["seconds"] for kernel in found)]
    return Need(
        section.name,
        sum(whole) + sum(beside),
        max([*row, *beside]),
        expected(row, beside, deadline),
        section.limit_s,
        len(found),
        sum(kernel["cached"] for kernel in found),
    )


def main(argv: list[str] | None = None) -> int:
    """Prints the table row by row as results arrive."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sections", help="comma-separated; default: all that gpu-check runs")
    parser.add_argument("--golden", type=Path, default=GOLDEN, help="golden files, for parity")
    parser.add_argument("--out", type=Path, help="keeps the log and a line for each kernel there")
    args = parser.parse_args(argv)
    wanted = args.sections.split(",") if args.sections else None
    print(
        f"{'section':20} {'processor':>9} {'longest':>9} {f'{CORES} cores':>10} {'limit':>7} "
        f"{'kernels':>8} {'from cache':>10}"
    )
    with tempfile.TemporaryDirectory() as temporary:
        folder = (args.out or Path(temporary)).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        env = environment() | {"TRITON_CACHE_DIR": f"{temporary}/triton"}
        build_dir = Path(temporary, "build")
        check = sections(folder, build_dir, args.golden.resolve(), cores=CORES)
        needs = []
        for section in check:
            if section.name not in wanted if wanted else section.asked_only:
                continue
            commands = [
                # Leave this checkout's core unchanged.
                [part.replace(str(ROOT / "afd_kernels"), f"{temporary}/core") for part in command]
                for command in section.commands
            ]
            changed = Section(
                section.name, commands, section.limit_s, section.beside, env=section.env
            )
            needs.append(need(changed, folder, build_dir, env))
            print(needs[-1].line(), flush=True)
    total = sum(one.expected_s for one in needs)
    limits = sum(one.limit_s for one in needs)
    slack = WHOLE_S / total
    print(f"{'all':20} {'':9} {'':9} {total:10.0f} {limits:7.0f}")
    over = [one.name for one in needs if one.expected_s > one.limit_s]
    print(
        f"ten minutes are {slack:.2f} times what is expected; over their limits: {over or 'none'}"
    )
    return int(slack < SLACK or bool(over))


if __name__ == "__main__":
    sys.exit(main())
