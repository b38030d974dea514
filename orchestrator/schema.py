"""The tables of state.db as numbered migrations: each is applied once, in its own transaction, and never edited."""

from __future__ import annotations

import sqlite3

from tunesmith.orchestrator.errors import StorageError

_FIRST = """
CREATE TABLE jobs (
    number      INTEGER PRIMARY KEY AUTOINCREMENT,  -- order of submission
    id          TEXT NOT NULL UNIQUE,
    name        TEXT,
    state       TEXT NOT NULL,
    backend     TEXT,
    method      TEXT,
    model       TEXT,
    priority    INTEGER NOT NULL DEFAULT 0,
    request     TEXT NOT NULL,
    yes         TEXT,                               -- caps given with --yes, until a first plan is approved by it
    created_at  TEXT NOT NULL,
    updated_at  TEXT NOT NULL,
    ended_at    TEXT,
    plan        INTEGER,                            -- version of the newest plan
    plan_stale  INTEGER NOT NULL DEFAULT 0,
    wanted      TEXT,                               -- cancel or retry, asked for and not yet carried out
    error       TEXT,
    repairs     INTEGER NOT NULL DEFAULT 0,         -- used up
    wake        INTEGER NOT NULL DEFAULT 0,         -- counts marks: something happened that the graph must see
    seen        INTEGER NOT NULL DEFAULT 0,         -- the newest mark that a driver has worked off
    fence       INTEGER NOT NULL DEFAULT 0,         -- lease epoch; a write under an older one is refused
    holder      TEXT,                               -- the driver process that holds the lease
    leased_wake INTEGER NOT NULL DEFAULT 0,
    tries       INTEGER NOT NULL DEFAULT 0          -- leases in a row that ended with the driver's death
) STRICT;
CREATE INDEX jobs_state ON jobs (state, number);
CREATE INDEX jobs_name ON jobs (name) WHERE name IS NOT NULL;
CREATE INDEX jobs_awake ON jobs (number) WHERE wake > seen;

CREATE TABLE events (
    job     TEXT NOT NULL REFERENCES jobs (id),
    seq     INTEGER NOT NULL,
    time    TEXT NOT NULL,
    kind    TEXT NOT NULL,
    doc     TEXT NOT NULL,
    attempt INTEGER NOT NULL,                       -- the newest event line that had arrived before: (attempt, line)
    line    INTEGER NOT NULL,
    PRIMARY KEY (job, seq)
) STRICT, WITHOUT ROWID;
CREATE TRIGGER events_are_facts BEFORE UPDATE ON events BEGIN SELECT RAISE(ABORT, 'events are append-only'); END;

CREATE TABLE plans (
    job      TEXT NOT NULL REFERENCES jobs (id),
    version  INTEGER NOT NULL,
    hash     TEXT NOT NULL,
    doc      TEXT NOT NULL,
    saved_at TEXT NOT NULL,
    PRIMARY KEY (job, version)
) STRICT, WITHOUT ROWID;

CREATE TABLE approvals (
    job     TEXT NOT NULL REFERENCES jobs (id),
    number  INTEGER NOT NULL,
    hash    TEXT NOT NULL,
    by      TEXT NOT NULL,
    usd     REAL,
    hours   REAL,
    time    TEXT NOT NULL,
    void    INTEGER NOT NULL DEFAULT 0,
    PRIMARY KEY (job, number)
) STRICT, WITHOUT ROWID;

CREATE TABLE answers (
    job   TEXT NOT NULL REFERENCES jobs (id),
    field TEXT NOT NULL,
    value TEXT NOT NULL,
    time  TEXT NOT NULL,
    PRIMARY KEY (job, field)
) STRICT, WITHOUT ROWID;

CREATE TABLE attempts (
    job          TEXT NOT NULL REFERENCES jobs (id),
    number       INTEGER NOT NULL,
    key          TEXT NOT NULL UNIQUE,
    backend      TEXT NOT NULL,
    state        TEXT NOT NULL,
    doc          TEXT NOT NULL,
    intent       INTEGER NOT NULL DEFAULT 0,        -- 1 from just before the executor is first asked to start it
    handle       TEXT,
    ending       TEXT,                              -- cancel or deadline: why the daemon is ending it
    exit_code    INTEGER,
    error        TEXT,
    submitted_at TEXT NOT NULL,
    started_at   TEXT,
    ended_at     TEXT,
    checkpoint   TEXT,
    cause        TEXT,
    evidence     TEXT,
    PRIMARY KEY (job, number)
) STRICT, WITHOUT ROWID;
CREATE INDEX attempts_live ON attempts (backend, job, number)
    WHERE state IN ('submitted', 'starting', 'running', 'finishing', 'unknown');

CREATE TABLE remedies (
    job     TEXT NOT NULL REFERENCES jobs (id),
    attempt INTEGER NOT NULL,
    id      TEXT NOT NULL,
    doc     TEXT NOT NULL,
    PRIMARY KEY (job, attempt, id)
) STRICT, WITHOUT ROWID;

CREATE TABLE artifacts (
    job     TEXT NOT NULL REFERENCES jobs (id),
    path    TEXT NOT NULL,
    attempt INTEGER NOT NULL,
    kind    TEXT NOT NULL,
    bytes   INTEGER NOT NULL,
    sha256  TEXT NOT NULL,
    PRIMARY KEY (job, path)
) STRICT, WITHOUT ROWID;

CREATE TABLE deliveries (
    job   TEXT NOT NULL REFERENCES jobs (id),
    kind  TEXT NOT NULL,
    state TEXT NOT NULL,
    error TEXT,
    PRIMARY KEY (job, kind)
) STRICT, WITHOUT ROWID;

CREATE TABLE keys (
    key    TEXT PRIMARY KEY,
    body   TEXT NOT NULL,                           -- digest of route and body: a key stands for one request only
    answer TEXT NOT NULL,
    time   TEXT NOT NULL
) STRICT, WITHOUT ROWID;
CREATE INDEX keys_time ON keys (time);
"""

MIGRATIONS: tuple[str, ...] = (_FIRST,)


def migrate(db: sqlite3.Connection) -> None:
    """Bring a database to the newest version, one transaction for each step. Raises StorageError where it is newer."""
    version = int(db.execute("PRAGMA user_version").fetchone()[0])
    if version > len(MIGRATIONS):
        raise StorageError(
            "This home was written by a newer Tunesmith.",
            code="storage.newer",
            why=f"state.db has version {version}; this Tunesmith knows {len(MIGRATIONS)}.",
            fix="Update Tunesmith, or set TUNESMITH_HOME to another folder.",
        )
    for number, script in enumerate(MIGRATIONS[version:], version + 1):
        db.execute("BEGIN IMMEDIATE")
        try:
            for statement in _statements(script):
                db.execute(statement)
            db.execute(f"PRAGMA user_version = {number}")
            db.execute("COMMIT")
        except BaseException:
            if db.in_transaction:
                db.execute("ROLLBACK")
            raise


def _statements(script: str) -> list[str]:
    found: list[str] = []
    part = ""
    for line in script.splitlines():
        part += line + "\n"
        if sqlite3.complete_statement(part):
            found.append(part)
            part = ""
    return found
