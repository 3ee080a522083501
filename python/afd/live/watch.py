"""`afd report RUN --live`: a run's report in the browser, renewed while it trains."""

from __future__ import annotations

import asyncio
import logging
import time
from functools import partial
from pathlib import Path

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route

from afd.lab.report.page import render_report
from afd.live.security import ALWAYS, Guard, guard
from afd.live.serve import PORT, listen, serve
from afd.live.server import guarded, page

PAGE = Path(__file__).with_name("watch.html")
# What a report shows; each change of one of these in the folder or in a run below it renews it.
SHOWN = ("metrics.jsonl", "evaluation.jsonl", "samples.jsonl", "samples.safetensors", "train.log",
         "config.yaml", "videos", "DONE")  # fmt: skip
# Seconds between two renderings at least: they take the training's processor.
REST_S = 5.0
# Of the report, whose style and script are inline and which shows data URIs alone.
POLICY = (
    "default-src 'none'; img-src data:; media-src data:; style-src 'unsafe-inline'; "
    "script-src 'unsafe-inline'; base-uri 'none'; form-action 'none'; frame-ancestors 'self'"
)
_log = logging.getLogger("afd")


class Watched:
    """A run's folder, read only, and its newest report."""

    def __init__(self, folder: Path, rules: Guard) -> None:
        self._folder, self._guard = folder, rules
        self._lock = asyncio.Lock()
        self._html, self._stamp, self._at = "", "", float("-inf")

    def app(self) -> Starlette:
        """The application."""
        routes = [
            Route("/", guarded(self._guard, partial(page, PAGE))),
            Route("/report", guarded(self._guard, self._report)),
            Route("/state", guarded(self._guard, self._state)),
        ]
        return Starlette(routes=routes)

    async def _state(self, request: Request) -> Response:
        # While it rests, a page that asked for the report would get the present one again.
        resting = time.monotonic() - self._at < REST_S
        stamp = self._stamp if resting else self.stamp()
        name = self._folder.resolve().name
        return JSONResponse({"name": name, "stamp": stamp}, headers=ALWAYS)

    async def _report(self, request: Request) -> Response:
        async with self._lock:
            stamp = self.stamp()
            if stamp != self._stamp and time.monotonic() - self._at >= REST_S:
                self._html = await asyncio.to_thread(self._render)
                self._stamp, self._at = stamp, time.monotonic()
            html = self._html.encode("utf-8", "backslashreplace")
        return HTMLResponse(html, headers={"Content-Security-Policy": POLICY} | ALWAYS)

    def _render(self) -> str:
        try:
            return render_report(self._folder)
        except FileNotFoundError as error:  # removed in the meantime
            _log.warning("report: %s", error)
            return self._html or "<!doctype html><title>report</title>the folder is gone"

    def stamp(self) -> str:
        """A string that changes with the files that the report shows."""
        found = []
        try:
            folders = [self._folder, *(f for f in sorted(self._folder.iterdir()) if f.is_dir())]
        except OSError:
            return "gone"
        for folder in folders:
            for name in SHOWN:
                try:
                    state = (folder / name).stat()
                except OSError:
                    continue
                found.append((folder.name, name, state.st_mtime_ns, state.st_size))
        return f"{hash(tuple(found)) & (2**64 - 1):016x}"


def watch(
    folder: Path,
    *,
    host: str = "127.0.0.1",
    port: int = PORT,
    public: str | None = None,
    show: bool = False,
) -> None:
    """Serve the report of a folder until a signal ends it; arguments as of `afd live`."""
    rules = guard(host, public)
    with listen(host, port) as listening:
        serve(Watched(folder, rules).app(), listening, rules, public, show)
