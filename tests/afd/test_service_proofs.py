"""What an answer of a service proves: that a submit never arrived, was refused, or is paid."""

from __future__ import annotations

import json
import os
import sqlite3
import stat
import time
from collections.abc import Iterator
from email.parser import BytesParser
from pathlib import Path
from typing import Any

import pytest

import afd.teachers.paid.purchase
from afd.errors import TeacherError, Unanswered
from afd.teachers.paid.answers import receive
from afd.teachers.paid.ledger import LOCK, NAME, Ledger
from afd.teachers.paid.secret import Secret
from afd.teachers.paid.teacher import PROVIDERS
from tests.afd.paid import MODELS, paid_config, teacher_of, video_bytes
from tests.afd.service import (
    KEY,
    WIRES,
    Exchange,
    Service,
    accept_but_say,
    answer,
    drip,
    fail,
    hang_up,
    lost,
)

VIDEO = video_bytes()
QUICK = {"tries": 2, "deadline_s": 0.4, "settle_s": 0.05}
FILTERED = {"code": "content_filter", "message": "filtered"}


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch) -> Iterator[Service]:
    for provider in PROVIDERS.values():
        monkeypatch.setenv(provider.key_variable, KEY)
    with Service(VIDEO).running() as running:
        yield running


def asked(wire: str, service: Service, folder: Path, *overrides: str, **fetch: Any) -> Any:
    """The video or error of one request of a new process."""
    teacher = teacher_of(paid_config(wire, service, folder, *overrides, **(QUICK | fetch)))
    try:
        future = teacher.start(teacher.requests[0])
        return future.exception() or future.result()
    finally:
        teacher.close()


def spent(folder: Path) -> float:
    books = Ledger.snapshot(folder / "videos")
    try:
        return books.spent_usd()
    finally:
        books.close()


# --- a submit that left and was not understood ---


def item(**fields: Any) -> dict[str, Any]:
    """A task of a list that is not of this order, and old."""
    return {"id": "other", "created_at": 1.5e9, "seed": 1, "prompt": "x"} | fields


NO_PROOF = {
    "ark": [
        {},
        {"error": {"code": "busy"}},
        {"items": None},
        {"items": None, "total": 3},
        {"items": [item()], "total": 0},
        {"items": [item()], "total": 2},
        {"items": [item(created_at=0, seed=None)], "total": 1},
        {"items": [item(id="../x")], "total": 1},
    ],
    "openai": [
        {},
        {"error": "busy"},
        {"data": None, "has_more": False},
        {"data": [item()]},
        {"data": [item()], "has_more": True},
        {"data": [item(created_at=0, prompt="")], "has_more": False},
        {"data": [item(created_at=None, prompt="prompt")], "has_more": False},
        {"data": [item(created_at=-5.0, prompt=None)], "has_more": False},
    ],
}


@pytest.mark.parametrize(
    ("wire", "page"), [(wire, page) for wire, pages in NO_PROOF.items() for page in pages]
)
def test_a_list_that_may_hide_a_task_is_no_proof(
    service: Service, tmp_path: Path, wire: str, page: Any
) -> None:
    service.script("submit", lost)
    service.script("list", *[answer(200, page)] * 200)
    assert isinstance(asked(wire, service, tmp_path), Unanswered)
    assert len(service.jobs) == 1
    assert spent(tmp_path) == 1.0


@pytest.mark.parametrize(
    "change",
    [
        {"created_at": 0},
        {"created_at": None},
        {"created_at": "milliseconds"},
        {"created_at": 1.5e9},
        {"duration": "5"},
        {"duration": "5s", "resolution": "480P"},
    ],
    ids=str,
)
def test_a_lost_task_is_found_however_its_options_are_spelt(
    service: Service, tmp_path: Path, change: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    if change.get("created_at") == "milliseconds":
        change = {"created_at": int(1000 * time.time())}
    told = Exchange.on_list

    def on_list(exchange: Exchange) -> None:
        say = exchange.say
        exchange.say = lambda status, body: say(  # type: ignore[method-assign, misc, assignment]
            status, body | {"items": [one | change for one in body["items"]]}
        )
        told(exchange)

    monkeypatch.setattr(Exchange, "on_list", on_list)
    service.script("submit", lost)
    options = "teacher.api.options={duration: 5, resolution: 480p}"
    assert isinstance(asked("ark", service, tmp_path, options, deadline_s=4.0), Path)
    assert len(service.jobs) == 1


@pytest.mark.parametrize("status", [101, 302, 303, 408, 424, 499, 599])
def test_a_status_that_does_not_refuse_leaves_a_submit_in_doubt(
    service: Service, tmp_path: Path, status: int
) -> None:
    service.script("submit", accept_but_say(status, {"message": "see elsewhere"}))
    assert isinstance(asked("ark", service, tmp_path, deadline_s=4.0), Path)
    assert len(service.jobs) == 1


@pytest.mark.parametrize(
    "body",
    [
        b"OK",
        b"[]",
        {"ok": True},
        {"id": None, "request_id": None},
        {"id": "..%2f", "request_id": "a/b"},
        {"error": {"message": "busy"}},
    ],
    ids=str,
)
@pytest.mark.parametrize("wire", ["ark", "openai"])
def test_what_a_service_took_is_not_bought_again_though_its_list_is_empty(
    service: Service, tmp_path: Path, wire: str, body: Any
) -> None:
    service.script("submit", *[answer(200, body)] * 9)
    for _ in range(2):
        got = asked(wire, service, tmp_path)
        assert isinstance(got, Unanswered)
        assert not got.rejected
    assert service.seen("POST", "") == 1
    assert spent(tmp_path) == 1.0


def cut_short(exchange: Exchange) -> bool:
    exchange.send_response(200)
    exchange.send_header("content-length", "99")
    exchange.end_headers()
    exchange.wfile.write(b'{"id": "job')
    exchange.close_connection = True
    return True


@pytest.mark.parametrize("fault", [cut_short, drip, answer(200, b"x", content_encoding="gzip")])
def test_an_answer_that_breaks_off_is_one(service: Service, tmp_path: Path, fault: Any) -> None:
    service.script("submit", *[fault] * 9)
    assert isinstance(asked("ark", service, tmp_path, request_s=0.5), Unanswered)
    assert service.seen("POST", "") == 1
    assert spent(tmp_path) == 1.0


def test_an_identifier_given_twice_leaves_the_second_in_doubt(
    service: Service, tmp_path: Path
) -> None:
    service.script("submit", *[answer(200, {"id": "same"})] * 9)
    service.script("list", *[answer(200, {"items": [], "total": 0})] * 99)
    teacher = teacher_of(paid_config("ark", service, tmp_path, prompts=3, **QUICK))
    futures = [teacher.start(request) for request in teacher.requests]
    assert all(isinstance(future.exception(), Unanswered) for future in futures)
    teacher.close()
    assert service.seen("POST", "") == 3
    assert spent(tmp_path) == 3.0


def test_a_clock_that_is_set_proves_nothing(
    service: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Forward: the list has as long as before to show the task. Back: nobody waits for ever."""
    config = paid_config("ark", service, tmp_path, settle_s=0.5, deadline_s=2.0)
    clock = time.time

    def jump(exchange: Exchange) -> bool:
        monkeypatch.setattr(afd.teachers.paid.purchase.time, "time", lambda: clock() + 9000.0)
        return lost(exchange)

    service.script("submit", jump)
    service.script("list", *[answer(200, {"items": [], "total": 0})] * 3)
    teacher = teacher_of(config)
    assert isinstance(teacher.start(teacher.requests[0]).result(), Path)
    teacher.close()
    assert len(service.jobs) == 1

    service.script("submit", hang_up)
    assert isinstance(asked("fal", service, tmp_path / "back"), Unanswered)
    monkeypatch.setattr(afd.teachers.paid.purchase.time, "time", lambda: clock() - 9000.0)
    began = time.monotonic()
    assert isinstance(asked("fal", service, tmp_path / "back"), Unanswered)
    assert time.monotonic() - began < 10.0


# --- tasks that end ---


@pytest.mark.parametrize(
    ("status", "body"),
    [
        (200, {"id": None, "request_id": "", "error": FILTERED}),
        (200, {"id": "", "code": "content_filter"}),
        (500, {"error": {"code": "content_policy_violation"}}),
        (451, {"message": "rejected by our content policy"}),
    ],
)
@pytest.mark.parametrize("wire", WIRES)
def test_a_rejection_beside_an_empty_identifier_is_remembered(
    service: Service, tmp_path: Path, wire: str, status: int, body: Any
) -> None:
    service.script("submit", answer(status, body))
    for _ in range(2):
        assert asked(wire, service, tmp_path).rejected
    assert service.seen("POST", "") == 1


@pytest.mark.parametrize("status", [400, 422, 500])
@pytest.mark.parametrize("wire", WIRES)
def test_a_task_whose_status_is_a_rejection_is_remembered(
    service: Service, tmp_path: Path, wire: str, status: int
) -> None:
    service.script("poll", *[answer(status, {"error": FILTERED})] * 2)
    for _ in range(2):
        assert asked(wire, service, tmp_path, deadline_s=4.0).rejected
    assert service.seen("POST", "") == 1


@pytest.mark.parametrize("wire", WIRES)
def test_a_task_that_failed_as_invalid_is_not_bought_again(
    service: Service, tmp_path: Path, wire: str
) -> None:
    code = {"ark": "InvalidParameter", "openai": "invalid_value", "fal": "value_error"}[wire]
    service.script("poll", *[fail(code)] * 2)
    for _ in range(3):
        got = asked(wire, service, tmp_path)
        assert isinstance(got, Unanswered)
        assert not got.rejected
    assert len(service.jobs) == 1
    asked(wire, service, tmp_path, retry_rejected=True)
    assert len(service.jobs) == 2


def failed_later(exchange: Exchange) -> bool:
    exchange.say(200, {"status": "failed", "error": {"code": "InternalServiceError"}})
    return True


def test_a_video_that_was_finished_once_stays_paid(service: Service, tmp_path: Path) -> None:
    """Its file is deleted, and then the service reports that the task had failed."""
    asked("ark", service, tmp_path, deadline_s=4.0).unlink()
    service.script("poll", failed_later)
    (again,) = [asked("ark", service, tmp_path, budget_usd=1.0)]
    assert isinstance(again, TeacherError)
    assert spent(tmp_path) == 1.0
    assert len(service.jobs) == 1


def test_a_task_that_fails_after_it_succeeded_stays_paid(service: Service, tmp_path: Path) -> None:
    """Ark bills what succeeds: an address that leads nowhere, then a failure."""
    bill = {"total_tokens": 2_000_000}
    done = {"status": "succeeded", "content": {"video_url": f"{service.root}/media/x-1.mp4"}}
    service.script("poll", answer(200, done | {"usage": bill}), failed_later)
    service.script("media", answer(404))
    fetch = {"price_per": "million_tokens", "units": 1e6, "attempts": 1}
    assert isinstance(asked("ark", service, tmp_path, **fetch), Unanswered)
    assert spent(tmp_path) == 2.0


# --- time, files, forms ---


@pytest.mark.parametrize(
    "text", ["\\" * 60_000, "%5c" * 20_000, "&#92;" * 13_000, "\\u005c" * 9000]
)
def test_escapes_take_a_time_that_grows_with_their_number(text: str) -> None:
    began = time.process_time()
    receive(200, {}, json.dumps({"error": {"message": text}}).encode(), Secret("X", KEY))
    assert time.process_time() - began < 5.0


@pytest.mark.parametrize("umask", [0o002, 0o077])
def test_files_of_the_folder_follow_the_umask(service: Service, tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        video = asked("ark", service, tmp_path, deadline_s=4.0)
    finally:
        os.umask(before)
    for name in (NAME, LOCK, "prompts.jsonl", video.name):
        mode = stat.S_IMODE((tmp_path / "videos" / name).stat().st_mode)
        assert mode == 0o666 & ~umask, name


@pytest.mark.parametrize("name", [NAME, LOCK, "prompts.jsonl"])
def test_a_folder_where_a_file_belongs_ends_in_a_sentence(
    service: Service, tmp_path: Path, name: str
) -> None:
    (tmp_path / "videos" / name).mkdir(parents=True)
    with pytest.raises(TeacherError, match="cannot be"):
        raise asked("ark", service, tmp_path)
    assert not service.jobs


def test_a_manifest_of_odd_lines_is_kept_out(service: Service, tmp_path: Path) -> None:
    (tmp_path / "videos").mkdir()
    lines = ['{"file": ["x"]}', '{"file": {}}', "[]", "\x00", '{"file": "a.mp4", "prompt": "p"}']
    (tmp_path / "videos" / "prompts.jsonl").write_text("\n".join(lines))
    assert isinstance(asked("ark", service, tmp_path, deadline_s=4.0), Path)


def test_a_ledger_that_another_process_keeps_locked_is_named(
    service: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked("ark", service, tmp_path, deadline_s=4.0)
    holder = sqlite3.connect(tmp_path / "videos" / NAME, isolation_level=None)
    holder.execute("BEGIN EXCLUSIVE")
    connect = sqlite3.connect
    monkeypatch.setattr(sqlite3, "connect", lambda *a, **k: connect(*a, **(k | {"timeout": 0.1})))
    with pytest.raises(TeacherError, match="locked"):
        Ledger.snapshot(tmp_path / "videos")
    holder.close()


@pytest.mark.parametrize("wire", WIRES)
def test_nested_options_travel_as_json(service: Service, tmp_path: Path, wire: str) -> None:
    nested = {"flow_shift": 5.0, "tiled": True, "name": None, "text": 'a "quote", ü', "n": [1, {}]}
    options = {"extra_params": nested, "loras": ["a", {"w": 0.5}], "fps": 16, "audio": False}
    seen: list[dict[str, Any]] = []

    def keep(exchange: Exchange) -> bool:
        if wire != "openai":
            seen.append(json.loads(exchange.body))
            return False
        head = f"content-type: {exchange.headers['content-type']}\r\n\r\n".encode()
        seen.append({})
        for part in BytesParser().parsebytes(head + exchange.body).get_payload():
            name = part.get_param("name", header="content-disposition")
            text = part.get_payload(decode=True).decode()
            seen[0][name] = json.loads(text) if name in options else text
        return False

    service.script("submit", keep)
    asked(wire, service, tmp_path, f"teacher.api.options={json.dumps(options)}", deadline_s=4.0)
    (sent,) = seen
    assert {name: sent[name] for name in options} == options
    assert sent.get("model", MODELS[wire]) == MODELS[wire]
