"""Any text-to-video model on fal's queue: https://queue.fal.run/{model}.

Written against fal_client 1.0.3 and fal's pages; never run against the live service. fal keeps a
result for minutes to an hour, its media longer; the request history of the platform API holds both
results that are gone from the queue and submits that got no answer. It lists finished requests, so
it can find a lost submit but never prove that one did not arrive.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime, timezone
from typing import Any

from afd.teachers.http import Http
from afd.teachers.provider import (
    Failure,
    Kind,
    Order,
    Provider,
    Reply,
    Sightings,
    State,
    Status,
    Task,
    failed_kind,
    given,
    refusal,
    text,
    unknown,
)

CONTENT = r"content_policy|nsfw|moderation|safety|no_media_generated"
QUOTA = r"balance|billing|locked|insufficient|payment"
INVALID = (
    r"missing|_type$|_parsing$|greater_than|less_than|one_of|literal_error|value_error|unsupported"
)
PLATFORM = "https://api.fal.ai/v1"
PAGES = 100
STATES = {"IN_QUEUE": State.QUEUED, "IN_PROGRESS": State.RUNNING, "COMPLETED": State.SUCCEEDED}


class Fal(Provider):
    """base_url is the queue; another one is taken to serve the platform API as well."""

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
        length = text(parameters.get("duration")).removesuffix("s")
        return float(length) if length.replace(".", "", 1).isdigit() else None

    async def submit(self, http: Http, order: Order, headers: Mapping[str, str]) -> Task:
        url = f"/{order.model.strip('/')}"
        reply = await http.call("POST", url, json=self._input(order), headers=dict(headers))
        if not reply.ok:
            raise self._unsent(reply)
        told = reply.object()
        number = text(told.get("request_id"))
        if not number:
            raise _refusal(reply)
        return self._task(http, order.model, number, told)

    async def poll(self, http: Http, task: Task) -> Status:
        reply = await http.call("GET", task["status_url"])
        if reply.status == 404:
            return await self._remembered(http, task, _refusal(reply))
        if not reply.ok:
            raise _refusal(reply)
        told = reply.object()
        word = text(told.get("status"))
        state = STATES.get(word)
        if state is None:
            return unknown(word)
        if state is not State.SUCCEEDED:
            return Status(state)
        if told.get("error"):
            code = text(told.get("error_type"))
            kind = failed_kind(f"{code} {told['error']}", CONTENT, QUOTA, INVALID)
            return Status(State.FAILED, kind=kind, reason=f"{code}: {told['error']}")
        result = await http.call("GET", task["response_url"])
        if result.status in (404, 410):
            return await self._remembered(http, task, _refusal(result))
        if result.ok:
            return Status(State.SUCCEEDED, video_url=_video(result.object()))
        if result.status == 429 or not any(
            word in result.text for word in ("error_type", "detail")
        ):
            # Not the model's answer but that of something on the way to it.
            raise _refusal(result)
        code, message = _error(result.json)
        kind = failed_kind(code, CONTENT, QUOTA, INVALID)
        return Status(State.FAILED, kind=kind, reason=f"{code}: {message}")

    async def cancel(self, http: Http, task: Task) -> None:
        reply = await http.call("PUT", task["cancel_url"])
        if not reply.ok:
            raise _refusal(reply)

    async def find(self, http: Http, order: Order, since: float) -> Sightings | None:
        sightings, ours = Sightings(), self._input(order)
        for item in await self._history(http, order.model, start=_iso(since)):
            number, told = text(item.get("request_id")), item.get("json_input")
            task = self._task(http, order.model, number, {})
            if not isinstance(told, dict):
                sightings.lookalikes.append(task)
            elif all(told.get(name) == value for name, value in ours.items()):
                sightings.ours.append(task)
        return sightings

    async def _remembered(self, http: Http, task: Task, gone: Failure) -> Status:
        """What the history says of a request that the queue does not know (any more)."""
        for item in await self._history(http, task["model"], request_id=task["id"]):
            if text(item.get("request_id")) != task["id"]:
                continue
            output, code = item.get("json_output"), int(item.get("status_code") or 0)
            if code == 200 and isinstance(output, dict):
                return Status(State.SUCCEEDED, video_url=_video(output))
            if code >= 400:
                word, message = _error(output)
                kind = failed_kind(word, CONTENT, QUOTA, INVALID)
                return Status(State.FAILED, kind=kind, reason=f"HTTP {code} {word}: {message}")
        raise gone

    async def _history(self, http: Http, model: str, **filters: str) -> list[dict[str, Any]]:
        url, cursor = f"{self._platform}/models/requests/by-endpoint", ""
        items: list[dict[str, Any]] = []
        for _ in range(PAGES):
            where = {"endpoint_id": model, "expand": "payloads", "limit": "100", **filters}
            where |= {"cursor": cursor} if cursor else {}
            reply = await http.call("GET", url, params=where)
            if not reply.ok:
                # The history is an aid: a key that may not read it can still buy.
                raise Failure(Kind.RETRYABLE, f"request history: HTTP {reply.status}")
            told = reply.object()
            items += [item for item in told.get("items") or [] if isinstance(item, dict)]
            cursor = text(told.get("next_cursor"))
            if not told.get("has_more") or not cursor:
                break
        return items

    def _unsent(self, reply: Reply) -> Failure:
        """fal's own client repeats a submit that its ingress answered without a request id."""
        failure = _refusal(reply)
        ingress = reply.status in (502, 503, 504) and "nginx" in reply.text
        if ingress and "x-fal-request-id" not in reply.headers:
            failure.certain = True
        return failure

    def _task(self, http: Http, model: str, number: str, told: Mapping[str, Any]) -> Task:
        owner_app = "/".join(model.strip("/").split("/")[:2])
        root = f"{self.base_url}/{owner_app}/requests/{number}"
        task = {"id": number, "model": model}
        for name, own in (
            ("status_url", f"{root}/status"),
            ("response_url", root),
            ("cancel_url", f"{root}/cancel"),
        ):
            # The key goes nowhere but to the queue, whatever the answer says.
            named = text(told.get(name))
            task[name] = named if named and http.trusts(named) else own
        return task

    def _input(self, order: Order) -> dict[str, Any]:
        options = dict(order.parameters)
        said = order.prompt + options.pop("prompt_suffix", "")
        seed = {"seed": order.seed} if order.send_seed else {}
        return given({"prompt": said, **seed, **options})


def _video(output: Mapping[str, Any]) -> str | None:
    """The address in a model's output; models spell it in a few ways."""
    several = output.get("videos")
    for place in (
        output.get("video"),
        several[0] if isinstance(several, list) and several else None,
    ):
        if isinstance(place, str) and place:
            return place
        if isinstance(place, dict) and place.get("url"):
            return text(place["url"])
    return None


def _iso(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")


def _error(told: Any) -> tuple[str, str]:
    """Platform errors have error_type and a sentence; models' have a list with type and msg."""
    if not isinstance(told, dict):
        return "", ""
    detail = told.get("detail")
    if isinstance(detail, list) and detail and isinstance(detail[0], dict):
        return text(detail[0].get("type")), text(detail[0].get("msg"))
    return text(told.get("error_type")), text(detail)


def _refusal(reply: Reply) -> Failure:
    code, message = _error(reply.json)
    # Models without typed errors only say it in words.
    return refusal(reply, code or message, message if code else "", CONTENT, QUOTA)
