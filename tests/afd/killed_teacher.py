"""A program that buys videos, is killed at a chosen event, and buys again.

killed_teacher.py CONFIG FIRST STEP: for event = FIRST, FIRST + STEP, ... a folder and a prompt of
its own, where a forked process is killed with SIGKILL at that event and a second one runs to its
end; until one process ends before its event comes. There is an event before and after every
transaction of the ledger and in the middle of it, before and after every HTTP exchange, sync and
rename, and when a file is half written.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

import afd.data.videos
from afd.config.run import RunConfig, load_config
from afd.errors import TeacherError
from afd.teachers.paid.http import Http
from afd.teachers.paid.ledger import Ledger


class Killer:
    """Counts events; the chosen one is the last thing this process does."""

    def __init__(self, event: int) -> None:
        self.left = event

    def here(self) -> None:
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def around(self, owner: Any, name: str) -> None:
        function = getattr(owner, name)

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            self.here()
            result = function(*args, **kwargs)
            self.here()
            return result

        setattr(owner, name, wrapped)

    def around_async(self, owner: Any, name: str) -> None:
        function = getattr(owner, name)

        async def wrapped(*args: Any, **kwargs: Any) -> Any:
            self.here()
            result = await function(*args, **kwargs)
            self.here()
            return result

        setattr(owner, name, wrapped)

    def arm(self) -> None:
        writing, here = Ledger._writing, self.here

        @contextmanager
        def in_the_middle(ledger: Ledger) -> Iterator[None]:
            with writing(ledger):
                yield
                here()

        Ledger._writing = in_the_middle
        for name in ("reserve", "running", "done", "end"):
            self.around(Ledger, name)
        self.around(os, "fsync")
        self.around(os, "replace")
        self.around(Path, "replace")
        self.around_async(Http, "_call")
        self.around_async(Http, "_save")
        iterate = httpx.Response.aiter_bytes

        async def in_halves(response: httpx.Response) -> AsyncIterator[bytes]:
            async for chunk in iterate(response):
                yield chunk[: len(chunk) // 2]
                here()
                yield chunk[len(chunk) // 2 :]

        httpx.Response.aiter_bytes = in_halves


def buy(config: Any) -> None:
    teacher = config.open_teacher()
    futures = [teacher.start(request) for request in teacher.requests]
    for future in futures:
        error = future.exception()
        if error is not None and not isinstance(error, TeacherError):
            raise error
    teacher.close()


def child(config: Any, event: int | None) -> int:
    """The exit code of a forked process that buys."""
    number = os.fork()
    if number == 0:
        try:
            if event is not None:
                Killer(event).arm()
            buy(config)
            os._exit(0)
        except BaseException as error:
            print(repr(error), file=sys.stderr, flush=True)
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(number, 0)[1])


def main() -> None:
    file, event, step = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    base = load_config(file).teacher
    killed = -signal.SIGKILL
    while killed != 0:
        folder = file.with_name(f"{file.stem}-{event}")
        prompts = folder.with_suffix(".txt")
        prompts.write_text(f"prompt of event {event}\n", encoding="utf-8")
        api = base.api.model_copy(update={"prompts": prompts})
        config = RunConfig(teacher=base.model_copy(update={"path": folder, "api": api}))
        killed = child(config, event)
        print(event, killed, child(config, None), flush=True)
        event += step


if __name__ == "__main__":
    # What a run imports and reads on its way: the forked processes start with it.
    import afd.teachers.paid.network
    import afd.teachers.paid.teacher

    assert afd.teachers.paid.teacher.PROVIDERS
    afd.teachers.paid.network.certificates()
    main()
