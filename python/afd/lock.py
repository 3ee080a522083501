"""One process at a time in a folder."""

from __future__ import annotations

import fcntl
import logging
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from afd.config.run import ConfigError
from afd.files import remove

_log = logging.getLogger("afd")


class LockedError(RuntimeError):
    """Another process has the lock."""


@contextmanager
def locked(path: Path) -> Iterator[bool]:
    """Hold the lock on a folder, or on a file that is made where there is none, for the block.

    Yields whether it could be locked: some network file systems have no locks. It goes with the
    process. Raises LockedError where another process has it.
    """
    flags = os.O_RDONLY if path.is_dir() else os.O_RDWR | os.O_CREAT
    descriptor = os.open(path, flags, 0o666)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            held = True
        except BlockingIOError:
            raise LockedError(str(path)) from None
        except OSError as error:
            _log.warning("%s cannot be locked (%s): write there once at a time", path, error)
            held = False
        yield held
    finally:
        os.close(descriptor)


@contextmanager
def only_one(folder: Path, *, made: tuple[str, ...] = ()) -> Iterator[None]:
    """The folder (made where there is none) is this process's; the lock goes with the process.

    Files whose names end as one of `made` are then what a killed process left, and are removed. The
    lock is on the folder itself, so nothing else lies in it. Raises ConfigError where another
    process has it.
    """
    new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        try:
            held = stack.enter_context(locked(folder))
        except LockedError:
            raise ConfigError(
                f"{folder}: another process is writing videos there; wait for it, or choose "
                "another folder"
            ) from None
        if held:
            for ending in made:
                for left in folder.glob(f"*{ending}"):
                    remove(left)
        try:
            yield
        finally:
            # It may have been removed, or have become unreadable, meanwhile.
            with suppress(OSError):
                if new and not any(folder.iterdir()):
                    folder.rmdir()
