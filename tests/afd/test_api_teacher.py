"""Paid teachers over real HTTP: every provider's wire format under every scripted fault."""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from afd.errors import TeacherError, Unanswered
from afd.teachers.base import Request
from afd.teachers.folder import FolderTeacher
from afd.teachers.paid.ledger import Ledger
from tests.afd.paid import paid_config, teacher_of, video_bytes
from tests.afd.service import (
    KEY,
    WIRES,
    Service,
    accept_but_say,
    answer,
    cut_off,
    drip,
    endless,
    fail,
    hang_up,
    lost,
    silent,
    state,
    truncated,
)

VIDEO = video_bytes()
LISTS = ("ark", "openai")  # whose list proves that a submit never arrived


@pytest.fixture(autouse=True)
def _key(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ARK_API_KEY", "OPENAI_API_KEY", "FAL_KEY"):
        monkeypatch.setenv(name, KEY)


@pytest.fixture
def service() -> Iterator[Service]:
    with Service(VIDEO).running() as running:
        yield running


@pytest.fixture(params=WIRES)
def wire(request: pytest.FixtureRequest) -> str:
    return request.param


def buy(
    wire: str, service: Service, folder: Path, *overrides: str, prompts: int = 1, **fetch: Any
) -> list[Path | Exception]:
    """Every answer of a fresh teacher on the folder."""
    teacher = teacher_of(paid_config(wire, service, folder, *overrides, prompts=prompts, **fetch))
    try:
        futures = [teacher.start(request) for request in teacher.requests]
        return [future.exception() or future.result() for future in futures]
    finally:
        teacher.close()


def one(wire: str, service: Service, folder: Path, **fetch: Any) -> Path:
    (got,) = buy(wire, service, folder, **fetch)
    if isinstance(got, Exception):
        raise got
    assert got.read_bytes() == VIDEO
    return got


def spent(folder: Path) -> float:
    ledger = Ledger(folder / "videos")
    try:
        return ledger.spent_usd()
    finally:
        ledger.close()


def test_a_prompt_is_bought_once_and_then_answered_from_the_folder(
    wire: str, service: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    got = buy(wire, service, tmp_path, prompts=3)
    assert all(isinstance(path, Path) and path.read_bytes() == VIDEO for path in got)
    assert set(service.paid().values()) == {1}
    before = len(service.requests)
    for name in ("ARK_API_KEY", "OPENAI_API_KEY", "FAL_KEY"):
        monkeypatch.delenv(name)
    assert buy(wire, service, tmp_path, prompts=3) == got
    assert len(service.requests) == before
    assert spent(tmp_path) == pytest.approx(3.0)


def test_the_folder_is_a_folder_teacher_without_the_ledger(
    wire: str, service: Service, tmp_path: Path
) -> None:
    got = buy(wire, service, tmp_path, "teacher.api.draws=2", prompts=2)
    folder = tmp_path / "videos"
    for name in folder.glob("ledger*"):
        name.unlink()
    teacher = FolderTeacher(folder, frames=4)
    assert set(teacher.requests) == {
        Request(f"prompt {n}", draw) for n in range(2) for draw in range(2)
    }
    assert {teacher.answer(request) for request in teacher.requests} == set(got)
    entry = json.loads((folder / "prompts.jsonl").read_text().split("\n")[0])
    assert entry["sha256"] == hashlib.sha256(VIDEO).hexdigest()
    assert entry["provider"] == wire


@pytest.mark.parametrize("lost", ["missing", "no bytes", "no rows", "older"])
def test_videos_that_the_ledger_does_not_know_are_refused_and_adopted_only_if_asked(
    wire: str, service: Service, tmp_path: Path, lost: str
) -> None:
    ledger = tmp_path / "videos" / "ledger.sqlite3"
    Ledger(tmp_path / "videos").close()
    empty = ledger.read_bytes()
    if lost == "older":
        buy(wire, service, tmp_path)
        empty = ledger.read_bytes()
    got = buy(wire, service, tmp_path, prompts=2)
    if lost == "missing":
        ledger.unlink()
    else:
        ledger.write_bytes(b"" if lost == "no bytes" else empty)
    number = 1 if lost == "older" else 2
    with pytest.raises(
        TeacherError, match=rf"list {number} of .* teacher\.fetch\.adopt_videos=true"
    ):
        buy(wire, service, tmp_path, prompts=2)
    assert len(service.jobs) == 2
    assert buy(wire, service, tmp_path, prompts=2, adopt_videos=True) == got
    assert buy(wire, service, tmp_path, prompts=2) == got
    assert len(service.jobs) == 2
    assert spent(tmp_path) == (1.0 if lost == "older" else 0.0)
    assert len(FolderTeacher(tmp_path / "videos").requests) == 2


@pytest.mark.parametrize(
    ("point", "fault"),
    [
        ("submit", answer(429, {"error": {"code": "RateLimit"}}, retry_after="0.05")),
        ("poll", answer(429, b"", retry_after="0.05")),
        ("poll", answer(503, b"busy")),
        ("poll", answer(200, b"")),
        ("poll", answer(200, b"<html>")),
        ("poll", hang_up),
        ("poll", state("resting")),
        ("media", answer(500)),
        ("media", answer(429)),
        ("media", answer(200, b"")),
        ("media", answer(403, b"expired")),
        ("media", answer(200, b"<html>not found</html>")),
        ("media", truncated),
        ("media", cut_off),
    ],
)
def test_what_passes_is_tried_again_without_paying_again(
    wire: str, service: Service, tmp_path: Path, point: str, fault: Any
) -> None:
    service.script(point, fault, fault)
    one(wire, service, tmp_path)
    assert list(service.paid().values()) == [1]
    assert spent(tmp_path) == pytest.approx(1.0)


def test_an_expired_address_is_asked_for_again(service: Service, tmp_path: Path) -> None:
    service.script("media", answer(403), answer(410), answer(404))
    one("ark", service, tmp_path)
    signatures = {path for _, path, _ in service.requests if path.startswith("/media")}
    polls = service.seen("GET", r"/ark/contents/generations/tasks/ark-1$")
    assert polls == 2 + 3
    assert len(signatures) >= 1


def test_retry_after_is_waited_for(wire: str, service: Service, tmp_path: Path) -> None:
    busy = answer(429, {"error": {"code": "RateLimitExceeded"}}, retry_after="0.3")
    service.script("submit", *[busy] * 4)
    began = time.time()
    got = buy(wire, service, tmp_path, prompts=8, concurrency=4)
    assert all(isinstance(path, Path) for path in got)
    assert set(service.paid().values()) == {1}
    assert min(job.created for job in service.jobs.values()) >= began + 0.3


def test_a_lost_answer_is_found_in_the_list_and_not_paid_twice(
    wire: str, service: Service, tmp_path: Path
) -> None:
    service.script("submit", lost)
    one(wire, service, tmp_path)
    assert list(service.paid().values()) == [1]


@pytest.mark.parametrize("status", [200, 500, 502])
def test_an_answer_that_does_not_say_so_may_still_have_been_accepted(
    wire: str, service: Service, tmp_path: Path, status: int
) -> None:
    service.script("submit", accept_but_say(status))
    one(wire, service, tmp_path)
    assert list(service.paid().values()) == [1]


@pytest.mark.parametrize("wire", LISTS)
@pytest.mark.parametrize("fault", [hang_up, answer(200, b""), answer(503, b"")])
def test_a_submit_that_never_arrived_is_repeated_once_the_list_proves_it(
    wire: str, service: Service, tmp_path: Path, fault: Any
) -> None:
    service.script("submit", fault)
    one(wire, service, tmp_path)
    assert list(service.paid().values()) == [1]
    assert spent(tmp_path) == pytest.approx(1.0)


def test_without_proof_a_submit_stays_in_doubt_until_the_user_decides(
    service: Service, tmp_path: Path
) -> None:
    service.script("submit", hang_up)
    (doubt,) = buy("fal", service, tmp_path, deadline_s=0.3)
    assert isinstance(doubt, Unanswered)
    assert "resubmit_in_doubt=true" in str(doubt)
    (doubt,) = buy("fal", service, tmp_path, deadline_s=0.3)
    assert isinstance(doubt, Unanswered)
    assert service.paid() == {}
    assert spent(tmp_path) == pytest.approx(1.0)
    one("fal", service, tmp_path, resubmit_in_doubt=True, deadline_s=0.3)
    assert list(service.paid().values()) == [1]
    assert spent(tmp_path) == pytest.approx(2.0)


def test_a_task_that_may_be_ours_keeps_a_submit_in_doubt(
    service: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A service that tells neither seed nor expiry: any task of that time may be the lost one."""
    service.script("submit", lost)
    monkeypatch.setattr("tests.afd.service.Job.asked", {"content": [{"text": "?"}]}, raising=False)
    listed = {"total": 1, "items": [{"id": "ark-1", "created_at": 4e9, "status": "running"}]}
    service.script("list", *[answer(200, listed)] * 50)
    (doubt,) = buy("ark", service, tmp_path)
    assert isinstance(doubt, Unanswered)
    assert "it may be ark-1" in str(doubt)
    assert len(service.jobs) == 1


def test_a_server_that_recognises_repeats_is_asked_again_with_the_same_mark(
    service: Service, tmp_path: Path
) -> None:
    service.script("submit", hang_up)
    one("fal", service, tmp_path, idempotency_header="Idempotency-Key")
    marks = [h["idempotency-key"] for m, _, h in service.requests if m == "POST"]
    assert len(marks) == 2
    assert len(set(marks)) == 1


@pytest.mark.parametrize(
    ("wire", "code"),
    [
        ("ark", "OutputVideoSensitiveContentDetected.PolicyViolation"),
        ("openai", "moderation_blocked"),
        ("fal", "content_policy_violation"),
    ],
)
def test_a_rejected_prompt_is_skipped_and_remembered(
    service: Service, tmp_path: Path, wire: str, code: str, caplog: pytest.LogCaptureFixture
) -> None:
    service.script("poll", fail(code))
    with caplog.at_level(logging.WARNING, "afd"):
        got = buy(wire, service, tmp_path, prompts=3, concurrency=1)
    assert [type(answer).__name__ for answer in got].count("Unanswered") == 1
    assert "1 of 1 decided videos (100 %) were rejected" in caplog.text
    again = buy(wire, service, tmp_path, prompts=3)
    assert [isinstance(answer, Unanswered) for answer in again].count(True) == 1
    assert len(service.jobs) == 3
    assert spent(tmp_path) == pytest.approx(2.0 if wire == "ark" else 3.0)
    buy(wire, service, tmp_path, prompts=3, retry_rejected=True)
    assert len(service.jobs) == 4


@pytest.mark.parametrize(
    ("wire", "status", "body"),
    [
        ("ark", 400, {"error": {"code": "InputTextSensitiveContentDetected", "message": "no"}}),
        ("openai", 400, {"error": {"code": "moderation_blocked", "message": "no"}}),
        ("fal", 422, {"detail": [{"type": "content_policy_violation", "msg": "no"}]}),
    ],
)
def test_a_prompt_rejected_at_the_door_costs_nothing(
    service: Service, tmp_path: Path, wire: str, status: int, body: Any
) -> None:
    service.script("submit", answer(status, body))
    (got,) = buy(wire, service, tmp_path)
    assert isinstance(got, Unanswered)
    assert spent(tmp_path) == 0.0


def test_a_success_without_video_is_a_rejection(
    wire: str, service: Service, tmp_path: Path
) -> None:
    service.polls = 0
    if wire == "fal":
        service.script("poll", *[lambda exchange: False, silent] * 2)
    else:
        service.script("poll", silent, silent)
    (got,) = buy(wire, service, tmp_path)
    assert isinstance(got, Unanswered)
    assert "rejected" in str(got)
    assert len(service.jobs) == 1
    assert spent(tmp_path) == pytest.approx(1.0)


def test_one_odd_answer_is_no_rejection(service: Service, tmp_path: Path) -> None:
    odd = [{"status": "succeeded"}, {"status": "succeeded", "content": ["x"], "error": "none"}]
    service.script("poll", answer(200, odd[0]), *[answer(200, odd[1])] * 3)
    one("ark", service, tmp_path)


def test_too_many_rejections_stop_the_buying(service: Service, tmp_path: Path) -> None:
    service.script("poll", *[fail("OutputVideoSensitiveContentDetected")] * 40)
    got = buy("ark", service, tmp_path, prompts=40, concurrency=1)
    assert any("20 of 20 videos were rejected" in str(answer) for answer in got)
    assert len(service.jobs) == 20


@pytest.mark.parametrize("code", ["InternalServiceError", "internal_error", "runner_disconnected"])
def test_a_task_that_fails_in_passing_is_submitted_again_a_few_times(
    wire: str, service: Service, tmp_path: Path, code: str
) -> None:
    service.script("poll", fail(code))
    one(wire, service, tmp_path / "one")
    assert len(service.jobs) == 2
    service.script("poll", *[fail(code)] * 10)
    (got,) = buy(wire, service, tmp_path / "many", attempts=3)
    assert isinstance(got, Unanswered)
    assert len(service.jobs) == 2 + 3


@pytest.mark.parametrize(
    ("status", "code"),
    [(401, "invalid"), (402, "payment"), (403, "AccountOverdueError"), (429, "insufficient_quota")],
)
def test_an_account_that_gives_nothing_stops_everything(
    wire: str, service: Service, tmp_path: Path, status: int, code: str
) -> None:
    body = {"error": {"code": code, "message": f"your key {KEY}"}, "error_type": code}
    service.script("submit", *[answer(status, body)] * 9)
    got = buy(wire, service, tmp_path, prompts=9, concurrency=1)
    assert all(isinstance(error, TeacherError) for error in got)
    assert not any(isinstance(error, Unanswered) for error in got)
    assert service.seen("POST", "") == 1
    assert KEY not in str(got)


def test_a_request_that_is_wrong_from_the_start_stops_everything(
    wire: str, service: Service, tmp_path: Path
) -> None:
    service.script("submit", *[answer(400, {"error": {"code": "InvalidParameter"}})] * 9)
    got = buy(wire, service, tmp_path, prompts=9, concurrency=1)
    assert all("refuses: HTTP 400" in str(error) for error in got)
    assert service.seen("POST", "") == 1


@pytest.mark.parametrize("word", ["queued", "running"])
def test_a_stuck_task_is_given_up_at_its_deadline_and_collected_later(
    wire: str, service: Service, tmp_path: Path, word: str
) -> None:
    service.polls = 10**6
    (got,) = buy(wire, service, tmp_path, deadline_s=0.2)
    assert isinstance(got, Unanswered)
    assert "still running" in str(got)
    assert spent(tmp_path) == pytest.approx(1.0)
    service.polls = 0
    one(wire, service, tmp_path, deadline_s=0.2)
    assert len(service.jobs) == 1


def test_a_task_still_queued_at_its_deadline_is_cancelled(service: Service, tmp_path: Path) -> None:
    service.script("poll", *[state("queued")] * 10**3)

    def cancel(exchange: Any) -> bool:
        service.faults["poll"].clear()
        return False

    service.script("cancel", cancel)
    (got,) = buy("ark", service, tmp_path, deadline_s=0.2)
    assert isinstance(got, Unanswered)
    assert "cancelled" in str(got)
    assert spent(tmp_path) == 0.0


def test_an_unknown_state_is_waited_out_with_one_warning(
    wire: str, service: Service, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    service.script("poll", *[state("pondering")] * 10**3)
    (got,) = buy(wire, service, tmp_path, deadline_s=0.2)
    assert isinstance(got, Unanswered)
    assert caplog.text.count("unknown state 'pondering'") == 1


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        (drip, "no complete answer within 0.2 s"),
        (endless, "exceeds 1048576 bytes"),
        (answer(200, b"0" * 2**21), "exceeds 1048576 bytes"),
        (truncated, "cannot be"),
    ],
)
def test_a_video_that_does_not_come_is_kept_in_the_ledger_and_fetched_later(
    wire: str, service: Service, tmp_path: Path, fault: Any, told: str
) -> None:
    service.script("media", *[fault] * 2)
    (got,) = buy(wire, service, tmp_path, download_s=0.2, max_mib=1.0, tries=2)
    assert isinstance(got, Unanswered)
    assert told in str(got)
    assert not list((tmp_path / "videos").glob("*.partial"))
    assert not list((tmp_path / "videos").glob(".*.partial"))
    service.faults["media"].clear()
    one(wire, service, tmp_path)
    assert len(service.jobs) == 1


def test_a_slow_answer_of_the_api_is_cut_at_its_deadline(service: Service, tmp_path: Path) -> None:
    service.script("poll", drip)
    one("ark", service, tmp_path, request_s=0.2)


def test_the_budget_is_never_exceeded(wire: str, service: Service, tmp_path: Path) -> None:
    got = buy(wire, service, tmp_path, prompts=12, concurrency=8, budget_usd=5.0)
    assert sum(isinstance(path, Path) for path in got) == 5
    assert len(service.jobs) == 5
    refused = [str(error) for error in got if isinstance(error, Exception)]
    assert all("5.00 USD of teacher.fetch.budget_usd=5.00 are spent" in text for text in refused)
    buy(wire, service, tmp_path, prompts=12, concurrency=8, budget_usd=7.0)
    assert len(service.jobs) == 7


def test_bills_above_the_estimate_raise_the_next_estimate(service: Service, tmp_path: Path) -> None:
    """The service bills 1000 tokens, the configuration expects 500."""
    tokens = {"price_per": "million_tokens", "price_usd": 1000.0, "units": 500.0}
    got = buy("ark", service, tmp_path, prompts=8, concurrency=1, budget_usd=3.2, **tokens)
    assert sum(isinstance(path, Path) for path in got) == 3
    assert spent(tmp_path) == pytest.approx(3.0)


def test_a_file_that_was_deleted_is_fetched_again_without_paying(
    wire: str, service: Service, tmp_path: Path
) -> None:
    one(wire, service, tmp_path).unlink()
    one(wire, service, tmp_path).write_bytes(VIDEO[:-100])
    one(wire, service, tmp_path)
    assert len(service.jobs) == 1


def test_a_list_of_many_pages_is_read_to_its_end(
    wire: str, service: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The lost task is on the last page; the service gives two at a time."""
    monkeypatch.setattr("afd.teachers.paid.ark.PAGE", 2)
    service.page = 2
    service.script("submit", lost)
    config = paid_config(wire, service, tmp_path)
    teacher = teacher_of(config)
    future = teacher.start(teacher.requests[0])
    while not service.jobs:
        time.sleep(0.001)
    (job,) = service.jobs.values()
    for number in range(2, 8):
        other = replace(job, number=f"{wire}-{number}", asked=dict(job.asked))
        other.asked |= {"prompt": "x", "seed": 1, "execution_expires_after": 90_000}
        service.jobs[other.number] = other
    assert future.result().read_bytes() == VIDEO
    assert future.exception() is None
    teacher.close()
    assert len(service.jobs) == 7


def test_a_folder_bought_for_something_else_is_refused(service: Service, tmp_path: Path) -> None:
    one("ark", service, tmp_path)
    with pytest.raises(TeacherError, match=r"was bought as .*choose another teacher\.path"):
        buy("ark", service, tmp_path, "teacher.api.options={resolution: 720p}")


def test_the_first_video_too_short_for_the_run_stops_the_buying(
    service: Service, tmp_path: Path
) -> None:
    got = buy("ark", service, tmp_path, "video.frames=9", prompts=5, concurrency=1)
    assert "is too short" in str(got[0])
    assert all(isinstance(error, TeacherError) for error in got)
    assert len(service.jobs) == 1
