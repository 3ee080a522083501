"""Logging of a run: log file, JSON lines of metrics, phase timers and progress bar."""

from __future__ import annotations

import hashlib
import json
import logging
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from math import isfinite
from pathlib import Path
from typing import Any

from rich.console import Console, ConsoleRenderable, Group
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

from afd.files import JsonAppender, read_json_lines, refuse_odd, write_bytes, write_text

PHASES = ("teacher", "rollout", "discriminator", "student", "evaluate")
LABELS = dict(
    zip(PHASES, ("teacher wait", "rollout", "discriminator", "student", "evaluation"), strict=True)
)
_log = logging.getLogger("afd")


@contextmanager
def log_to(path: Path, console: Console) -> Iterator[None]:
    """Send the package's log to a file (appended, DEBUG) and the console (INFO) for the block."""
    refuse_odd(path)
    file = _File(path, encoding="utf-8", errors="backslashreplace")
    file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    screen = _Screen(console=console, show_path=False, markup=False, highlighter=None)
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


class _Screen(RichHandler):
    """A terminal log handler restricted to the terminal's encoding: paths may hold any bytes."""

    def render_message(self, record: logging.LogRecord, message: str) -> ConsoleRenderable:
        encoding = self.console.encoding
        shown = message.encode(encoding, "backslashreplace").decode(encoding)
        return super().render_message(record, shown)


class _File(logging.FileHandler):
    """A file log handler that warns once when it can no longer write, and never stops the run."""

    missed = False

    def handleError(self, record: logging.LogRecord) -> None:
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            super().handleError(record)
        elif not self.missed:
            self.missed = True
            why = error.strerror
            _log.warning(
                "log %s: cannot be written, continuing without it (%s)", self.baseFilename, why
            )

    def close(self) -> None:
        # Closing tries to flush the buffer once more.
        with suppress(OSError):
            super().close()


class Timers:
    """Seconds per phase since the last `take`; `begins` is called at the start of each phase."""

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
        """Return the seconds of every phase and reset them to zero."""
        taken = {phase: round(self._seconds.get(phase, 0.0), 6) for phase in PHASES}
        self._seconds = {}
        return taken


class Lines:
    """A .jsonl file of a run, one object with an "update" per line. Lines after `resumed_at` are
    dropped on opening.

    A truncated last line is dropped with a warning; so is a damaged line before it, in which case
    the original file is kept as <name>.damaged.

    Attributes:
        kept: the existing lines that were kept.
        updates: their updates.
    """

    def __init__(
        self,
        path: Path,
        resumed_at: int,
        *,
        needs: Sequence[str] = (),
        promised: Mapping[str, Any] | None = None,
    ) -> None:
        """`needs`: keys that every line must have; `promised`: the `state_dict` of a checkpoint at
        `resumed_at`, against which the kept lines are verified."""
        self.path = path
        lines = read_json_lines(path)
        problems = {line.number: line.problem or _oddity(line.value or {}, needs) for line in lines}
        whole = [line.value or {} for line in lines if problems[line.number] is None]
        self.kept = kept = [value for value in whole if value["update"] <= resumed_at]
        damaged = [line for line in lines if problems[line.number] is not None]
        for line in damaged:
            if line.torn:
                _log.warning("%s: its last line was truncated and is dropped", path)
            else:
                text = "%s: line %d is damaged (%s), and is dropped; a copy of the file: %s"
                _log.warning(text, path, line.number, problems[line.number], _aside(path).name)
        if any(not line.torn for line in damaged):
            write_bytes(_aside(path), path.read_bytes())
        self._digest, self._lines = hashlib.sha256(), len(kept)
        text = "".join(self._counted(value) + "\n" for value in kept)
        if path.is_file() and path.read_bytes() != text.encode():
            write_text(path, text)
        if promised is not None and promised != self.state_dict():
            _log.warning(
                "%s: its lines differ from those that the run wrote up to update %d (%d, now %d)",
                path,
                resumed_at,
                promised["lines"],
                len(kept),
            )
        self.updates = {line["update"] for line in kept}
        self._file = JsonAppender(path)

    def write(self, line: dict[str, Any]) -> None:
        """Append a line; it has been passed to the operating system when this returns."""
        self._file.write(line)
        self._counted(line)
        self._lines += 1

    def state_dict(self) -> dict[str, Any]:
        """The number of lines and the SHA-256 of all of them."""
        return {"lines": self._lines, "sha256": self._digest.hexdigest()}

    def sync(self) -> None:
        """Wait until every line is on the disk."""
        self._file.sync()

    def close(self) -> None:
        self._file.close()

    def _counted(self, line: dict[str, Any]) -> str:
        text = json.dumps(line, allow_nan=False)
        self._digest.update(text.encode() + b"\n")
        return text


def _aside(path: Path) -> Path:
    return path.with_name(path.name + ".damaged")


def _oddity(line: Mapping[str, Any], needs: Sequence[str]) -> str | None:
    """Why an object is not a valid line of a run, or None."""
    missing = [key for key in ("update", *needs) if key not in line]
    if missing:
        return f"has no {missing[0]}"
    if type(line["update"]) is not int:
        return f"update is {line['update']!r}"
    for key, value in line.items():
        within = value.values() if isinstance(value, dict) else [value]
        if key != "method" and not all(isinstance(v, int | float) and isfinite(v) for v in within):
            return f"{key} is {str(value)[:80]}"
    return None


@contextmanager
def progress_bar(name: str, total: int, done: int, console: Console, shown: bool) -> Iterator[Bar]:
    """Progress of the updates and of every phase, with time left; silent without a terminal."""
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
    """A phase's mean duration, its remaining time in the run, and the elapsed time if running."""

    max_refresh = 0.25

    def render(self, task: Task) -> Text:
        mean, left = task.fields["mean"], task.fields["left"]
        rate = "" if mean is None else f"{_time(mean)} an update, {_time(mean * left)} left"
        if task.fields["began"] is None:
            return Text(rate, style="dim")
        running = _time(time.perf_counter() - task.fields["began"])
        return Text(f"{rate}  ▶ {running}".strip())


class Bar:
    """The progress display of one run."""

    def __init__(
        self, updates: Progress, phases: Progress, name: str, total: int, done: int
    ) -> None:
        self._updates, self._phases = updates, phases
        self._task = updates.add_task(name, total=total, completed=done)
        self._left, self._mean = total - done, dict[str, float]()
        self._rows: dict[str, TaskID] = {}
        self._running: str | None = None

    def begins(self, phase: str) -> None:
        """Mark the phase of the current update that has started."""
        self._mark(self._running, None)
        self._running = phase
        if phase not in self._rows:
            self._rows[phase] = self._phases.add_task(
                f"{LABELS[phase]:<13}", mean=None, left=self._left, began=None
            )
        self._mark(phase, time.perf_counter())

    def advance(self, phase_s: dict[str, float]) -> None:
        """Count one more update, and update each phase's running mean and time left."""
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
    """Format a duration: 12 ms, 3.4 s, 5:07 or 12:05:07."""
    if seconds < 60:
        return f"{1000 * seconds:.0f} ms" if seconds < 0.1 else f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
