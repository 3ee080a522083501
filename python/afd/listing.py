"""Values, numbers and lists in messages: truncated, counted, cut after the first few things."""

from __future__ import annotations

import logging
from collections.abc import Sequence

# Things that are listed, each on a line of its own.
FEW = 10


def shown(value: object, width: int = 120) -> str:
    """A value's repr, truncated to `width`; with a large `width` printable text is not quoted."""
    text = value if isinstance(value, str) and width > 120 and value.isprintable() else repr(value)
    return text if len(text) <= width else f"{text[:width]}…"


def counted(number: float, thing: str) -> str:
    """A number of things in words, such as "1 video" and "12 videos"; `thing` is singular."""
    text = str(number) if isinstance(number, int) else f"{number:.3g}"
    return f"{text} {thing}{'' if number == 1 else 'es' if thing.endswith('ss') else 's'}"


def few(things: Sequence[str], most: int = FEW) -> list[str]:
    """The first `most` things and "and N more"; all of them if that would stand for a single one.

    A log that takes DEBUG has the complete list (`log_all`).
    """
    if len(things) <= most + 1:
        return list(things)
    return [*things[:most], f"and {len(things) - most} more"]


def listed(things: Sequence[str]) -> str:
    """`few` things, each on an indented line."""
    return "\n".join(f"  {thing}" for thing in few(things))


def log_all(log: logging.Logger, level: int, text: str, things: Sequence[str]) -> None:
    """Log `text`, which has one %s, of each thing: FEW of them at `level`, and the number of the
    others, which go to DEBUG: a run's log file takes it, its terminal does not."""
    some = Some(log, level, text)
    for thing in things:
        some(thing)
    some.end()


class Some:
    """Logs one line a thing as `log_all` does, of things that come one after another."""

    def __init__(self, log: logging.Logger, level: int, text: str) -> None:
        self._log, self._level, self._text = log, level, text
        self._seen: set[str] = set()

    def __call__(self, thing: str) -> None:
        """Log a thing, unless the same one was logged before."""
        if thing in self._seen:
            return
        self._seen.add(thing)
        self._log.log(self._level if len(self._seen) <= FEW else logging.DEBUG, self._text, thing)

    def end(self) -> None:
        """Log how many things were logged at DEBUG only."""
        if len(self._seen) > FEW:
            self._log.log(self._level, "%d more like these", len(self._seen) - FEW)
        self._seen.clear()
