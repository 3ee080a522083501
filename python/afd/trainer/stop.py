"""A signal as a request: the loop finishes its update, saves and leaves."""

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
    """Becomes true once SIGINT, SIGTERM or SIGHUP came."""

    def __init__(self) -> None:
        self.requested = False

    def __bool__(self) -> bool:
        return self.requested


@contextmanager
def stop_request() -> Iterator[StopRequest]:
    """Catch SIGINT, SIGTERM and SIGHUP for the block; a second SIGINT interrupts at once.

    A run whose terminal is closed stops, saved, as torchrun would have it killed 30 seconds later.
    Under nohup, where SIGHUP is ignored, it goes on.
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
            return  # a service manager sends SIGTERM and SIGHUP
        request.requested = True
        name = signal.Signals(number).name
        _log.info("%s: stopping after this update (Ctrl-C now: at once, without saving)", name)

    before = handled((signal.SIGINT, *ENDS), handle)
    try:
        yield request
    finally:
        restore(before)
