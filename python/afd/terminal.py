"""The terminal of a command that runs for hours, and may outlive it."""

from __future__ import annotations

import io
import os
import select
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any, TextIO

# What asks a command to end. SIGHUP comes when its terminal is closed; under nohup it is ignored.
ENDS = (signal.SIGTERM, signal.SIGHUP)


@contextmanager
def lasting_streams() -> Iterator[None]:
    """Let the block outlive whoever reads its standard streams.

    Once a stream cannot be written to (its reader has left, the terminal is gone, its disk is
    full), what would go there is dropped. Streams that somebody has put in their place, as tests
    do, are left alone.
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
    """Let SIGTERM and SIGHUP end the block as Ctrl-C does, so that it can tidy up; once."""
    if threading.current_thread() is not threading.main_thread():
        # Only the main thread may set handlers; elsewhere the caller owns the signals.
        yield
        return

    def handle(number: int, frame: FrameType | None) -> None:
        # A service manager sends both: the second one must not end the tidying up.
        for each in before:
            signal.signal(each, signal.SIG_IGN)
        raise KeyboardInterrupt

    before = handled(ENDS, handle)
    try:
        yield
    finally:
        restore(before)


def handled(numbers: tuple[signal.Signals, ...], handle: Any) -> dict[signal.Signals, Any]:
    """Set a handler for signals; returns what was there. A SIGHUP that is ignored stays so."""
    hung_up = signal.getsignal(signal.SIGHUP)
    numbers = tuple(n for n in numbers if n != signal.SIGHUP or hung_up != signal.SIG_IGN)
    return {number: signal.signal(number, handle) for number in numbers}


def restore(before: dict[signal.Signals, Any]) -> None:
    """Put back what `handled` returned."""
    for number, handler in before.items():
        signal.signal(number, handler)


def occupy() -> None:
    """Open standard streams that were closed from the start, so that no file gets their numbers."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number, which is this one


def drop(descriptor: int) -> None:
    """Send a standard stream nowhere, for all that write there: C libraries, child processes."""
    nothing = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, descriptor)
    os.close(nothing)


class _Raw(io.FileIO):
    """A standard stream that drops what it cannot write."""

    def write(self, data: Any) -> int:
        while True:
            try:
                written = super().write(data)
            except OSError:
                drop(self.fileno())
                return len(memoryview(data).cast("B"))
            if written is not None:
                return written
            # Another program has made the stream one that does not wait.
            select.select([], [self.fileno()], [])


def _lasting(descriptor: int, like: TextIO | None) -> TextIO:
    """A text stream as `like` is, which never fails."""
    if like is not None:
        with suppress(OSError, ValueError):
            like.flush()
    raw = _Raw(descriptor, "w", closefd=False)
    return io.TextIOWrapper(
        io.BufferedWriter(raw),
        encoding=getattr(like, "encoding", None) or "utf-8",
        # A prompt may hold letters that the terminal's encoding has not.
        errors="backslashreplace",
        line_buffering=descriptor == 2 or raw.isatty(),
    )
