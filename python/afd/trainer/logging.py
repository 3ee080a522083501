"""What a run says about itself: log, lines of metrics, how long each phase takes and will take."""

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
    """A log on a terminal, in letters that its encoding has: a path may hold any bytes."""

    def render_message(self, record: logging.LogRecord, message: str) -> ConsoleRenderable:
        encoding = self.console.encoding
        shown = message.encode(encoding, "backslashreplace").decode(encoding)
        return super().render_message(record, shown)


class _File(logging.FileHandler):
    """A log that cannot be written any more is missed, once in a warning, and stops nobody."""

    missed = False

    def handleError(self, record: logging.LogRecord) -> None:
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            super().handleError(record)
        elif not self.missed:
            self.missed = True
            why = error.strerror
            _log.warning("log %s: cannot be written, goes on without (%s)", self.baseFilename, why)

    def close(self) -> None:
        # What its buffer holds is tried once more.
        with suppress(OSError):
            super().close()


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
    """A .jsonl file of a run, one object with a "step" a line; later lines than `resumed_at` go.

    A last line that was cut off is dropped with a warning; so is a damaged one before it, and then
    the file as it was stays beside it, as <name>.damaged.

    Attributes:
        kept: the lines that were there.
        steps: their steps.
    """

    def __init__(
        self,
        path: Path,
        resumed_at: int,
        *,
        needs: Sequence[str] = (),
        promised: Mapping[str, Any] | None = None,
    ) -> None:
        """`needs`: keys that every line has; `promised`: the `state_dict` of a checkpoint at
        `resumed_at`, which says what the kept lines were."""
        self.path = path
        lines = read_json_lines(path)
        problems = {line.number: line.problem or _oddity(line.value or {}, needs) for line in lines}
        whole = [line.value or {} for line in lines if problems[line.number] is None]
        self.kept = kept = [value for value in whole if value["step"] <= resumed_at]
        damaged = [line for line in lines if problems[line.number] is not None]
        for line in damaged:
            if line.torn:
                _log.warning("%s: its last line was cut off, and is dropped", path)
            else:
                said = "%s: line %d is damaged (%s), and is dropped; the file as it was: %s"
                _log.warning(said, path, line.number, problems[line.number], _aside(path).name)
        if any(not line.torn for line in damaged):
            write_bytes(_aside(path), path.read_bytes())
        self._digest, self._lines = hashlib.sha256(), len(kept)
        text = "".join(self._counted(value) + "\n" for value in kept)
        if path.is_file() and path.read_bytes() != text.encode():
            write_text(path, text)
        if promised is not None and promised != self.state_dict():
            _log.warning(
                "%s: holds other lines than the run wrote up to update %d (%d, now %d)",
                path,
                resumed_at,
                promised["lines"],
                len(kept),
            )
        self.steps = {line["step"] for line in kept}
        self._file = JsonAppender(path)

    def write(self, line: dict[str, Any]) -> None:
        """Append; the line is with the operating system when this returns."""
        self._file.write(line)
        self._counted(line)
        self._lines += 1

    def state_dict(self) -> dict[str, Any]:
        """How many lines there are, and the SHA-256 of all."""
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
    """What keeps an object from being a line of a run, or None."""
    missing = [key for key in ("step", *needs) if key not in line]
    if missing:
        return f"has no {missing[0]}"
    if type(line["step"]) is not int:
        return f"step is {line['step']!r}"
    for key, value in line.items():
        within = value.values() if isinstance(value, dict) else [value]
        if key != "method" and not all(isinstance(v, int | float) and isfinite(v) for v in within):
            return f"{key} is {str(value)[:80]}"
    return None


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
