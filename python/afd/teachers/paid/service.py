"""The interface of a paid service: five operations, and the types of their results.

A new provider is one file with a subclass of Provider, listed in
`afd.teachers.paid.teacher.PROVIDERS`. It defines only the mapping to its API; payment, waiting,
retrying and files are handled by the core.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, TypeVar
from urllib.parse import quote

from afd.teachers.paid.answers import Answer, Failure, Kind, Reply
from afd.teachers.paid.http import Http, Saved
from afd.teachers.paid.moderation import Complaint, any_moderated, complaint

# What a provider needs to find one of its tasks again; stored in the ledger as JSON. `id` is unique
# within the provider.
Task = dict[str, str]


class State(str, Enum):
    """The state of a task."""

    QUEUED = "queued"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"
    EXPIRED = "expired"


# The names of each state in all services, and in gateways.
STATES = {
    State.QUEUED: "queued in_queue pending submitted created waiting not_started throttled",
    State.RUNNING: "running in_progress processing generating started dreaming",
    State.SUCCEEDED: "succeeded completed success succeed finished complete",
    State.FAILED: "failed error failure fail",
    State.CANCELLED: "cancelled canceled aborted",
    State.EXPIRED: "expired timeout",
}
# HTTP statuses that mean the API has not acted: the request is invalid, or must be sent elsewhere.
# Not 302 and 303, which also redirect from accepted requests, nor timeouts and failures behind a
# gateway.
REFUSING = {301, 307, 308, *range(400, 500)} - {408, 409, 424, 425, 499}
_A = TypeVar("_A", bound=Answer)
_STATES = {word: state for state, words in STATES.items() for word in words.split()}


@dataclass(frozen=True)
class Status:
    """A task as reported by the provider. SUCCEEDED without video_url is a silent filter."""

    state: State
    video_url: str | None = None
    kind: Kind = Kind.RETRYABLE  # of FAILED
    reason: str = ""
    tokens: float | None = None  # billed, if the provider reports it; above 0
    seconds: float | None = None  # of the video, if the provider reports it; above 0
    unknown: str | None = None  # the provider's name of an unknown state


@dataclass(frozen=True)
class Order:
    """One video to request. Two orders with the same key are the same purchase."""

    provider: str
    model: str
    prompt: str
    parameters: dict[str, Any]
    seed: int
    draw: int = 0
    send_seed: bool = True

    @cached_property
    def key(self) -> str:
        """SHA-256 of everything that determines the video, in hexadecimal."""
        what = [self.provider, self.model, self.prompt, self.parameters, self.seed]
        return hashlib.sha256(canonical(what).encode()).hexdigest()

    @property
    def file(self) -> str:
        """The video's file name in the folder."""
        return f"{self.key[:32]}.mp4"

    def number(self, below: int) -> int:
        """A number in [0, below) that depends only on the key: a mark to recognise a task by."""
        return int(self.key[:15], 16) % below


@dataclass
class Sightings:
    """Tasks in the provider's list that match an order whose submit got no response.

    `ours` definitely belong to this order; `lookalikes` may. Only if the list is `complete` and
    there are no lookalikes does an empty `ours` prove that the submit never arrived.
    """

    ours: list[Task] = field(default_factory=list)
    lookalikes: list[Task] = field(default_factory=list)
    complete: bool = False


class Provider(Protocol):
    """A paid service. Each method makes one or a few HTTP exchanges and raises Failure."""

    name: str
    key_variable: str  # the environment variable with the API key
    key_scheme: str  # the word before the key in the Authorization header
    base_url: str
    seeded: bool  # whether the API takes a seed
    bills_failures: bool  # whether a task that failed may have cost its price

    def __init__(self, base_url: str | None = None) -> None:
        if base_url is not None:
            self.base_url = base_url
        self.base_url = self.base_url.rstrip("/")

    @property
    def trusted(self) -> list[str]:
        """URLs whose origins may receive the API key."""
        return [self.base_url]

    def defaults(self) -> dict[str, Any]:
        """Default options of every request, unless overridden by the configuration."""
        return {}

    def seconds(self, parameters: Mapping[str, Any]) -> float | None:
        """Length of the video in seconds for the price, or None if the options do not set it."""
        return None

    def tokens(self, parameters: Mapping[str, Any]) -> float | None:
        """The fewest tokens billed for a video with these options by the service's rule, for the
        price; None if the options do not determine it."""
        return None

    async def submit(self, http: Http, order: Order, headers: Mapping[str, str]) -> Task:
        """Request the video. A Failure is `certain` only if nothing can have been started."""
        ...

    async def poll(self, http: Http, task: Task) -> Status:
        """Query a task's status; the returned video_url is fresh."""
        ...

    async def download(self, http: Http, status: Status, path: Path, max_bytes: int) -> Saved:
        """Write the video of a SUCCEEDED task to `path`."""
        assert status.video_url is not None
        return await http.save(status.video_url, path, max_bytes)

    async def cancel(self, http: Http, task: Task) -> None:
        """Ask the provider to cancel a task; the next poll shows whether it did."""
        ...

    async def find(self, http: Http, order: Order, since: float) -> Sightings | None:
        """Find tasks created after `since` (Unix seconds) that are or may be this order's; None if
        the API has no list."""
        return None


def canonical(value: Any) -> str:
    """Canonical JSON: one representation per value."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def state_of(word: str) -> State | None:
    """The state for a service's name of it, case-insensitive; None if unknown."""
    return _STATES.get(re.sub(r"[\s_-]+", "_", word.strip().lower()))


def unfinished(state: State | None, word: str, wrong: Complaint) -> Status:
    """The Status of a task without a video, from its state, the service's name for it and the
    reported error.

    A state name that reports moderation is a rejection, and so is a moderation code without a
    state. Any other unknown state counts as running, and is reported as `unknown`.
    """
    moderated = any_moderated([word]) or (state is None and wrong.surely_moderated)
    if moderated:
        return Status(State.FAILED, kind=Kind.CONTENT, reason=wrong.reason or word)
    if state is None:
        return Status(State.RUNNING, unknown=word[:64] or "(none)")
    return Status(state, reason=wrong.reason)


def submitted(reply: Reply, model: type[_A], quota: str) -> _A:
    """Parse the response to a submit. Raises Failure if it is a refusal or unreadable."""
    if not reply.ok:
        raise refusal(reply, quota)
    try:
        return reply.read(model)
    except Failure as failure:
        unread = failure
    # A null or empty identifier may come with an error message.
    raise refusal(reply, quota) if complaint(reply.json) else unread


def refusal(reply: Reply, quota: str) -> Failure:
    """The Failure for an HTTP error. `quota`: pattern of the provider's account error codes."""
    body = reply.json
    if body is None and not reply.text.lstrip().startswith("<"):
        body = reply.text
    wrong, status = complaint(body), reply.status
    reason = f"HTTP {status} {wrong.reason or reply.text[:200].strip()}".strip()
    if _rejects(status, wrong):
        return Failure(Kind.CONTENT, reason, certain=True)
    if status in (401, 402, 403) or _named(quota, wrong):
        return Failure(Kind.QUOTA, reason, certain=True)
    wait_s = reply.retry_after_s
    if status == 429:
        return Failure(Kind.RETRYABLE, reason, True, throttled=True, retry_after_s=wait_s)
    if status not in REFUSING:
        return Failure(Kind.RETRYABLE, reason, received=reply.received, retry_after_s=wait_s)
    return Failure(Kind.INVALID, reason, certain=True, gone=status in (404, 410))


def _rejects(status: int, wrong: Complaint) -> bool:
    """Whether an HTTP response is a rejection of the prompt. A code decides for every status except
    account errors; a sentence only for statuses that concern the request."""
    if status in (401, 402):
        return False
    if wrong.surely_moderated:
        return True
    of_account = status == 403 and any("account" in word.lower() for word in wrong.sentences)
    speaks = 200 <= status < 300 or status in (400, 403, 406, 422, 451)
    return speaks and not of_account and wrong.moderated


def failed_kind(wrong: Complaint, quota: str, invalid: str) -> Kind:
    """The Kind of a failed task, by the provider's codes."""
    if wrong.moderated:
        return Kind.CONTENT
    if _named(quota, wrong):
        return Kind.QUOTA
    return Kind.INVALID if _named(invalid, wrong) else Kind.RETRYABLE


def _named(pattern: str, wrong: Complaint) -> bool:
    return any(re.search(pattern, word) for word in wrong.codes or wrong.sentences)


def segment(identifier: str) -> str:
    """Quote an untrusted identifier as one segment of a URL path."""
    if identifier.strip(".") == "":
        raise Failure(
            Kind.RETRYABLE, f"the identifier {identifier!r} is not a valid part of a path"
        )
    return quote(identifier, safe=":@=+,~")


def length(value: Any) -> float | None:
    """Parse an option as a positive, finite number, possibly a string such as "5s"; else None."""
    if isinstance(value, str):
        number = re.fullmatch(r"\s*(\d{1,9}(?:\.\d{1,9})?)\s*s?\s*", value, re.ASCII)
        value = float(number.group(1)) if number else None
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if 0 < value < 1e9 and math.isfinite(value) else None


def given(fields: dict[str, Any]) -> dict[str, Any]:
    """A request's fields without those that the options set to null."""
    return {name: value for name, value in fields.items() if value is not None}
