"""Graceful stopping on signals: the loop finishes its update, saves and returns."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from afd.terminal import ENDS, handled, restore

_log = logging.getLogger("afd")


class StopRequest:
    """True once SIGINT, SIGTERM or SIGHUP has been received."""

    def __init__(self) -> None:
        self.requested = False

    def __bool__(self) -> bool:
        return self.requested


@contextmanager
def stop_request() -> Iterator[StopRequest]:
    """Catch SIGINT, SIGTERM and SIGHUP for the block; a second SIGINT interrupts immediately.

    A run whose terminal is closed saves and stops, as torchrun would kill it 30 seconds later.
    Under nohup, where SIGHUP is ignored, it continues.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        # Only the main thread may set handlers; elsewhere the caller owns the signals.
        yield request
        return

    def handle(number: int, frame: FrameType | None) -> None:
        if request.requested:
            if number == signal.SIGINT:
                raise KeyboardInterrupt
            return  # service managers send both SIGTERM and SIGHUP
        request.requested = True
        name = signal.Signals(number).name
        _log.info(
            "%s: stopping after this update (Ctrl-C again: exit immediately, without saving)", name
        )

    before = handled((signal.SIGINT, *ENDS), handle)
    try:
        yield request
    finally:
        restore(before)
