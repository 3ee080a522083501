"""Any text-to-video model on fal's queue: https://queue.fal.run/{model}.

Written against fal_client 1.0.3 and fal's pages; never run against the live service. fal keeps a
result for minutes to an hour, its media longer; the platform API's request history holds both
results that have left the queue and submits that got no response. It lists only finished requests,
so it can find a lost submit but never prove that one did not arrive.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import datetime, timezone
from typing import Any
from urllib.parse import urlsplit

from afd.teachers.paid.answers import (
    Address,
    Answer,
    Failure,
    Kind,
    Name,
    Number,
    Reply,
    Word,
    parse,
)
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

QUOTA = r"balance|billing|\blocked\b|user_locked|account_locked|insufficient|payment"
INVALID = (
    r"missing|_type$|_parsing$|greater_than|less_than|one_of|literal_error|value_error|unsupported"
)
PLATFORM = "https://api.fal.ai/v1"
PAGES = 100


class _Submitted(Answer):
    request_id: Name


class _Named(Answer):
    status_url: Address | None = None
    response_url: Address | None = None
    cancel_url: Address | None = None


class _Queue(Answer):
    status: Word = ""


class _File(Answer):
    url: Address


class _Past(Answer):
    request_id: Name
    json_input: Any = None
    json_output: Any = None
    status_code: Number = None


class _Page(Answer):
    items: list[dict[str, Any]] | None = None
    next_cursor: Word = ""
    has_more: bool | None = None


class Fal(Provider):
    """The provider for fal. `base_url` is the queue; a custom one is assumed to serve the platform
    API as well."""

    name = "fal"
    key_variable = "FAL_KEY"
    key_scheme = "Key"
    base_url = "https://queue.fal.run"
    seeded = True
    bills_failures = True

    def __init__(self, base_url: str | None = None) -> None:
        super().__init__(base_url)
        self._platform = PLATFORM if base_url is None else self.base_url

    @property
    def trusted(self) -> list[str]:
        return [self.base_url, self._platform]

    def seconds(self, parameters: Mapping[str, Any]) -> float | None:
        return length(parameters.get("duration"))

    async def submit(self, http: Http, order: Order, headers: Mapping[str, str]) -> Task:
        url = f"/{order.model.strip('/')}"
        reply = await http.call("POST", url, json=self._input(order), headers=dict(headers))
        if not reply.ok:
            raise self._unsent(reply)
        number = submitted(reply, _Submitted, QUOTA).request_id
        return self._task(http, order.model, number, reply.object())

    async def poll(self, http: Http, task: Task) -> Status:
        reply = await http.call("GET", task["status_url"])
        if reply.status == 404:
            return await self._remembered(http, task, refusal(reply, QUOTA))
        if not reply.ok:
            raise refusal(reply, QUOTA)
        answer, word = reply.object(), reply.read(_Queue).status
        state = state_of(word)
        wrong = complaint(answer)
        if state is State.FAILED or (state is State.SUCCEEDED and answer.get("error")):
            kind = failed_kind(wrong, QUOTA, INVALID)
            return Status(State.FAILED, kind=kind, reason=wrong.reason)
        if state is not State.SUCCEEDED:
            return unfinished(state, word, wrong)
        result = await http.call("GET", task["response_url"])
        if result.status in (404, 410):
            return await self._remembered(http, task, refusal(result, QUOTA))
        if result.ok:
            return _succeeded(result.object())
        if result.status == 429 or not any(
            word in result.text for word in ("error_type", "detail")
        ):
            # Not the model's response but that of an intermediary.
            raise refusal(result, QUOTA)
        wrong = complaint(result.json)
        kind = failed_kind(wrong, QUOTA, INVALID)
        return Status(State.FAILED, kind=kind, reason=wrong.reason)

    async def cancel(self, http: Http, task: Task) -> None:
        reply = await http.call("PUT", task["cancel_url"])
        if not reply.ok:
            raise refusal(reply, QUOTA)

    async def find(self, http: Http, order: Order, since: float) -> Sightings | None:
        sightings, ours = Sightings(), http.plain(self._input(order))
        for item in await self._history(http, order.model, start=_iso(since)):
            task = self._task(http, order.model, item.request_id, {})
            asked = item.json_input
            if not isinstance(asked, dict):
                sightings.lookalikes.append(task)
            elif all(asked.get(name) == value for name, value in ours.items()):
                sightings.ours.append(task)
        return sightings

    async def _remembered(self, http: Http, task: Task, gone: Failure) -> Status:
        """The status, from the history, of a request that the queue does not or no longer know."""
        for item in await self._history(http, task["model"], request_id=task["id"]):
            if item.request_id != task["id"]:
                continue
            code = item.status_code or 0
            if code == 200 and isinstance(item.json_output, dict):
                return _succeeded(item.json_output)
            if code >= 400:
                wrong = complaint(item.json_output)
                kind = failed_kind(wrong, QUOTA, INVALID)
                return Status(State.FAILED, kind=kind, reason=f"HTTP {code:.0f} {wrong.reason}")
        raise gone

    async def _history(self, http: Http, model: str, **filters: str) -> list[_Past]:
        """Finished requests; malformed entries are skipped, as the list is never used as proof."""
        url, cursor = f"{self._platform}/models/requests/by-endpoint", ""
        items: list[_Past] = []
        for _ in range(PAGES):
            where = {"endpoint_id": model, "expand": "payloads", "limit": "100", **filters}
            where |= {"cursor": cursor} if cursor else {}
            reply = await http.call("GET", url, params=where)
            if not reply.ok:
                # The history is optional: a key without access to it can still buy.
                raise Failure(Kind.RETRYABLE, f"request history: HTTP {reply.status}")
            page = reply.read(_Page)
            for raw in page.items or []:
                try:
                    items.append(parse(raw, _Past))
                except Failure:
                    continue
            cursor = page.next_cursor
            if not page.has_more or not cursor:
                break
        return items

    def _unsent(self, reply: Reply) -> Failure:
        """The Failure of a rejected submit. Like fal's own client, treats an ingress error without
        a request id as certainly not submitted."""
        failure = refusal(reply, QUOTA)
        ingress = reply.status in (502, 503, 504) and "nginx" in reply.text
        if ingress and "x-fal-request-id" not in reply.headers:
            failure.certain = True
        return failure

    def _task(self, http: Http, model: str, number: str, answer: Mapping[str, Any]) -> Task:
        owner_app = "/".join(model.strip("/").split("/")[:2])
        root = f"{self.base_url}/{owner_app}/requests/{segment(number)}"
        task = {"id": number, "model": model}
        try:
            named = parse(dict(answer), _Named).model_dump()
        except Failure:
            named = {}
        for name, ending in (
            ("status_url", "/status"),
            ("response_url", ""),
            ("cancel_url", "/cancel"),
        ):
            url = named.get(name)
            # The key is sent only to the queue, and there only for this request, whatever URLs the
            # response contains.
            ours = url is not None and http.trusts(url) and _leads_to(url, number)
            task[name] = str(url) if ours else root + ending
        return task

    def _input(self, order: Order) -> dict[str, Any]:
        options = dict(order.parameters)
        asked = order.prompt + options.pop("prompt_suffix", "")
        seed = {"seed": order.seed} if order.send_seed else {}
        return given({"prompt": asked, **seed, **options})


def _leads_to(url: str, number: str) -> bool:
    """Whether a queue URL refers to this request."""
    path = r"(/(?!\.)[\w.-]+)+/requests/" + re.escape(number) + r"(/status|/response|/cancel)?"
    parts = urlsplit(url)
    return not parts.query and re.fullmatch(path, parts.path, re.ASCII) is not None


def _succeeded(output: dict[str, Any]) -> Status:
    """The Status for a model's output. If its safety checker triggered, the video is black or
    absent."""
    flags = {name: value for name, value in output.items() if "nsfw" in name.lower()}
    wrong = complaint({"error": output.get("error"), **flags})
    url = None if wrong.moderated else _video(output)
    return Status(State.SUCCEEDED, video_url=url, reason=wrong.reason)


def _video(output: Mapping[str, Any]) -> str | None:
    """The video URL in a model's output; models use a few different fields."""
    several = output.get("videos")
    for place in (
        output.get("video"),
        several[0] if isinstance(several, list) and several else None,
    ):
        if place:
            return parse({"url": place} if isinstance(place, str) else place, _File).url
    return None


def _iso(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
