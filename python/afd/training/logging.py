"""What a run says about itself: log, lines of metrics, how long each phase takes and will take."""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.logging import RichHandler
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

PHASES = ("teacher", "rollout", "critic", "student", "evaluate")
LABELS = dict(
    zip(PHASES, ("teacher wait", "rollout", "discriminator", "student", "evaluation"), strict=True)
)
_log = logging.getLogger("afd")


@contextmanager
def log_to(path: Path, console: Console) -> Iterator[None]:
    """Send the package's log to a file (appended, DEBUG) and the console (INFO) for the block."""
    file = logging.FileHandler(path, encoding="utf-8")
    file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    screen = RichHandler(console=console, show_path=False, markup=False, highlighter=None)
    level = _log.level
    screen.setLevel(logging.INFO)
    _log.setLevel(logging.DEBUG)
    for handler in (file, screen):
        _log.addHandler(handler)
    try:
        yield
    finally:
        for handler in (file, screen):
            _log.removeHandler(handler)
            handler.close()
        _log.setLevel(level)


class Timers:
    """Seconds per phase since the last `take`; `begins` is told of each phase."""

    def __init__(self, begins: Callable[[str], None] = lambda phase: None) -> None:
        self._seconds: dict[str, float] = {}
        self._begins = begins

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        self._begins(phase)
        start = time.perf_counter()
        try:
            yield
        finally:
            passed = time.perf_counter() - start
            self._seconds[phase] = self._seconds.get(phase, 0.0) + passed

    def take(self) -> dict[str, float]:
        """Every phase's seconds, then start from zero."""
        taken = {phase: round(self._seconds.get(phase, 0.0), 6) for phase in PHASES}
        self._seconds = {}
        return taken


class Lines:
    """A .jsonl file, one object with a "step" a line; `resumed_at` drops every later line.

    Attributes:
        kept: the lines that were there.
        steps: their steps.
    """

    def __init__(self, path: Path, resumed_at: int) -> None:
        self.kept = kept = [line for line in _lines(path) if line["step"] <= resumed_at]
        partial = path.with_name(path.name + ".partial")
        with partial.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(line) + "\n" for line in kept)
        partial.replace(path)
        self.steps = {line["step"] for line in kept}
        self._file = path.open("a", encoding="utf-8")

    def write(self, line: dict[str, Any]) -> None:
        """Append; the line is with the operating system when this returns."""
        self._file.write(json.dumps(line, allow_nan=False) + "\n")
        self._file.flush()

    def sync(self) -> None:
        """Wait until every line is on the disk."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


@contextmanager
def progress_bar(name: str, total: int, done: int, console: Console, shown: bool) -> Iterator[Bar]:
    """Updates with the time left, and every phase with its own; silent without a terminal."""
    updates = Progress(
        TextColumn("[bold]{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
    )
    phases = Progress(TextColumn("  {task.description}"), _Phase(), console=console)
    bar = Bar(updates, phases, name, total, done)
    if not (shown and console.is_terminal):
        yield bar
        return
    with Live(Group(updates, phases), console=console, refresh_per_second=4):
        yield bar


class _Phase(ProgressColumn):
    """How long a phase takes, what is left of it in the run, and how far the running one is."""

    max_refresh = 0.25

    def render(self, task: Task) -> Text:
        mean, left = task.fields["mean"], task.fields["left"]
        told = "" if mean is None else f"{_time(mean)} an update, {_time(mean * left)} left"
        if task.fields["began"] is None:
            return Text(told, style="dim")
        running = _time(time.perf_counter() - task.fields["began"])
        return Text(f"{told}  ▶ {running}".strip())


class Bar:
    """One run's lines in the progress display."""

    def __init__(
        self, updates: Progress, phases: Progress, name: str, total: int, done: int
    ) -> None:
        self._updates, self._phases = updates, phases
        self._task = updates.add_task(name, total=total, completed=done)
        self._left, self._mean = total - done, dict[str, float]()
        self._rows: dict[str, TaskID] = {}
        self._running: str | None = None

    def begins(self, phase: str) -> None:
        """A phase of the current update is under way now."""
        self._mark(self._running, None)
        self._running = phase
        if phase not in self._rows:
            self._rows[phase] = self._phases.add_task(
                f"{LABELS[phase]:<13}", mean=None, left=self._left, began=None
            )
        self._mark(phase, time.perf_counter())

    def advance(self, phase_s: dict[str, float]) -> None:
        """One more update; each phase has a running mean of its seconds, and so a time left."""
        self._mark(self._running, None)
        self._left -= 1
        self._updates.update(self._task, advance=1)
        for phase, seconds in phase_s.items():
            self._mean[phase] = 0.9 * self._mean.get(phase, seconds) + 0.1 * seconds
            if phase in self._rows:
                row = self._rows[phase]
                self._phases.update(row, mean=self._mean[phase], left=self._left)

    def _mark(self, phase: str | None, began: float | None) -> None:
        if phase is not None:
            self._phases.update(self._rows[phase], began=began)


def _time(seconds: float) -> str:
    """12 ms, 3.4 s, 5:07 or 12:05:07."""
    if seconds < 60:
        return f"{1000 * seconds:.0f} ms" if seconds < 0.1 else f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    """The whole lines of a .jsonl file, up to the first torn one."""
    if not path.is_file():
        return
    for line in path.read_text(encoding="utf-8").split("\n")[:-1]:
        try:
            yield json.loads(line)
        except json.JSONDecodeError:
            return
