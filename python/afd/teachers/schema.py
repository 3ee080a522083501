"""The tables of a ledger, their version, and how older ones become it."""

from __future__ import annotations

import sqlite3

# Version 1 carried no number: what has its tables and the number 0.
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
# Statements that lead from a version to the next. Version 1 took bills as a server named them: what
# is no price becomes the price that was reserved.
_MIGRATIONS = {
    1: """
ALTER TABLE submits ADD COLUMN faults INTEGER NOT NULL DEFAULT 0;
ALTER TABLE submits ADD COLUMN fault TEXT;
UPDATE submits SET cost_usd = price_usd
    WHERE state = 'done' AND NOT (cost_usd > 0 AND cost_usd < 1e300)
""",
}


class SchemaError(ValueError):
    """The database is no ledger that this version can use; the message says why."""


def prepare(database: sqlite3.Connection) -> None:
    """Make the tables, or bring those of an older version to this one; within a transaction."""
    version = database.execute("PRAGMA user_version").fetchone()[0]
    tables = {found[0] for found in database.execute("SELECT name FROM sqlite_master")}
    if version > VERSION:
        raise SchemaError(f"its schema is version {version}, this afd knows up to {VERSION}")
    if version == 0 and not tables:
        _run(database, _TABLES)
    elif not {"submits", "about", "one_purchase"} <= tables:
        raise SchemaError("it is another program's database")
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
        raise SchemaError(f"{wrong} of its rows hold no price")


def _run(database: sqlite3.Connection, statements: str) -> None:
    for statement in statements.split(";"):
        database.execute(statement)
