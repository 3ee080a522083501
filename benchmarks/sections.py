"""Sections of a check: commands with a time limit, their outcomes, and their execution."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import signal
import subprocess
import tempfile
import time
from dataclasses import dataclass, field
from importlib.machinery import PathFinder
from math import inf
from pathlib import Path
from typing import IO, Any

from benchmarks.clock import INCOMPLETE, MISSING

ROOT = Path(__file__).resolve().parents[1]
SIMULATED = 90  # the capability, times ten, of the simulated GPU
Result = tuple[list[str], str, str]  # command, what went wrong with it, output
_TAIL = 30  # lines of a failed section's output in the summary


@dataclass(frozen=True)
class Section:
    """Commands run sequentially within a shared time limit.

    Those of `beside` run in parallel meanwhile.
    """

    name: str
    commands: list[list[str]]
    limit_s: float
    beside: list[list[str]] = field(default_factory=list)
    needs_gpu: bool = False
    needs_tool: str | None = None
    needs_path: Path | None = None
    needs_modules: tuple[str, ...] = ()
    env: dict[str, str] = field(default_factory=dict)
    asked_only: bool = False  # runs only if requested by name


@dataclass(frozen=True)
class Outcome:
    """`status` is "passed", "failed", "incomplete" or "skipped"; `note` has the reason.

    `tail` is the end of the output.
    """

    section: str
    status: str
    seconds: float
    note: str = ""
    tail: str = ""


@dataclass(frozen=True)
class Machine:
    """Resources available to the sections."""

    slug: str
    name: str
    has_gpu: bool
    arch: int = SIMULATED  # the GPU's capability, times ten
    packages: tuple[str, ...] = ()  # folders into which carried wheels were installed


def environment(packages: tuple[str, ...] = ()) -> dict[str, str]:
    """This process's environment, with the checkout and the carried packages importable."""
    paths = [str(ROOT), str(ROOT / "python"), *packages, os.environ.get("PYTHONPATH", "")]
    path = os.pathsep.join(filter(None, paths))
    return os.environ | {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}


def run(section: Section, machine: Machine, log: IO[str], left_s: float = inf) -> Outcome:
    """Runs a section or reports why not; its output is logged as it is produced."""
    log.write(f"\n===== {section.name} =====\n")
    reason = _why_not(section, machine)
    if reason is None and left_s < 5:
        reason = "no time is left"
    if reason is not None:
        log.write(f"skipped: {reason}\n")
        return Outcome(section.name, "skipped", 0.0, reason)
    start, limit_s = time.monotonic(), min(section.limit_s, left_s)
    env = environment(machine.packages) | section.env
    results: list[Result] = []
    with Beside(section.beside, env) as others:
        for command in section.commands:
            left = limit_s - (time.monotonic() - start)
            log.write(f"$ {' '.join(command)}\n")
            results.append((command, *execute(command, env, max(left, 1.0), log)))
        results += others.finish(start + limit_s, log)
    notes = [f"`{' '.join(command)}` {note}" for command, note, _ in results if note]
    text = "".join(output for *_, output in results)
    missing = [line for line in text.splitlines() if line.startswith(MISSING)]
    status = "failed" if notes else "incomplete" if missing else "passed"
    tail = "\n".join(text.rstrip().splitlines()[-_TAIL:])
    seconds = time.monotonic() - start
    return Outcome(section.name, status, seconds, "; ".join([*notes, *missing]), tail)


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


def execute(
    command: list[str], env: dict[str, str], limit_s: float, log: IO[str]
) -> tuple[str, str]:
    """The error ("" if none) and all output. Kills the whole process group on time-out."""
    log.flush()
    path = Path(log.name)
    before = path.stat().st_size
    try:
        # The log is opened for appending, so both processes write at its end.
        process = _start(command, env, log)
    except OSError as error:
        return f"could not start ({error})", ""
    try:
        note = _wait(process, limit_s)
    finally:
        _kill(process)
    return note, path.read_bytes()[before:].decode(errors="replace")


def _start(command: list[str], env: dict[str, str], output: IO[Any]) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        command, cwd=ROOT, env=env, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
    )


def _wait(process: subprocess.Popen[bytes], limit_s: float) -> str:
    """The error; none if a process itself reports what it had no time for."""
    try:
        code = process.wait(limit_s)
    except subprocess.TimeoutExpired:
        return f"was stopped at the limit of {limit_s:.0f} s"
    return "" if code in (0, INCOMPLETE) else f"exited with {code}"


def _kill(process: subprocess.Popen[bytes]) -> None:
    """Kill a process with its children."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


class Beside:
    """Parallel processes, each with a separate output until it ends."""

    def __init__(self, commands: list[list[str]], env: dict[str, str]) -> None:
        self._commands, self._env = commands, env
        self._running: list[tuple[list[str], subprocess.Popen[bytes], IO[bytes]]] = []
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Beside:
        for command in self._commands:
            output = self._stack.enter_context(tempfile.TemporaryFile())
            process = _start(command, self._env, output)
            self._stack.callback(_kill, process)
            self._running.append((command, process, output))
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def finish(self, until: float, log: IO[str]) -> list[Result]:
        """Waits for all processes, at most until `until` on the monotonic clock."""
        found = []
        for command, process, output in self._running:
            note = _wait(process, max(until - time.monotonic(), 0.1))
            _kill(process)
            output.seek(0)
            text = output.read().decode(errors="replace")
            log.write(f"$ {' '.join(command)}\n{text}")
            found.append((command, note, text))
        return found
