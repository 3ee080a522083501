"""What a run says about itself: log, lines of metrics, signs of trouble, a progress bar."""

from __future__ import annotations

import json
import logging
import math
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.logging import RichHandler
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

AGREEMENT = "agreement/phys"
PHASES = ("teacher", "rollout", "critic", "student", "evaluate")
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
    """Seconds per phase since the last `take`."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
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
    """A .jsonl file, one object with a "step" a line; `resumed_at` drops every later line."""

    def __init__(self, path: Path, resumed_at: int) -> None:
        kept = [line for line in _lines(path) if line["step"] <= resumed_at]
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


class Signs:
    """Warns in the log when a known sign of trouble appears (once until it goes away)."""

    def __init__(self) -> None:
        self._shown: set[str] = set()
        self._accuracy = 0.5
        self._agreement: float | None = None
        self._best_agreement = 0.0

    def look(self, step: int, metrics: dict[str, float]) -> None:
        """Judge one update's metrics."""
        present = dict(signs(metrics | self._smooth_accuracy(metrics))) | self._falling(metrics)
        for name, sentence in present.items():
            if name not in self._shown:
                _log.warning("update %d: %s", step, sentence)
        self._shown = set(present)

    def _smooth_accuracy(self, metrics: dict[str, float]) -> dict[str, float]:
        """The accuracy over the last tens of updates; a single batch is often all right."""
        if "critic/accuracy" not in metrics:
            return {}
        self._accuracy = 0.95 * self._accuracy + 0.05 * metrics["critic/accuracy"]
        return {"critic/accuracy": self._accuracy}

    def _falling(self, metrics: dict[str, float]) -> dict[str, str]:
        """The score once ranked by physics and no longer does: the best sign to stop early."""
        if AGREEMENT in metrics:
            before = metrics[AGREEMENT] if self._agreement is None else self._agreement
            self._agreement = 0.8 * before + 0.2 * metrics[AGREEMENT]
            self._best_agreement = max(self._best_agreement, self._agreement)
        now = self._agreement
        if now is None or self._best_agreement < 0.4 or now > 0.2:
            return {}
        sentence = (
            f"correlation of score and physics fell from {self._best_agreement:.2f} to {now:.2f}"
        )
        return {"agreement": sentence}


def signs(metrics: dict[str, float]) -> Iterator[tuple[str, str]]:
    """(name, sentence) of every sign of trouble in one step's metrics."""

    def value(key: str) -> float:
        return metrics.get(key, math.nan)

    margin, zero_std = value("critic/margin"), value("student/zero_std_groups")
    if margin > 5:
        yield "margin", f"discriminator margin {margin:.1f} is above 5: it may rank a shortcut"
    if value("critic/accuracy") >= 0.995:
        yield "accuracy", "discriminator accuracy is 1: its scores say little about the student"
    if value("student/r_mean") > 0.9 or value("student/r_at_1") > 0.5:
        yield "r high", "r is near 1: the student may be fooling a discriminator that is too slow"
    if value("student/r_mean") < 0.1 or value("student/r_at_0") > 0.5:
        yield "r low", "r is near 0: the discriminator may be too strong"
    if zero_std > 0:
        yield "zero std", f"{zero_std:g} of the prompts' groups have equal scores"


@contextmanager
def progress_bar(name: str, total: int, done: int, console: Console, shown: bool) -> Iterator[Bar]:
    """A bar with the time per phase and the time left; silent where there is no terminal."""
    progress = Progress(
        TextColumn("[bold]{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[phases]}"),
        console=console,
        disable=not (shown and console.is_terminal),
    )
    with progress:
        yield Bar(progress, name, total, done)


class Bar:
    """One run's line in the progress display."""

    def __init__(self, progress: Progress, name: str, total: int, done: int) -> None:
        self._progress = progress
        self._task = progress.add_task(name, total=total, completed=done, phases="")
        self._mean: dict[str, float] = {}

    def advance(self, phase_s: dict[str, float]) -> None:
        """One more update; the phases show a running mean in seconds per update."""
        for phase, seconds in phase_s.items():
            self._mean[phase] = 0.9 * self._mean.get(phase, seconds) + 0.1 * seconds
        text = "  ".join(f"{p} {s:.2f}s" for p, s in self._mean.items() if s >= 0.005)
        self._progress.update(self._task, advance=1, phases=text)


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    """The whole lines of a .jsonl file, up to the first torn one."""
    if not path.is_file():
        return
    for line in path.read_text(encoding="utf-8").split("\n")[:-1]:
        try:
            yield json.loads(line)
        except json.JSONDecodeError:
            return
