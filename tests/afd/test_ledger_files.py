"""A ledger's file over time: older and newer versions, damage, and the videos that it binds."""

from __future__ import annotations

import gc
import os
import shutil
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest

from afd.errors import ContentsError, TeacherError
from afd.teachers.paid.ledger import NAME, Ledger
from afd.teachers.paid.schema import VERSION
from afd.teachers.paid.teacher import PROVIDERS, ApiTeacher
from tests.afd.paid import paid_config, teacher_of, video_bytes
from tests.afd.service import KEY, Service
from tests.afd.test_ledger import order

VIDEO, OTHER = video_bytes(), video_bytes(frames=5)
# Written by the ledger of commit fedd166, which carried no version, after bills of 0.25, -8000, 0.
V1 = (Path(__file__).parent / "fixtures" / "ledger_v1.sql").read_text(encoding="utf-8")


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch) -> Iterator[Service]:
    for provider in PROVIDERS.values():
        monkeypatch.setenv(provider.key_variable, KEY)
    with Service(VIDEO).running() as running:
        yield running


@pytest.fixture
def old(tmp_path: Path) -> Path:
    database = sqlite3.connect(tmp_path / NAME)
    database.executescript(V1)
    database.close()
    return tmp_path


def test_an_older_ledger_is_brought_to_this_version(old: Path) -> None:
    before = (old / NAME).read_bytes()
    looked = Ledger.snapshot(old)
    assert looked.spent_usd() == pytest.approx(1.0 + 0.25 + 1.0 + 1.0 + 1.0 + 1.0)
    assert [row.state for _, row in looked.open_rows()] == ["running", "asked"]
    looked.close()
    assert (old / NAME).read_bytes() == before
    for _ in range(2):
        ledger = Ledger(old, {"provider": "ark", "model": "m"})
        assert ledger._database.execute("PRAGMA user_version").fetchone()[0] == VERSION
        assert ledger.counts() == {"done": 4, "running": 1, "asked": 1, "content": 1}
        # What was no price is the price that was reserved; a real bill stays.
        assert ledger.spent_usd() == pytest.approx(5.25)
        row = ledger.latest(order(4, model="m").key)
        assert (row.task, row.faults, row.fault) == ({"id": "t4"}, 0, None)
        ledger.fault(order(4).key, "TypeError")
        assert ledger.latest(order(4).key).faults == 1
        ledger._database.execute("UPDATE submits SET faults = 0, fault = NULL")
        ledger.close()


def test_a_migration_that_is_cut_off_leaves_the_older_version(
    old: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "afd.teachers.paid.schema._MIGRATIONS",
        {1: "ALTER TABLE submits ADD COLUMN faults INTEGER; ALTER TABLE absent ADD COLUMN x"},
    )
    with pytest.raises(TeacherError, match="no such table"):
        Ledger(old)
    monkeypatch.undo()
    Ledger(old).close()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            "PRAGMA user_version = 99",
            f"version 99, this version of afd supports up to {VERSION}",
        ),
        ("UPDATE submits SET cost_usd = -5 WHERE id = 1", "1 of its rows have no price"),
        ("UPDATE submits SET cost_usd = 9e999 WHERE id = 1", "1 of its rows have no price"),
        ("UPDATE submits SET cost_usd = 'free' WHERE id = 1", "1 of its rows have no price"),
        ("DROP TABLE submits", "it is the database of another program"),
    ],
)
def test_a_ledger_that_this_version_cannot_use_is_refused(
    tmp_path: Path, change: str, message: str
) -> None:
    ledger = Ledger(tmp_path)
    ledger.reserve(order(), 1.0, 10.0)
    ledger._database.execute(change)
    ledger.close()
    for way in (Ledger, Ledger.snapshot):
        with pytest.raises(TeacherError, match=f"cannot be used .*{message}"):
            way(tmp_path)


def test_another_programs_database_is_left_alone(tmp_path: Path) -> None:
    database = sqlite3.connect(tmp_path / NAME)
    database.execute("CREATE TABLE notes (text)")
    database.close()
    before = (tmp_path / NAME).read_bytes()
    with pytest.raises(TeacherError, match="database of another program"):
        Ledger(tmp_path, {"provider": "ark"})
    assert (tmp_path / NAME).read_bytes() == before


@pytest.mark.parametrize("at", [0, 100, 8192, 12288])
def test_a_damaged_ledger_ends_in_a_sentence(tmp_path: Path, at: int) -> None:
    ledger = Ledger(tmp_path)
    for number in range(30):
        ledger.reserve(order(number), 0.01, 10.0)
    ledger.close()
    data = bytearray((tmp_path / NAME).read_bytes())
    data[at : at + 64] = b"\xa5" * 64
    (tmp_path / NAME).write_bytes(data)
    for way in (Ledger, Ledger.snapshot):
        with pytest.raises(TeacherError, match=r"ledger\.sqlite3: cannot be used \("):
            way(tmp_path)


def test_a_damaged_row_ends_in_a_sentence(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    ledger.running(ledger.reserve(order(), 1.0, 10.0), {"id": "t"})
    for torn in ("{'id'", "[1]", '"t"', "1"):
        ledger._database.execute("UPDATE submits SET task = ?", (torn,))
        with pytest.raises(TeacherError, match="submit 1 has no readable task"):
            ledger.latest(order().key)
    ledger._database.execute("UPDATE submits SET task = CAST(x'fffe' AS TEXT)")
    with pytest.raises(TeacherError, match="cannot be used"):
        ledger.latest(order().key)
    ledger.close()


def test_a_full_disk_stops_the_buying_with_a_sentence(
    service: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace = os.replace

    def full(source: Path, target: Path) -> None:
        if str(target).endswith(".mp4"):
            raise OSError(28, "No space left on device")
        replace(source, target)

    monkeypatch.setattr(os, "replace", full)
    teacher = teacher_of(paid_config("ark", service, tmp_path, prompts=5, concurrency=1))
    errors = [teacher.start(request).exception() for request in teacher.requests]
    teacher.close()
    assert "cannot be written (No space left on device); nothing more is bought" in str(errors[0])
    assert all(isinstance(error, TeacherError) for error in errors)
    assert len(service.jobs) == 1


# --- contents ---


def bought(service: Service, folder: Path, prompts: int = 2, **fetch: object) -> ApiTeacher:
    teacher = teacher_of(paid_config("ark", service, folder, prompts=prompts, **fetch))
    for request in teacher.requests:
        teacher.start(request).exception()
    return teacher


def test_a_video_that_was_exchanged_is_named_and_refused(service: Service, tmp_path: Path) -> None:
    teacher = bought(service, tmp_path)
    path, other = (teacher.answer(request) for request in teacher.requests)
    teacher.close()
    # As long as before, and a video.
    box = len(OTHER) - len(VIDEO)
    same_size = VIDEO + b"\0\0\0\x08free" if box == 8 else VIDEO[:-1] + bytes([VIDEO[-1] ^ 1])
    for changed in (OTHER, same_size):
        path.write_bytes(changed)
        teacher = bought(service, tmp_path)
        with pytest.raises(ContentsError, match=rf"{path.name}: is not the video that was bought"):
            teacher.answer(teacher.requests[0])
        assert teacher.answer(teacher.requests[1]) == other
        teacher.close()
    assert len(service.jobs) == 2
    for _ in range(2):  # bound anew by the first
        teacher = bought(service, tmp_path, accept_changed_videos=True)
        assert teacher.answer(teacher.requests[0]).read_bytes() == same_size
        teacher.close()
    path.unlink()
    teacher = bought(service, tmp_path)
    with pytest.raises(ContentsError, match="is not the video that was bought"):
        teacher.answer(teacher.requests[0])
    assert not list(path.parent.glob(".*.partial"))
    teacher.close()
    assert len(service.jobs) == 2


def test_a_checkpoint_knows_which_videos_there_were(service: Service, tmp_path: Path) -> None:
    teacher = bought(service, tmp_path)
    state = teacher.state_dict()
    teacher.close()
    shutil.copytree(tmp_path, tmp_path / "copy")
    more = bought(service, tmp_path, prompts=4)  # later ones change nothing
    more.load_state_dict(state)
    more.close()
    folder = tmp_path / "videos"
    database = sqlite3.connect(folder / NAME)
    database.execute("UPDATE submits SET sha256 = ? WHERE id = 1", ("0" * 64,))
    database.commit()
    database.close()
    teacher = teacher_of(paid_config("ark", service, tmp_path))
    with pytest.raises(TeacherError, match="knows other videos than at the checkpoint"):
        teacher.load_state_dict(state)
    teacher.load_state_dict({"submits": 1, "spent_usd": 1.0})  # of an older version
    teacher.close()
    teacher = teacher_of(paid_config("ark", service, tmp_path, accept_changed_videos=True))
    teacher.load_state_dict(state)
    teacher.close()


def test_a_teacher_left_behind_without_its_folder_logs_one_sentence(
    service: Service, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "videos"
    teacher = teacher_of(paid_config("ark", service, folder))
    teacher.start(teacher.requests[0]).result()
    worker = teacher._worker
    assert worker is not None
    shutil.rmtree(folder)
    del teacher
    gc.collect()
    assert not worker._thread.is_alive()
    (line,) = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
    assert str(folder) in line
