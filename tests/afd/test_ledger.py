"""The ledger: money under concurrency, and kill -9 at every event of a purchase."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from afd.config.run import to_yaml
from afd.errors import BudgetError, TeacherError
from afd.teachers.folder import FolderTeacher
from afd.teachers.paid.contents import Saved
from afd.teachers.paid.ledger import NAME, Claims, Ledger
from afd.teachers.paid.service import Order
from tests.afd.paid import paid_config, teacher_of, video_bytes
from tests.afd.service import KEY, Service

ROOT = Path(__file__).parents[2]


def order(number: int = 0, **changes: object) -> Order:
    fields = {"provider": "ark", "model": "m", "prompt": f"p{number}", "parameters": {}, "seed": 7}
    return Order(**(fields | changes))


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    opened = Ledger(tmp_path, {"provider": "ark"})
    yield opened
    opened.close()


def test_the_key_depends_on_everything_that_decides_the_video() -> None:
    changes = [
        {"provider": "fal"},
        {"model": "n"},
        {"prompt": "q"},
        {"parameters": {"duration": 5}},
        {"seed": 8},
    ]
    keys = {order(**change).key for change in changes} | {order().key}
    assert len(keys) == 6
    assert order(parameters={"a": 1, "b": 2}).key == order(parameters={"b": 2, "a": 1}).key


def test_a_second_submit_of_what_may_be_paid_is_refused_by_the_database(ledger: Ledger) -> None:
    ledger.reserve(order(), 1.0, 10.0)
    with pytest.raises(Exception, match="UNIQUE"):
        ledger.reserve(order(), 1.0, 10.0)
    assert ledger.spent_usd() == 1.0


def test_a_run_goes_on_only_with_a_ledger_that_holds_what_its_checkpoint_knew(
    tmp_path: Path,
) -> None:
    with Service(video_bytes()).running() as service:
        config = paid_config("ark", service, tmp_path, prompts=2)
        teacher = teacher_of(config)
        early = teacher.state_dict()
        assert early == {"submits": 0, "spent_usd": 0.0}
        books = Ledger(teacher.folder)
        books.reserve(order(), 1.5, 10.0)
        books.close()
        known = teacher.state_dict()
        assert known == {"submits": 1, "spent_usd": 1.5}
        for state in (early, known):
            teacher.load_state_dict(state)
        teacher.close()
        elsewhere = teacher_of(paid_config("ark", service, tmp_path / "elsewhere", prompts=2))
        with pytest.raises(TeacherError, match=r"0 submits for 0\.00 USD, .* 1 for 1\.50 USD"):
            elsewhere.load_state_dict(known)
        elsewhere.close()


def test_a_task_belongs_to_one_submit(ledger: Ledger) -> None:
    first, second = (ledger.reserve(order(n), 1.0, 10.0) for n in range(2))
    assert ledger.running(first, {"id": "t"}) is not None
    assert ledger.running(second, {"id": "t"}) is None
    assert ledger.latest(order(1).key).state == "asked"


def test_what_is_written_is_there_for_the_next_process(ledger: Ledger, tmp_path: Path) -> None:
    row = ledger.running(ledger.reserve(order(), 1.5, 10.0), {"id": "t", "url": "u"})
    ledger.done(row, order().file, Saved("0" * 64, 10), 2.0)
    again = Ledger(tmp_path, {"provider": "ark"})
    found = again.latest(order().key)
    assert (found.state, found.task, found.bytes) == ("done", {"id": "t", "url": "u"}, 10)
    assert again.spent_usd() == 2.0
    again.close()
    with pytest.raises(TeacherError, match="was bought as"):
        Ledger(tmp_path, {"provider": "fal"})


def test_a_ledger_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    (tmp_path / NAME).write_text("no database, whatever its name says")
    with pytest.raises(TeacherError, match=r"ledger\.sqlite3: cannot be used \(file is not a data"):
        Ledger(tmp_path)
    full = Ledger(tmp_path / "full", {"provider": "ark"})
    kept = full.reserve(order(), 1.0, 10.0)
    (pages,) = full._database.execute("PRAGMA page_count").fetchone()
    full._database.execute(f"PRAGMA max_page_count = {pages}")
    many = (full.reserve(order(number), 0.0, 10.0) for number in range(1, 10_000))
    with pytest.raises(TeacherError, match=r"cannot be used \(database or disk is full\)"):
        list(many)
    assert full.latest(order().key) == kept
    full.close()


def test_many_together_never_reserve_more_than_the_budget(tmp_path: Path) -> None:
    Ledger(tmp_path).close()
    reserved: list[int] = []

    def spend(start: int) -> None:
        mine = Ledger(tmp_path)
        for number in range(start, start + 10):
            try:
                mine.reserve(order(number), 0.7, 10.0)
                reserved.append(number)
            except BudgetError:
                pass
        mine.close()

    threads = [threading.Thread(target=spend, args=(10 * n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(reserved) == 14
    last = Ledger(tmp_path)
    assert last.spent_usd() == pytest.approx(9.8)
    last.close()


def test_only_one_works_on_a_video_also_between_processes(tmp_path: Path) -> None:
    key, other = order().key, order(1).key
    claims, alike = Claims(tmp_path), Claims(tmp_path)
    assert claims.take(key)
    assert not alike.take(key)

    def in_another_process(wanted: str) -> bool:
        number = os.fork()
        if number == 0:
            os._exit(int(Claims(tmp_path).take(wanted)))
        return bool(os.waitstatus_to_exitcode(os.waitpid(number, 0)[1]))

    assert not in_another_process(key)
    assert in_another_process(other)
    claims.release(key)
    assert in_another_process(key)
    assert alike.take(key)
    alike.release(key)


def test_the_manifest_keeps_what_others_wrote(ledger: Ledger, tmp_path: Path) -> None:
    (tmp_path / "prompts.jsonl").write_text('{"file": "mine.mp4", "prompt": "x"}\ntorn', "utf-8")
    video = video_bytes()
    (tmp_path / "mine.mp4").write_bytes(video)
    (tmp_path / order().file).write_bytes(video)
    row = ledger.running(ledger.reserve(order(), 1.0, 10.0), {"id": "t"})
    ledger.done(row, order().file, Saved("0" * 64, len(video)), None)
    for _ in range(2):
        ledger.write_manifest()
        teacher = FolderTeacher(tmp_path)
        assert [request.prompt for request in teacher.requests] == ["x", "p0"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("wire", "first", "step"), [("ark", 1, 2), ("openai", 2, 3), ("fal", 1, 3)]
)
def test_killed_at_any_event_nothing_is_paid_twice_and_no_video_is_lost(
    tmp_path: Path, wire: str, first: int, step: int
) -> None:
    """Each event has its own prompt and folder, so the service distinguishes their ledgers."""
    service = Service(video_bytes())
    with service.running():
        config = paid_config(wire, service, tmp_path, deadline_s=2.0)
        file = tmp_path / f"{wire}.yaml"
        file.write_text(to_yaml(config), encoding="utf-8")
        key = {"ark": "ARK_API_KEY", "openai": "OPENAI_API_KEY", "fal": "FAL_KEY"}[wire]
        run = subprocess.run(
            [sys.executable, "-m", "tests.afd.killed_teacher", str(file), str(first), str(step)],
            cwd=ROOT,
            env=os.environ | {key: KEY, "PYTHONPATH": f"{ROOT}:{ROOT / 'python'}"},
            capture_output=True,
            text=True,
            check=False,
        )
    assert run.returncode == 0, run.stderr
    outcomes = [[int(word) for word in line.split()] for line in run.stdout.splitlines()]
    assert len(outcomes) > 40 / step
    assert {killed for _, killed, _ in outcomes[:-1]} == {-9}
    assert {code for *_, code in outcomes} == {0}, run.stderr
    paid = service.paid()
    assert set(paid.values()) <= {1}
    for event, _, _ in outcomes:
        folder = tmp_path / f"{wire}-{event}"
        bought = sum(f"event {event}|" in which for which in paid)
        ledger = Ledger(folder)
        counts, spent = ledger.counts(), ledger.spent_usd()
        ledger.close()
        assert spent == pytest.approx(1.0), event
        if bought:
            assert counts == {"done": 1}, event
            assert len(FolderTeacher(folder, frames=4).requests) == 1
        else:
            # Only fal has no proof that a submit never arrived: in doubt, counted, not repeated.
            assert (wire, counts) == ("fal", {"asked": 1}), event
