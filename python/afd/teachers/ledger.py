"""The ledger of a folder of bought videos: what was asked, what it costs, what came back.

One SQLite file, ledger.sqlite3, with one row per submit. The row is on the disk before the submit
leaves, and a unique index allows one row per video that may have been paid, so a crash at any point
leaves a row that says what may have happened; nothing is ever deleted. Times are Unix seconds,
money is USD. API keys never come here.
"""

from __future__ import annotations

import fcntl
import json
import os
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from afd.teachers.base import TeacherError
from afd.teachers.http import Saved
from afd.teachers.provider import Order, Task, canonical

NAME, LOCK, MANIFEST = "ledger.sqlite3", "ledger.lock", "prompts.jsonl"
# asked: the submit left or was about to, no answer is recorded (after a crash: in doubt)
# running: the provider gave a task   done: the video lies in the folder
# refused: surely not accepted        failed, cancelled, expired: the task's own end
# written_off: in doubt or stuck, and the user chose to submit again; its price stays counted
LIVE = ("asked", "running", "done")
_SCHEMA = """
CREATE TABLE IF NOT EXISTS about (name TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS submits (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    key TEXT NOT NULL,
    prompt TEXT NOT NULL,
    draw INTEGER NOT NULL,
    seed INTEGER,
    state TEXT NOT NULL,
    kind TEXT,
    reason TEXT,
    task TEXT,
    task_id TEXT UNIQUE,
    price_usd REAL NOT NULL,
    cost_usd REAL NOT NULL,
    asked_at REAL NOT NULL,
    ended_at REAL,
    file TEXT,
    sha256 TEXT,
    bytes INTEGER
);
CREATE UNIQUE INDEX IF NOT EXISTS one_purchase ON submits (key)
    WHERE state IN ('asked', 'running', 'done');
CREATE INDEX IF NOT EXISTS by_key ON submits (key);
"""


class BudgetError(TeacherError):
    """The next submit could exceed the budget."""


@dataclass(frozen=True)
class Row:
    """One submit."""

    id: int
    key: str
    state: str
    kind: str | None
    reason: str | None
    task: Task | None
    price_usd: float
    asked_at: float
    bytes: int | None

    def holds(self, path: Path) -> bool:
        """Whether this submit's video lies there, as long as it was."""
        return self.state == "done" and path.is_file() and path.stat().st_size == self.bytes


class Ledger:
    """One connection to a folder's ledger; belongs to the thread that made it."""

    def __init__(self, folder: Path, about: dict[str, Any] | None = None) -> None:
        """`about`: what the folder's videos are (provider, model, parameters). A folder made for
        something else is refused with TeacherError, and so is a file that is no ledger; None takes
        the folder as it is."""
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        with self._named_errors():
            self._database = sqlite3.connect(folder / NAME, timeout=60.0, isolation_level=None)
            self._database.row_factory = sqlite3.Row
            # Every commit reaches the disk; the rollback journal also works on network folders.
            self._database.execute("PRAGMA synchronous = FULL")
        with self._writing():
            for statement in _SCHEMA.split(";"):
                self._database.execute(statement)
            there = self._one("SELECT value FROM about WHERE name = 'about'")
            if about is not None and there is None:
                self._database.execute("INSERT INTO about VALUES ('about', ?)", (canonical(about),))
        if about is not None and there is not None and there["value"] != canonical(about):
            self.close()
            raise TeacherError(
                f"teacher folder {folder}: was bought as {there['value']}, this run asks for "
                f"{canonical(about)}; choose another teacher.path= or out=, or "
                "teacher.kind=folder to use it as it is"
            )

    def close(self) -> None:
        self._database.close()

    def latest(self, key: str) -> Row | None:
        """The newest submit of a video."""
        found = self._one("SELECT * FROM submits WHERE key = ? ORDER BY id DESC LIMIT 1", key)
        return None if found is None else _row(found)

    def reserve(self, order: Order, price_usd: float, budget_usd: float) -> Row:
        """Write that a submit is about to leave and count its price, or raise BudgetError.

        One transaction: many processes together never reserve more than the budget.
        """
        with self._writing():
            # Bills above their estimate raise the next estimate alike.
            excess = "SELECT max(cost_usd / price_usd) FROM submits WHERE price_usd > 0"
            price_usd *= max(1.0, self._database.execute(excess).fetchone()[0] or 1.0)
            spent = self._spent()
            if spent + price_usd > budget_usd * (1 + 1e-9):
                raise BudgetError(
                    f"{spent:.2f} USD of teacher.fetch.budget_usd={budget_usd:.2f} are spent or "
                    f"reserved, the next video may cost {price_usd:.2f} USD"
                )
            inserted = self._database.execute(
                "INSERT INTO submits (key, prompt, draw, seed, state, price_usd, cost_usd,"
                " asked_at) VALUES (?, ?, ?, ?, 'asked', ?, ?, ?)",
                (
                    order.key,
                    order.prompt,
                    order.draw,
                    order.seed if order.send_seed else None,
                    price_usd,
                    price_usd,
                    time.time(),
                ),
            )
        return self._get(inserted.lastrowid)

    def running(self, row: Row, task: Task) -> Row | None:
        """Record the provider's task; None if another submit already has that task."""
        try:
            self._update(row, state="running", task=json.dumps(task), task_id=task["id"])
        except sqlite3.IntegrityError:
            return None
        return self._get(row.id)

    def done(self, row: Row, file: str, saved: Saved, cost_usd: float | None) -> None:
        """The video lies in the folder under its name. `cost_usd` None: the estimate stands."""
        extra = {} if cost_usd is None else {"cost_usd": cost_usd}
        self._end(row, "done", file=file, sha256=saved.sha256, bytes=saved.bytes, **extra)

    def found(self, order: Order, saved: Saved) -> None:
        """A finished video of this order lay in the folder without a submit: it costs nothing."""
        with self._writing():
            self._database.execute(
                "INSERT INTO submits (key, prompt, draw, seed, state, reason, price_usd, cost_usd,"
                " asked_at, ended_at, file, sha256, bytes)"
                " VALUES (?, ?, ?, ?, 'done', 'found in the folder', 0, 0, ?, ?, ?, ?, ?)",
                (
                    order.key,
                    order.prompt,
                    order.draw,
                    order.seed if order.send_seed else None,
                    time.time(),
                    time.time(),
                    order.file,
                    saved.sha256,
                    saved.bytes,
                ),
            )

    def end(self, row: Row, state: str, kind: str, reason: str, *, paid: bool) -> None:
        """A submit came to nothing; `paid` says whether its price may have been charged."""
        self._end(row, state, kind=kind, reason=reason, cost_usd=row.price_usd if paid else 0.0)

    def task_ids(self) -> set[str]:
        """Every task that belongs to a submit."""
        query = "SELECT task_id FROM submits WHERE task_id IS NOT NULL"
        return {found["task_id"] for found in self._database.execute(query)}

    def spent_usd(self) -> float:
        """Paid, reserved and possibly paid."""
        return self._spent()

    def length(self) -> int:
        """Submits ever written down; none is taken back, so this only grows."""
        found = self._database.execute("SELECT coalesce(max(id), 0) FROM submits").fetchone()
        return int(found[0])

    def typical_seconds(self) -> float | None:
        """Mean time from a submit to its video on the disk; None where none was bought yet."""
        query = (
            "SELECT avg(ended_at - asked_at) FROM submits WHERE state = 'done' AND price_usd > 0"
        )
        found = self._database.execute(query).fetchone()[0]
        return None if found is None else float(found)

    def counts(self) -> dict[str, int]:
        """How many videos stand where; a failed one under its kind. The newest submit counts."""
        query = (
            "SELECT CASE WHEN state = 'failed' THEN kind ELSE state END AS stands, count(*) AS n "
            "FROM submits WHERE id IN (SELECT max(id) FROM submits GROUP BY key) GROUP BY stands"
        )
        return {found["stands"]: found["n"] for found in self._database.execute(query)}

    def open_rows(self) -> list[tuple[str, Row]]:
        """(prompt, row) of every submit that is asked or running, oldest first."""
        query = "SELECT * FROM submits WHERE state IN ('asked', 'running') ORDER BY id"
        return [(found["prompt"], _row(found)) for found in self._database.execute(query)]

    def about(self) -> dict[str, Any]:
        """What the folder's videos are."""
        found = self._one("SELECT value FROM about WHERE name = 'about'")
        return {} if found is None else json.loads(found["value"])

    def write_manifest(self) -> None:
        """prompts.jsonl with every finished video, so that the folder is a `folder` teacher.

        Entries of other files that are there stay. Replaced as a whole, one writer at a time.
        """
        query = "SELECT * FROM submits WHERE state = 'done' ORDER BY draw, id"
        path = self.folder / MANIFEST
        with (self.folder / f"{MANIFEST}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            made_by = {k: v for k, v in self.about().items() if k in ("provider", "model")}
            mine = [
                {"file": f["file"], "prompt": f["prompt"], "seed": f["seed"], "sha256": f["sha256"]}
                | made_by
                for f in self._database.execute(query)
                if (self.folder / f["file"]).is_file()
            ]
            names = {entry["file"] for entry in mine}
            others = [entry for entry in _entries(path) if entry.get("file") not in names]
            partial = path.with_name(f".{MANIFEST}.partial")
            with partial.open("w", encoding="utf-8") as file:
                for entry in [*others, *mine]:
                    file.write(json.dumps(entry, ensure_ascii=False) + "\n")
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)

    def _spent(self) -> float:
        return float(self._database.execute("SELECT total(cost_usd) FROM submits").fetchone()[0])

    def _end(self, row: Row, state: str, **values: Any) -> None:
        self._update(row, state=state, ended_at=time.time(), **values)

    def _update(self, row: Row, **values: Any) -> None:
        with self._writing():
            self._database.execute(
                f"UPDATE submits SET {', '.join(f'{name} = ?' for name in values)} WHERE id = ?",
                (*values.values(), row.id),
            )

    def _get(self, number: int | None) -> Row:
        return _row(
            self._database.execute("SELECT * FROM submits WHERE id = ?", (number,)).fetchone()
        )

    def _one(self, query: str, *values: Any) -> sqlite3.Row | None:
        return self._database.execute(query, values).fetchone()

    @contextmanager
    def _writing(self) -> Iterator[None]:
        with self._named_errors():
            self._database.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._database.execute("COMMIT")
            except BaseException:
                # A full disk has ended the transaction already.
                if self._database.in_transaction:
                    self._database.execute("ROLLBACK")
                raise

    @contextmanager
    def _named_errors(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.IntegrityError:
            raise  # a rule of ours
        except sqlite3.Error as error:  # no database, no space, no right to write
            raise TeacherError(
                f"{self.folder / NAME}: cannot be used ({error}); it knows what is paid, so "
                "nothing is bought without it"
            ) from None


def _row(found: sqlite3.Row) -> Row:
    names = Row.__dataclass_fields__
    values = {name: found[name] for name in names}
    values["task"] = json.loads(found["task"]) if found["task"] else None
    return Row(**values)


def _entries(path: Path) -> list[dict[str, Any]]:
    """The readable entries of a manifest."""
    entries = []
    if path.is_file():
        for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
            try:
                entry = json.loads(line)
            except ValueError:
                continue
            if isinstance(entry, dict):
                entries.append(entry)
    return entries


class Claims:
    """Who works on which video: byte locks of one file, one byte per video.

    They hold between the processes of a machine and go with the process that dies. A process opens
    the file once and never closes it, because closing would drop all its locks.
    """

    _files: ClassVar[dict[tuple[int, str], tuple[int, set[int]]]] = {}
    _guard = threading.Lock()

    def __init__(self, folder: Path) -> None:
        name = (os.getpid(), str((folder / LOCK).resolve()))
        with self._guard:
            if name not in self._files:
                descriptor = os.open(name[1], os.O_RDWR | os.O_CREAT, 0o644)
                self._files[name] = descriptor, set()
            self._descriptor, self._mine = self._files[name]

    def take(self, key: str) -> bool:
        """Whether this caller alone now works on the video."""
        place = _byte(key)
        with self._guard:
            if place in self._mine:
                return False
            try:
                fcntl.lockf(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, place)
            except OSError:
                return False
            self._mine.add(place)
            return True

    def release(self, key: str) -> None:
        place = _byte(key)
        with self._guard:
            fcntl.lockf(self._descriptor, fcntl.LOCK_UN, 1, place)
            self._mine.discard(place)


def _byte(key: str) -> int:
    return int(key[:15], 16)
