"""The ledger of a folder of bought videos: requests, costs and results.

One SQLite file, ledger.sqlite3, with one row per submit. The row is on disk before the request is
sent, and a unique index allows at most one row per video that may have been paid for, so a crash at
any point leaves a record of what may have happened; nothing is ever deleted. Times are Unix
seconds, money is USD. API keys are never stored.
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
# asked: the submit was sent or about to be, with no response recorded (after a crash: in doubt)
# running: the provider returned a task    done: the video is in the folder
# refused: definitely not accepted         failed, cancelled, expired: final states of the task
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
    faults: int  # number of unexpected errors
    fault: str | None  # the last unexpected error


class Ledger:
    """A connection to a folder's ledger; must be used on the thread that created it."""

    def __init__(self, folder: Path, about: dict[str, Any] | None = None) -> None:
        """`about`: identity of the folder's videos (provider, model, parameters); None accepts any.
        Raises TeacherError if the folder was made for something else, or the file is not a
        ledger."""
        self.folder = folder
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
        with self._named_errors():
            self._database = create(folder / NAME)
            # Every commit is flushed to disk; the rollback journal also works on network folders.
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
        """An in-memory copy of the folder's current ledger for inspection, empty if there is none.
        Nothing is written to the folder."""
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
        """Names of bought videos in the folder that are not in any row: the ledger is new, or an
        older copy."""
        if not self.folder.is_dir():
            return []
        there = {name.name for name in self.folder.iterdir() if _BOUGHT.fullmatch(name.name)}
        known = {
            f"{found['name']}.mp4"
            for found in self._all("SELECT DISTINCT substr(key, 1, 32) AS name FROM submits")
        }
        return sorted(there - known)

    def latest(self, key: str) -> Row | None:
        """The newest submit of a video, or None."""
        found = self._one("SELECT * FROM submits WHERE key = ? ORDER BY id DESC LIMIT 1", key)
        return None if found is None else _row(found)

    def reserve(self, order: Order, price_usd: float, budget_usd: float) -> Row:
        """Record a submit that is about to be sent and reserve its price, or raise BudgetError.

        One transaction: concurrent processes never reserve more than the budget in total.
        """
        with self._writing():
            # If a bill exceeded its estimate, scale up the next reservation and those of submits in
            # flight by the same factor.
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
        """Record a success response that does not name the task: the submit was accepted, even if
        the provider's list does not contain it."""
        self._update(row, reason=reason[:500])
        return self._get(row.id)

    def delivered(self, row: Row, bill_usd: float | None) -> None:
        """Record that the provider reported the video as finished. From now on it counts as paid,
        even if the task is later reported as failed. `bill_usd` as in `done`."""
        with self._writing():
            self._database.execute(
                "UPDATE submits SET ended_at = coalesce(ended_at, ?), cost_usd = max(cost_usd, ?)"
                " WHERE id = ?",
                (time.time(), _bill(bill_usd), row.id),
            )

    def done(self, row: Row, file: str, saved: Saved, bill_usd: float | None) -> None:
        """Record that the video is in the folder under its name. `bill_usd`: the bill, which may
        raise the reserved price but never lowers it; None if there is none."""
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
        """Whether the video of a done submit is present. `found`: result of `contents.compare`.

        If another video is in its place, raises ContentsError, or records its hash if
        `accept_changed`.
        """
        same, saved = found
        if same or saved is None:
            return same
        if row.sha256 is not None and not accept_changed:
            raise ContentsError(
                f"{path}: is not the video that was bought (sha256 {saved.sha256[:16]}..., the "
                f"ledger has {row.sha256[:16]}...); restore it, delete it so that it is fetched "
                "again, or take it with teacher.fetch.accept_changed_videos=true"
            )
        _log.warning("%s: accepted with contents other than those bought", path)
        self._update(row, sha256=saved.sha256, bytes=saved.bytes)
        return True

    def found(self, order: Order, saved: Saved, path: Path, adopt: bool) -> None:
        """Handle a finished video of this order found without a submit: if `adopt`, record it at no
        cost, else raise ContentsError."""
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
        """End a submit without a video. `paid`: whether its price may have been charged; the price
        of a video that was once reported finished stays counted."""
        unpaid = "CASE WHEN ended_at IS NULL THEN 0.0 ELSE cost_usd END"
        cost = "max(cost_usd, price_usd)" if paid else unpaid
        with self._writing():
            self._database.execute(
                "UPDATE submits SET state = ?, kind = ?, reason = ?, ended_at = ?,"
                f" cost_usd = {cost} WHERE id = ?",
                (state, kind, reason[:500], time.time(), row.id),
            )

    def task_ids(self) -> set[str]:
        """Ids of all tasks that belong to a submit."""
        query = "SELECT task_id FROM submits WHERE task_id IS NOT NULL"
        return {found["task_id"] for found in self._all(query)}

    def spent_usd(self) -> float:
        """Total of amounts paid, reserved and possibly paid."""
        return float(self._all("SELECT total(cost_usd) FROM submits")[0][0])

    def length(self) -> int:
        """The number of submits ever recorded. Rows are never deleted, so this only grows."""
        return int(self._all("SELECT coalesce(max(id), 0) FROM submits")[0][0])

    def contents(self, length: int, until: float) -> str:
        """A hash over the videos of the first `length` submits that were finished by a time (Unix
        seconds); empty if there were none."""
        query = (
            "SELECT key, sha256 FROM submits WHERE state = 'done' AND id <= ? AND ended_at <= ?"
            " ORDER BY id"
        )
        lines = [f"{found['key']} {found['sha256']}\n" for found in self._all(query, length, until)]
        return hashlib.sha256("".join(lines).encode()).hexdigest() if lines else ""

    def typical_seconds(self) -> float | None:
        """Mean time from a submit to its video on disk; None if none was bought yet."""
        query = (
            "SELECT avg(ended_at - asked_at) FROM submits WHERE state = 'done' AND price_usd > 0"
        )
        found = self._all(query)[0][0]
        return None if found is None else float(found)

    def counts(self) -> dict[str, int]:
        """Number of videos per state of their newest submit; failed ones by their kind."""
        query = (
            "SELECT CASE WHEN state = 'failed' THEN kind ELSE state END AS stands, count(*) AS n "
            "FROM submits WHERE id IN (SELECT max(id) FROM submits GROUP BY key) GROUP BY stands"
        )
        return {found["stands"]: found["n"] for found in self._all(query)}

    def open_rows(self) -> list[tuple[str, Row]]:
        """(prompt, row) of every submit in state asked or running, oldest first."""
        query = "SELECT * FROM submits WHERE state IN ('asked', 'running') ORDER BY id"
        return [(found["prompt"], _row(found)) for found in self._all(query)]

    def about(self) -> dict[str, Any]:
        """Identity of the folder's videos (provider, model, parameters)."""
        found = self._one("SELECT value FROM about WHERE name = 'about'")
        try:
            about = {} if found is None else json.loads(found["value"])
        except ValueError:
            about = None
        if not isinstance(about, dict):
            raise TeacherError(f"{self.folder / NAME}: does not record what its videos are")
        return about

    def write_manifest(self) -> None:
        """Write prompts.jsonl with every finished video, so that a `folder` teacher can read it.

        Entries for other existing files are kept. Written atomically, by one writer at a time.
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
        """Refuse a damaged file before anything is written to it."""
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
                # On a full disk SQLite has already rolled back the transaction.
                if self._database.in_transaction:
                    self._database.execute("ROLLBACK")
                raise

    @contextmanager
    def _named_errors(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.IntegrityError:
            raise  # a violated constraint, handled by the caller
        # Not a database, no space, no write permission; a schema of another version.
        except (sqlite3.Error, SchemaError) as error:
            raise TeacherError(
                f"{self.folder / NAME}: cannot be used ({error}); it records what was paid, "
                "so nothing is bought without it"
            ) from None


def _bill(usd: float | None) -> float:
    return usd if usd is not None and math.isfinite(usd) else 0.0


def refuse_unknown_videos(folder: Path) -> None:
    """Raise TeacherError if a folder holds bought videos that its ledger does not list: the ledger
    is missing, empty or an older copy, so its record of spending is incomplete."""
    ledger = Ledger.snapshot(folder)
    try:
        names = ledger.unknown_videos()
    finally:
        ledger.close()
    if names:
        raise TeacherError(_unknown(folder, names))


def _unknown(folder: Path, names: list[str]) -> str:
    return (
        f"teacher folder {folder}: its {NAME} does not list {len(names)} of the bought videos "
        f"there ({', '.join(names[:3])}): it is missing, empty or an older copy, and what was paid "
        "is not counted; restore it, or take the videos as they are with "
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
            raise TeacherError(f"{NAME}: submit {found['id']} has no readable task")
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
    """Exclusive claims on videos in progress: byte-range locks on one file, one byte per video.

    They are effective between the processes of a machine and released when a process ends. A
    process opens the file once and never closes it, because closing would drop all its locks.
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
        """Try to claim a video; True if this caller now holds it exclusively."""
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
