"""Seedance on Volcengine Ark and BytePlus ModelArk: /contents/generations/tasks.

Written against volcengine-ark-runtime 5.0.54 and the vendor's pages; never run against the live
service. The vendor keeps tasks for 7 days and addresses of videos for 24 hours, and says that only
videos that succeed are billed.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from afd.teachers.http import Http
from afd.teachers.provider import (
    Order,
    Provider,
    Reply,
    Sightings,
    State,
    Status,
    Task,
    created_since,
    failed_kind,
    given,
    refusal,
    text,
    unknown,
)

TASKS = "/contents/generations/tasks"
MARK = "execution_expires_after"
CONTENT = r"Sensitive|RiskDetection|PolicyViolation|ContentSecurity|Copyright|Moderation"
QUOTA = r"Overdue|[Ii]nsufficient|SetLimitExceeded|ModelNotOpen|Authentication|AccessDenied"
INVALID = r"^(InvalidParameter|MissingParameter|InvalidEndpoint|UnsupportedModel)"
DAY_S = 86_400
KEPT_S = 7 * DAY_S
PAGE, PAGES = 100, 100
STATES = {
    "queued": State.QUEUED,
    "running": State.RUNNING,
    "succeeded": State.SUCCEEDED,
    "failed": State.FAILED,
    "cancelled": State.CANCELLED,
    "expired": State.EXPIRED,
}


class Ark(Provider):
    """base_url is the international site; https://ark.cn-beijing.volces.com/api/v3 the Chinese."""

    name = "ark"
    key_variable = "ARK_API_KEY"
    key_scheme = "Bearer"
    base_url = "https://ark.ap-southeast.bytepluses.com/api/v3"
    seeded = True
    bills_failures = False

    def defaults(self) -> dict[str, Any]:
        # A sound track only adds moderation failures; the trainer does not hear it.
        return {"generate_audio": False, "watermark": False}

    def seconds(self, parameters: Mapping[str, Any]) -> float | None:
        frames, duration = parameters.get("frames"), parameters.get("duration")
        if isinstance(frames, int | float):
            return frames / 24
        return float(duration) if isinstance(duration, int | float) and duration > 0 else None

    async def submit(self, http: Http, order: Order, headers: Mapping[str, str]) -> Task:
        reply = await http.call("POST", TASKS, json=self._body(order), headers=dict(headers))
        if not reply.ok:
            raise _refusal(reply)
        number = text(reply.object().get("id"))
        if not number:
            raise _refusal(reply)
        return {"id": number}

    async def poll(self, http: Http, task: Task) -> Status:
        reply = await http.call("GET", f"{TASKS}/{task['id']}")
        if not reply.ok:
            raise _refusal(reply)
        told = reply.object()
        state = STATES.get(text(told.get("status")))
        if state is None:
            return unknown(text(told.get("status")))
        code, message = _error(told)
        return Status(
            state,
            # Content of another form is a broken answer, not a video that is missing.
            video_url=(told.get("content") or {}).get("video_url"),
            kind=failed_kind(code, CONTENT, QUOTA, INVALID),
            reason=f"{code}: {message}" if code else "",
            tokens=_part(told, "usage").get("total_tokens"),
        )

    async def cancel(self, http: Http, task: Task) -> None:
        reply = await http.call("DELETE", f"{TASKS}/{task['id']}")
        if not reply.ok:
            raise _refusal(reply)

    async def find(self, http: Http, order: Order, since: float) -> Sightings | None:
        """The list tells neither prompt nor name, but the seed and the expiry of each task."""
        sightings = Sightings()
        if time.time() - since > KEPT_S:
            return sightings  # older than the list
        tier = order.parameters.get("service_tier")
        filters = {} if tier is None else {"filter.service_tier": tier}
        seen = 0
        for page in range(1, PAGES + 1):
            where = {"page_num": page, "page_size": PAGE, **filters}
            reply = await http.call("GET", TASKS, params=where)
            if not reply.ok:
                raise _refusal(reply)
            told = reply.object()
            items = told.get("items") or []
            seen += len(items)
            for item in items:
                if isinstance(item, dict) and created_since(item, since):
                    self._sort(order, item, sightings)
            total = told.get("total")
            if not items or (isinstance(total, int) and seen >= total):
                sightings.complete = True
                break
        return sightings

    def _sort(self, order: Order, item: dict[str, Any], sightings: Sightings) -> None:
        ours, task = self._body(order), {"id": text(item.get("id"))}
        for name in ("resolution", "ratio", "duration"):
            if name in ours and item.get(name) not in (None, ours[name], "adaptive"):
                return
        mark, own = item.get(MARK), MARK not in order.parameters
        if own and mark is not None and mark != ours[MARK]:
            return
        # Models without seeds tell one of their own; then only the mark counts.
        same_seed = order.send_seed and item.get("seed") == order.seed
        if (own and mark is not None) or same_seed:
            sightings.ours.append(task)
        else:
            sightings.lookalikes.append(task)

    def _body(self, order: Order) -> dict[str, Any]:
        options = dict(order.parameters)
        said = order.prompt + options.pop("prompt_suffix", "")
        body = {
            "model": order.model,
            "content": [{"type": "text", "text": said}],
            **({"seed": order.seed} if order.send_seed else {}),
            # Between 24 and 48 hours, a different second for each order: the mark by which a
            # submit without an answer is found in the list.
            MARK: DAY_S + order.number(DAY_S),
            **options,
        }
        return given(body)


def _part(told: dict[str, Any], name: str) -> dict[str, Any]:
    part = told.get(name)
    return part if isinstance(part, dict) else {}


def _error(told: Any) -> tuple[str, str]:
    error = _part(told, "error") if isinstance(told, dict) else {}
    return text(error.get("code")), text(error.get("message"))


def _refusal(reply: Reply) -> Exception:
    code, message = _error(reply.json)
    return refusal(reply, code, message, CONTENT, QUOTA)
