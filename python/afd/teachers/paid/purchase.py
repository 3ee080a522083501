"""The purchase engine: turns an order into a video file, for every provider.

The steps of an order are: claim, ledger, submit, poll, download, probe, rename, ledger. A process
may end after any step; the next process continues from the state of the ledger and the folder.
"""

from __future__ import annotations

import asyncio
import logging
import os
import random
import time
import traceback
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TypeVar

from afd.errors import ContentsError, TeacherError, Unanswered, VideoError
from afd.files import sync
from afd.teachers.paid.answers import Failure, Kind
from afd.teachers.paid.config import FetchConfig
from afd.teachers.paid.contents import compare, lying, writing
from afd.teachers.paid.http import Http
from afd.teachers.paid.ledger import LIVE, Claims, Ledger, Row
from afd.teachers.paid.limiter import Limiter
from afd.teachers.paid.service import Order, Provider, State, Status
from afd.video import check_video

_T = TypeVar("_T")
_log = logging.getLogger("afd")
# A provider's clock may differ from ours by this much, including a wrong time zone.
SKEW_S = 86_400.0
MANIFEST_S = 5.0
DECIDED = 20  # decided videos before the share of rejections is checked
FAULTS = 5  # unexpected errors of one video, over all processes, before it is given up
WORDS = 5  # unknown states that are logged


class Engine:
    """Buys videos into one folder. Must be used on one event loop and its thread."""

    def __init__(
        self,
        provider: Provider,
        http: Http,
        ledger: Ledger,
        config: FetchConfig,
        price_usd: float,
        accept: Callable[[Path], None] = check_video,
    ) -> None:
        """`price_usd`: the most one video is expected to cost. `accept`: raises VideoError for an
        intact video that this run cannot use; the first such video stops further purchases."""
        self.provider, self.http, self.ledger, self.config = provider, http, ledger, config
        self.price_usd = price_usd
        self.limiter = Limiter(config.concurrency)
        self.fatal: TeacherError | None = None
        self._accept = accept
        self._claims = Claims(ledger.folder)
        self._asking: set[asyncio.Task[Row]] = set()
        self._unknown: set[str] = set()
        self._first_seen: dict[int, tuple[float, float]] = {}
        self._accepted = 0
        self._manifest_at = time.monotonic()

    async def obtain(self, order: Order) -> Path:
        """The finished video of an order, bought if necessary.

        Raises Unanswered if this video cannot be obtained now, TeacherError if purchases have
        stopped.
        """
        while True:
            await self.limiter.enter()
            fault: Exception | None = None
            try:
                if self._claims.take(order.key):
                    try:
                        return await self._work(order)
                    finally:
                        self._claims.release(order.key)
            except TeacherError as error:
                if not isinstance(error, Unanswered | ContentsError):
                    self.fatal = self.fatal or error
                raise
            except Exception as error:
                fault = error
            finally:
                self.limiter.leave()
            if fault is not None:
                raise self._fault(order, fault)
            # Another caller is working on it; the claim is released when it finishes or dies.
            await asyncio.sleep(self.config.poll_s)

    async def settle(self) -> None:
        """Stop submitting, and wait until the responses of submits in flight are recorded."""
        self.fatal = self.fatal or TeacherError("the teacher was closed")
        while self._asking:
            await asyncio.gather(*self._asking, return_exceptions=True)

    def close(self) -> None:
        self.ledger.write_manifest()

    async def _work(self, order: Order) -> Path:
        reason = ""
        for attempt in range(self.config.attempts):
            if attempt:
                await asyncio.sleep(self._pause_s(attempt))
            row = self.ledger.latest(order.key)
            path = self.ledger.folder / order.file
            if row is not None and row.state == "done":
                lies = await asyncio.to_thread(compare, path, row.sha256)
                if self.ledger.holds(row, path, lies, self.config.accept_changed_videos):
                    return path
            elif path.is_file() and (saved := await asyncio.to_thread(lying, path)) is not None:
                if row is not None and row.state == "running":
                    # A process ended between the rename and the ledger.
                    self.ledger.done(row, order.file, saved, None)
                    return path
                if row is None or row.state not in LIVE:
                    self.ledger.found(order, saved, path, self.config.adopt_videos)
                    return path
            if row is not None and row.faults >= FAULTS and not self.config.retry_faults:
                raise Unanswered(
                    f"{order.prompt!r}: failed unexpectedly {row.faults} times, last: {row.fault}; "
                    "its price stays counted, teacher.fetch.retry_faults=true tries it again"
                )
            if row is not None and row.state == "done" and row.task is None:
                self.ledger.end(row, "written_off", "retryable", "the file is gone", paid=True)
                row = None
            if row is None or row.state not in LIVE:
                if row is not None and row.kind == "content" and not self.config.retry_rejected:
                    raise _rejection(order, row.reason)
                wrong = row is not None and (row.state, row.kind) == ("failed", "invalid")
                if row is not None and wrong and not self.config.retry_rejected:
                    raise Unanswered(
                        f"{order.prompt!r}: {row.reason}; the same request fails again, "
                        "teacher.fetch.retry_rejected=true asks again"
                    )
                row = await self._submit(order)
            if row.state == "asked":
                found = await self._look_up(order, row)
                if found is None:
                    reason = "submits got no answer and left no task"
                    continue
                row = found
            outcome = await self._follow(order, row)
            if isinstance(outcome, Path):
                return outcome
            reason = outcome
        raise Unanswered(f"{order.prompt!r}: {self.config.attempts} submits failed, last: {reason}")

    async def _submit(self, order: Order) -> Row:
        """Submit an order. Returns a row in state running, or asked if the response was lost."""
        give_up, tries = time.monotonic() + self.config.deadline_s, 0
        while True:
            if self.fatal is not None:
                raise self.fatal
            row = self.ledger.reserve(order, self.price_usd, self.config.budget_usd)
            self._age_s(row)
            # Shielded: the response must be recorded even if the caller is cancelled.
            asking = asyncio.ensure_future(self._ask(order, row))
            self._asking.add(asking)
            asking.add_done_callback(self._asking.discard)
            try:
                return await asyncio.shield(asking)
            except Failure as error:
                failure = error
            if not failure.certain:
                _log.warning("submit without an answer (%s); looking it up", failure.reason)
                return self.ledger.received(row, failure.reason) if failure.received else row
            rejected = failure.kind is Kind.CONTENT
            state = "failed" if rejected else "refused"
            self.ledger.end(row, state, failure.kind.value, failure.reason, paid=False)
            if rejected:
                raise self._rejected(order, failure.reason)
            if failure.kind is Kind.QUOTA:
                raise self._stop(failure.reason)
            if failure.kind is Kind.INVALID:
                if not self._accepted:
                    raise TeacherError(f"{self.provider.name} refuses: {failure.reason}")
                raise Unanswered(f"{order.prompt!r}: {failure.reason}")
            tries += 1
            wait_s = self._pause_s(tries, failure.retry_after_s)
            last = time.monotonic() + wait_s > give_up
            if last or (tries >= self.config.tries and not failure.throttled):
                raise Unanswered(f"{order.prompt!r}: cannot be submitted: {failure.reason}")
            if failure.throttled:
                self.limiter.throttled(wait_s)
                self.limiter.leave()
                await self._enter_again()
            else:
                await asyncio.sleep(wait_s)

    async def _enter_again(self) -> None:
        """Re-enter the limiter after a pause. If cancelled, the slot is counted all the same, as
        `obtain` will leave it."""
        try:
            await self.limiter.enter()
        except BaseException:
            self.limiter.under_way += 1
            raise

    async def _ask(self, order: Order, row: Row) -> Row:
        name = self.config.idempotency_header
        header = {} if name is None else {name: f"{order.key}-{row.id}"}
        task = await self._understood(self.provider.submit(self.http, order, header))
        running = self.ledger.running(row, task)
        if running is None:
            reason = f"the task {task['id']} was assigned twice"
            raise Failure(Kind.RETRYABLE, reason, received=True)
        self._accepted += 1
        self.limiter.accepted()
        return running

    async def _look_up(self, order: Order, row: Row) -> Row | None:
        """Look up the task of an unanswered submit; None once it definitely never arrived.

        Raises Unanswered (in doubt) if the provider's list does not settle it.
        """
        tries, why = 0, f"{self.provider.name} has no list of tasks"
        while True:
            tries += 1
            partial = False
            # Evaluated before the list is requested: the list must be newer than this moment.
            settled = self._age_s(row) >= self.config.settle_s
            try:
                if self.config.idempotency_header is not None:
                    return await self._ask(order, row)
                seen = await self._understood(
                    self.provider.find(self.http, order, row.asked_at - SKEW_S)
                )
                if seen is None:
                    break
                taken = self.ledger.task_ids()
                for task in seen.ours:
                    if task["id"] not in taken and (found := self.ledger.running(row, task)):
                        _log.info("found the task %s of a submit without an answer", task["id"])
                        return found
                alike = [task["id"] for task in seen.lookalikes if task["id"] not in taken]
                if settled and seen.complete and not alike and not row.reason:
                    self.ledger.end(row, "refused", "retryable", "never arrived", paid=False)
                    return None
                partial = not seen.complete
                why = f"it may be {', '.join(alike[:3])}" if alike else "the list is not complete"
                if seen.complete and row.reason and not alike:
                    why = f"it was answered, but: {row.reason}"
            except Failure as failure:
                if failure.kind is Kind.QUOTA:
                    raise self._stop(failure.reason) from None
                why = failure.reason
            patience_s = self.config.deadline_s if partial else self.config.settle_s
            late = self._age_s(row) >= patience_s
            if settled and late and tries >= min(2, self.config.tries):
                break
            await asyncio.sleep(self._pause_s(tries))
        self._doubt(order, row, f"a submit got no answer and is in doubt ({why})")
        return None

    async def _follow(self, order: Order, row: Row) -> Path | str:
        """Poll a task until it ends. Returns the video, or the reason to submit again."""
        assert row.task is not None
        faults = downloads = silences = 0
        cancelled = delivered = False
        while True:
            try:
                status = await self._understood(self.provider.poll(self.http, row.task))
            except Failure as failure:
                if failure.kind is Kind.QUOTA:
                    raise self._stop(failure.reason) from None
                if failure.kind is Kind.CONTENT:
                    silences += 1
                    if silences > 1:
                        status = Status(State.FAILED, kind=failure.kind, reason=failure.reason)
                        return self._ended(order, row, status, cancelled)
                faults += 1
                wait_s = self._pause_s(faults, failure.retry_after_s)
                if failure.throttled:
                    self.limiter.throttled(wait_s)
                late = self._age_s(row) + wait_s > self.config.deadline_s
                if late or (failure.gone and faults >= self.config.tries):
                    return self._stuck(order, row, f"cannot be polled: {failure.reason}")
                await asyncio.sleep(wait_s)
                continue
            faults = 0
            if (
                status.unknown
                and status.unknown not in self._unknown
                and len(self._unknown) < WORDS
            ):
                self._unknown.add(status.unknown)
                _log.warning(
                    "%s reports an unknown state %r; still waiting",
                    self.provider.name,
                    status.unknown,
                )
            if status.state is State.SUCCEEDED and not delivered:
                self.ledger.delivered(row, self._bill_usd(status))
                delivered = True
            if status.state is State.SUCCEEDED and status.video_url:
                try:
                    return await self._download(order, row, status)
                except (Failure, VideoError) as error:
                    downloads += 1
                    reason = f"its video cannot be fetched: {error}"
                    hopeless = isinstance(error, Failure) and error.kind is Kind.INVALID
                if hopeless or downloads >= self.config.tries:
                    return self._stuck(order, row, reason)
                _log.info("%s; asking for a fresh address", reason)
                await asyncio.sleep(self._pause_s(downloads))
                continue
            if status.state is State.SUCCEEDED and silences == 0:
                # A rejection is permanent, so a single odd response is not enough.
                silences += 1
                await asyncio.sleep(self.config.poll_s)
                continue
            if status.state not in (State.QUEUED, State.RUNNING):
                return self._ended(order, row, status, cancelled)
            if self._age_s(row) > self.config.deadline_s:
                if cancelled or status.state is not State.QUEUED:
                    waited = f"still {status.state.value} after {self.config.deadline_s:g} s"
                    return self._stuck(order, row, waited)
                cancelled = True  # only if not yet started: it is then not billed, and ends soon
                try:
                    await self._understood(self.provider.cancel(self.http, row.task))
                except Failure as failure:
                    _log.info("cancelling %s: %s", row.task["id"], failure.reason)
            await asyncio.sleep(self.config.poll_s)

    def _ended(self, order: Order, row: Row, status: Status, cancelled: bool) -> str:
        """Record a task that ended without a video. Returns the reason if it is worth submitting
        again, else raises."""
        paid = self.provider.bills_failures
        if status.state is State.SUCCEEDED:
            reason = status.reason or "succeeded without a video (a silent filter)"
            self.ledger.end(row, "failed", Kind.CONTENT.value, reason, paid=True)
            raise self._rejected(order, reason)
        reason = status.reason or status.state.value
        kind = status.kind if status.state is State.FAILED else Kind.RETRYABLE
        self.ledger.end(row, status.state.value, kind.value, reason, paid=paid)
        if kind is Kind.CONTENT:
            raise self._rejected(order, reason)
        if kind is Kind.QUOTA:
            raise self._stop(reason)
        if kind is Kind.INVALID or status.state is State.CANCELLED:
            late = f", {self.config.deadline_s:g} s after its submit" if cancelled else ""
            raise Unanswered(f"{order.prompt!r}: {reason}{late}")
        _log.info("a task failed temporarily (%s)", reason)
        return reason

    async def _download(self, order: Order, row: Row, status: Status) -> Path:
        """Download the video, give it its final name and record it in the ledger."""
        folder = self.ledger.folder
        path, partial = folder / order.file, folder / f".{order.file}.partial"
        try:
            most = int(self.config.max_mib * 2**20)
            saved = await self.provider.download(self.http, status, partial, most)
            await asyncio.to_thread(check_video, partial)
            # A video downloaded again must be the one that was bought.
            if row.state == "done" and saved.sha256 != row.sha256:
                self.ledger.holds(row, path, (False, saved), self.config.accept_changed_videos)
            with writing(folder):
                os.replace(partial, path)
                sync(folder)
        finally:
            partial.unlink(missing_ok=True)
        self.ledger.done(row, order.file, saved, self._bill_usd(status))
        if time.monotonic() - self._manifest_at > MANIFEST_S:
            self._manifest_at = time.monotonic()
            self.ledger.write_manifest()
        try:
            await asyncio.to_thread(self._accept, path)
        except VideoError as error:
            self.fatal = TeacherError(f"{error}; no further video is bought")
            raise self.fatal from None
        return path

    def _bill_usd(self, status: Status) -> float | None:
        """The cost by the units that the service reports as billed; None if it reports none."""
        units = {"million_tokens": (status.tokens or 0.0) / 1e6, "second": status.seconds}
        found = units.get(self.config.price_per)
        return found * (self.config.price_usd or 0.0) if found else None

    def _age_s(self, row: Row) -> float:
        """Seconds since a submit. Wall-clock time is used only up to when this process first saw
        it, monotonic time after that, so later clock changes have no effect."""
        now = time.monotonic()
        known = (now, max(0.0, time.time() - row.asked_at))
        first, age_s = self._first_seen.setdefault(row.id, known)
        return age_s + now - first

    def _stuck(self, order: Order, row: Row, reason: str) -> str:
        """Handle a task that may be paid but currently yields no video; the next fetch retries."""
        self._doubt(order, row, f"the task {(row.task or {}).get('id')} {reason}")
        return reason

    def _doubt(self, order: Order, row: Row, reason: str) -> None:
        if self.config.resubmit_in_doubt:
            _log.warning("%r: %s; submitting again, as configured", order.prompt, reason)
            self.ledger.end(row, "written_off", Kind.RETRYABLE.value, reason, paid=True)
            return
        raise Unanswered(
            f"{order.prompt!r}: {reason}; its price stays counted, the next fetch looks again, and "
            "teacher.fetch.resubmit_in_doubt=true submits it again"
        )

    def _rejected(self, order: Order, reason: str) -> Unanswered:
        """Log the share of rejected prompts, which biases the training data, and return the error
        for this one."""
        counts = self.ledger.counts()
        rejected = counts.get(Kind.CONTENT.value, 0)
        decided = rejected + counts.get("done", 0)
        _log.warning(
            "rejected: %r (%s); %d of %d decided videos (%.0f %%) were rejected",
            order.prompt,
            reason,
            rejected,
            decided,
            100 * rejected / decided,
        )
        if decided >= DECIDED and rejected > self.config.max_rejected * decided:
            self.fatal = TeacherError(
                f"{rejected} of {decided} videos were rejected, more than "
                f"teacher.fetch.max_rejected={self.config.max_rejected:g}"
            )
        return _rejection(order, reason)

    async def _understood(self, exchange: Awaitable[_T]) -> _T:
        """Await a provider's method, converting unexpected errors to a Failure."""
        try:
            return await exchange
        except (Failure, TeacherError):
            raise
        except Exception as error:
            what = self._described(error)
        _log.error("%s: unexpected answer: %s", self.provider.name, what)
        raise Failure(Kind.RETRYABLE, f"an answer of unknown form ({what})")

    def _fault(self, order: Order, error: Exception) -> TeacherError:
        """Record an unexpected error, which ends only this order. Later processes retry a few times
        to collect what may be paid, without buying it again."""
        what = self._described(error)
        _log.error("%r: unexpected: %s; this video fails, the others continue", order.prompt, what)
        try:
            self.ledger.fault(order.key, what)
        except TeacherError as lost:
            self.fatal = self.fatal or lost
            return lost
        return Unanswered(f"{order.prompt!r}: unexpected: {what}; the next fetch looks again")

    def _described(self, error: Exception) -> str:
        """The type, location and message of an error."""
        frames = traceback.extract_tb(error.__traceback__)
        where = f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "?"
        return f"{type(error).__name__} at {where}: {self.http.words(str(error))}"

    def _stop(self, reason: str) -> TeacherError:
        return TeacherError(
            f"{self.provider.name} refuses this account "
            f"(key in {self.provider.key_variable}): {reason}"
        )

    def _pause_s(self, tries: int, at_least_s: float = 0.0) -> float:
        """Exponential backoff with jitter, in seconds; at least what the provider requested."""
        grown = self.config.backoff_s * 2.0 ** min(tries - 1, 30)
        wanted = min(grown, self.config.backoff_max_s) * random.uniform(0.5, 1.0)
        return min(max(wanted, at_least_s), self.config.deadline_s)


def _rejection(order: Order, reason: str | None) -> Unanswered:
    return Unanswered(f"{order.prompt!r} was rejected: {reason}", rejected=True)
