"""One process at a time in a folder that videos are written into."""

from __future__ import annotations

import fcntl
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from afd.config import ConfigError

_log = logging.getLogger("afd")


@contextmanager
def only_one(folder: Path, *, made: tuple[str, ...] = ()) -> Iterator[None]:
    """The folder (made where there is none) is this process's; the lock goes with the process.

    Files whose names end as one of `made` are then what a killed process left, and are removed. The
    lock is on the folder itself, so nothing else lies in it. Raises ConfigError where another
    process has it.
    """
    new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(
                f"{folder}: another process is writing videos there; wait for it, or choose "
                "another folder"
            ) from None
        except OSError as error:  # some network file systems have no locks on folders
            _log.warning("%s cannot be locked (%s): write there once at a time", folder, error)
        else:
            for ending in made:
                for left in folder.glob(f"*{ending}"):
                    left.unlink()
        try:
            yield
        finally:
            if new and not any(folder.iterdir()):
                folder.rmdir()
    finally:
        os.close(descriptor)
