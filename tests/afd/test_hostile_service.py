"""Answers that no service should give: each is its own order's failure, never the folder's."""

from __future__ import annotations

import base64
import gzip
import json
import logging
import resource
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import afd.teachers.paid.purchase
from afd.errors import TeacherError, Unanswered
from afd.teachers.paid.ark import Ark
from afd.teachers.paid.ledger import NAME, Ledger
from afd.teachers.paid.teacher import PROVIDERS
from tests.afd.paid import paid_config, teacher_of, video_bytes
from tests.afd.service import KEY, WIRES, Exchange, Service, answer, state

VIDEO = video_bytes()
QUICK = {"tries": 2, "deadline_s": 0.3, "settle_s": 0.05}


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch) -> Iterator[Service]:
    for provider in PROVIDERS.values():
        monkeypatch.setenv(provider.key_variable, KEY)
    with Service(VIDEO).running() as running:
        yield running


def asked(wire: str, service: Service, folder: Path, prompts: int = 1, **fetch: Any) -> list[Any]:
    """The video or error of each request of a new process."""
    teacher = teacher_of(paid_config(wire, service, folder, prompts=prompts, **(QUICK | fetch)))
    try:
        futures = [teacher.start(request) for request in teacher.requests]
        return [future.exception() or future.result() for future in futures]
    finally:
        teacher.close()


# --- encodings and time ---

BOMB = gzip.compress(gzip.compress(b"\0" * 2**26, 9), 9)


ENCODINGS = ["gzip", "gzip, gzip", "deflate", "br", "zstd", "identity, GZIP", "x-odd"]


@pytest.mark.parametrize(
    ("point", "encoding"),
    [("submit", "gzip"), ("media", "gzip, gzip"), *(("poll", name) for name in ENCODINGS)],
)
def test_an_encoding_that_nobody_asked_for_is_refused_undecoded(
    service: Service, tmp_path: Path, point: str, encoding: str
) -> None:
    body = BOMB if "gzip" in encoding.lower() else zlib.compress(b"{}")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    service.script(point, *[answer(200, body, content_encoding=encoding)] * 40)
    (got,) = asked("ark", service, tmp_path)
    assert isinstance(got, Unanswered)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 60 * 1024
    assert all(h["accept-encoding"] == "identity" for _, _, h in service.requests)
    service.faults.clear()
    service.script("poll", answer(200, b"", content_encoding="identity"))
    # A submit that was answered is not repeated automatically.
    again = {"resubmit_in_doubt": point == "submit"}
    (got,) = asked("ark", service, tmp_path, deadline_s=4.0, **again)
    assert isinstance(got, Path)


def trickle(*chunks: bytes, head: bytes = b"HTTP/1.1 200 OK\r\n") -> Any:
    """Raw bytes, then the last chunk again and again."""

    def fault(exchange: Exchange) -> bool:
        exchange.close_connection = True
        try:
            exchange.wfile.write(head)
            for chunk in chunks:
                exchange.wfile.write(chunk)
            while not exchange.service.released.wait(0.002):
                exchange.wfile.write(chunks[-1])
        except OSError:
            pass
        return True

    return fault


@pytest.mark.parametrize(
    "fault",
    [
        trickle(b"transfer-encoding: chunked\r\n\r\n", b"1\r\n \r\n"),
        trickle(b"x-filler: " + b"x" * 500 + b"\r\n"),
        trickle(b"HTTP/1.1 100 Continue\r\n\r\n", head=b""),
        trickle(b"content-length: 99999999999999999999999999\r\n\r\n", b"{"),
        trickle(b"x: \x00\xff\r\n\r\n", b"{"),
        trickle(b"\xff\xfe\x00", head=b""),
    ],
    ids=["chunks", "headers", "continue", "length", "header bytes", "no HTTP"],
)
@pytest.mark.parametrize("point", ["poll", "media"])
def test_an_answer_without_an_end_is_cut(
    service: Service, tmp_path: Path, fault: Any, point: str
) -> None:
    service.script(point, *[fault] * 9)
    began = time.monotonic()
    (got,) = asked("ark", service, tmp_path, request_s=0.2, download_s=0.2)
    assert isinstance(got, Unanswered)
    assert time.monotonic() - began < 5


def test_no_cookie_is_kept(service: Service, tmp_path: Path) -> None:
    def bake(exchange: Exchange) -> bool:
        exchange.say(200, exchange.submitted(exchange.accept()), set_cookie="track=1; Path=/")
        return True

    service.script("submit", *[bake] * 3)
    bought = ("ark", service, tmp_path)
    assert all(isinstance(got, Path) for got in asked(*bought, prompts=3, deadline_s=4.0))
    assert not any("cookie" in headers for _, _, headers in service.requests)


# --- forms ---

NAMES: list[Any] = ["../../admin", "a/../../b", "..", "a%2f..%2fb", "a\nb", "a?x=1", "x" * 300, ""]
NAMES += [["a"], {"a": 1}, True, None, -1, 1.5, KEY, base64.b64encode(KEY.encode()).decode()]


@pytest.mark.parametrize("wire", WIRES)
def test_an_identifier_steers_no_path(service: Service, tmp_path: Path, wire: str) -> None:
    def named(name: Any) -> Any:
        told = {"id": name, "request_id": name, "status": "queued"}
        return answer(200, told | {"status_url": f"{service.root}/{wire}/admin/{name}"})

    service.script("submit", *map(named, NAMES))
    got = asked(wire, service, tmp_path, prompts=len(NAMES))
    assert all(isinstance(answer, Path | TeacherError) for answer in got)
    assert service.seen("GET", r"^[^?]*(admin|\.\.|%2|xxx|\[|True|None|1\.5)|[?]x=1") == 0
    assert KEY not in str(got)
    assert KEY.encode() not in (tmp_path / "videos" / NAME).read_bytes()


def test_a_queue_may_name_addresses_of_the_request_only(service: Service, tmp_path: Path) -> None:
    def elsewhere(ending: str) -> Any:
        def fault(exchange: Exchange) -> bool:
            job = exchange.accept()
            url = f"{exchange.service.root}/fal{ending.format(job.number)}"
            urls = dict.fromkeys(("status_url", "response_url", "cancel_url"), url)
            exchange.say(200, {"request_id": job.number, **urls})
            return True

        return fault

    odd = ["/admin", "/lab/../admin/requests/{}", "/lab/%2e%2e/requests/{}", "/x?y=/requests/{}"]
    service.script("submit", *map(elsewhere, odd))
    got = asked("fal", service, tmp_path, prompts=len(odd), deadline_s=4.0)
    assert all(isinstance(path, Path) for path in got)
    assert service.seen("GET", "admin|%2e|[?]y") == 0


URLS: list[Any] = [5, True, ["x"], {"url": 5}, "video.mp4", "//a.example/x", "javascript:x", "\0"]
URLS += ["http://[::1", "http://a.example:99999/x", "http://" + "a" * 300 + "/x", "x" * 9000]
URLS += ["data:video/mp4;base64,AAAA", "http://\ud83d/x", f"http://127.0.0.1:1/{KEY}", "http://"]


def test_an_address_that_is_none_fails_its_own_video_only(
    service: Service, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def linked(exchange: Exchange) -> bool:
        url = URLS[int(exchange.job().number.partition("-")[2]) - 1]
        exchange.say(200, {"status": "succeeded", "content": {"video_url": url}})
        return True

    service.script("poll", *[linked] * 999)
    got = asked("ark", service, tmp_path, prompts=len(URLS))
    assert all(isinstance(error, Unanswered) for error in got)
    service.faults.clear()
    got = asked("ark", service, tmp_path, prompts=len(URLS), deadline_s=4.0)
    assert all(isinstance(path, Path) for path in got)
    assert KEY.encode() not in (tmp_path / "videos" / NAME).read_bytes()
    assert len(service.jobs) == len(URLS)
    assert KEY not in caplog.text


@pytest.mark.parametrize("wire", ["ark", "openai"])
@pytest.mark.parametrize("word", ["SUCCEEDED", " Completed ", "Success"])
def test_a_state_is_known_in_every_case(
    service: Service, tmp_path: Path, wire: str, word: str
) -> None:
    def done(exchange: Exchange) -> bool:
        exchange.job().state = "done"
        return state(word)(exchange)

    odd = [answer(200, {"status": value}) for value in (True, 3, ["x"], {"a": 1}, None, "\x1b[2J")]
    service.script("poll", *odd, done)
    (got,) = asked(wire, service, tmp_path, deadline_s=4.0)
    assert isinstance(got, Path)


# --- the key ---


@pytest.mark.parametrize(
    "text",
    [
        "".join(f"\\u{ord(c):04x}" for c in KEY),
        base64.b64encode(b"Bearer " + KEY.encode()).decode(),
        "".join(f"%{ord(c):02x}" for c in KEY),
        KEY[::-1],
        f"{KEY[:18]} ... {KEY[18:]}",
        KEY.encode().hex(),
    ],
)
def test_the_key_comes_back_nowhere(
    service: Service, tmp_path: Path, text: str, caplog: pytest.LogCaptureFixture
) -> None:
    body = json.dumps({"error": {"code": "Odd", "message": "X"}}).replace("X", text).encode()

    def broken_header(exchange: Exchange) -> bool:
        exchange.close_connection = True
        exchange.wfile.write(b"HTTP/1.1 200 OK\r\nbad header " + text.encode() + b"\r\n\r\n")
        return True

    places = {
        "submit": [answer(503, body), answer(400, body)],
        "poll": [answer(500, body), broken_header, answer(503, text.encode("utf-16"))],
        "media": [answer(302, b"", location=f"http://10.0.0.1/{text.replace(' ', '')}")] * 2,
    }
    said = ""
    with caplog.at_level(logging.DEBUG):
        for point, faults in places.items():
            service.script(point, *faults)
            said += str(asked("ark", service, tmp_path, prompts=2, deadline_s=1.0))
            service.faults.clear()
    said += caplog.text + str((tmp_path / "videos" / NAME).read_bytes())
    letters = "".join(filter(str.isalnum, said)).lower()
    for shown in (KEY, KEY[:18], KEY[18:], KEY[::-1], text):
        assert "".join(filter(str.isalnum, shown)).lower() not in letters


# --- errors of our own ---


def test_an_error_that_nobody_foresaw_fails_one_order_a_few_times(
    service: Service,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def broken(path: Path) -> None:
        raise ZeroDivisionError(f"of {KEY} \x1b[2J")

    monkeypatch.setattr(afd.teachers.paid.purchase, "check_video", broken)
    for process in range(afd.teachers.paid.purchase.FAULTS + 1):
        polls = service.seen("GET", "tasks/")
        (got,) = asked("ark", service, tmp_path, deadline_s=4.0)
        assert isinstance(got, Unanswered)
        assert "ZeroDivisionError at test_hostile_service.py" in str(got)
        looked = service.seen("GET", "tasks/") > polls
        assert looked == (process < afd.teachers.paid.purchase.FAULTS)
    assert "teacher.fetch.retry_faults=true" in str(got)
    assert "unexpected: ZeroDivisionError" in caplog.text
    books = Ledger.snapshot(tmp_path / "videos")
    ((_, row),) = books.open_rows()
    assert (row.state, row.faults, books.spent_usd()) == (
        "running",
        afd.teachers.paid.purchase.FAULTS,
        1.0,
    )
    books.close()
    monkeypatch.undo()
    for name in (provider.key_variable for provider in PROVIDERS.values()):
        monkeypatch.setenv(name, KEY)
    (got,) = asked("ark", service, tmp_path, retry_faults=True, deadline_s=4.0)
    assert isinstance(got, Path)
    assert len(service.jobs) == 1
    assert "of [key] [2J" in row.fault
    assert KEY not in caplog.text
    assert "\x1b" not in caplog.text


def test_a_provider_with_a_bug_fails_its_orders_and_the_log_names_it(
    service: Service,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def poll(self: Ark, http: Any, task: Any) -> Any:
        return task["no such thing"]

    monkeypatch.setattr(Ark, "poll", poll)
    (got,) = asked("ark", service, tmp_path)
    assert isinstance(got, Unanswered)
    assert "KeyError at test_hostile_service.py" in caplog.text
    monkeypatch.undo()
    monkeypatch.setenv("ARK_API_KEY", KEY)
    (got,) = asked("ark", service, tmp_path, deadline_s=4.0)
    assert isinstance(got, Path)
    assert len(service.jobs) == 1
