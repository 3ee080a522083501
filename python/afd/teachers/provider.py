"""What a paid service is to the core: five verbs and the words for what can happen.

A new provider is one file with a subclass of Provider, named in `afd.teachers.api.PROVIDERS`. It
says how its API spells things; money, waiting, retrying and files belong to the core.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from afd.teachers.http import Http, Saved

# What a provider needs to find a task of its own again; goes into the ledger as JSON. `id` is
# unique within the provider.
Task = dict[str, str]


class State(str, Enum):
    """What a task is doing."""

    QUEUED = "queued"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"
    EXPIRED = "expired"


class Kind(str, Enum):
    """Why something failed, as far as it decides what to do next."""

    RETRYABLE = "retryable"  # passing: the same request may succeed later
    CONTENT = "content"  # moderation: this prompt is skipped
    QUOTA = "quota"  # the account: no money, no permission; everything stops
    INVALID = "invalid"  # the request itself is wrong


@dataclass(eq=False)
class Failure(Exception):
    """One HTTP exchange did not give what was wanted. The reason holds no secret.

    `certain`: the provider surely did not act on the request. Only then may a submit be repeated.
    """

    kind: Kind
    reason: str
    certain: bool = False
    throttled: bool = False
    gone: bool = False  # the address is not valid (any more): ask for a fresh one
    retry_after_s: float = 0.0

    def __str__(self) -> str:
        return self.reason


@dataclass(frozen=True)
class Reply:
    """An API's answer. `json` is None where the body is empty or not JSON."""

    status: int
    headers: Mapping[str, str]
    json: Any
    text: str

    @property
    def ok(self) -> bool:
        return 200 <= self.status < 300

    def object(self) -> dict[str, Any]:
        """The JSON object of the body; Failure for anything else, such as an empty 200."""
        if not isinstance(self.json, dict):
            said = "an empty body" if not self.text.strip() else "no JSON object"
            raise Failure(Kind.RETRYABLE, f"HTTP {self.status} with {said}")
        return self.json


@dataclass(frozen=True)
class Status:
    """A task as the provider tells it. SUCCEEDED without video_url is a silent filter."""

    state: State
    video_url: str | None = None
    kind: Kind = Kind.RETRYABLE  # of FAILED
    reason: str = ""
    tokens: int | None = None  # billed, where the provider tells
    unknown: str | None = None  # the provider's word, where it is none of those we know


@dataclass(frozen=True)
class Order:
    """One video to ask for. Two orders with the same key are the same purchase."""

    provider: str
    model: str
    prompt: str
    parameters: dict[str, Any]
    seed: int
    draw: int = 0
    send_seed: bool = True

    @cached_property
    def key(self) -> str:
        """sha256 over everything that decides the video, in hexadecimal."""
        what = [self.provider, self.model, self.prompt, self.parameters, self.seed]
        return hashlib.sha256(canonical(what).encode()).hexdigest()

    @property
    def file(self) -> str:
        """The video's name in the folder."""
        return f"{self.key[:32]}.mp4"

    def number(self, below: int) -> int:
        """A number in [0, below) that depends on the key only: a mark to know a task by."""
        return int(self.key[:15], 16) % below


@dataclass
class Sightings:
    """What the provider's list says about an order whose submit was not answered.

    `ours` surely belong to this order; `lookalikes` may. Only if the list is `complete` and there
    are no lookalikes does an empty `ours` prove that the submit never arrived.
    """

    ours: list[Task] = field(default_factory=list)
    lookalikes: list[Task] = field(default_factory=list)
    complete: bool = False


class Provider(Protocol):
    """One service. Its methods make one HTTP exchange each, or a few, and raise Failure."""

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
        """Roots that may see the API key."""
        return [self.base_url]

    def defaults(self) -> dict[str, Any]:
        """Options of every request unless the configuration says otherwise."""
        return {}

    def seconds(self, parameters: Mapping[str, Any]) -> float | None:
        """Length of the video in seconds, if the options say it; for the price."""
        return None

    async def submit(self, http: Http, order: Order, headers: Mapping[str, str]) -> Task:
        """Ask for the video. A Failure is `certain` only if nothing can have been started."""
        ...

    async def poll(self, http: Http, task: Task) -> Status:
        """Look at a task; a video_url given here is fresh."""
        ...

    async def download(self, http: Http, status: Status, path: Path, max_bytes: int) -> Saved:
        """Write the video of a SUCCEEDED task to `path`."""
        assert status.video_url is not None
        return await http.save(status.video_url, path, max_bytes)

    async def cancel(self, http: Http, task: Task) -> None:
        """Ask the provider to stop; the next poll tells whether it did."""
        ...

    async def find(self, http: Http, order: Order, since: float) -> Sightings | None:
        """Tasks created after `since` (Unix seconds) that are or may be this order's; None where
        the API has no list."""
        return None


def canonical(value: Any) -> str:
    """JSON with one spelling per value."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def refusal(reply: Reply, code: str, message: str, content: str, quota: str) -> Failure:
    """The Failure of an HTTP error. `content` and `quota`: patterns of the provider's codes."""
    said = f"{code}: {message}" if code else message or reply.text[:200].strip()
    reason = f"HTTP {reply.status} {said}".strip()
    wait_s = _seconds(reply.headers.get("retry-after"))
    status = reply.status
    if re.search(content, code):
        return Failure(Kind.CONTENT, reason, certain=True)
    if status in (401, 402, 403) or re.search(quota, code):
        return Failure(Kind.QUOTA, reason, certain=True)
    if status == 429:
        return Failure(Kind.RETRYABLE, reason, True, throttled=True, retry_after_s=wait_s)
    if status >= 500 or status in (408, 409, 425) or 200 <= status < 300:
        return Failure(Kind.RETRYABLE, reason, retry_after_s=wait_s)
    return Failure(Kind.INVALID, reason, certain=True, gone=status in (404, 410))


def failed_kind(code: str, content: str, quota: str, invalid: str) -> Kind:
    """The Kind of a task that failed, by the provider's code."""
    for pattern, kind in (
        (content, Kind.CONTENT),
        (quota, Kind.QUOTA),
        (invalid, Kind.INVALID),
    ):
        if re.search(pattern, code):
            return kind
    return Kind.RETRYABLE


def unknown(word: str) -> Status:
    """A state that this version does not know: keep waiting, but say so."""
    return Status(State.RUNNING, unknown=word or "(none)")


def given(fields: dict[str, Any]) -> dict[str, Any]:
    """A request's fields without those that the options set to null."""
    return {name: value for name, value in fields.items() if value is not None}


def created_since(item: Mapping[str, Any], since: float) -> bool:
    """Whether a listed task is not older than `since`; one without a time may be younger."""
    at = item.get("created_at")
    return not isinstance(at, int | float) or at >= since


def text(value: Any) -> str:
    """A field of an answer as text; absent is empty."""
    return "" if value is None else str(value)


def _seconds(value: str | None) -> float:
    """Retry-After in seconds; an HTTP date counts from now."""
    if not value:
        return 0.0
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    from datetime import datetime, timezone
    from email.utils import parsedate_to_datetime

    try:
        when = parsedate_to_datetime(value)
    except ValueError:
        return 0.0
    return max(0.0, (when - datetime.now(timezone.utc)).total_seconds()) if when.tzinfo else 0.0
