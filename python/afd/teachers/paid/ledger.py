"""The ledger of a folder of bought videos: what was asked, what it costs, what came back.

One SQLite file, ledger.sqlite3, with one row per submit. The row is on the disk before the submit
leaves, and a unique index allows one row per video that may have been paid, so a crash at any point
leaves a row that says what may have happened; nothing is ever deleted. Times are Unix seconds,
money is USD. API keys never come here.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import math
import os
import re
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from afd.errors import BudgetError, ContentsError, SchemaError, TeacherError
from afd.teachers.paid.contents import Saved, writing
from afd.teachers.paid.schema import connect, copy, create, prepare
from afd.teachers.paid.service import Order, Task, canonical

NAME, LOCK, MANIFEST = "ledger.sqlite3", "ledger.lock", "prompts.jsonl"
# asked: the submit left or was about to, no answer is recorded (after a crash: in doubt)
# running: the provider gave a task   done: the video lies in the folder
# refused: surely not accepted        failed, cancelled, expired: the task's own end
# written_off: in doubt or stuck, and the user chose to submit again; its price stays counted
LIVE = ("asked", "running", "done")
_BOUGHT = re.compile(r"[0-9a-f]{32}\.mp4")  # names of bought videos
_log = logging.getLogger("afd")


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
    sha256: str | None
    bytes: int | None
    faults: int  # unexpected errors on the way
    fault: str | None  # the last of them


class Ledger:
    """One connection to a folder's ledger; belongs to the thread that made it."""

    def __init__(self, folder: Path, about: dict[str, Any] | None = None) -> None:
        """`about`: what the folder's videos are (provider, model, parameters). A folder made for
        something else is refused with TeacherError, and so is a file that is no ledger; None takes
        the folder as it is."""
        self.folder = folder
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
        with self._named_errors():
            self._database = create(folder / NAME)
            # Every commit reaches the disk; the rollback journal also works on network folders.
            self._database.execute("PRAGMA synchronous = FULL")
            self._check()
        with self._writing():
            prepare(self._database)
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

    @classmethod
    def snapshot(cls, folder: Path) -> Ledger:
        """A copy in memory of what the folder's ledger holds now, to look at: nothing is written
        to the folder. An empty one where there is none."""
        ledger = cls.__new__(cls)
        ledger.folder = folder
        with ledger._named_errors():
            ledger._database = connect(":memory:")
            if (folder / NAME).is_file():
                copy(folder / NAME, ledger._database)
            ledger._check()
            prepare(ledger._database)
        return ledger

    def close(self) -> None:
        self._database.close()

    def unknown_videos(self) -> list[str]:
        """Names of bought videos that lie in the folder and stand in no row: the ledger is new, or
        an older copy than they."""
        if not self.folder.is_dir():
            return []
        there = {name.name for name in self.folder.iterdir() if _BOUGHT.fullmatch(name.name)}
        known = {
            f"{found['name']}.mp4"
            for found in self._all("SELECT DISTINCT substr(key, 1, 32) AS name FROM submits")
        }
        return sorted(there - known)

    def latest(self, key: str) -> Row | None:
        """The newest submit of a video."""
        found = self._one("SELECT * FROM submits WHERE key = ? ORDER BY id DESC LIMIT 1", key)
        return None if found is None else _row(found)

    def reserve(self, order: Order, price_usd: float, budget_usd: float) -> Row:
        """Write that a submit is about to leave and count its price, or raise BudgetError.

        One transaction: many processes together never reserve more than the budget.
        """
        with self._writing():
            # Bills above their estimate raise the next one alike, and those of what is under way.
            excess = "SELECT max(cost_usd / price_usd) FROM submits WHERE price_usd > 0"
            price_usd *= max(1.0, self._one(excess)[0] or 1.0)
            if not (math.isfinite(price_usd) and price_usd >= 0):
                raise BudgetError(f"the next video has no finite price ({price_usd} USD)")
            spent = float(
                self._one(
                    "SELECT total(CASE WHEN state IN ('asked', 'running') THEN max(cost_usd, ?)"
                    " ELSE cost_usd END) FROM submits",
                    price_usd,
                )[0]
            )
            if not spent + price_usd <= budget_usd * (1 + 1e-9):
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

    def received(self, row: Row, reason: str) -> Row:
        """An answer of success came that does not name the task: it was taken, whatever a list
        says."""
        self._update(row, reason=reason[:500])
        return self._get(row.id)

    def delivered(self, row: Row, bill_usd: float | None) -> None:
        """The provider says that the video is finished: from here on it is paid, also if the task
        is said to have failed later. A bill as in `done`."""
        with self._writing():
            self._database.execute(
                "UPDATE submits SET ended_at = coalesce(ended_at, ?), cost_usd = max(cost_usd, ?)"
                " WHERE id = ?",
                (time.time(), _bill(bill_usd), row.id),
            )

    def done(self, row: Row, file: str, saved: Saved, bill_usd: float | None) -> None:
        """The video lies in the folder under its name. A bill may raise what was reserved for
        it and never lowers it; None: there is none."""
        with self._writing():
            self._database.execute(
                "UPDATE submits SET state = 'done', ended_at = CASE WHEN state = 'done' THEN"
                " ended_at ELSE ? END, file = ?, sha256 = ?, bytes = ?, cost_usd = max(cost_usd, ?)"
                " WHERE id = ?",
                (time.time(), file, saved.sha256, saved.bytes, _bill(bill_usd), row.id),
            )

    def holds(
        self, row: Row, path: Path, found: tuple[bool, Saved | None], accept_changed: bool
    ) -> bool:
        """Whether the video of a done submit lies there. `found`: as `contents.compare` has it.

        Another video in its place is refused with ContentsError, or bound anew if accepted.
        """
        same, saved = found
        if same or saved is None:
            return same
        if row.sha256 is not None and not accept_changed:
            raise ContentsError(
                f"{path}: is not the video that was bought (sha256 {saved.sha256[:16]}..., the "
                f"ledger has {row.sha256[:16]}...); put it back, delete it so that it is fetched "
                "again, or take it with teacher.fetch.accept_changed_videos=true"
            )
        _log.warning("%s: taken with other contents than were bought", path)
        self._update(row, sha256=saved.sha256, bytes=saved.bytes)
        return True

    def found(self, order: Order, saved: Saved, path: Path, adopt: bool) -> None:
        """A finished video of this order lay in the folder without a submit: adopted, it costs
        nothing; else ContentsError."""
        if not adopt:
            raise ContentsError(_unknown(self.folder, [path.name]))
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

    def fault(self, key: str, what: str) -> None:
        """Count an unexpected error of a video's newest submit, if there is one."""
        with self._writing():
            self._database.execute(
                "UPDATE submits SET faults = faults + 1, fault = ?"
                " WHERE id = (SELECT max(id) FROM submits WHERE key = ?)",
                (what[:500], key),
            )

    def end(self, row: Row, state: str, kind: str, reason: str, *, paid: bool) -> None:
        """A submit came to nothing; `paid` says whether its price may have been charged. That of a
        video that was finished once stays."""
        unpaid = "CASE WHEN ended_at IS NULL THEN 0.0 ELSE cost_usd END"
        cost = "max(cost_usd, price_usd)" if paid else unpaid
        with self._writing():
            self._database.execute(
                "UPDATE submits SET state = ?, kind = ?, reason = ?, ended_at = ?,"
                f" cost_usd = {cost} WHERE id = ?",
                (state, kind, reason[:500], time.time(), row.id),
            )

    def task_ids(self) -> set[str]:
        """Every task that belongs to a submit."""
        query = "SELECT task_id FROM submits WHERE task_id IS NOT NULL"
        return {found["task_id"] for found in self._all(query)}

    def spent_usd(self) -> float:
        """Paid, reserved and possibly paid."""
        return float(self._all("SELECT total(cost_usd) FROM submits")[0][0])

    def length(self) -> int:
        """Submits ever written down; none is taken back, so this only grows."""
        return int(self._all("SELECT coalesce(max(id), 0) FROM submits")[0][0])

    def contents(self, length: int, until: float) -> str:
        """One hash of the videos that lay there at a time (Unix seconds), of the first `length`
        submits: empty where there were none."""
        query = (
            "SELECT key, sha256 FROM submits WHERE state = 'done' AND id <= ? AND ended_at <= ?"
            " ORDER BY id"
        )
        lines = [f"{found['key']} {found['sha256']}\n" for found in self._all(query, length, until)]
        return hashlib.sha256("".join(lines).encode()).hexdigest() if lines else ""

    def typical_seconds(self) -> float | None:
        """Mean time from a submit to its video on the disk; None where none was bought yet."""
        query = (
            "SELECT avg(ended_at - asked_at) FROM submits WHERE state = 'done' AND price_usd > 0"
        )
        found = self._all(query)[0][0]
        return None if found is None else float(found)

    def counts(self) -> dict[str, int]:
        """How many videos stand where; a failed one under its kind. The newest submit counts."""
        query = (
            "SELECT CASE WHEN state = 'failed' THEN kind ELSE state END AS stands, count(*) AS n "
            "FROM submits WHERE id IN (SELECT max(id) FROM submits GROUP BY key) GROUP BY stands"
        )
        return {found["stands"]: found["n"] for found in self._all(query)}

    def open_rows(self) -> list[tuple[str, Row]]:
        """(prompt, row) of every submit that is asked or running, oldest first."""
        query = "SELECT * FROM submits WHERE state IN ('asked', 'running') ORDER BY id"
        return [(found["prompt"], _row(found)) for found in self._all(query)]

    def about(self) -> dict[str, Any]:
        """What the folder's videos are."""
        found = self._one("SELECT value FROM about WHERE name = 'about'")
        try:
            about = {} if found is None else json.loads(found["value"])
        except ValueError:
            about = None
        if not isinstance(about, dict):
            raise TeacherError(f"{self.folder / NAME}: does not say what its videos are")
        return about

    def write_manifest(self) -> None:
        """prompts.jsonl with every finished video, so that the folder is a `folder` teacher.

        Entries of other files that are there stay. Replaced as a whole, one writer at a time.
        """
        query = "SELECT * FROM submits WHERE state = 'done' ORDER BY draw, id"
        path = self.folder / MANIFEST
        with writing(self.folder), (self.folder / f"{MANIFEST}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            made_by = {k: v for k, v in self.about().items() if k in ("provider", "model")}
            mine = [
                {"file": f["file"], "prompt": f["prompt"], "seed": f["seed"], "sha256": f["sha256"]}
                | made_by
                for f in self._all(query)
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

    def _update(self, row: Row, **values: Any) -> None:
        with self._writing():
            self._database.execute(
                f"UPDATE submits SET {', '.join(f'{name} = ?' for name in values)} WHERE id = ?",
                (*values.values(), row.id),
            )

    def _get(self, number: int | None) -> Row:
        return _row(self._all("SELECT * FROM submits WHERE id = ?", number)[0])

    def _one(self, query: str, *values: Any) -> Any:
        found = self._all(query, *values)
        return found[0] if found else None

    def _all(self, query: str, *values: Any) -> list[sqlite3.Row]:
        with self._named_errors():
            return self._database.execute(query, values).fetchall()

    def _check(self) -> None:
        """Refuse a damaged file before anything is added to it."""
        found = self._database.execute("PRAGMA quick_check(1)").fetchone()[0]
        if found != "ok":
            raise SchemaError(f"it is damaged: {found}")

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
        # No database, no space, no right to write; a schema of another version.
        except (sqlite3.Error, SchemaError) as error:
            raise TeacherError(
                f"{self.folder / NAME}: cannot be used ({error}); it knows what is paid, so "
                "nothing is bought without it"
            ) from None


def _bill(usd: float | None) -> float:
    return usd if usd is not None and math.isfinite(usd) else 0.0


def refuse_unknown_videos(folder: Path) -> None:
    """TeacherError where bought videos lie in a folder whose ledger does not know them: it is gone,
    empty or an older copy, and what it counted as paid with it."""
    ledger = Ledger.snapshot(folder)
    try:
        names = ledger.unknown_videos()
    finally:
        ledger.close()
    if names:
        raise TeacherError(_unknown(folder, names))


def _unknown(folder: Path, names: list[str]) -> str:
    return (
        f"teacher folder {folder}: its {NAME} does not know {len(names)} of the bought videos "
        f"there ({', '.join(names[:3])}): it is missing, empty or an older copy, and what was paid "
        "is not counted; put it back, or take the videos as they are with "
        "teacher.fetch.adopt_videos=true"
    )


def _row(found: sqlite3.Row) -> Row:
    names = Row.__dataclass_fields__
    values = {name: found[name] for name in names}
    if found["task"]:
        try:
            task = json.loads(found["task"])
        except ValueError:
            task = None
        if not isinstance(task, dict):
            raise TeacherError(f"{NAME}: submit {found['id']} holds no task that can be read")
        values["task"] = task
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
            if isinstance(entry, dict) and isinstance(entry.get("file"), str):
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
                with writing(folder):
                    descriptor = os.open(name[1], os.O_RDWR | os.O_CREAT, 0o666)
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
