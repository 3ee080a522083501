"""Sanitising and validation of server responses: the only path by which server data enters.

Bytes of bounded size are decoded once into text and JSON of bounded depth; the API key and
non-printable characters are removed from every string; then a model of typed, bounded fields is
validated. Anything invalid is a Failure of that exchange, whose reason contains no secret.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime
from enum import Enum
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from afd.teachers.paid.secret import HIDDEN, NAME_RUN, WORD_RUN, Secret, clean

DEPTH, VALUES = 32, 200_000
TEXT, SHOWN = 65_536, 300
DIGITS = 18  # of an integer; larger values are implausible
PATIENCE_S = 86_400.0  # cap on Retry-After
# Identifiers that may appear unescaped in a path (RFC 3986), without delimiters or escapes.
NAME = re.compile(r"(?!\.+$)[A-Za-z0-9._~:@=+,-]{1,200}")


class Kind(str, Enum):
    """Category of a failure, which decides what to do next."""

    RETRYABLE = "retryable"  # transient: the same request may succeed later
    CONTENT = "content"  # moderation: this prompt is skipped
    QUOTA = "quota"  # the account: no money or no permission; everything stops
    INVALID = "invalid"  # the request itself is wrong


@dataclass(eq=False)
class Failure(Exception):
    """An HTTP exchange failed. The reason contains no secret.

    `certain`: the provider definitely did not act on the request. Only then may a submit be
    repeated.
    """

    kind: Kind
    reason: str
    certain: bool = False
    throttled: bool = False
    gone: bool = False  # the URL is not or no longer valid: request a fresh one
    received: bool = False  # a success response came that does not identify what was created
    retry_after_s: float = 0.0

    def __str__(self) -> str:
        return self.reason


# --- fields ---


def _number(value: Any) -> float | None:
    """A finite number, possibly in a string; None for anything else, such as a bool."""
    if isinstance(value, str) and re.fullmatch(r"\d{1,15}(\.\d{1,9})?", value):
        value = float(value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if abs(value) < 10**DIGITS and math.isfinite(value) else None


def _amount(value: Any) -> float | None:
    """A finite number above 0, not in a string; None for anything else."""
    found = None if isinstance(value, str) else _number(value)
    return found if found is not None and found > 0 else None


def _moment(value: Any) -> float | None:
    """Unix seconds, from seconds or milliseconds; None if not a time since 2001, such as 0."""
    found = _number(value)
    if found is not None and found >= 1e11:
        found /= 1000.0
    return found if found is not None and 1e9 <= found < 1e11 else None


def _name(value: Any) -> str:
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 10**DIGITS:
        value = str(value)
    if not isinstance(value, str) or not NAME.fullmatch(value):
        raise ValueError("needs 1 to 200 letters, digits or any of ._~:@=+,-")
    return value


def _address(value: str) -> str:
    if HIDDEN in value:
        raise ValueError("holds the API key")
    return value


def _word(value: Any) -> str:
    """A short text; empty if absent."""
    if value is None:
        return ""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ValueError("needs a word")
    return str(value)[:SHOWN]


# An identifier that is safe as a path segment; a state or code; a URL; a number or None; a billed
# quantity or None; a time or None.
Name = Annotated[str, BeforeValidator(_name)]
Word = Annotated[str, BeforeValidator(_word)]
Address = Annotated[str, Field(min_length=1, max_length=8192), AfterValidator(_address)]
Number = Annotated[float | None, BeforeValidator(_number)]
Amount = Annotated[float | None, BeforeValidator(_amount)]
Moment = Annotated[float | None, BeforeValidator(_moment)]


class Answer(BaseModel):
    """Base class of response models; unknown fields are ignored."""

    model_config = ConfigDict(frozen=True, strict=True, hide_input_in_errors=True)


_A = TypeVar("_A", bound=Answer)


@dataclass(frozen=True)
class Reply:
    """An API response, with the key removed. `json` is None if the body is empty or not JSON."""

    status: int
    headers: Mapping[str, str]
    json: Any
    text: str

    @property
    def ok(self) -> bool:
        return 200 <= self.status < 300

    @property
    def received(self) -> bool:
        """Whether it is a success with a non-empty body, so that the request definitely arrived."""
        return self.ok and bool(self.text.strip())

    @property
    def retry_after_s(self) -> float:
        return _seconds(self.headers.get("retry-after"))

    def object(self) -> dict[str, Any]:
        """The body's JSON object. Raises Failure for anything else, such as an empty 200."""
        if not isinstance(self.json, dict):
            held = "an empty body" if not self.text.strip() else "no JSON object"
            reason = f"HTTP {self.status} with {held}"
            raise Failure(Kind.RETRYABLE, reason, received=self.received)
        return self.json

    def read(self, model: type[_A]) -> _A:
        """Validate the body's object. Raises Failure that names the first invalid field."""
        try:
            return parse(self.object(), model)
        except Failure as failure:
            failure.received = self.received
            raise


def parse(value: Any, model: type[_A]) -> _A:
    """Validate a part of a response. Raises Failure that names the first invalid field."""
    try:
        return model.model_validate(value)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    place = ".".join(str(part) for part in first["loc"])
    message = str(first["msg"]).removeprefix("Value error, ")
    raise Failure(Kind.RETRYABLE, f"an answer whose {place[:100] or 'body'} is wrong: {message}")


# --- bytes ---


def receive(status: int, headers: Mapping[str, str], body: bytes, secret: Secret) -> Reply:
    """Decode a response, with the key and non-printable characters removed."""
    text = body.decode(json.detect_encoding(body), "replace").removeprefix("\ufeff")
    kept = {
        name: shown(headers[name], secret)
        for name in ("retry-after", "x-fal-request-id")
        if name in headers
    }
    return Reply(status, kept, _tree(text, secret), shown(text, secret, 2000))


def shown(text: str, secret: Secret, most: int = SHOWN) -> str:
    """Prepare a server's text for display: without the key, on one line, truncated."""
    # Truncated twice: the first cut may split the key so that its beginning is not recognised, but
    # the second removes that part.
    return clean(secret.hide(text[: 2 * most]))[:most]


def plain(value: Any, secret: Secret) -> Any:
    """Sanitise a JSON value of ours like a response, so that it can be compared with one."""
    return _redacted(value, secret, DEPTH, [VALUES])


def _tree(text: str, secret: Secret) -> Any:
    """Parse JSON with every string redacted and cleaned; None if it is invalid, too deep, too large
    or has conflicting duplicate keys."""
    try:
        value = json.loads(
            text,
            parse_int=lambda digits: int(digits) if len(digits) <= DIGITS else None,
            parse_constant=lambda _: None,  # NaN and infinities are not valid JSON
            object_pairs_hook=_once,
        )
        return _redacted(value, secret, DEPTH, [VALUES])
    except (ValueError, RecursionError):
        return None


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        for name, value in pairs:
            if found[name] != value:
                raise ValueError("two values under one name")
    return found


def _redacted(value: Any, secret: Secret, depth: int, left: list[int]) -> Any:
    left[0] -= 1
    if depth < 0 or left[0] < 0:
        raise ValueError("too deep or too large")
    if isinstance(value, str):
        # Signatures in URLs and identifiers may match a few characters of the key by chance.
        least = WORD_RUN if any(map(str.isspace, value)) else NAME_RUN
        return clean(secret.hide(value[:TEXT], least))
    if isinstance(value, float) and not math.isfinite(value):
        return None  # 1e999
    if isinstance(value, list):
        return [_redacted(item, secret, depth - 1, left) for item in value]
    if isinstance(value, dict):
        found = {
            clean(secret.hide(name[:SHOWN])): _redacted(item, secret, depth - 1, left)
            for name, item in value.items()
        }
        if len(found) < len(value):
            raise ValueError("two values under one name")
        return found
    return value


def _seconds(value: str | None) -> float:
    """Parse Retry-After to seconds; an HTTP date counts from now; 0 if invalid."""
    if not value:
        return 0.0
    try:
        seconds = float(value)
    except ValueError:
        try:
            when = parsedate_to_datetime(value)
            now = datetime.now(timezone.utc)
            seconds = (when - now).total_seconds() if when.tzinfo else 0.0
        except (ValueError, TypeError, OverflowError, IndexError):
            return 0.0
    return min(max(0.0, seconds), PATIENCE_S) if math.isfinite(seconds) else 0.0
