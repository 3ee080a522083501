"""What each process of the tests of distributed sequences does; processes import it."""

from __future__ import annotations

import io
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console

from afd.adapt import run
from afd.distributed import join
from afd.trainer.loop import Trainer


def sequence(path: Path, moment: str, killed: int | None) -> bool:
    """A sequence in which one process (None: every process) is killed at a moment, if there is one:
    "before" or "after" the second domain's measurement, "within" its first update, or at its
    "save"."""
    with join("cpu") as ranks:
        if moment and killed in (None, ranks.rank):
            _prepare(moment)
        return run.adapt(path, [], Console(file=io.StringIO()))


def _prepare(moment: str) -> None:
    measure, save, update = run.measure, Trainer._save, Trainer._update
    calls = []

    def measured(*given: Any) -> None:
        calls.append(1)
        if len(calls) < 2:
            measure(*given)
            return
        if moment == "after":
            measure(*given)
        _die()

    def second(made: Callable[..., Any]) -> Callable[..., Any]:
        def method(self: Trainer, *given: Any) -> Any:
            if "2_sand" in str(self.out) and self.update == 1:
                _die()
            return made(self, *given)

        return method

    if moment in ("before", "after"):
        run.measure = measured
    if moment == "within":
        Trainer._update = second(update)  # type: ignore[method-assign]
    if moment == "save":
        Trainer._save = second(save)  # type: ignore[method-assign]


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)
