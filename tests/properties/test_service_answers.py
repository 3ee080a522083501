"""The door of paid services: valid answers, mutated, end in a value or in the documented error.

Over real HTTP against the loopback service: first each verb of each provider, then whole purchases.
"""

from __future__ import annotations

import asyncio
import copy
import json
import math
import tempfile
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass, is_dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from afd.errors import TeacherError
from afd.teachers.paid.answers import NAME, Failure
from afd.teachers.paid.config import FetchConfig
from afd.teachers.paid.http import Http
from afd.teachers.paid.ledger import Ledger
from afd.teachers.paid.secret import Secret
from afd.teachers.paid.service import Order, Sightings, Status
from afd.teachers.paid.teacher import PROVIDERS
from tests.afd.paid import MODELS, paid_config, teacher_of, video_bytes
from tests.afd.service import KEY, WIRES, Exchange, Service

VIDEO = video_bytes()
TASK = {"id": "job-1", "model": "lab/toy"}
FILE = {"url": "https://media.example/v.mp4"}
MODERATED = {"code": "content_filter", "message": "filtered by the content management policy"}
VALID: dict[str, list[Any]] = {
    "submit": [
        {"id": "job-1", "request_id": "job-1", "status": "queued", "seconds": "4"},
        {"error": {"code": "InvalidParameter", "type": "invalid", "message": "duration is wrong"}},
        {"detail": [{"loc": ["body", "prompt"], "msg": "flagged", "type": "content_policy"}]},
    ],
    "poll": [
        {
            "id": "job-1",
            "status": "succeeded",
            "content": {"video_url": FILE["url"]},
            "usage": {"completion_tokens": 5, "total_tokens": 1000},
            "duration": 5,
            "video": FILE,
            "videos": [FILE],
            "has_nsfw_concepts": [False],
        },
        {"status": "running", "progress": 0.5, "error": None},
        {"status": "failed", "error": MODERATED, "error_type": "x"},
    ],
    "find": [
        {
            "total": 1,
            "items": [
                {
                    "id": "job-1",
                    "request_id": "job-1",
                    "created_at": 4e9,
                    "seed": 7,
                    "status_code": 200,
                    "json_input": {"prompt": "p"},
                    "json_output": {"video": FILE},
                }
            ],
            "data": [{"id": "job-1", "created_at": 4e9, "prompt": "p", "seconds": "4"}],
            "has_more": False,
            "last_id": "job-1",
            "next_cursor": None,
        }
    ],
}
ODD: list[Any] = [
    None,
    True,
    False,
    -1,
    0,
    10**30,
    -0.0,
    1e308,
    "",
    " ",
    "5",
    [],
    {},
    [[]],
    {"a": 1},
]
ODD += [
    float("nan"),
    float("inf"),
    "\ud83d",
    "\x1b[2J",
    "a\0b",
    "\u202e",
    "../x",
    "a%2fb",
    "x" * 9000,
]
ODD += [KEY, KEY[::-1], KEY.encode().hex(), f"key {KEY[:20]}", "http://[::1", "//x", "SAFETY", 1026]


@dataclass(frozen=True)
class Mutated:
    """A raw response."""

    status: int
    body: bytes
    headers: tuple[tuple[str, str], ...] = ()


@st.composite
def mutated(draw: Any, verb: str) -> Mutated:
    value = copy.deepcopy(draw(st.sampled_from(VALID[verb])))
    for _ in range(draw(st.integers(0, 3))):
        value = _changed(draw, value)
    body = json.dumps(value, ensure_ascii=draw(st.booleans())).encode("utf-8", "surrogatepass")
    way = draw(st.sampled_from(["", "", "", "charset", "bytes", "cut", "twice", "deep", "number"]))
    if way == "charset":
        charset = draw(st.sampled_from(["utf-8-sig", "utf-16", "utf-32", "latin-1", "utf-7"]))
        body = body.decode("utf-8", "replace").encode(charset, "replace")
    if way == "bytes":
        at = draw(st.integers(0, len(body)))
        body = body[:at] + draw(st.binary(max_size=3)) + body[at + 1 :]
    if way == "cut":
        body = body[: draw(st.integers(0, len(body)))]
    if way == "twice" and body.startswith(b"{") and len(body) > 2:
        body = b'{"id": "other", "status": "failed", ' + body[1:]
    if way == "deep":
        body = b'{"error": ' + b"[" * 100 + body + b"]" * 100 + b"}"
    if way == "number":
        body = body.replace(
            b"1000", draw(st.sampled_from([b"1e999", b"-1e99", b"NaN", b"1" * 5000]))
        )
    headers = draw(
        st.lists(
            st.sampled_from(
                [
                    ("retry-after", "1e999"),
                    ("retry-after", "-5"),
                    ("content-encoding", "gzip"),
                    ("content-type", "text/html; charset=utf-7"),
                    ("set-cookie", "a=b"),
                    ("location", f"http://10.0.0.1/{KEY}"),
                    ("x-fal-request-id", KEY),
                ]
            ),
            max_size=2,
        )
    )
    status = draw(st.sampled_from([200, 200, 200, 200, 201, 302, 400, 404, 422, 429, 500]))
    return Mutated(status, body, tuple(headers))


def _changed(draw: Any, value: Any) -> Any:
    """The value with one part, at any depth, exchanged, left out or moved."""
    inside = isinstance(value, dict | list) and value
    if not inside or not draw(st.integers(0, 3)):
        return copy.deepcopy(draw(st.sampled_from(ODD)))
    place = draw(st.sampled_from(sorted(value) if isinstance(value, dict) else range(len(value))))
    if isinstance(value, dict) and not draw(st.integers(0, 4)):
        value.pop(place)
    else:
        value[place] = _changed(draw, value[place])
    return value


def said(sent: Mutated) -> Any:
    def fault(exchange: Exchange) -> bool:
        exchange.send_response(sent.status)
        exchange.send_header("content-length", str(len(sent.body)))
        for name, text in sent.headers:
            exchange.send_header(name, text)
        exchange.end_headers()
        exchange.wfile.write(sent.body)
        return True

    return fault


@pytest.fixture(scope="module")
def service() -> Iterator[Service]:
    with pytest.MonkeyPatch.context() as patch, Service(VIDEO).running() as running:
        for provider in PROVIDERS.values():
            patch.setenv(provider.key_variable, KEY)
        yield running


def strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield str(value)
    elif isinstance(value, list):
        for inner in value:
            yield from strings(inner)
    elif isinstance(value, dict):
        yield from strings([*value, *value.values()])
    elif is_dataclass(value):
        yield from strings(list(vars(value).values()))


def check_text(text: str) -> None:
    """May reach a terminal, a log and the ledger."""
    assert not any(unicodedata.category(character)[0] == "C" for character in text), text
    letters = "".join(filter(str.isalnum, text)).lower()
    for shown in (KEY, KEY[::-1], KEY.encode().hex(), KEY[:20]):
        assert "".join(filter(str.isalnum, shown)).lower() not in letters, text


def check(verb: str, got: Any) -> None:
    for text in strings(got):
        check_text(text)
    if verb == "submit":
        assert NAME.fullmatch(got["id"])
    elif verb == "poll":
        assert isinstance(got, Status)
        for number in (got.tokens, got.seconds):
            assert number is None or (math.isfinite(number) and number > 0)
    else:
        assert isinstance(got, Sightings)
        assert all(NAME.fullmatch(task["id"]) for task in [*got.ours, *got.lookalikes])


@pytest.mark.parametrize("verb", list(VALID))
@pytest.mark.parametrize("wire", WIRES)
@given(data=st.data())
def test_a_verb_gives_a_typed_value_or_a_failure(
    service: Service, wire: str, verb: str, data: st.DataObject
) -> None:
    sent = data.draw(mutated(verb))
    root = service.base_url(wire)
    provider = PROVIDERS[wire](root)
    order = Order(wire, MODELS[wire], "p", {}, 7)
    task = TASK | {f"{name}_url": f"{root}/x" for name in ("status", "response", "cancel")}
    config = FetchConfig(schemes=["http"], private_hosts=["127.0.0.1"], request_s=5.0)
    point = {"find": "list"}.get(verb, verb)
    service.faults.clear()
    service.script(point, *[said(sent)] * 9)

    async def ask() -> Any:
        secret = Secret("X", KEY)
        async with Http(root, [root], secret, provider.key_scheme, config) as http:
            if verb == "submit":
                return await provider.submit(http, order, {})
            if verb == "poll":
                return await provider.poll(http, task)
            return await provider.find(http, order, 0.0)

    try:
        got = asyncio.run(ask())
    except Failure as failure:
        got = failure
    if isinstance(got, Failure):
        check_text(got.reason)
        assert math.isfinite(got.retry_after_s)
        assert got.retry_after_s >= 0
    else:
        check(verb, got)


@settings(max_examples=max(6, settings.default.max_examples // 5))
@given(
    wire=st.sampled_from(WIRES),
    at=st.sampled_from(["submit", "poll", "find"]),
    data=st.data(),
)
def test_a_purchase_ends_in_a_video_or_its_own_error(
    service: Service, wire: str, at: str, data: st.DataObject
) -> None:
    """Whatever the answer, the folder continues, no video is paid twice, money never shrinks."""
    sent = data.draw(mutated(at))
    service.faults.clear()
    service.jobs.clear()
    with tempfile.TemporaryDirectory() as name:
        patience = {"deadline_s": 0.2, "settle_s": 0.05, "tries": 2, "attempts": 2}
        config = paid_config(wire, service, Path(name), prompts=2, budget_usd=2.0, **patience)
        service.script({"find": "list"}.get(at, at), said(sent))
        for _ in range(2):
            teacher = teacher_of(config)
            for request in teacher.requests:
                error = teacher.start(request).exception()
                assert error is None or isinstance(error, TeacherError)
                if error is not None:
                    check_text(str(error).replace("\n", " "))
            teacher.close()
            books = Ledger.snapshot(Path(name) / "videos")
            spent = books.spent_usd()
            books.close()
            assert math.isfinite(spent)
            assert 0.0 <= spent <= 2.0
            assert spent >= len(list((Path(name) / "videos").glob("*.mp4")))
        assert KEY.encode() not in (Path(name) / "videos" / "ledger.sqlite3").read_bytes()
