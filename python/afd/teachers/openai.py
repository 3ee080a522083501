"""Servers that speak the OpenAI Videos API: /videos.

Written against openai 3.54.0, whose videos resource announces that OpenAI's own service shuts down
on 2026-09-24; gateways and self-hosted servers speak the same API (teacher.api.base_url). Never run
against a live service. The API takes no seed and has no cancel; whether a failed video is billed is
not documented, so its price stays counted.
"""

from __future__ import annotations

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

CONTENT = r"moderation|content_policy|safety|sentinel_block|misalignment"
QUOTA = r"insufficient|billing|invalid_api_key|account_deactivated"
INVALID = r"^invalid_|unsupported_"
PAGES = 100
STATES = {
    "queued": State.QUEUED,
    "in_progress": State.RUNNING,
    "completed": State.SUCCEEDED,
    "failed": State.FAILED,
    "cancelled": State.CANCELLED,
    "expired": State.EXPIRED,
}


class OpenAI(Provider):
    """The Videos API; the content of a video needs the key as well."""

    name = "openai"
    key_variable = "OPENAI_API_KEY"
    key_scheme = "Bearer"
    base_url = "https://api.openai.com/v1"
    seeded = False
    bills_failures = True

    def seconds(self, parameters: Mapping[str, Any]) -> float | None:
        return float(parameters.get("seconds", 4))

    async def submit(self, http: Http, order: Order, headers: Mapping[str, str]) -> Task:
        form = {name: (None, _field(value)) for name, value in self._body(order).items()}
        reply = await http.call("POST", "/videos", files=form, headers=dict(headers))
        if not reply.ok:
            raise _refusal(reply)
        number = text(reply.object().get("id"))
        if not number:
            raise _refusal(reply)
        return {"id": number}

    async def poll(self, http: Http, task: Task) -> Status:
        reply = await http.call("GET", f"/videos/{task['id']}")
        if not reply.ok:
            raise _refusal(reply)
        told = reply.object()
        state = STATES.get(text(told.get("status")))
        if state is None:
            return unknown(text(told.get("status")))
        code, message = _error(told)
        silent = state is State.SUCCEEDED and bool(code)
        return Status(
            state,
            video_url=None if silent else f"{http.base_url}/videos/{task['id']}/content",
            kind=failed_kind(code, CONTENT, QUOTA, INVALID),
            reason=f"{code}: {message}" if code else "",
        )

    async def cancel(self, http: Http, task: Task) -> None:
        """There is no cancel; DELETE would lose a video that finished meanwhile."""

    async def find(self, http: Http, order: Order, since: float) -> Sightings | None:
        """The list tells prompt, size and seconds. Draws of one prompt are alike, so any of its
        videos that nobody holds will do."""
        sightings, after = Sightings(), ""
        ours = self._body(order)
        for _ in range(PAGES):
            where = {"limit": 100, "order": "desc", **({"after": after} if after else {})}
            reply = await http.call("GET", "/videos", params=where)
            if not reply.ok:
                raise _refusal(reply)
            told = reply.object()
            items = [item for item in told.get("data") or [] if isinstance(item, dict)]
            for item in items:
                said = item.get("prompt")
                other = said is not None and text(said).split() != ours["prompt"].split()
                if other or not created_since(item, since):
                    continue
                shared = [n for n in ("size", "seconds") if n in ours and item.get(n) is not None]
                same = said is not None and all(text(item[n]) == text(ours[n]) for n in shared)
                where_to = sightings.ours if same else sightings.lookalikes
                where_to.append({"id": text(item.get("id"))})
            old = bool(items) and not created_since(items[-1], since)
            if old or not items or not told.get("has_more"):
                sightings.complete = True
                break
            after = text(told.get("last_id") or items[-1].get("id"))
        return sightings

    def _body(self, order: Order) -> dict[str, Any]:
        options = dict(order.parameters)
        said = order.prompt + options.pop("prompt_suffix", "")
        seed = {"seed": order.seed} if order.send_seed else {}
        return given({"model": order.model, "prompt": said, **seed, **options})


def _field(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _error(told: Any) -> tuple[str, str]:
    error = told.get("error") if isinstance(told, dict) else None
    if not isinstance(error, dict):
        return "", ""
    return text(error.get("code") or error.get("type")), text(error.get("message"))


def _refusal(reply: Reply) -> Exception:
    code, message = _error(reply.json)
    return refusal(reply, code, message, CONTENT, QUOTA)
