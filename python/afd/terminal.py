"""What commands have in common: one sentence for a wrong command line, and streams and signals of
those that may outlive their terminal."""

from __future__ import annotations

import argparse
import io
import os
import re
import select
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any, NoReturn, TextIO

from afd.errors import MISTAKE

# Signals that end a command. SIGHUP is sent when its terminal closes; under nohup it is ignored.
ENDS = (signal.SIGTERM, signal.SIGHUP)

# argparse's sentences, in the form of all other errors.
_REWORDED = (
    (r"the following arguments are required: (.+)", r"needs \1"),
    (
        r"argument (.+): invalid choice: ('.*') \(choose from (.+)\)",
        r"\1: got \2; needed: one of \3",
    ),
    (r"argument (.+): invalid int value: ('.*')", r"\1: got \2; needed: an integer"),
    (r"argument (.+): invalid (\w+) value: ('.*')", r"\1: got \3; needed: a \2"),
    (r"argument (.+)", r"\1"),
)


class CommandParser(argparse.ArgumentParser):
    """A parser of options that reports a mistake in one sentence and exits with MISTAKE."""

    def error(self, message: str) -> NoReturn:
        for pattern, reworded in _REWORDED:
            text, found = re.subn(f"(?s)^{pattern}$", reworded, message)
            if found:
                message = text
                break
        _, _, verb = self.prog.partition(" ")
        usage = " ".join(self.format_usage().split())
        self.exit(MISTAKE, f"afd: error: {verb}{': ' if verb else ''}{message}; {usage}\n")


@contextmanager
def lasting_streams() -> Iterator[None]:
    """Keep the block running if its standard streams fail.

    Once a stream cannot be written to (its reader has exited, the terminal is gone, the disk is
    full), further output to it is discarded. Replaced streams, as in tests, are left alone.
    """
    occupy()
    before = sys.stdout, sys.stderr
    if sys.stdout is sys.__stdout__:
        sys.stdout = _lasting(1, sys.stdout)
    if sys.stderr is sys.__stderr__:
        sys.stderr = _lasting(2, sys.stderr)
    try:
        yield
    finally:
        for stream, old in zip((sys.stdout, sys.stderr), before, strict=True):
            if stream is not old:
                stream.flush()
        sys.stdout, sys.stderr = before


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """Raise KeyboardInterrupt on the first SIGTERM or SIGHUP in the block, so that it can clean up
    as after Ctrl-C."""
    if threading.current_thread() is not threading.main_thread():
        # Only the main thread may set handlers; elsewhere the caller owns the signals.
        yield
        return

    def handle(number: int, frame: FrameType | None) -> None:
        # Service managers send both: the second one must not interrupt the clean-up.
        for each in before:
            signal.signal(each, signal.SIG_IGN)
        raise KeyboardInterrupt

    before = handled(ENDS, handle)
    try:
        yield
    finally:
        restore(before)


def handled(numbers: tuple[signal.Signals, ...], handle: Any) -> dict[signal.Signals, Any]:
    """Set a handler for signals and return the previous ones. An ignored SIGHUP stays ignored."""
    hung_up = signal.getsignal(signal.SIGHUP)
    numbers = tuple(n for n in numbers if n != signal.SIGHUP or hung_up != signal.SIG_IGN)
    return {number: signal.signal(number, handle) for number in numbers}


def restore(before: dict[signal.Signals, Any]) -> None:
    """Restore the handlers that `handled` returned."""
    for number, handler in before.items():
        signal.signal(number, handler)


def occupy() -> None:
    """Open standard streams that were closed at start-up, so that no file reuses their
    descriptors."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest free descriptor, which is this one


def drop(descriptor: int) -> None:
    """Redirect a standard stream to /dev/null, also for C libraries and child processes."""
    nothing = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, descriptor)
    os.close(nothing)


class _Raw(io.FileIO):
    """A raw standard stream that discards what it cannot write."""

    def write(self, data: Any) -> int:
        while True:
            try:
                written = super().write(data)
            except OSError:
                drop(self.fileno())
                return len(memoryview(data).cast("B"))
            if written is not None:
                return written
            # Another program has made the stream non-blocking.
            select.select([], [self.fileno()], [])


def _lasting(descriptor: int, like: TextIO | None) -> TextIO:
    """A text stream like `like` that never fails."""
    if like is not None:
        with suppress(OSError, ValueError):
            like.flush()
    raw = _Raw(descriptor, "w", closefd=False)
    return io.TextIOWrapper(
        io.BufferedWriter(raw),
        encoding=getattr(like, "encoding", None) or "utf-8",
        # A prompt may hold characters that the terminal's encoding lacks.
        errors="backslashreplace",
        line_buffering=descriptor == 2 or raw.isatty(),
    )
