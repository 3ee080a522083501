"""Seedance on Volcengine Ark and BytePlus ModelArk: /contents/generations/tasks.

Written against volcengine-ark-runtime 5.0.54 and the vendor's pages; never run against the live
service. The vendor keeps tasks for 7 days and video URLs for 24 hours, and states that only
successful videos are billed: width x height x 24 frames per second x seconds / 1024 tokens.
"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from typing import Any

from afd.teachers.paid.answers import (
    Address,
    Amount,
    Answer,
    Failure,
    Moment,
    Name,
    Number,
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

TASKS = "/contents/generations/tasks"
MARK = "execution_expires_after"
QUOTA = r"Overdue|[Ii]nsufficient|SetLimitExceeded|ModelNotOpen|Authentication|AccessDenied"
INVALID = r"^(InvalidParameter|MissingParameter|InvalidEndpoint|UnsupportedModel)"
FPS = 24.0
DAY_S = 86_400
KEPT_S = 7 * DAY_S
PAGE, PAGES = 100, 100


class _Submitted(Answer):
    id: Name


class _Content(Answer):
    video_url: Address | None = None


class _Usage(Answer):
    total_tokens: Amount = None


class _Task(Answer):
    status: Word = ""
    # Content of another form is a malformed response, not a missing video.
    content: _Content | None = None
    usage: Any = None
    duration: Amount = None


class _Listed(Answer):
    id: Name
    created_at: Moment = None
    seed: Number = None
    execution_expires_after: Number = None


class _Page(Answer):
    items: list[dict[str, Any]] | None = None
    total: Number = None


class Ark(Provider):
    """The provider for Ark. `base_url` is the international site; the Chinese one is
    https://ark.cn-beijing.volces.com/api/v3."""

    name = "ark"
    key_variable = "ARK_API_KEY"
    key_scheme = "Bearer"
    base_url = "https://ark.ap-southeast.bytepluses.com/api/v3"
    seeded = True
    bills_failures = False

    def defaults(self) -> dict[str, Any]:
        # Audio only adds moderation failures; the trainer does not use it.
        return {"generate_audio": False, "watermark": False}

    def seconds(self, parameters: Mapping[str, Any]) -> float | None:
        parameters = _with_flags(parameters)
        frames = length(parameters.get("frames"))
        return frames / FPS if frames else length(parameters.get("duration"))

    def tokens(self, parameters: Mapping[str, Any]) -> float | None:
        """The vendor's rule for the smallest frame of a resolution: 480p has at least 480 x 640
        pixels, for every aspect ratio and model."""
        resolution = str(_with_flags(parameters).get("resolution", ""))
        rows = re.fullmatch(r"(\d{3,4})p", resolution, re.ASCII)
        seconds = self.seconds(parameters)
        if rows is None or seconds is None:
            return None
        return int(rows[1]) ** 2 * 4 / 3 * FPS * seconds / 1024

    async def submit(self, http: Http, order: Order, headers: Mapping[str, str]) -> Task:
        reply = await http.call("POST", TASKS, json=self._body(order), headers=dict(headers))
        return {"id": submitted(reply, _Submitted, QUOTA).id}

    async def poll(self, http: Http, task: Task) -> Status:
        reply = await http.call("GET", f"{TASKS}/{segment(task['id'])}")
        if not reply.ok:
            raise refusal(reply, QUOTA)
        answer, found = reply.object(), reply.read(_Task)
        state = state_of(found.status)
        if state is State.SUCCEEDED:
            wrong = complaint({"error": answer.get("error")})
            url = None if wrong.moderated or found.content is None else found.content.video_url
            usage = found.usage if isinstance(found.usage, dict) else {}
            tokens = parse(usage, _Usage).total_tokens
            return Status(state, url, reason=wrong.reason, tokens=tokens, seconds=found.duration)
        wrong = complaint(answer)
        if state is State.FAILED:
            return Status(state, kind=failed_kind(wrong, QUOTA, INVALID), reason=wrong.reason)
        return unfinished(state, found.status, wrong)

    async def cancel(self, http: Http, task: Task) -> None:
        reply = await http.call("DELETE", f"{TASKS}/{segment(task['id'])}")
        if not reply.ok:
            raise refusal(reply, QUOTA)

    async def find(self, http: Http, order: Order, since: float) -> Sightings | None:
        """The list gives neither prompt nor name, but the seed and the expiry of each task."""
        sightings = Sightings()
        if time.time() - since > KEPT_S:
            return sightings  # older than the list
        tier = order.parameters.get("service_tier")
        filters = {} if tier is None else {"filter.service_tier": tier}
        seen: set[str] = set()
        whole = True
        for number in range(1, PAGES + 1):
            where = {"page_num": number, "page_size": PAGE, **filters}
            reply = await http.call("GET", TASKS, params=where)
            if not reply.ok:
                raise refusal(reply, QUOTA)
            page = reply.read(_Page)
            if page.items is None and page.total != 0:
                break  # no list, hence no proof
            listed, before = page.items or [], len(seen)
            for raw in listed:
                try:
                    item = parse(raw, _Listed)
                except Failure:  # it may be ours
                    whole = False
                    continue
                seen.add(item.id)
                self._sort(order, raw, item, since, sightings)
            if not listed or page.total == len(seen):
                sightings.complete = whole
                break
            if len(seen) == before:
                break  # the same page again
        return sightings

    def _sort(
        self, order: Order, raw: dict[str, Any], item: _Listed, since: float, sightings: Sightings
    ) -> None:
        ours, task = self._body(order), {"id": item.id}
        # Models without seeds report one of their own; then only the mark counts.
        same_seed = order.send_seed and item.seed == order.seed
        mark, own = item.execution_expires_after, MARK not in order.parameters
        marked = own and mark is not None
        if marked and mark == ours[MARK] and same_seed:
            sightings.ours.append(task)
            return
        if item.created_at is not None and item.created_at < since:
            return
        differs = any(
            name in ours and _differ(ours[name], raw.get(name))
            for name in ("resolution", "ratio", "duration")
        )
        if (differs or (marked and mark != ours[MARK])) and not same_seed:
            return
        # The same seed with another mark: another order's task, or the server sets its own marks.
        sure = not differs and (mark == ours[MARK] if marked else same_seed)
        (sightings.ours if sure else sightings.lookalikes).append(task)

    def _body(self, order: Order) -> dict[str, Any]:
        options = dict(order.parameters)
        asked = order.prompt + options.pop("prompt_suffix", "")
        body = {
            "model": order.model,
            "content": [{"type": "text", "text": asked}],
            **({"seed": order.seed} if order.send_seed else {}),
            # Between 24 and 48 hours, in seconds derived from the order: the mark by which an
            # unanswered submit is found in the list.
            MARK: DAY_S + order.number(DAY_S),
            **options,
        }
        return given(body)


def _with_flags(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """The options including the flags appended to the prompt, which older models read."""
    flags = re.findall(r"--(\w+)[ =]+(\S+)", str(parameters.get("prompt_suffix", "")))
    names = {"rs": "resolution", "dur": "duration", "frames": "frames"}
    return {**parameters, **{names.get(name, name): value for name, value in flags}}


def _differ(ours: Any, listed: Any) -> bool:
    """Whether a listed task definitely has a different option; 5, "5" and "5s" are equal."""
    if listed in (None, "adaptive"):
        return False
    seconds = length(ours), length(listed)
    if None not in seconds:
        return seconds[0] != seconds[1]
    return isinstance(listed, str) and str(ours).strip().lower() != listed.strip().lower()
