"""Servers that implement the OpenAI Videos API: /videos.

Written against openai 3.54.0, whose videos resource announces that OpenAI's own service shuts down
on 2026-09-24; gateways and self-hosted servers implement the same API (teacher.api.base_url). Never
run against a live service. The API takes no seed and has no cancel; whether a failed video is
billed is not documented, so its price stays counted.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from afd.teachers.paid.answers import Answer, Failure, Moment, Name, Number, Word, parse
from afd.teachers.paid.http import Http
from afd.teachers.paid.moderation import complaint
from afd.teachers.paid.service import (
    Order,
    Provider,
    Sightings,
    State,
    Status,
    Task,
    failed_kind,
    given,
    length,
    refusal,
    segment,
    state_of,
    submitted,
    unfinished,
)

QUOTA = r"insufficient|billing|invalid_api_key|account_deactivated"
INVALID = r"^invalid_|unsupported_"
PAGES = 100


class _Submitted(Answer):
    id: Name


class _Video(Answer):
    status: Word = ""
    seconds: Number = None


class _Listed(Answer):
    id: Name
    created_at: Moment = None
    prompt: str | None = None
    size: Word = ""
    seconds: Word = ""

    def before(self, since: float) -> bool:
        """Whether it is definitely older."""
        return self.created_at is not None and self.created_at < since


class _Page(Answer):
    data: list[dict[str, Any]] | None = None
    has_more: bool | None = None
    last_id: Word = ""


class OpenAI(Provider):
    """The provider for the Videos API; downloading a video also needs the key."""

    name = "openai"
    key_variable = "OPENAI_API_KEY"
    key_scheme = "Bearer"
    base_url = "https://api.openai.com/v1"
    seeded = False
    bills_failures = True

    def seconds(self, parameters: Mapping[str, Any]) -> float | None:
        return length(parameters.get("seconds", 4))

    async def submit(self, http: Http, order: Order, headers: Mapping[str, str]) -> Task:
        form = {name: (None, _field(value)) for name, value in self._body(order).items()}
        reply = await http.call("POST", "/videos", files=form, headers=dict(headers))
        return {"id": submitted(reply, _Submitted, QUOTA).id}

    async def poll(self, http: Http, task: Task) -> Status:
        path = f"/videos/{segment(task['id'])}"
        reply = await http.call("GET", path)
        if not reply.ok:
            raise refusal(reply, QUOTA)
        answer, video = reply.object(), reply.read(_Video)
        state = state_of(video.status)
        if state is State.SUCCEEDED:
            wrong = complaint({"error": answer.get("error")})
            url = None if wrong.moderated else f"{http.base_url}{path}/content"
            return Status(state, video_url=url, reason=wrong.reason, seconds=video.seconds)
        wrong = complaint(answer)
        if state is State.FAILED:
            return Status(state, kind=failed_kind(wrong, QUOTA, INVALID), reason=wrong.reason)
        return unfinished(state, video.status, wrong)

    async def cancel(self, http: Http, task: Task) -> None:
        """Do nothing: there is no cancel, and DELETE would lose a video that finished meanwhile."""

    async def find(self, http: Http, order: Order, since: float) -> Sightings | None:
        """Search the list by prompt, size and seconds. Draws of a prompt are interchangeable, so
        any of its videos that no submit holds will do."""
        sightings, after, whole = Sightings(), "", True
        seen: set[str] = set()
        ours = self._body(order)
        for _ in range(PAGES):
            where = {"limit": 100, "order": "desc", **({"after": after} if after else {})}
            reply = await http.call("GET", "/videos", params=where)
            if not reply.ok:
                raise refusal(reply, QUOTA)
            page = reply.read(_Page)
            if page.data is None:
                break  # no list, hence no proof
            listed, before = [], len(seen)
            for raw in page.data:
                try:
                    listed.append(parse(raw, _Listed))
                except Failure:  # it may be ours
                    whole = False
                    continue
                seen.add(listed[-1].id)
                self._sort(http.plain(ours["prompt"]), ours, listed[-1], since, sightings)
            # If a server does not report whether there is more, request pages until one is empty.
            if not page.data or page.has_more is False or _down_to(listed, since):
                sightings.complete = whole
                break
            if len(seen) == before:
                break  # the same page again
            after = page.last_id or listed[-1].id
        return sightings

    def _sort(
        self, prompt: str, ours: dict[str, Any], item: _Listed, since: float, seen: Sightings
    ) -> None:
        """Classify a listed video. `prompt`: ours, sanitised like a response."""
        # A prompt may be returned truncated or empty.
        asked = " ".join(prompt.split())
        listed = asked if item.prompt is None else " ".join(item.prompt.split())
        whole = item.prompt is not None and listed == asked
        if item.before(since) or not (asked.startswith(listed) or listed.startswith(asked)):
            return
        shared = [name for name in ("size", "seconds") if name in ours and getattr(item, name)]
        same = all(getattr(item, name) == str(ours[name]) for name in shared)
        where_to = seen.ours if same and whole else seen.lookalikes
        where_to.append({"id": item.id})

    def _body(self, order: Order) -> dict[str, Any]:
        options = dict(order.parameters)
        asked = order.prompt + options.pop("prompt_suffix", "")
        seed = {"seed": order.seed} if order.send_seed else {}
        return given({"model": order.model, "prompt": asked, **seed, **options})


def _down_to(listed: list[_Listed], since: float) -> bool:
    """Whether a page is sorted from new to old, as requested, and ends before a time."""
    times = [item.created_at for item in listed if item.created_at is not None]
    falling = len(times) > 1 and times[0] > times[-1] and times == sorted(times, reverse=True)
    return falling and listed[-1].before(since)


def _field(value: Any) -> str:
    """A form field; values other than strings are encoded as JSON."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
