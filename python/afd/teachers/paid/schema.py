"""The SQLite schema of a ledger: tables, version and migrations."""

from __future__ import annotations

import os
import sqlite3
from contextlib import suppress
from pathlib import Path

from afd.errors import SchemaError

# Version 1 files carry no version number: they have its tables and user_version 0.
VERSION = 2
_TABLES = """
CREATE TABLE about (name TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE submits (
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
    bytes INTEGER,
    faults INTEGER NOT NULL DEFAULT 0,
    fault TEXT
);
CREATE UNIQUE INDEX one_purchase ON submits (key)
    WHERE state IN ('asked', 'running', 'done');
CREATE INDEX by_key ON submits (key)
"""
# Statements that migrate a version to the next. Version 1 stored bills as reported by servers:
# values that are not a price are replaced by the price that was reserved.
_MIGRATIONS = {
    1: """
ALTER TABLE submits ADD COLUMN faults INTEGER NOT NULL DEFAULT 0;
ALTER TABLE submits ADD COLUMN fault TEXT;
UPDATE submits SET cost_usd = price_usd
    WHERE state = 'done' AND NOT (cost_usd > 0 AND cost_usd < 1e300)
""",
}


def connect(name: str, *, uri: bool = False) -> sqlite3.Connection:
    """Open a connection with a busy timeout of one minute, in autocommit mode."""
    database = sqlite3.connect(name, timeout=60.0, isolation_level=None, uri=uri)
    database.row_factory = sqlite3.Row
    return database


def create(path: Path) -> sqlite3.Connection:
    """Open a connection to a file, created with the umask's permissions if absent."""
    # Files created by SQLite are writable by their owner only; its journals copy the permissions of
    # the file. Only a new file is opened here: closing one that is open elsewhere in the process
    # would drop its locks.
    with suppress(OSError):
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666))
    return connect(str(path))


def copy(path: Path, into: sqlite3.Connection) -> None:
    """Copy a database. Raises sqlite3.OperationalError if another process keeps it locked."""

    def locked(status: int, *_: int) -> None:
        # SQLITE_BUSY, SQLITE_LOCKED: `backup` would otherwise retry forever.
        if status in (5, 6):
            raise sqlite3.OperationalError("another process holds it locked")

    source = connect(f"{path.absolute().as_uri()}?mode=rw", uri=True)
    try:
        source.backup(into, progress=locked)
    finally:
        source.close()


def prepare(database: sqlite3.Connection) -> None:
    """Create the tables, or migrate those of an older version. Call within a transaction."""
    version = database.execute("PRAGMA user_version").fetchone()[0]
    tables = {found[0] for found in database.execute("SELECT name FROM sqlite_master")}
    if version > VERSION:
        raise SchemaError(
            f"its schema is version {version}, this version of afd supports up to {VERSION}"
        )
    if version == 0 and not tables:
        _run(database, _TABLES)
    elif not {"submits", "about", "one_purchase"} <= tables:
        raise SchemaError("it is the database of another program")
    else:
        for step in range(version or 1, VERSION):
            _run(database, _MIGRATIONS[step])
    if version != VERSION:
        database.execute(f"PRAGMA user_version = {VERSION}")
    wrong = database.execute(
        "SELECT count(*) FROM submits WHERE NOT (typeof(cost_usd) = 'real' AND cost_usd >= 0"
        " AND cost_usd < 1e300 AND typeof(price_usd) = 'real' AND price_usd >= 0)"
    ).fetchone()[0]
    if wrong:
        raise SchemaError(f"{wrong} of its rows have no price")


def _run(database: sqlite3.Connection, statements: str) -> None:
    for statement in statements.split(";"):
        database.execute(statement)
