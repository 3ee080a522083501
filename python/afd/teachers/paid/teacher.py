"""The teacher backed by a paid service: answers from its folder, and buys missing videos in the
background.

Importing this module needs neither network nor key; the first purchase does.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import math
import threading
import time
import weakref
from collections.abc import Coroutine, Sequence
from concurrent.futures import Future
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from afd.errors import TeacherError, Unanswered
from afd.teachers.base import Request
from afd.teachers.paid.ark import Ark
from afd.teachers.paid.config import PaidConfig
from afd.teachers.paid.contents import compare
from afd.teachers.paid.fal import Fal
from afd.teachers.paid.http import Http, Secret
from afd.teachers.paid.ledger import NAME, Ledger, Row, refuse_unknown_videos
from afd.teachers.paid.openai import OpenAI
from afd.teachers.paid.prompts import read_prompts
from afd.teachers.paid.purchase import Engine
from afd.teachers.paid.service import Order, Provider, canonical
from afd.video import DEFAULT_LIMITS, Hdr, Limits, check_video
from afd.video.config import VideoConfig

PROVIDERS: dict[str, type[Provider]] = {"ark": Ark, "openai": OpenAI, "fal": Fal}
# Options that are set elsewhere in the configuration, or by the core.
RESERVED = ("model", "prompt", "content", "seed", "callback_url")
_log = logging.getLogger("afd")


@dataclass(frozen=True)
class Progress:
    """Spending and concurrency of a teacher; money in USD."""

    spent_usd: float
    budget_usd: float
    under_way: int
    limit: int


class ApiTeacher:
    """The teacher of kinds ark, openai and fal."""

    def __init__(
        self,
        config: PaidConfig,
        folder: Path,
        *,
        frames: int = 1,
        fps: float | None = None,
        hdr: Hdr = "tonemap",
        limits: Limits = DEFAULT_LIMITS,
    ) -> None:
        """`folder`: where the videos and the ledger are kept. `frames` to `limits`: how each video
        will be read (see `video.check_video`), so that the first unusable one stops purchases."""
        api = config.api
        assert api.model is not None
        assert api.prompts is not None
        self.folder, self.config = folder, config
        self.provider = PROVIDERS[config.kind](api.base_url)
        wrong = [name for name in RESERVED if name in api.options]
        if wrong:
            raise TeacherError(
                f"teacher.api.options: {', '.join(wrong)} is set elsewhere "
                "(teacher.api.model, teacher.api.prompts, teacher.seed)"
            )
        suffix = {"prompt_suffix": api.prompt_suffix} if api.prompt_suffix else {}
        parameters = {**self.provider.defaults(), **api.options, **suffix}
        self.price_usd = price_of(config, self.provider, parameters)
        send_seed = self.provider.seeded if api.send_seed is None else api.send_seed
        prompts = read_prompts(api.prompts)
        self._requests = [Request(prompt, n) for n in range(api.draws) for prompt in prompts]
        self._orders = {
            request: Order(
                provider=config.kind,
                model=api.model,
                prompt=request.prompt,
                parameters=parameters,
                seed=_seed(config.seed, request),
                draw=request.draw,
                send_seed=send_seed,
            )
            for request in self._requests
        }
        self.about = {"provider": config.kind, "model": api.model, "parameters": parameters}
        if not config.fetch.adopt_videos:
            refuse_unknown_videos(folder)
        self._ledger = Ledger(folder, self.about)
        # The manifest of a process that died may lack its last videos.
        self._ledger.write_manifest()
        self._accept = lambda path: check_video(
            path, frames=frames, fps=fps, hdr=hdr, limits=limits
        )
        self._asked: dict[Request, Future[Path]] = {}
        self._worker: _Worker | None = None

    @property
    def requests(self) -> Sequence[Request]:
        """Every prompt, once per draw, including those that turn out to be rejected, so that a
        sampler's order does not depend on the provider."""
        return self._requests

    def answer(self, request: Request) -> Path:
        """The video, bought first if missing; blocks until it is available.

        Raises Unanswered if this request has none (rejected, in doubt, stuck), TeacherError if
        nothing more can be bought (budget, account, configuration).
        """
        return self.start(request).result()

    def prefetch(self, requests: Sequence[Request]) -> None:
        """Start buying the first missing ones of the requests that come next, in this order."""
        waiting = 0
        for request in requests:
            if waiting >= self.config.fetch.prefetch:
                return
            waiting += not self.start(request).done()

    def ready(self, request: Request) -> bool:
        """Whether `answer` would return this request's video without waiting."""
        future = self._asked.get(request)
        return future is not None and future.done() and future.exception() is None

    def progress(self) -> Progress:
        """Current spending and concurrency, for display."""
        limiter = self._worker.engine.limiter if self._worker else None
        return Progress(
            spent_usd=self._ledger.spent_usd(),
            budget_usd=self.config.fetch.budget_usd,
            under_way=limiter.under_way if limiter else 0,
            limit=int(limiter.limit) if limiter else self.config.fetch.concurrency,
        )

    def state_dict(self) -> dict[str, Any]:
        """The ledger's state for a checkpoint: number of submits, USD spent and, if there are
        videos, a hash over them with the current time (Unix seconds)."""
        length, until = self._ledger.length(), time.time()
        contents = self._ledger.contents(length, until)
        state = {"submits": length, "spent_usd": self._ledger.spent_usd()}
        return state | ({"videos": contents, "until": until} if contents else {})

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raise TeacherError if the ledger has lost submits since the checkpoint, which would be
        paid for again, or lists other videos, with which the run would continue."""
        length = self._ledger.length()
        if length < state["submits"]:
            held = f"{self._ledger.spent_usd():.2f} USD, at the checkpoint it held"
            raise TeacherError(
                f"teacher folder {self.folder}: its ledger holds {length} submits for {held} "
                f"{state['submits']} for {state['spent_usd']:.2f} USD; it is another folder or an "
                "older copy"
            )
        known = state.get("videos", "")
        if not known or self.config.fetch.accept_changed_videos:
            return
        if self._ledger.contents(state["submits"], state["until"]) != known:
            raise TeacherError(
                f"teacher folder {self.folder}: its ledger knows other videos than at the "
                "checkpoint; restore the folder of the run, or accept these with "
                "teacher.fetch.accept_changed_videos=true"
            )

    def close(self) -> None:
        """Stop the background thread. Submits in flight are awaited and recorded; tasks continue at
        the provider, and the next teacher on this folder collects them."""
        if self._worker is not None:
            self._worker.stop()
            self._worker = None
        self._ledger.close()

    def start(self, request: Request) -> Future[Path]:
        """The answer as a future, for callers that wait for many."""
        known = self._asked.get(request)
        if known is not None:
            return known
        order = self._orders.get(request)
        if order is None:
            raise TeacherError(f"teacher {self.config.kind}: was not configured for {request}")
        future: Future[Path] = Future()
        fetch = self.config.fetch
        row = self._ledger.latest(order.key)
        if row is not None and row.state == "done" and self._held(order, row, future):
            pass
        elif row is not None and row.kind == "content" and not fetch.retry_rejected:
            why = f"{request.prompt!r} was rejected: {row.reason}"
            future.set_exception(Unanswered(why, rejected=True))
        else:
            if self._worker is None:
                self._worker = _Worker(self)
                # Without a close(), the thread still ends with the teacher or the process.
                weakref.finalize(self, self._worker.stop_at_exit)
            future = self._worker.run(self._worker.engine.obtain(order))
        self._asked[request] = future
        return future

    def _held(self, order: Order, row: Row, future: Future[Path]) -> bool:
        """Resolve the future from the file in the folder; False if the video is missing."""
        path = self.folder / order.file
        try:
            found = compare(path, row.sha256)
            if not self._ledger.holds(row, path, found, self.config.fetch.accept_changed_videos):
                return False
            future.set_result(path)
        except TeacherError as error:
            future.set_exception(error)
        return True


class _Worker:
    """A background thread with an event loop that runs the engine and owns its resources."""

    def __init__(self, teacher: ApiTeacher) -> None:
        provider, config, folder = teacher.provider, teacher.config.fetch, teacher.folder
        secret = Secret.from_environment(provider.key_variable)
        if secret.stands_in(canonical(teacher.about)) or secret.stands_in(str(teacher.about)):
            raise TeacherError(
                "teacher.api holds the API key; it belongs only in an environment variable"
            )
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._serve, name="afd teacher", daemon=True)
        self._thread.start()

        async def build() -> tuple[Http, Ledger, Engine]:
            http = Http(provider.base_url, provider.trusted, secret, provider.key_scheme, config)
            ledger = Ledger(folder)
            return (
                http,
                ledger,
                Engine(
                    provider,
                    http,
                    ledger,
                    config,
                    teacher.price_usd,
                    teacher._accept,
                ),
            )

        try:
            self._http, self._ledger, self.engine = self.run(build()).result()
        except BaseException:
            self._loop.call_soon_threadsafe(self._loop.stop)
            raise

    def run(self, work: Coroutine[Any, Any, Any]) -> Future[Any]:
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def stop(self) -> None:
        """Stop the engine and the thread. Idempotent."""
        if not self._thread.is_alive():
            return
        try:
            self.run(self._end()).result()
        finally:
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()

    def stop_at_exit(self) -> None:
        """Stop, and log what fails: nobody is left to catch it."""
        try:
            self.stop()
        except TeacherError as error:
            _log.error("%s", error)

    def _serve(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_forever()
        self._loop.close()

    async def _end(self) -> None:
        await self.engine.settle()
        others = asyncio.all_tasks() - {asyncio.current_task()}
        while others:
            for task in others:
                task.cancel()
            # Repeat until all are done: before Python 3.12 wait_for may swallow a cancellation.
            _, others = await asyncio.wait(others, timeout=0.1)
        async with self._http:
            with closing(self._ledger):
                self.engine.close()


def open_teacher(
    config: PaidConfig, video: VideoConfig, folder: Path, console: Console | None = None
) -> ApiTeacher:
    """Open the paid service of a configuration (`TeacherConfig.open`)."""
    return ApiTeacher(
        config,
        folder,
        frames=video.frames if video.short == "error" else 1,
        fps=video.fps,
        hdr=video.hdr,
        limits=video.limits,
    )


def _seed(seed: int, request: Request) -> int:
    """A 31-bit seed, accepted by every provider, that differs between prompts and draws and so also
    identifies a task."""
    mixed = hashlib.sha256(f"{seed}\n{request.draw}\n{request.prompt}".encode()).digest()
    return int.from_bytes(mixed[:4], "big") & 0x7FFFFFFF


def price_of(config: PaidConfig, provider: Provider, parameters: dict[str, Any]) -> float:
    """The expected price of one video in USD. It is finite and, even if teacher.fetch.units is
    smaller, no less than the service's own rule for the length or tokens set by the options."""
    fetch = config.fetch
    assert fetch.price_usd is not None
    if fetch.price_per == "video":
        return fetch.price_usd
    if fetch.price_per == "million_tokens":
        per_unit, rule = fetch.price_usd / 1e6, provider.tokens(parameters)
        missing = (
            "teacher.fetch.price_per=million_tokens needs teacher.fetch.units, the tokens of "
            "one video (Seedance: width x height x frames per second x seconds / 1024)"
        )
    else:
        per_unit, rule = fetch.price_usd, provider.seconds(parameters)
        missing = (
            "teacher.fetch.price_per=second needs a duration: teacher.fetch.units in seconds, or "
            "the provider's own field in teacher.api.options"
        )
    units = max(fetch.units or 0.0, rule or 0.0)
    if not units:
        raise TeacherError(missing)
    if not math.isfinite(per_unit * units):
        raise TeacherError(
            f"teacher.fetch.price_usd={fetch.price_usd:g} x {units:g} units: needs a finite price"
        )
    return per_unit * units


__all__ = ["NAME", "PROVIDERS", "ApiTeacher", "Progress", "price_of"]
